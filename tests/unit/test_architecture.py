"""docs/architecture.md against the tree: packages, what they import, files, and the names of classes and methods."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import jobledger
from tests import shape

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
FOUND = shape.modules()
#: Files that the page names without their folder, because the page names the folder just before.
NAMES = {module.path.name for module in FOUND} | {path.name for path in (ROOT / "schemas").iterdir()}


def rows() -> dict[str, str]:
    """The table of packages: the cell with the imports of each package."""
    table = PAGE.partition("## Packages and layers")[2].partition("\n## ")[0]
    cells = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `jobledger")]
    return {cell[0].strip(" `"): cell[2] for cell in cells}


def test_every_package_is_in_the_table_and_no_other() -> None:
    """A new package needs a row, and the row of a deleted package is deleted."""
    packages = {module.name for module in FOUND if module.path.name == "__init__.py"}
    packages |= {name.rpartition(".")[0] for name in (m.name for m in FOUND if m.path.name != "__init__.py")}
    assert set(rows()) == packages


@pytest.mark.parametrize("name", sorted(set(rows()) - {"jobledger", "jobledger.cli"}))
def test_a_package_imports_what_its_row_says(name: str) -> None:
    """The row neither lacks an import nor lists one that the package does not have."""
    imported = shape.packages(FOUND, shape.imports(FOUND))[name]
    top = name.split(".")[1]
    listed = set()
    for word in re.findall(r"`([\w.]+)`", rows()[name]):
        for full in (f"jobledger.{top}.{word}", f"jobledger.{word}", f"jobledger.{word.rpartition('.')[0]}"):
            if full in imported or full in rows():
                listed.add(full)
                break
        else:
            listed.add(word)
    assert listed == imported


def test_every_file_of_the_page_exists() -> None:
    """A file that is named with its folder exists in that folder."""
    for word in re.findall(r"`([\w/.-]+\.(?:py|avsc|toml|md))`", PAGE):
        assert (ROOT / word).exists() or ("/" not in word and word in NAMES), word


def test_every_method_of_the_page_exists() -> None:
    """Each `Class.method` and `Class.field` of the page exists in some module."""
    known = {
        f"{node.name}.{each.name}"
        for m in FOUND
        for node in ast.walk(m.tree)
        if isinstance(node, ast.ClassDef)
        for each in node.body
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    classes = {node.name for m in FOUND for node in ast.walk(m.tree) if isinstance(node, ast.ClassDef)}
    fields = {
        f"{node.name}.{at.attr}"
        for m in FOUND
        for node in ast.walk(m.tree)
        if isinstance(node, ast.ClassDef)
        for at in ast.walk(node)
        if isinstance(at, ast.Attribute) and isinstance(at.ctx, ast.Store)
    }
    for word in re.findall(r"`([A-Z]\w*\.\w+)`", PAGE):
        if word.partition(".")[0] in classes:
            assert word in known | fields, word
        else:
            assert word.endswith(".md"), word


def test_the_figures_are_beside_the_page() -> None:
    """The figures are stored as SVG files in the repository, so a reader needs no tool that draws them."""
    figures = re.findall(r"!\[[^]]+\]\(([\w.-]+)\)", PAGE)
    assert len(figures) == 2
    for name in figures:
        assert (ROOT / "docs" / name).read_text("utf-8").startswith("<svg")


def test_every_package_says_what_it_owns() -> None:
    """Each `__init__` has a docstring."""
    for module in FOUND:
        if module.path.name == "__init__.py":
            assert ast.get_docstring(module.tree), module.name
    assert jobledger.__doc__
