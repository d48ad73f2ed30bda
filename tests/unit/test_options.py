"""The options of tasks: one name for one thing in `App.task`, `App.on`, `Task.using`, `Queue`, the commands and the
docs, and the same errors and help texts everywhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_overloads

import pytest
import typer

from jobledger import App, HandlerOptions, Queue, Settings, Task, TaskOptions
from jobledger.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
#: The options of a task that need an ordering key.
KEYED = {"key", "key_hold_max"}


class Happened:
    """An event."""

    rows: int


@pytest.fixture
def app() -> App:
    """An app with an event."""
    made = App("shop", settings=Settings(bootstrap="127.0.0.1:1"))
    made.event(Happened)
    return made


def keywords(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a function's keyword parameters by name."""
    return {name: p for name, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def command_options(*words: str) -> set[str]:
    """Return the long options of a command, as names of Python."""
    command: Any = typer.main.get_command(cli)
    for word in words:
        command = command.commands[word]
    return {option[2:].replace("-", "_") for each in command.params for option in each.opts if option.startswith("--")}


def test_the_options_that_editors_show_are_those_of_the_typed_dict(app: App) -> None:
    """`App.task` spells its options out for editors. They have the names and types of `TaskOptions`, and `help` shows
    them, too."""
    spelled = {name: p.annotation for name, p in keywords(get_overloads(App.task)[-1]).items()}
    assert spelled == {name: kind.__forward_arg__ for name, kind in TaskOptions.__annotations__.items()}
    for shown in (App.task, app.task):
        assert {name: p.annotation for name, p in keywords(shown).items()} == spelled
    assert {name: p.default for name, p in keywords(App.task).items() if p.default is not None} == {
        "key_hold_max": 60.0,
        "lease": 30.0,
    }
    assert all(f"``{name}" in (App.task.__doc__ or "") for name in TaskOptions.__annotations__)


def test_a_handler_has_the_options_of_a_task_without_a_key() -> None:
    """`App.on` has all options of `App.task`, except those of the ordering key. Its ``tags`` are those of its jobs."""
    assert {*keywords(App.on), *HandlerOptions.__annotations__} == {*TaskOptions.__annotations__, "tags"} - KEYED


def test_an_option_has_one_name_everywhere() -> None:
    """A submission, a queue and the commands name an option as the task does. An option of a command that is repeated
    for several values has its name in the singular."""
    task, using = set(TaskOptions.__annotations__), set(keywords(Task.using))
    assert using - task == {"delay", "tags", "job_id"}
    assert {"tag" if name == "tags" else name for name in using} <= command_options("submit")
    limits = {"rate", "concurrency"}
    assert limits <= task
    for command in ("queues limit", "tasks limit"):
        assert limits <= command_options(*command.split())
    assert limits <= set(inspect.signature(Queue).parameters)
    for command in ("worker", "audit", "submit", "jobs list"):
        assert "queue" in command_options(*command.split())


def test_the_reference_has_each_option() -> None:
    """The table in docs/reference.md has the options of `App.task` and `Task.using`, and marks the latter."""
    page = (
        (ROOT / "docs" / "reference.md").read_text("utf-8").partition("## Options of a task")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {
        *TaskOptions.__annotations__,
        *keywords(Task.using),
    }
    assert {name for row in rows for name in re.findall(r"`(\w+)`\*", row)} == set(keywords(Task.using))


def test_an_unknown_option_is_refused_where_it_stands(app: App) -> None:
    """The call itself raises the error, which names the option."""
    task: Any = app.task
    with pytest.raises(TypeError, match=r"^App.task\(\) got an unexpected keyword argument 'retries'$"):
        task(retries=3)
    on: Any = app.on
    with pytest.raises(TypeError, match=r"^App.on\(\) got an unexpected keyword argument 'retries'$"):
        on(Happened, retries=3)
