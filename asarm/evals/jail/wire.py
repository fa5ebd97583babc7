"""Lines of JSON between the referee and the candidate: plain values go through, and nothing that could act.

A value is rebuilt from its contents alone, as the builtin type that it is or derives from, so that no method of the
other side's making (an ``__eq__`` that is always true, say) comes along. JSON alone would confuse tuples with lists.
"""

import itertools
import json
import sys

MAX_LINE = 64 << 20  # bytes
MAX_ITEMS = 1_000_000  # of an iterator
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes, "range": range}

sys.set_int_max_str_digits(0)  # long integers are values too; the CPU limit holds for reading them


class Opaque:
    """Stands for a result that is no plain data: equal to nothing but itself."""


def encode(value: object) -> object:
    """A value as JSON can hold it: {kind: contents} where the kind must be kept."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(value, "__next__"):
        return {"iterator": [encode(item) for item in itertools.islice(value, MAX_ITEMS)]}
    return {"opaque": type(value).__name__}


def decode(value: object) -> object:
    """The plain value; raises ``ValueError`` or ``TypeError`` for what :func:`encode` does not write."""
    if not isinstance(value, dict):
        return value
    ((kind, contents),) = value.items()
    if kind == "opaque":
        return Opaque()
    if kind == "complex":
        return complex(*contents)
    if kind == "range":
        return range(*contents)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in contents}
    items = [decode(item) for item in contents]
    return iter(items) if kind == "iterator" else SEQUENCES[kind](items)


def send(file, *message: object) -> None:
    """Write the message as one line."""
    file.write(json.dumps([encode(part) for part in message]).encode() + b"\n")
    file.flush()


def receive(file) -> list:
    """The next message; raises ``EOFError`` when the other side is gone and ``ValueError`` for what is no message."""
    line = file.readline(MAX_LINE)
    if not line:
        raise EOFError
    if not line.endswith(b"\n"):
        raise ValueError(f"a line of more than {MAX_LINE} bytes")
    return [decode(part) for part in json.loads(line)]
