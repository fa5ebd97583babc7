"""The public names, as another program imports them, and the README's Python example."""

import re
import subprocess
import sys
from pathlib import Path

from asarm import _PUBLIC

ROOT = Path(__file__).parents[2]


def test_no_public_name_is_shadowed_by_a_module():
    """Importing a submodule sets an attribute of the package; none may be called like a public function."""
    script = f"""
import types, asarm.cli, asarm.evals.speculative, asarm.train.model, asarm
from asarm import infill, sample, joint_log_prob
for name in {sorted(_PUBLIC)}:
    assert not isinstance(getattr(asarm, name), types.ModuleType), name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_example_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Tom lost" in done.stdout
