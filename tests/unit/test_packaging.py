"""The content of the distributions, and what the README promises about it."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import jobledger
from jobledger import errors
from jobledger.process import extras

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"consumers": "jobledger.consumers", "schemas": "jobledger.schemas", "streams": "jobledger.streams"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def packages_on_disk() -> set[str]:
    """Return the import name of every folder with an ``__init__.py``; of a linked folder only one name."""
    names = set()
    for top, name in {"jobledger": "jobledger", **FOLDERS}.items():
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            if not any((ROOT / top).joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))):
                names.add(".".join([name, *parts]))
    return names


def test_the_list_of_packages_names_exactly_the_folders(project: dict[str, Any]) -> None:
    """The list is in pyproject.toml. A folder that is not listed would be missing in the wheel."""
    assert set(project["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_package_dir_maps_every_linked_folder(project: dict[str, Any]) -> None:
    """The build reads the linked folders at their real place."""
    assert project["tool"]["setuptools"]["package-dir"] == {
        "jobledger": "jobledger",
        **{name: folder for folder, name in FOLDERS.items()},
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_to_the_top_level_folders(folder: str) -> None:
    """``jobledger/<folder>`` is a relative link, so it works in a clone at any path."""
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("a source distribution: links do not travel in it")
    link = ROOT / "jobledger" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert link.resolve() == ROOT / folder


def test_linked_folders_are_never_imported_under_their_short_names() -> None:
    """Otherwise ``sys.modules`` would have two copies of a module of ``streams``, ``schemas`` or ``consumers``."""
    probe = (
        "import sys, jobledger, jobledger.cli.main, jobledger.streams.supervisor, jobledger.schemas.codec\n"
        "import jobledger.consumers.state.offset_tracker, jobledger.streams.coordinator.rules.decisions\n"
        f"print([m for m in sys.modules if m.partition('.')[0] in {set(FOLDERS)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_process_imports_a_build_tool() -> None:
    """Worker, router and stream processor run without setuptools. New versions of Python do not include it, and its
    newest releases have no ``pkg_resources``."""
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
import jobledger.cli.main, jobledger.consumers.worker.main, jobledger.consumers.router.router
import jobledger.streams.coordinator.coordinator, jobledger.streams.status.materializer, jobledger.streams.projections.runner
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_schema_is_a_resource_of_the_package() -> None:
    """The event's schema is read from the package, and not from a path in the checkout."""
    assert resources.files("jobledger.schemas").joinpath("job_event.avsc").is_file()


