"""The sandbox against programs that try to pass without being right, to get out, or to stay; every attack is run."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import mostly_slow

from asarm.errors import SandboxError
from asarm.evals.code_config import SANDBOXES
from asarm.evals.sandbox import COVERS, Limits, Sandbox

ROOT = Path(__file__).parents[2]
LIMITS = Limits(cpu=1, wall=4)
RIGHT = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return x\n"
CHECK = "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate('a') == 'aa'\n"

# Each stands before WRONG unless it defines double itself; no right answer is ever given, so none may pass.
ATTACKS = {
    "exit status 0 at once": "import os; os._exit(0)",
    "SystemExit at once": "raise SystemExit(0)",
    "exit status 0 when called": "import os\ndef double(x): os._exit(0)",
    "SystemExit when called": "def double(x): raise SystemExit(0)",
    "another check": "def check(candidate): pass",
    "another check everywhere": "import sys\nfor m in list(sys.modules.values()): setattr(m, 'check', lambda f: None)",
    "another AssertionError": "import builtins\nbuiltins.AssertionError = type('Quiet', (SystemExit,), dict(code=0))",
    "an exception hook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)",
    "always equal": """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def double(x): return Same(1)""",
    "always equal text": "class Same(str):\n    __eq__ = lambda *_: True\ndef double(x): return Same()",
    "always equal object": "class Same:\n    __eq__ = lambda *_: True\ndef double(x): return Same()",
    "printing the sentinel's pattern": """
import json
for name in "sentinel", "verdict", "outcome":
    print(name, "passed", "0" * 32)
print(json.dumps(dict(outcome="passed", detail="", sentinel="0" * 32)))""",
    "a verdict on every file": """
import os, json
for fd in range(256):
    for answer in dict(outcome="passed", detail="", sentinel="0" * 32), ["result", 6, [3]], ["done"]:
        try: os.write(fd, json.dumps(answer).encode() + b"\\n")
        except OSError: pass""",
    "a sentinel from frames, objects, arguments and environment": """
import gc, sys, os, re, json
texts = [repr(o)[:100000] for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
frame = sys._getframe()
while frame:
    texts.append(repr(frame.f_locals))
    frame = frame.f_back
texts += [repr(sys.argv), repr(dict(os.environ))]
if "".join(["assert can", "didate(3)"]) in " ".join(texts): raise KeyboardInterrupt("the tests are here")
for sentinel in set(re.findall("[0-9a-f]{32}", " ".join(texts))):
    for fd in range(256):
        try: os.write(fd, json.dumps(dict(outcome="passed", detail="", sentinel=sentinel)).encode() + b"\\n")
        except OSError: pass""",
    "memory and files of the other processes": """
import ctypes, os
for pid in {os.getppid(), 1, 2, 3} - {os.getpid()}:
    for name in "mem", "environ", "fd/0", "fd/1", "fd/3", "fd/4", "fd/5":
        try: os.open(f"/proc/{pid}/{name}", os.O_RDWR)
        except OSError: continue
        raise KeyboardInterrupt(f"reached {name} of {pid}")
if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: raise KeyboardInterrupt("reached the referee")""",
    "a background thread": "import threading\nthreading.Thread(target=lambda: print('passed')).start()",
    "a background process": "import os\nif os.fork(): os._exit(0)\nos.setsid()",
    "endless": "while True: pass",
    "endless, ignoring signals": "import signal\nfor s in 1, 2, 15: signal.signal(s, signal.SIG_IGN)\nwhile True: 0",
    "asleep in a session of its own": "import os, time\nos.setsid()\ntime.sleep(1000)",
    "outliving its parents": """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
try: os.kill(os.getppid(), 9)
except OSError: pass
time.sleep(1000)""",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "10 GB": "x = bytearray(10 << 30)",
    "1 GB of output": "for _ in range(1024): print('x' * (1 << 20))",
    "an answer of 100 MB": "def double(x): return 'x' * (100 << 20)",
    "an answer without end": "import itertools\ndef double(x): return itertools.count()",
    "an answer that is too deep": """
def double(x):
    a = []
    for _ in range(100000): a = [a]
    return a""",
    "killing the group": "import os, signal; os.killpg(0, signal.SIGKILL)",
    "a crash": "import ctypes; ctypes.string_at(0)",
    "many files": "for i in range(2000): open(f'file{i}', 'wb').write(bytes(1 << 16))",
    "no Python": "\0",
    "a message that is no text": "raise ValueError('\\ud800')",
}
FOOL_EXIT_STATUS = {name for name in ATTACKS if "exit status 0" in name or "SystemExit" in name or "always" in name}


@pytest.fixture(scope="module", params=mostly_slow(SANDBOXES[1:], quick=["bwrap", "namespaces"]))
def sandbox(request, tmp_path_factory):
    """One way of isolating, with a temporary folder of its own: what is left there can be seen."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp(request.param))
    reason = ""
    try:
        for python in (None, "/usr/bin/python3"):  # root becomes nobody, who may not be able to read this interpreter
            try:
                yield Sandbox(request.param, LIMITS, python)
                return
            except (SandboxError, OSError) as error:
                reason = str(error)
        pytest.skip(reason)
    finally:
        tempfile.tempdir = before


@pytest.fixture(scope="module")
def any_sandbox():
    try:
        return Sandbox("auto", LIMITS)
    except SandboxError as error:
        pytest.skip(str(error))


def left_behind(folder: str) -> list[str]:
    """Files in the folder, and processes whose command line names it."""
    found = os.listdir(folder)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", pid, "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if folder.encode() in command and "warden.py" in str(command):
            found.append(f"process {pid}")
    return found


def attack_program(name: str) -> str:
    return ATTACKS[name] + "\n" + WRONG * ("def double" not in ATTACKS[name])


def test_no_attack_passes_and_none_leaves_anything(sandbox):
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: sandbox.run(attack_program(name), CHECK, "double"), ATTACKS)
        verdicts = dict(zip(ATTACKS, found, strict=True))
    assert left_behind(tempfile.tempdir) == []
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    assert {name for name, verdict in verdicts.items() if verdict.outcome == "timed out"} >= {"endless"}
    assert all(verdict.detail.encode() or not verdict.detail for verdict in verdicts.values())
    assert not any("reached" in v.detail or "the tests are here" in v.detail for v in verdicts.values()), verdicts


