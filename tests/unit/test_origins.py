"""The names of tasks: two functions cannot share a name, and a module that is executed again keeps its names."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobledger import App
from jobledger.config import Settings
from jobledger.errors import ConfigError


def shop(name: str = "shop") -> App:
    """Return an app that does not connect."""
    return App(name, settings=Settings())


def test_a_second_lambda_without_a_name_is_refused() -> None:
    """The error has both positions in the code. With different names the lambdas are two tasks."""
    app = shop()
    double = app.task(lambda x: x * 2)
    with pytest.raises(ConfigError, match=r"<lambda>.*test_origins\.py:\d+.*test_origins\.py:\d+.*name=") as caught:
        app.task(lambda x: x * 3)
    line = double.fn.__code__.co_firstlineno
    assert f"test_origins.py:{line})" in str(caught.value)
    assert f"test_origins.py:{line + 2})" in str(caught.value)
    assert app.task(name="triple")(lambda x: x * 3)(10) == 30
    assert app.tasks["<lambda>"](10) == 20


def test_functions_of_one_factory_cannot_share_a_name() -> None:
    """The functions have the same code and different values in their closures. With the same values they count as one
    task."""
    app = shop()

    def times(factor: int) -> Callable[[int], int]:
        def multiply(x: int) -> int:
            return x * factor

        return multiply

    app.task(times(2))
    app.task(times(2))
    with pytest.raises(ConfigError, match="multiply"):
        app.task(times(3))
    with pytest.raises(ConfigError, match="multiply"):
        in_a_thread(lambda: app.task(times(4)))
    assert app.tasks["multiply"](10) == 20


def execute(text: str, file: str, space: dict[str, Any]) -> None:
    """Execute a text as the body of a module, as notebooks and reloads do."""
    exec(compile(text, file, "exec"), space)  # noqa: S102  # the tests are about code that is executed again


def in_a_thread(call: Callable[[], Any]) -> None:
    """Call the function in a thread, without the body of a module on the stack. Raise its exception."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as exc:  # noqa: BLE001  # raised again below
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


