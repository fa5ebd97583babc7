"""The public names, as another program imports them, and the README's Python example."""

import re
from pathlib import Path

from asarm import _PUBLIC

ROOT = Path(__file__).parents[2]


def test_no_public_name_is_shadowed_by_a_module():
    """Importing a submodule sets an attribute of the package; none may be called like a public function."""
    modules = {path.stem for path in (ROOT / "asarm").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {"law", "sampling", "infilling"} <= modules and not modules & set(_PUBLIC)


def test_the_python_example_of_the_readme_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    exec(code, {})
    assert "Tom lost" in capsys.readouterr().out
