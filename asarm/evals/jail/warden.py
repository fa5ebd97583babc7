"""The warden, a script of its own: ``python -s -S -B warden.py SETTINGS``, with a job on standard input.

It makes an empty folder and the isolation, starts the referee, keeps the wall clock, kills all that is below it and
removes the folder. It never reads the job. See :mod:`asarm.evals.sandbox` for what the whole holds and does not hold.
"""

import json
import os
import shutil
import signal
import sys

from isolation import NOBODY, adopt_orphans, drop_privileges, end_with_parent, enter_namespaces, private_root
from referee import referee

sys.path.pop(0)  # this folder: no program is to import from it


def main(settings: dict) -> None:
    if settings["mode"] == "inside":  # bwrap has made the walls
        referee(settings, os.open(os.devnull, os.O_RDWR))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGALRM, _ring)
    folder = os.path.join(settings["tmp"], f"asarm-sandbox-{os.urandom(8).hex()}")
    os.mkdir(folder, 0o700)
    try:
        if settings["mode"] == "namespaces":
            enter_namespaces()
        adopt_orphans()
        end_with_parent(signal.SIGTERM)
        ended = watch(settings, folder)
    finally:
        end_descendants()
        if settings["mode"] == "process":
            shutil.rmtree(folder)
        else:
            os.rmdir(folder)  # it was only mounted upon, elsewhere
    sys.exit(ended)


def watch(settings: dict, folder: str) -> int:
    """Start the referee, and wait until it ends or the time is up. Returns 1 if it could not begin, else 0."""
    signal.setitimer(signal.ITIMER_REAL, settings["wall"])
    try:
        if (pid := os.fork()) == 0:
            go_inside(settings, folder)
        _, status = os.waitpid(pid, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        os.write(1, json.dumps({"outcome": "timed out", "detail": "wall clock"}).encode() + b"\n")
        return 0
    return int(os.waitstatus_to_exitcode(status) == 1)  # what a killed referee ends with is the program's doing


def _ring(*_) -> None:
    raise TimeoutError


def go_inside(settings: dict, folder: str) -> None:
    """The warden's child: put up the walls and become the referee. Does not return."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        if settings["mode"] == "namespaces":
            private_root(folder, settings["visible"])
        else:
            if os.getuid() == 0:
                os.chown(folder, NOBODY, NOBODY)
            os.chdir(folder)
        drop_privileges()
        if settings["mode"] == "bwrap":
            os.execv(settings["command"][0], settings["command"])
        referee(settings, null)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def end_descendants() -> None:
    """Kill and reap all that is below this process: what has left its group or lost its parent as well, because
    orphans come here, and because a process namespace ends with its first process."""
    while True:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended meanwhile
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