@pytest.mark.parametrize("name", sorted(FOOL_EXIT_STATUS))
def test_the_attacks_are_real(name):
    """Negative control: an evaluator that runs program and tests as one and goes by the exit status is fooled."""
    whole = attack_program(name) + CHECK + "check(double)\n"
    assert subprocess.run([sys.executable, "-c", whole], check=False).returncode == 0


def test_nothing_is_written_outside(sandbox, tmp_path):
    """Root runs programs as nobody; only in the mode ``process`` can an ordinary user's program write his files."""
    if sandbox.mode == "process" and os.getuid() != 0:
        pytest.skip("documented: this mode does not keep a user's program from his files")
    targets = [
        tmp_path / "new",
        *(Path(d, "asarm-escaped") for d in ("/usr", "/usr/lib", sandbox.prefix, "/home", "/")),
    ]
    if sandbox.mode != "process":
        targets += [Path(d, "asarm-escaped") for d in ("/tmp", "/dev/shm", "/var/tmp", "..", "../..")]
    program = "".join(f"try: open({str(t)!r}, 'w').write('x')\nexcept OSError: pass\n" for t in targets)
    verdict = sandbox.run(program + RIGHT, CHECK, "double")
    escaped = [target for target in targets if target.is_absolute() and target.exists()]
    for target in escaped:
        target.unlink()
    assert verdict.passed and escaped == []


def test_files_are_hidden(sandbox):
    """No benchmark file to look the solutions up in, no home, no other process."""
    if sandbox.mode == "process":
        pytest.skip("documented: this mode hides nothing")
    program = f"import os\ndef seen(): return [p for p in {[str(ROOT), '/etc', '/home']!r} if os.path.exists(p)]"
    assert sandbox.run(program, "def check(seen): assert seen() == []", "seen").passed
    program = "import os\ndef seen(): return os.listdir('.') + list(os.environ)"
    assert sandbox.run(
        program, "def check(seen): assert set(seen()) <= {'LC_CTYPE', 'PWD', 'PYTHONHASHSEED'}", "seen"
    ).passed