#: A module; each text of `AGAIN` is a second declaration of one of its names.
MODULE = """
from functools import wraps
from jobledger import App
from jobledger.config import Settings
import {app}

app = {app}.app

def wrapped(fn):
    @wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)
    return call

@app.task
def send(to: str) -> str:
    return "{word}"

@app.task
@wrapped
def ship(order: str) -> str:
    return "{word}"

shift = app.task(name="shift")(lambda x: x)

@app.event
class Sent:
    to: str

@app.on(Sent)
def told(event: Sent) -> None: ...
"""
AGAIN = {
    "task": '\n@app.task\ndef send(to: str) -> str:\n    return "another"\n',
    "wrapped task": '\n@app.task\n@wrapped\ndef ship(order: str) -> str:\n    return "another"\n',
    "event": "\n@app.event\nclass Sent:\n    by: str\n",
    "handler": "\n@app.on(Sent)\ndef told(event: Sent) -> None:\n    raise NotImplementedError\n",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A function that writes and imports the module ``origins_tasks``. The app is in another module, which is not
    imported again."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    keeper = ModuleType("origins_keeper")
    keeper.app = shop()  # type: ignore[attr-defined]  # a module takes anything
    monkeypatch.setitem(sys.modules, "origins_keeper", keeper)

    def write(word: str, more: str = "", *, anew: bool = False) -> ModuleType:
        text = "\n" * len(word) + MODULE.format(app="origins_keeper", word=word) + more
        (tmp_path / "origins_tasks.py").write_text(text)
        importlib.invalidate_caches()
        known = sys.modules.get("origins_tasks")
        if known is None or anew:
            monkeypatch.delitem(sys.modules, "origins_tasks", raising=False)
            return importlib.import_module("origins_tasks")
        return importlib.reload(known)

    return write


@pytest.mark.parametrize("anew", [False, True], ids=["reload", "import anew"])
def test_a_module_that_is_executed_again_declares_its_tasks_again(module: Callable[..., Any], anew: bool) -> None:
    """After a reload, or after an import of a module that was removed, the new functions are the tasks. Their lines in
    the file may have changed."""
    module("first")
    again = module("second time", anew=anew)
    assert again.app.tasks["send"]("a") == again.app.tasks["ship"]("a") == "second time"
    assert again.app.events["Sent"].cls is again.Sent


@pytest.mark.parametrize("again", AGAIN.values(), ids=list(AGAIN))
def test_a_module_cannot_declare_one_name_twice(module: Callable[..., Any], again: str) -> None:
    """The error has both positions. Otherwise the second declaration would silently replace the first one."""
    with pytest.raises(ConfigError, match=r"origins_tasks\.py:\d+.*origins_tasks\.py:\d+"):
        module("first", again)


def test_a_cell_of_a_notebook_that_is_run_again_declares_its_task_again() -> None:
    """A cell is executed again in the same namespace, and the edited function becomes the task."""
    space: dict[str, Any] = {"app": shop(), "__name__": "__main__"}
    for word in ("first", "second"):
        cell = f"@app.task\ndef send(to):\n    return {word!r}\n\n@app.event\nclass Sent:\n    to: str\n"
        execute(cell, f"<cell {word}>", space)
    assert space["app"].tasks["send"]("a") == "second"
    execute("double = app.task(lambda x: x * 2)", "<cell 3>", space)
    with pytest.raises(ConfigError, match="<lambda>"):
        execute("triple = app.task(lambda x: x * 3)", "<cell 4>", space)


def test_a_lambda_of_a_reloaded_module_replaces_the_old_one(module: Callable[..., Any]) -> None:
    """Two lambdas of one module, or of one console, cannot share their name."""
    module("first", "double = app.task(lambda x: 2 * x)")
    reloaded = module("second time", "double = app.task(lambda x: 20 * x)")
    assert reloaded.app.tasks["<lambda>"](1) == 20
    with pytest.raises(ConfigError, match="already registered"):
        module("third", "double = app.task(lambda x: 2 * x)\ntriple = app.task(lambda x: 3 * x)")
    space: dict[str, Any] = {"app": shop(), "__name__": "__main__"}
    execute("double = app.task(lambda x: x * 2)", "<stdin>", space)
    with pytest.raises(ConfigError, match="already registered"):
        execute("triple = app.task(lambda x: x * 3)", "<stdin>", space)


@pytest.mark.usefixtures("module")
def test_a_script_that_is_compiled_once_may_be_executed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new module with the same name declares the same tasks and events again, also decorated ones."""
    script = compile(MODULE.format(app="origins_keeper", word="x"), "script.py", "exec")
    for _ in range(2):
        monkeypatch.setitem(sys.modules, "script", ModuleType("script"))
        space = sys.modules["script"].__dict__
        exec(script, space)  # noqa: S102  # the tests are about code that is executed again
        assert space["app"].tasks["ship"] is space["ship"]
        assert space["app"].events["Sent"].cls is space["Sent"]


def test_functions_of_two_modules_cannot_share_a_name() -> None:
    """A script that is also imported by its name declares each task twice. The error has both names."""
    app = shop()
    text = "@app.task\ndef send(to): ...\n"
    execute(text, "jobs.py", {"app": app, "__name__": "__main__"})
    with pytest.raises(ConfigError, match=r"__main__\.send \(jobs\.py:1\) and jobs\.send \(jobs\.py:1\)"):
        execute(text, "jobs.py", {"app": app, "__name__": "jobs"})


def test_a_decorated_function_and_the_plain_function_cannot_share_a_name() -> None:
    """A decorator that copies the name returns another function. The same function may be declared twice."""

    def send(to: str) -> str:
        return to

    def loud(fn: Callable[[str], str]) -> Callable[[str], str]:
        @functools.wraps(fn)
        def call(to: str) -> str:
            return fn(to).upper()

        return call

    app = shop()
    app.task(send)
    app.task(send)
    with pytest.raises(ConfigError, match="send"):
        app.task(loud(send))


def test_a_task_of_another_app_is_refused_with_the_names_of_both_apps() -> None:
    """The error is raised before a client connects. Otherwise the workers would run their own task with that name."""
    one, two = shop("one"), shop("two")

    @one.task(name="send")
    def send_one(x: int) -> int:
        return x

    @two.task(name="send")
    def send_two(x: int) -> int:
        return x

    with pytest.raises(ConfigError, match=r"'two'.*'one'"):
        one.submit_many([send_two.job(1)])
    with pytest.raises(ConfigError, match=r"'two'.*'one'"):
        one.task(name="first", fallback=send_two)(lambda x: x)

    def surround(job: object) -> Iterator[None]:
        yield

    one.around(surround, tasks=[send_two])
    with pytest.raises(ConfigError, match=r"'two'.*'one'"):
        one.check()
