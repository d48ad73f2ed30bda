"""Finding the app that a command line names, and the errors if the app is not found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobledger.cli.loading import load_app
from jobledger.errors import ConfigError, UnknownTask

Write = Callable[[str, str], Path]

GOOD = "from jobledger import App\napp = App('shop')\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """A function that writes modules into an empty working directory. The modules are removed from `sys.modules`
    afterwards."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)

    def file(name: str, text: str) -> Path:
        made = tmp_path / name
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text)
        return made

    yield file
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(target: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_app(target)
    return str(caught.value)


@pytest.mark.parametrize("target", ["lone_shop:app", "lone_shop", "lone_shop.py:app", "./lone_shop.py"])
def test_an_app_is_found_by_module_and_by_file(write: Write, target: str) -> None:
    """``module:app``, ``module`` and a path to the file all name the same app."""
    write("lone_shop.py", GOOD)
    assert load_app(target).names.namespace == "shop"


def test_a_path_into_a_package_loads_the_packages_module(write: Write) -> None:
    """So relative imports work, and the module is imported only once."""
    write("boxed/__init__.py", "")
    write("boxed/deep/__init__.py", "")
    write("boxed/other.py", "NAME = 'boxed'\n")
    write("boxed/deep/jobs.py", "from jobledger import App\nfrom ..other import NAME\napp = App(NAME)\n")
    assert load_app("boxed/deep/jobs.py:app") is load_app("boxed.deep.jobs:app")


def test_the_command_line_wins_over_the_apps_settings(write: Write) -> None:
    """``--bootstrap`` and ``--status-url`` replace the settings with which the app was made."""
    write("set_shop.py", GOOD)
    app = load_app("set_shop:app", bootstrap="there:1", status_url="sqlite:///x.db")
    assert (app.settings.bootstrap, app.settings.status_url) == ("there:1", "sqlite:///x.db")


def test_a_missing_module_and_an_error_inside_a_module_have_different_errors(write: Write) -> None:
    """The error of a missing module suggests a similar name. A failed import inside a module is reported as that."""
    write("shopping.py", "import no_such_thing_at_all\n")
    missing = refused("shoping:app")
    assert "'shoping' does not exist" in missing
    assert "did you mean 'shopping'?" in missing
    inside = refused("shopping:app")
    assert "'shopping' was found, but importing it failed" in inside
    assert "shopping.py:1: ModuleNotFoundError: No module named 'no_such_thing_at_all'" in inside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ndef broken(:\n", "broken_shop.py:2: SyntaxError"),
        ("def f():\n    raise OSError('disk on fire')\nf()\n", "broken_shop.py:2: OSError: disk on fire"),
        ("import sys\nsys.exit(4)\n", "broken_shop.py:2: SystemExit: 4"),
    ],
)
def test_an_error_inside_the_module_names_file_and_line(write: Write, text: str, expected: str) -> None:
    """Any exception of the import becomes one line with the position in the user's own code."""
    write("broken_shop.py", text)
    message = refused("broken_shop:app")
    assert expected in message
    assert "\n" not in message


def test_a_wrong_option_of_a_task_names_the_line_that_has_it(write: Write) -> None:
    """An error of the app keeps its type, and its message gets the position."""
    write("wrong_shop.py", GOOD + "@app.task(queue='no spaces please')\ndef f(): ...\n")
    assert refused("wrong_shop:app").startswith("wrong_shop.py:3: queue 'no spaces please'")


def test_loading_an_app_checks_the_whole_app(write: Write) -> None:
    """A fallback task that is not registered is refused."""
    write("half_shop.py", GOOD + "@app.task(fallback='later')\ndef f(): ...\n")
    with pytest.raises(UnknownTask, match="later"):
        load_app("half_shop:app")


def test_the_error_of_a_wrong_attribute_names_the_apps_of_the_module(write: Write) -> None:
    """A misspelled attribute, an attribute that is not an app, and a module without an app have different errors."""
    write("two_shops.py", GOOD + "application = App('other')\nlabel = 'x'\n")
    assert "did you mean two_shops:application?" in refused("two_shops:aplication")
    assert "is a str, not a jobledger.App; the module's apps are 'app', 'application'" in refused("two_shops:label")
    write("no_shop.py", "x = 1\n")
    assert "the module has no App" in refused("no_shop")
    write("hidden_shop.py", GOOD.replace("app =", "jobs ="))
    assert "write hidden_shop:jobs" in refused("hidden_shop")


@pytest.mark.parametrize("target", ["", ":app", "shop:", "absent/file.py:app"])
def test_the_error_of_a_malformed_target_shows_the_right_form(write: Write, target: str) -> None:
    """Malformed targets and missing files are refused."""
    assert "MODULE:APP" in refused(target)
