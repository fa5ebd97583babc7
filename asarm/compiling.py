"""What torch.compile is to know of some functions, told when something is compiled.

PyTorch's own decorators import its compiler when a module is imported: more than a second, whether anything is compiled
or not.
"""

from collections.abc import Callable
from functools import update_wrapper

import torch

_MARKS: list[Callable[[], None]] = []  # not set yet


def constant(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` as a decorator."""
    _MARKS.append(lambda: torch.compiler.assume_constant_result(function))
    return function


class uncompiled:
    """``torch.compiler.disable`` as a decorator."""

    def __init__(self, function: Callable):
        self.call = function
        update_wrapper(self, function)
        _MARKS.append(self._disable)

    def __call__(self, *arguments):
        return self.call(*arguments)

    def _disable(self) -> None:
        self.call = torch.compiler.disable(self.call)


def set_marks() -> None:
    """Tell torch.compile, before it is used, of every function that is decorated so far."""
    while _MARKS:
        _MARKS.pop()()