def test_versions_agree(project: dict[str, Any]) -> None:
    """``jobledger.__version__`` is the distribution's version, and the changelog has it."""
    assert jobledger.__version__ == project["project"]["version"]
    assert jobledger.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_errors_named_in_public_docstrings_can_be_imported_from_jobledger() -> None:
    """For example, the docstring of `submit` names `AccessDenied`. The docstrings name all errors that a call may
    raise."""
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
    """Every extra that `jobledger.process.extras` or a text names exists, and installs its packages on Linux. ``all``
    includes each extra, and ``dev`` includes ``all``."""
    wanted = project["project"]["optional-dependencies"]
    assert set(extras.PACKAGES) | {"all", "dev"} == set(wanted)
    assert set(wanted["all"]) == {f"jobledger[{name}]" for name in extras.PACKAGES}
    assert "jobledger[all]" in wanted["dev"]
    names = {"faust": "faust-streaming", "opentelemetry": "opentelemetry-api"}
    for extra, modules in extras.PACKAGES.items():
        here = [requirement for requirement in wanted[extra] if "!= 'linux'" not in requirement]
        brought = {re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0] for requirement in here}
        assert brought == {names.get(module, module.replace("_", "-")) for module in modules}
    named: set[str] = set()
    for text in [*ROOT.glob("*.md"), ROOT / "Dockerfile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("jobledger/**/*.py")]:
        for match in re.findall(r"(?:jobledger|'\.)\[([a-z,]+)\]", text.read_text("utf-8")):
            named |= set(match.split(","))
    assert named <= set(wanted)
    assert {"all", "worker", "streams", "kafka"} <= named


def test_version_3_of_confluent_kafka_is_not_installed(project: dict[str, Any]) -> None:
    """``confluent-kafka`` 3 is a preview of another client, so the dependency excludes it."""
    (client,) = [each for each in project["project"]["dependencies"] if each.startswith("confluent-kafka")]
    assert client.endswith(",<3")


def test_the_text_for_the_package_index_has_no_relative_link(project: dict[str, Any]) -> None:
    """The text is read outside the repository, where a link to one of our files would be broken."""
    text = (ROOT / project["project"]["readme"]).read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    assert [link for pair in links for link in pair if link and not link.startswith("https://")] == []
    assert "pip install 'jobledger[all]'" in text


#: Code that hides the packages of all extras from a process.
BASE_ONLY = f"""
import sys
MISSING = {sorted({module for modules in extras.PACKAGES.values() for module in modules} | {"aiokafka", "mode"})!r}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in MISSING else found(name, package)
"""


def base_only(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as in the base install."""
    return subprocess.run(
        [sys.executable, "-c", BASE_ONLY + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_base_install_can_submit_and_read_the_status_table(tmp_path: Path) -> None:
    """Without an extra, all public names can be imported, a submission connects to the broker's address, and a status
    table in SQLite can be read. Without an address the error names the missing setting or extra."""
    done = base_only(
        f"""
from jobledger import *
from jobledger import testing
import jobledger.cli.main
from jobledger.streams.status.store import open_store
url = "sqlite:///{tmp_path}/status.db"
open_store(url, "shop").close()
def work(a: int) -> int: return a
for bootstrap in ("127.0.0.1:1", None):
    app = App("shop", settings=Settings(bootstrap=bootstrap, submit_timeout=0.5, status_url=url))
    task = app.task(work)
    print(list(app.jobs()))
    for call in (lambda: app.job("nobody"), lambda: task.submit(1)):
        try:
            call()
        except JobledgerError as exc:
            print(type(exc).__name__, exc)
    app.close()
"""
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert output.count("[]") == output.count("JobNotFound") == 2
    assert "BrokerUnavailable" in output
    assert "ConfigError JOBLEDGER_BOOTSTRAP is not set" in output
    assert "pip install 'jobledger[kafka]'" in output


#: Command lines, and the extras that each needs.
NEEDS = {
    "dev examples.shop:app": "worker,streams,watch,kafka",  # first, as the app keeps later addresses
    "worker examples.shop:app --bootstrap 127.0.0.1:1": "worker",
    "worker examples.shop:app --bootstrap 127.0.0.1:1 --processes 2": "worker",
    "router examples.shop:app --bootstrap 127.0.0.1:1": "worker",
    "streams examples.shop:app --bootstrap 127.0.0.1:1": "streams",
    "coordinator examples.shop:app --bootstrap 127.0.0.1:1": "streams",
    "materializer examples.shop:app --bootstrap 127.0.0.1:1": "streams",
    "check examples.shop:app --bootstrap 127.0.0.1:1": "streams",
    "projections run examples.shop:app --bootstrap 127.0.0.1:1": "streams",
    "dev examples.shop:app --bootstrap 127.0.0.1:1": "worker,streams,watch",
    "dev examples.shop:app --bootstrap 127.0.0.1:1 --no-reload": "worker,streams",
    "kafka start": "kafka",
    "web examples.shop:app --bootstrap 127.0.0.1:1": "web",
    "web-token list --tokens tokens.json": "web",
}


def test_a_command_whose_packages_are_missing_names_the_extras() -> None:
    """The error is one line, before the command does anything."""
    done = base_only(
        f"""
import os
from jobledger.cli.main import main
os.environ.pop("JOBLEDGER_BOOTSTRAP", None)
for words in {list(NEEDS)!r}:
    print("\\n== code", main(words.split()), flush=True, file=sys.stderr)
"""
    )
    assert done.returncode == 0, done.stderr
    answers = re.split(r"\n== code (\d+)\n", done.stderr)
    assert len(answers) == 2 * len(NEEDS) + 1
    for (words, extra), error, code in zip(NEEDS.items(), answers[::2], answers[1::2], strict=False):
        assert f"pip install 'jobledger[{extra}]'" in " ".join(error.split()), (words, error)
        assert int(code) != 0
        assert "Traceback" not in error


def test_a_module_whose_packages_are_missing_names_the_extra() -> None:
    """This is for programs that import the parts themselves. The cause of the `ConfigError` is the `ImportError`."""
    modules = {
        "jobledger.consumers.worker.metrics": "worker",
        "jobledger.streams.coordinator.coordinator": "streams",
        "jobledger.streams.status.materializer": "streams",
        "jobledger.streams.maintenance.maintenance": "streams",
        "jobledger.kafka.embedded.server": "kafka",
        "jobledger.web": "web",
    }
    done = base_only(
        f"""
from importlib import import_module
from jobledger import ConfigError
for module in {list(modules)!r}:
    try:
        import_module(module)
    except ConfigError as exc:
        print(module, isinstance(exc.__cause__, ImportError), exc)
"""
    )
    for module, extra in modules.items():
        assert re.search(rf"^{module} True .*pip install 'jobledger\[{extra}\]'", done.stdout, re.MULTILINE), (
            done.stdout + done.stderr
        )


def test_the_command_is_declared(project: dict[str, Any]) -> None:
    """The package installs the command ``jobledger``."""
    assert project["project"]["scripts"] == {"jobledger": "jobledger.cli.main:run"}


def verbs() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_every_make_command_of_the_texts_is_in_the_makefile() -> None:
    """The Makefile has every ``make x`` of README and CONTRIBUTING, and the verbs of daily work."""
    named = set()
    for name in ("README.md", "CONTRIBUTING.md"):
        named |= set(re.findall(r"^(?:```)?\$ make ([a-z]+)", (ROOT / name).read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named | {"setup", "demo", "dev", "test", "lint", "bench", "chaos", "docs", "clean"} <= verbs()


def test_the_page_and_the_figure_of_states_are_up_to_date(tmp_path: Path) -> None:
    """`make docs` draws the same page and figure from the current table of transitions."""
    subprocess.run([sys.executable, "docs/draw.py", str(tmp_path)], cwd=ROOT, check=True)
    for name in ("states.md", "states.svg"):
        assert (ROOT / "docs" / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8"), "run: make docs"


def test_the_pipeline_runs_the_readme_command() -> None:
    """The script of the pipeline runs `make test`, like the README."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text("utf-8")


def test_the_wheel_has_every_module_and_only_the_folder_jobledger(tmp_path: Path) -> None:
    """A wheel puts only ``jobledger`` into site-packages, with every module, the schema and the type marker."""
    source = tmp_path / "source"
    source.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    # Built from a copy: a build makes folders in its source, and other processes may use the checkout.
    (source / "docs").mkdir()
    for name in ("docs/pypi.md", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    byte_code = shutil.ignore_patterns("__pycache__")  # other tests write these files during the copy
    for name in ("jobledger", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=byte_code)
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
    pages = source / "jobledger" / "web" / "pages"
    shown = [path for folder in ("templates", "static") for path in (pages / folder).rglob("*") if path.is_file()]
    assert shown
    assert {f"jobledger/web/pages/{path.relative_to(pages)}" for path in shown} <= names


def test_the_source_distribution_has_docs_and_tests(tmp_path: Path) -> None:
    """It has every file of the project, no file twice, and no build product."""
    source, tools, made = tmp_path / "source", tmp_path / "tools", tmp_path / "made"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout: nobody says what belongs to the project")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", str(ROOT / name), str(source / name)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--target", str(tools)]
    subprocess.run([*pip, "setuptools>=77"], check=True)
    build = f"import sys; sys.path.insert(0, {str(tools)!r}); from setuptools import build_meta as b; b.build_sdist({str(made)!r})"
    made.mkdir()
    done = subprocess.run([sys.executable, "-I", "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert set(files) - names == {f"jobledger/{folder}" for folder in FOLDERS}  # the links are not in it
    assert {"docs/tutorial.md", "tests/conftest.py", "schemas/job_event.avsc", ".ci/run"} <= names
    assert not [
        name for name in names if "__pycache__" in name or name.startswith(tuple(f"jobledger/{f}" for f in FOLDERS))
    ]
