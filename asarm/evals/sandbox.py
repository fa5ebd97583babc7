"""Running untrusted programs against a benchmark's tests, and believing nothing that they say of themselves.

A program that a model wrote is run with the user's machine around it, so: do not, unless asked to
(``--allow_code_execution``). Each run is a process tree of its own (:mod:`asarm.evals.jail`): a *warden* that isolates
and cleans up, a *referee* that runs the tests, and a *candidate* that runs the program.

How a program passes. The tests are not in the program's process. The referee calls the program's functions over a pipe
and compares what comes back, plain values rebuilt from their contents, with what the tests expect; when ``check`` has
returned, it writes the run's random sentinel, which only the referee was given, and given after the program's process
had been forked off. So no exit status, output, thread, replaced ``check`` or ``assert``, ``__eq__`` that is always
true, or search through frames, memory, arguments, environment and files can pass: the answers must be right.

What holds in every mode: no environment variables, no open files but the two pipes, an empty working directory that is
removed, CPU, wall clock, memory and file-size limits, no new processes or threads (a limit of zero), no privileges
(root becomes ``nobody``), and whatever is left at the end is killed, wherever it went. Beyond that:

=============  =====================================================================================================
``namespaces``  a root directory in memory that holds the Python installation and the system's libraries, read-only,
                and a 16 MB working directory; no network interface, no other process in sight, no IPC. Needs Linux 5.12
                and either root or user namespaces.
``bwrap``       the same, made by bubblewrap where that is installed (it may be allowed where user namespaces are not).
``process``     none of that. The program can read, and outside containers overwrite, what the user (or ``nobody``) can,
                use the network, and signal that user's other processes, this one included.
=============  =====================================================================================================

``auto`` takes the first of ``bwrap``, ``namespaces`` and ``process`` in which a correct program passes and a wrong one
does not.

Not covered: bugs of the kernel and of the interpreter's C code; reading what /usr, the libraries' folders and the
Python installation hold (a copy of the benchmark there, say); side channels such as load and timing. The tests are
trusted: they are the benchmark's, and run under the same walls and limits, but can pass whatever they like. A program
that needs processes, threads, a terminal, third-party packages or more than the limits fails although it may be right.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import SandboxError
from .code_config import SANDBOXES

WARDEN = Path(__file__).parent / "jail" / "warden.py"
FLAGS = ("-s", "-S", "-B")  # no site-packages, nothing compiled left behind
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of sets, and with it a verdict, does not change from run to run
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64")
GRACE = 60.0  # seconds that the warden may take beyond the wall clock before it is given up
CANARY = "import collections, hashlib, math, re, typing\ndef double(x):\n    return 2 * x\n"
COVERS = {
    "bwrap": {"network": "none", "files": "own root", "processes": "own namespace"},
    "namespaces": {"network": "none", "files": "own root", "processes": "own namespace"},
    "process": {"network": "not restricted", "files": "as user", "processes": "limits only"},
}


@dataclass(frozen=True)
class Limits:
    """Of the referee and the candidate, each: ``cpu`` in whole seconds, ``memory`` (address space) and ``file_size``
    in bytes. ``wall`` seconds are for both together."""

    cpu: int = 3
    wall: float = 30.0
    memory: int = 1 << 30
    file_size: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """``outcome`` is passed, failed or timed out; ``detail`` says how. The seconds are by the clock, start included."""

    passed: bool
    outcome: str
    detail: str
    execution_seconds: float


class Sandbox:
    """A way of running programs, tried out when it is made.

    Args:
        mode: one of ``SANDBOXES``; see the module.
        limits: of each run.
        python: interpreter of the programs (default: this one, without its site-packages).

    Raises :class:`SandboxError` where the mode does not work. ``mode`` holds what was chosen. Any number of threads may
    call :meth:`run` at once.
    """

    def __init__(self, mode: str = "auto", limits: Limits | None = None, python: str | None = None):
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"programs are executed on Linux only, and this is {sys.platform}; use a container")
        self.limits = limits or Limits()
        self.python = os.path.realpath(python or sys.executable)
        ask = [self.python, *FLAGS, "-c", "import sys; print(sys.base_prefix)"]
        self.prefix = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        problems = []
        for self.mode in SANDBOXES[1:] if mode == "auto" else [mode]:
            problem = self._problem()
            if problem is None:
                return
            problems.append(f"{self.mode}: {problem}")
        raise SandboxError(f"no program can be executed here ({'; '.join(problems)}); see --sandbox")

    def describe(self) -> dict:
        """What a record says of it."""
        return {"mode": self.mode, **COVERS[self.mode], "limits": asdict(self.limits), "python": self.python}

    def run(self, program: str, test: str, entry_point: str) -> Verdict:
        """Execute ``program``, then ``test``, whose ``check`` is called with the program's ``entry_point``."""
        sentinel = secrets.token_hex(16)
        job = {"program": program, "test": test, "entry_point": entry_point, "sentinel": sentinel}
        command = [self.python, *FLAGS, str(WARDEN), json.dumps(self._settings())]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job).encode(),
                capture_output=True,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                timeout=self.limits.wall + GRACE,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"the sandbox ({self.mode}) does not answer: {error}") from error
        seconds = time.perf_counter() - start
        if done.returncode == 1:
            raise SandboxError(f"the sandbox ({self.mode}) failed: {done.stderr.decode(errors='replace')[-500:]}")
        lines = done.stdout.splitlines()
        said = json.loads(lines[0]) if lines else {"outcome": "failed", "detail": "ended without a verdict"}
        if said["outcome"] == "passed" and said.get("sentinel") != sentinel:
            said = {"outcome": "failed", "detail": "a verdict without the sentinel"}
        detail = said["detail"].encode(errors="replace").decode()  # a program's message may hold half a character
        return Verdict(said["outcome"] == "passed", said["outcome"], detail, seconds)

    def _problem(self) -> str | None:
        """Why this mode does not work here, if it does not."""
        if self.mode == "bwrap" and not shutil.which("bwrap"):
            return "not installed"
        try:
            right, wrong = (
                self.run(CANARY, f"def check(double):\n    assert double(3) == {x}\n", "double") for x in (6, 7)
            )
        except SandboxError as error:
            return str(error).strip()
        if right.passed and not wrong.passed:
            return None
        return f"a correct program: {right.outcome} {right.detail}; a wrong one: {wrong.outcome} {wrong.detail}"

    def _settings(self) -> dict:
        settings = asdict(self.limits) | {"mode": self.mode, "tmp": tempfile.gettempdir(), "visible": self._visible()}
        return settings | {"command": self._bwrap()} if self.mode == "bwrap" else settings

    def _visible(self) -> list[str]:
        paths = [path for path in SYSTEM if os.path.exists(path)]
        inside = any(self.prefix == path or self.prefix.startswith(path + "/") for path in paths)
        return paths if inside else [*paths, self.prefix]

    def _bwrap(self) -> list[str]:
        """The command that starts the referee inside bubblewrap."""
        command = [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
        for path in self._visible():
            link = os.path.islink(path)
            command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
        command += ["--ro-bind", str(WARDEN.parent), "/jail", "--dev", "/dev", "--size", str(16 << 20)]
        command += ["--tmpfs", "/work", "--chdir", "/work", self.python, *FLAGS, "/jail/warden.py"]
        return [*command, json.dumps(asdict(self.limits) | {"mode": "inside"})]