def test_the_network_is_out_of_reach(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket\ntry: socket.create_connection({server.getsockname()!r}, 1)\nexcept OSError: pass\n"
        assert sandbox.run(program + RIGHT, CHECK, "double").passed
        try:
            server.accept()[0].close()
            reached = True
        except TimeoutError:
            reached = False
    assert reached == (COVERS[sandbox.mode]["network"] != "none"), "what is recorded is what holds"


def test_killing_everything_in_sight_ends_only_the_program(sandbox):
    if sandbox.mode == "process" and os.getuid() != 0:
        pytest.skip("documented: this mode does not keep a user's program from his processes")
    program = (
        "import os\nfor pid in (os.getppid(), -1, 1):\n    try: os.kill(pid, 9)\n    except OSError: pass\n" + WRONG
    )
    assert not sandbox.run(program, CHECK, "double").passed
    assert left_behind(tempfile.tempdir) == []


def test_limits_are_those_asked_for(sandbox):
    program = "import resource\ndef limits(n): return [resource.getrlimit(i)[1] for i in n]"
    numbers = "resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU"
    expected = [0, LIMITS.memory, LIMITS.file_size, LIMITS.cpu + 1]
    test = f"import resource\ndef check(limits):\n    assert limits([{numbers}]) == {expected}\n"
    assert sandbox.run(program, test, "limits").passed


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): x.append(1)", "x = []\n f(x)\n assert x == [1]"),
        ("def f(x): x['a'] = {1}", "x = {}\n f(x)\n assert x == {'a': {1}}"),
        ("def f(x): return (1, [2.5, None], {'a': (True,)})", "assert f(0) == (1, [2.5, None], {'a': (True,)})"),
        ("def f(x): return map(str, x)", "y = f([1, 2])\n assert y != ['1', '2'] and tuple(y) == ('1', '2')"),
        ("def f(x): return x / 0", "try: f(1)\n except ZeroDivisionError: pass\n else: assert False"),
        ("def f(x): return int(x)", "try: f('a')\n except ValueError: pass\n else: assert False"),
        ("import collections\ndef f(x): return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(x): return 10 ** x", "assert f(10000) == 10 ** 10000"),
        (
            "def f(x): return {x, -x}, b'x', 1j, float('nan')",
            "a = f(1)\n assert a[:3] == ({1, -1}, b'x', 1j) and a[3] != a[3]",
        ),
        ("import math\nK = 3\ndef g(x): return x + 1\ndef f(x): return g(x)", "assert f(K) == g(math.floor(3.5))"),
        ("import os\nopen('here', 'w').write('x')\ndef f(): return os.listdir()", "assert f() == ['here']"),
        ("def f(x, *, y): return x - y", "assert f(3, y=1) == 2"),
    ],
)
def test_right_programs_pass_and_the_same_tests_fail_without_them(any_sandbox, program, test):
    check = f"def check(f):\n {test}\n"
    verdict = any_sandbox.run(program, check, "f")
    assert verdict.passed, verdict
    assert not any_sandbox.run(program, check + "\n assert False", "f").passed
    assert not any_sandbox.run("def f(*_, **__): return 17", check, "f").passed


@pytest.mark.parametrize("killed", ["evaluator", "warden"])
@pytest.mark.usefixtures("any_sandbox")
def test_a_kill_leaves_nothing(tmp_path, killed):
    """The evaluator's end takes everything with it; so does the warden's where it has been asked to end."""
    program = f"""
import tempfile, sys
tempfile.tempdir = {str(tmp_path)!r}
from asarm.evals.sandbox import Limits, Sandbox
sandbox = Sandbox("auto", Limits(wall=100))
print("ready", flush=True)
sandbox.run("import time; time.sleep(100)", "", "f")"""
    evaluator = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert evaluator.stdout.readline()
    wait_until(lambda: len(left_behind(str(tmp_path))) >= 3)  # the folder, the warden, the referee
    if killed == "evaluator":
        evaluator.kill()
    else:
        children = Path(f"/proc/{evaluator.pid}/task/{evaluator.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
    evaluator.wait()
    wait_until(lambda: left_behind(str(tmp_path)) == [])


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def test_a_test_without_a_check_is_not_given_the_programs(any_sandbox):
    program = "def check(f): pass\n" + RIGHT
    assert not any_sandbox.run(program, "check\n", "double").passed


def test_a_mode_that_does_not_work_is_an_error(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SandboxError, match="bwrap: not installed"):
        Sandbox("bwrap")
