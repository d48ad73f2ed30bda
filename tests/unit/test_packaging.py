"""What is shipped, and what the README promises about it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import jobledger
from jobledger import errors

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"consumers": "jobledger.consumers", "schemas": "jobledger.schemas", "streams": "jobledger.streams"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def packages_on_disk() -> set[str]:
    """Every folder with an ``__init__.py``, by the name under which it is imported; linked folders once."""
    found = set()
    for top, name in {"jobledger": "jobledger", **FOLDERS}.items():
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            if not any((ROOT / top).joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))):
                found.add(".".join([name, *parts]))
    return found


def test_the_list_of_packages_is_the_folders(project: dict[str, Any]) -> None:
    """No sub-package is left out of the wheel: the list in pyproject.toml names every folder, and no other."""
    assert set(project["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_package_dir_maps_every_linked_folder(project: dict[str, Any]) -> None:
    """The build finds the linked folders where they really are."""
    assert project["tool"]["setuptools"]["package-dir"] == {
        "jobledger": "jobledger",
        **{name: folder for folder, name in FOLDERS.items()},
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_to_the_top_level_folders(folder: str) -> None:
    """``jobledger/<folder>`` is a relative link to the folder beside it, so a clone anywhere works."""
    link = ROOT / "jobledger" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert link.resolve() == ROOT / folder


def test_linked_folders_are_never_imported_under_their_short_names() -> None:
    """No module enters ``sys.modules`` as ``streams``, ``schemas`` or ``consumers``: there would be two of each."""
    probe = (
        "import sys, jobledger, jobledger.cli.main, jobledger.streams.supervisor, jobledger.schemas.codec\n"
        "import jobledger.consumers.offsets, jobledger.streams.decisions\n"
        f"print([m for m in sys.modules if m.partition('.')[0] in {set(FOLDERS)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_imports_what_belongs_to_builds() -> None:
    """Workers, router and stream processor run without setuptools, which new Pythons do not bring and whose newest
    releases have no ``pkg_resources`` any more."""
    probe = """
import sys
BUILD = ("setuptools", "pkg_resources", "distutils", "_distutils_hack")
for name in [name for name in sys.modules if name.partition(".")[0] in BUILD]:
    del sys.modules[name]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BUILD:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import jobledger.cli.main, jobledger.consumers.running, jobledger.consumers.router
import jobledger.streams.coordinator, jobledger.streams.status, jobledger.streams.projections
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_schema_is_a_resource_of_the_package() -> None:
    """The event's schema is found through the package, not through a path in the checkout."""
    assert resources.files("jobledger.schemas").joinpath("job_event.avsc").is_file()


def test_versions_agree(project: dict[str, Any]) -> None:
    """``jobledger.__version__`` is the distribution's version, and the changelog knows it."""
    assert jobledger.__version__ == project["project"]["version"]
    assert jobledger.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_errors_that_the_public_docstrings_name_can_be_imported_beside_what_raises_them() -> None:
    """Whoever reads that `submit` raises `AccessDenied` finds it in ``jobledger``, as all that a call may raise."""
    documented: dict[str, set[str]] = {}
    for owner in (jobledger.App, jobledger.Task, jobledger.JobHandle, jobledger.Settings, jobledger.JobContext):
        for name, member in [("", owner), *vars(owner).items()]:
            if not name.startswith("_"):
                words = set(re.findall(r"`(\w+)`", inspect.getdoc(member) or ""))
                documented[f"{owner.__name__}.{name}"] = words & vars(errors).keys()
    assert set().union(*documented.values()) <= set(jobledger.__all__)
    for call in ("Task.submit", "App.emit"):
        assert documented[call] >= {"AccessDenied", "SchemaRefused", "RegistryUnavailable", "BrokerUnavailable"}
    assert {"NotAuthenticated", "NotAuthorized", "StoreNotFound", "StoreUnavailable"} <= set(jobledger.__all__)


def test_extras_exist(project: dict[str, Any]) -> None:
    """The extras that texts and messages name are there, and ``dev`` brings the embedded broker."""
    extras = project["project"]["optional-dependencies"]
    assert {"kafka", "dev"} <= set(extras)
    assert "jobledger[kafka]" in extras["dev"]


def test_the_command_is_declared(project: dict[str, Any]) -> None:
    """Installing the package brings the command ``jobledger``."""
    assert project["project"]["scripts"] == {"jobledger": "jobledger.cli.main:run"}


def verbs() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_make_has_a_verb_for_everything_that_texts_tell_people_to_run() -> None:
    """Every ``make x`` in README and CONTRIBUTING is in the Makefile, as are the verbs of daily work."""
    told = set()
    for name in ("README.md", "CONTRIBUTING.md"):
        told |= set(re.findall(r"^(?:```)?\$ make ([a-z]+)", (ROOT / name).read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= told
    assert told | {"setup", "demo", "dev", "test", "lint", "bench", "chaos", "docs", "clean"} <= verbs()


def test_the_drawn_states_are_those_of_the_code() -> None:
    """``docs/states.md`` is what `make docs` draws from the table of transitions as it is now."""
    drawn = subprocess.run(
        [sys.executable, "docs/draw.py"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert (ROOT / "docs" / "states.md").read_text("utf-8") == drawn.stdout.decode(), "run: make docs"


def test_the_pipeline_runs_the_readme_command() -> None:
    """What the pipeline runs is what the README tells people to run."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text("utf-8")


@pytest.mark.slow
def test_the_wheel_has_every_module_and_nothing_else_at_the_top(tmp_path: Path) -> None:
    """A wheel puts ``jobledger`` alone into site-packages, with every module, the schema and the type marker."""
    source = tmp_path / "source"
    source.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    # Built from a copy: a build leaves folders behind, and the checkout may be used by others.
    for name in ("pyproject.toml", "README.md", "LICENSE", "jobledger", *FOLDERS):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"jobledger"}
    for top, package in {"jobledger": "jobledger", **FOLDERS}.items():
        for module in (source / top).rglob("*.py"):
            inside = module.relative_to(source / top)
            if not (source / top / inside.parts[0]).is_symlink():
                assert f"{package.replace('.', '/')}/{inside}" in names
    assert {"jobledger/py.typed", "jobledger/schemas/job_event.avsc"} <= names
