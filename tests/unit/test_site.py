"""The site that `make docs` builds from docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import jobledger
from jobledger.schemas import events
from tests.acceptance.promises import Promise

ROOT = Path(__file__).parents[2]


@pytest.mark.extended
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


def kinds_of_pages() -> dict[str, list[str]]:
    """Return the pages of each kind of docs/index.md, in order."""
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    blocks = re.findall(r"^```\{toctree\}\n:caption: (.+)\n:maxdepth: 1\n\n((?:\S+\n)+)```$", index, re.MULTILINE)
    return {caption: names.split() for caption, names in blocks}


def test_every_page_is_of_exactly_one_of_four_kinds() -> None:
    """A new page belongs to one of the kinds of docs/index.md. The design decisions have a page of their own."""
    assert list(kinds_of_pages()) == ["Tutorial", "How-to guides", "Reference", "Explanation"]
    pages = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.name not in ("index.md", "pypi.md"))
    assert sorted(name for names in kinds_of_pages().values() for name in names) == pages
    assert "\nadr/*\n" in (ROOT / "docs" / "decisions.md").read_text("utf-8")


def test_the_readme_is_short_and_names_each_page_under_its_kind() -> None:
    """The README has fewer than 150 lines, and its last section has the kinds of docs/index.md."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) < 150
    parts = re.split(r"^- (.+)$", text.partition("\n## Where to go on\n")[2], flags=re.MULTILINE)[1:]
    named = {
        kind: sorted(re.findall(r"\(docs/([\w-]+)\.md\)", links))
        for kind, links in zip(parts[::2], parts[1::2], strict=True)
    }
    assert named == {kind: sorted(names) for kind, names in kinds_of_pages().items()}


@pytest.mark.parametrize("promise", [each for each in Promise if each is not Promise.NOTHING_PASSED_OVER])
def test_the_tests_and_the_page_promise_the_same(promise: Promise) -> None:
    """A test that fails names a promise with the words of docs/promises.md."""
    page = (ROOT / "docs" / "promises.md").read_text("utf-8")
    section = page.partition(f"\n## {promise.name}\n")[2].lstrip("\n")
    assert " ".join(section.partition("\n\n")[0].split()) == promise.says


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    """docs/api.md has exactly the names of `jobledger.__all__`."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)) == sorted(jobledger.__all__)


def test_every_fact_is_on_the_page_of_the_api() -> None:
    """docs/api.md has the class of each fact, and the types of which events are made."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    listed = re.findall(r"^\.\. automodule:: jobledger\.schemas\.events\n   :members: (.+)$", page, re.MULTILINE)
    kinds = [kind.__name__ for kind in (events.JobEvent, events.JobSpec, events.ErrorInfo, *events.Fact.__args__)]
    assert [line.split(", ") for line in listed] == [["fact_name", *kinds, "RunningJob"]]


def test_what_the_pages_import_is_public() -> None:
    """A reader can import from `jobledger`, or from the names and modules on docs/api.md."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    modules = {
        name.rpartition(".")[0]: set[str]() for name in re.findall(r"^\.\. auto\w+:: (\S+\.\w+)$", page, re.MULTILINE)
    }
    for name in re.findall(r"^\.\. auto(?!module)\w+:: (\S+\.\w+)$", page, re.MULTILINE):
        modules[name.rpartition(".")[0]].add(name.rpartition(".")[2])
    modules |= {"jobledger": set(jobledger.__all__), "jobledger.schemas.events": set(vars(events))}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text("utf-8")
        for module, names in re.findall(r"^ *from (jobledger[\w.]*) import (.+)$", text, re.MULTILINE):
            unknown = set(re.findall(r"\w+", names)) - modules.get(module, set())
            assert not unknown, f"{path.name}: docs/api.md does not have {unknown} of {module}"
        for named in re.findall(r"`(jobledger\.[a-z_.]+\.[A-Za-z_]+)(?:\(.*?\))?`", text):
            if path.name not in ("architecture.md", "api.md"):
                module, _, name = named.rpartition(".")
                assert named in modules or name in modules.get(module, set()), (
                    f"{path.name}: docs/api.md has no {named}"
                )
