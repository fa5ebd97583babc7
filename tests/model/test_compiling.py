"""What torch.compile is told of some functions, and when."""

import subprocess
import sys

import pytest
import torch

from asarm.compiling import constant, set_marks, uncompiled


@pytest.fixture
def compiled_with():
    """A function through torch.compile, marks set."""
    torch._dynamo.reset()

    def compiled(function):
        set_marks()
        return torch.compile(function, backend="eager")

    yield compiled
    torch._dynamo.reset()


def test_an_uncompiled_function_runs_as_it_is(compiled_with):
    @uncompiled
    def inside(x):
        """What it does."""
        return x + (10 if torch.compiler.is_compiling() else 1)

    def outside(x):
        return 2 * inside(x)

    assert inside.__doc__ == "What it does."
    assert outside(torch.zeros(())) == 2
    assert compiled_with(outside)(torch.zeros(())) == 2


def test_a_constant_is_computed_once_for_a_graph(compiled_with):
    calls = []

    @constant
    def number():
        calls.append(1)
        return len(calls)

    compiled = compiled_with(lambda x: x * number())
    assert [compiled(torch.ones(())).item() for _ in range(3)] == [1, 1, 1]


def test_decorating_imports_no_compiler():
    script = "import sys, asarm.dropout, asarm.attention, asarm.law, asarm.rng; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
