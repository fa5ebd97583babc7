"""scripts/test.sh and the options that it hands to pytest: which tests are run, where, and what the status says."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

ROOT = Path(__file__).parents[2]
# What stands in for Python: it says that the processor is CPU, and writes down every run of pytest with its arguments
# and the instruction sets that it may use; then it ends with the run's status.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$CPU"; exit; fi
if [ "$2" != pytest ]; then exit; fi
echo "$* | ${ATEN_CPU_CAPABILITY:-} ${ONEDNN_MAX_CPU_ISA:-} ${MKL_ENABLE_INSTRUCTIONS:-}" >> "$CALLS"
case "$*" in *--numerical*) exit "$NUMERICAL" ;; *) exit "$EVERYTHING" ;; esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs the command among stand-ins; its status and the runs of pytest."""
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "ruff": "#!/bin/sh\n", "mypy": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*words: str, cpu="AVX512", numerical=0, everything=0) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        inherited = {k: v for k, v in os.environ.items() if not k.endswith(("_ISA", "_CAPABILITY", "_INSTRUCTIONS"))}
        env = inherited | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
        env |= {"ASARM_NO_INSTALL": "1", "CALLS": str(calls), "CPU": cpu, "ASARM_TEST_WORKERS": "3"}
        env |= {"NUMERICAL": str(numerical), "EVERYTHING": str(everything)}
        command = ["bash", str(ROOT / "scripts" / "test.sh"), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return done.returncode, [call.strip() for call in calls.read_text().splitlines()]

    return run


PYTEST = "-m pytest -n 3 --dist worksteal"


@pytest.mark.parametrize("status", [0, 1, 5])
def test_the_quick_suite_is_one_run(script, status):
    assert script("tests/law", "-x", everything=status) == (status, [f"{PYTEST} tests/law -x |"])


@pytest.mark.parametrize(
    ("cpu", "fewer"),
    [
        ("AVX512", "avx2 AVX2 AVX2"),
        ("AVX512_VNNI", "avx2 AVX2 AVX2"),
        ("AVX2", "default SSE41 SSE4_2"),
        ("DEFAULT", None),
    ],
)
def test_everything_is_preceded_by_the_numerical_tests_with_fewer_instructions(script, cpu, fewer):
    before = [f"{PYTEST} --all -x --numerical | {fewer}"] if fewer else []
    assert script("--all", "-x", cpu=cpu) == (0, [*before, f"{PYTEST} --all -x |"])


@pytest.mark.parametrize(
    ("numerical", "everything", "status", "n_runs"),
    [
        (1, 0, 1, 1),
        (0, 1, 1, 2),
        (5, 0, 0, 2),  # no numerical test among those asked for
        (5, 5, 5, 2),  # no test at all
        (2, 0, 2, 1),
    ],
)
def test_the_status_is_that_of_both_runs(script, numerical, everything, status, n_runs):
    found, runs = script("--all", numerical=numerical, everything=everything)
    assert (found, len(runs)) == (status, n_runs)


class Item:
    def __init__(self, file: str, slow: bool):
        self.path, self.slow = ROOT / "tests" / file, slow

    def get_closest_marker(self, name):
        return (name == "slow" and self.slow) or None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (set(), ["law/a.py", "train/b.py"]),
        ({"--all"}, ["law/slow.py", "train/slow.py", "law/a.py", "train/b.py"]),
        ({"--numerical"}, ["law/a.py"]),
        ({"--all", "--numerical"}, ["law/a.py"]),
    ],
)
def test_slow_tests_are_left_out_unless_asked_for_and_come_first(options, kept):
    items = [Item(f, "slow" in f) for f in ("law/a.py", "law/slow.py", "train/b.py", "train/slow.py")]
    left_out = []
    config = SimpleNamespace(
        getoption=lambda name: name in options,
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)),
    )
    everything = len(items)
    conftest.pytest_collection_modifyitems(config, items)
    assert [str(item.path.relative_to(ROOT / "tests")) for item in items] == kept
    assert len(items) + len(left_out) == everything


def test_a_parameter_that_is_not_for_the_quick_suite_is_slow():
    for values, quick in (([1, 2], [2]), ([("a", 1), ("b", 2)], [("b", 2)])):
        slow, plain = conftest.mostly_slow(values, quick)
        assert [mark.name for mark in slow.marks] == ["slow"] and not plain.marks
        assert [slow.values, plain.values] == [v if isinstance(v, tuple) else (v,) for v in values]
