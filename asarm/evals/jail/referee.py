"""The referee: runs the benchmark's tests; whatever they call of the program is asked of the candidate over a pipe."""

import ast
import builtins
import importlib
import json
import os
import random
import signal
import sys

from candidate import become_candidate
from isolation import limit_resources, undumpable
from wire import receive, send


def referee(settings: dict, null: int) -> None:
    """Fork the candidate, only then read the job from standard input, run its tests and write the verdict."""
    undumpable()
    limit_resources(settings)
    question_read, question_write = os.pipe()
    answer_read, answer_write = os.pipe()
    if (pid := os.fork()) == 0:
        become_candidate(question_read, answer_write, null)
    os.close(question_read)
    os.close(answer_write)
    verdict = os.dup(1)
    os.dup2(null, 1)  # a test may print
    job = json.loads(sys.stdin.buffer.read())
    outcome = judge(Program(pid, os.fdopen(question_write, "wb"), os.fdopen(answer_read, "rb")), job)
    os.write(verdict, json.dumps(outcome).encode() + b"\n")


def judge(program: "Program", job: dict) -> dict:
    """The verdict; the sentinel is in it only if ``check`` has returned."""
    try:
        program.ask("define", job["program"])
        namespace = borrowed_names(program, job["test"])
        random.seed(0)  # the tests' draws, so that a verdict does not change from run to run
        exec(compile(job["test"], "<test>", "exec"), namespace)
        namespace["check"](program.function(job["entry_point"]))
    except OutOfTime as error:
        return {"outcome": "timed out", "detail": str(error)}
    except BaseException as error:
        return {"outcome": "failed", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": "passed", "detail": "", "sentinel": job["sentinel"]}


def borrowed_names(program: "Program", test: str) -> dict:
    """The names that the tests may have from the program: modules of the standard library, functions, values. They
    cannot shadow a builtin or be ``check``; what the tests define themselves comes later and wins."""
    used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    namespace = {"__name__": "test"}
    for name in sorted(used - {"check", *dir(builtins)}):
        kind, *value = program.ask("get", name)
        if kind == "module" and name in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(name)
        elif kind == "function":
            namespace[name] = program.function(name)
        elif kind == "value":
            (namespace[name],) = value
    return namespace


class ProgramEnded(BaseException):
    """The candidate is gone or gave no answer; not an ``Exception``, which a test might expect."""


class OutOfTime(ProgramEnded):
    """The candidate used up its CPU time."""


class Program:
    """The candidate as the referee sees it: its process id, and files to write questions to and read answers from."""

    def __init__(self, pid: int, questions, answers):
        self.pid, self.questions, self.answers = pid, questions, answers

    def ask(self, *question: object) -> list:
        """The answer, [kind, ...]; raises what the program raised."""
        try:
            send(self.questions, *question)
            kind, *rest = receive(self.answers)
        except (BrokenPipeError, EOFError):
            raise self._ending() from None
        except (ValueError, TypeError, KeyError) as error:
            raise ProgramEnded(f"what the program answered is no answer: {error}") from None
        if kind == "raised":
            raise like(*rest)
        return [kind, *rest]

    def _ending(self) -> ProgramEnded:
        os.kill(self.pid, signal.SIGKILL)  # closing the pipe alone would keep it alive
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if -code == signal.SIGXCPU:
            return OutOfTime("CPU time")
        return ProgramEnded(f"signal {-code}" if code < 0 else f"exit status {code}")

    def function(self, name: str):
        """A function of the program. Lists, dictionaries and sets among its arguments change as they did there."""

        def call(*args, **kwargs):
            answer = self.ask("call", name, list(args), kwargs)
            try:
                _, result, changed = answer
                for mine, theirs in zip(args, changed, strict=True):
                    update(mine, theirs)
            except (ValueError, TypeError) as error:
                raise ProgramEnded(f"what {name} answered is no answer: {error}") from None
            return result

        return call


def update(mine: object, theirs: object) -> None:
    """Give a mutable argument the contents that the call left it with."""
    if type(mine) is type(theirs) and isinstance(mine, list | dict | set):
        mine.clear()
        (mine.extend if isinstance(mine, list) else mine.update)(theirs)


def like(name: str, message: str) -> BaseException:
    """The builtin exception of that name, which a test may expect; for any other, one that no test expects."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(message)
    return ProgramEnded(f"{name}: {message}")
