"""The candidate: the process that runs the untrusted program and answers what the referee asks of it.

It is forked before the referee has read its job, and gives up all files but the two pipes: whatever the program looks
for in its own process, neither tests nor sentinel nor the way to a verdict are there.
"""

import contextlib
import os
import resource
import types

from wire import receive, send


def become_candidate(questions: int, answers: int, null: int) -> None:
    """Keep two pipe ends (file descriptors) and an empty standard input and output; serve until the referee is gone.
    Does not return."""
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in range(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        if fd not in (questions, answers):
            with contextlib.suppress(OSError):  # was not open
                os.close(fd)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process, no thread, and so nothing that could outlive it
    try:
        serve(os.fdopen(questions, "rb"), os.fdopen(answers, "wb"))
    finally:  # also when the referee's questions end
        os._exit(0)


def serve(questions, answers) -> None:
    namespace = {"__name__": "candidate"}
    while True:
        verb, *rest = receive(questions)
        try:
            answer = VERBS[verb](namespace, *rest)
        except BaseException as error:  # SystemExit too: ending is not passing
            answer = ["raised", type(error).__name__, str(error)[:200]]
        send(answers, *answer)


def define(namespace: dict, program: str) -> list:
    exec(compile(program, "<program>", "exec"), namespace)
    return ["done"]


def get(namespace: dict, name: str) -> list:
    """What the program has under a name: a module, something to call, a value, or nothing."""
    if name not in namespace:
        return ["absent"]
    value = namespace[name]
    if isinstance(value, types.ModuleType):
        return ["module"]
    return ["function"] if callable(value) else ["value", value]


def call(namespace: dict, name: str, args: list, kwargs: dict) -> list:
    """The result, and the arguments as the call left them."""
    return ["result", namespace[name](*args, **kwargs), args]


VERBS = {"define": define, "get": get, "call": call}
