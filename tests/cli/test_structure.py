"""The house: a module imports only from modules before it in docs/modules.md; files stay short."""

import ast
import re
from pathlib import Path

import pytest

import asarm

PACKAGE = Path(asarm.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def captions() -> dict[str, str]:
    """Dotted module name -> caption, in the order of the tree in docs/modules.md."""
    tree = re.search(r"^asarm/\n((?:  .*\n)+)", (PACKAGE.parent / "docs" / "modules.md").read_text(), re.M)[1]
    found, folders = {}, []
    for line in tree.splitlines():
        indent, name, caption = re.fullmatch(r"((?:  )+)(\S+)\s*(.*)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name[:-1])
        elif name.endswith(".py"):
            found[".".join([*folders, name.removesuffix(".py")])] = caption
    return found


def reading_order() -> list[str]:
    return [name for name in captions() if not name.startswith("__")]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_the_tree_names_every_module():
    assert sorted(reading_order()) == sorted(dotted(p) for p in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_above(path):
    order, own = reading_order(), dotted(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own[: len(own) - node.level]
            imported = ".".join([*base, node.module]) if node.module else None
            assert imported in order, f"{dotted(path)} imports {imported}"
            assert order.index(imported) < order.index(dotted(path)), f"{dotted(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert text.count("\n") <= 320


def test_every_module_has_a_caption():
    assert all(captions().values())
