"""The site that `make docs` builds from docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jobledger

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the table of contents, every link has a target, and every docstring can be rendered."""
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path.name != "pypi.md"]
    assert {str(page.with_suffix(".html")) for page in pages} <= {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")
    }
    assert (tmp_path / "_images" / "architecture-worker.svg").exists()
    assert (tmp_path / "_images" / "states.svg").exists()


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    """docs/api.md has exactly the names of `jobledger.__all__`."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)) == sorted(jobledger.__all__)
