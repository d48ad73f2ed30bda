"""The types of tasks, jobs and results for a type checker; `make lint` runs mypy over this file."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import pytest

from jobledger import App, AsyncTask, JobHandle, JobRequest, PlainTask, Task

ROOT = Path(__file__).resolve().parents[2]
app = App("typed")


@dataclass
class Report:
    """The result of a job."""

    rows: int
    on: dt.date


@app.task
def plain(rows: int) -> Report:
    """A plain task without options."""
    return Report(rows, dt.date(2026, 1, 2))


@app.task(retry=2)
async def coroutine(rows: int) -> Report:
    """A coroutine task with options."""
    return Report(rows, dt.date(2026, 1, 2))


@app.task
def flag() -> bool:
    """A task with a result of type bool, which is a subclass of int."""
    return True


@app.event
@dataclass(frozen=True)
class Happened:
    """An event."""

    rows: int


@app.event
class Plain:
    """An event without the decorator `dataclass`."""

    rows: int


@app.task
def anything(rows: int) -> Any:
    """A task with a result of an unknown type."""
    return rows


@app.task
def something(rows: int) -> object:
    """A task with a result of any type; with `object` its arguments are checked."""
    return rows


@app.on(Happened)
async def handler(event: Happened) -> None:
    """A handler."""


def types_of_tasks() -> None:
    """Never run: mypy reads it."""
    direct: PlainTask[[int], Report] = plain
    awaited: AsyncTask[[int], Report] = coroutine
    handling: AsyncTask[[Happened], None] = handler
    both: list[Task[[int], Report]] = [direct, awaited]
    assert_type(both[0].submit(1), JobHandle[Report])
    assert_type(handling.submit(Happened(1)), JobHandle[None])


def types_of_calls() -> None:
    """Never run: mypy reads it."""
    assert_type(plain(1), Report)
    coroutines = [coroutine(1)]
    assert_type(coroutines, list[Coroutine[Any, Any, Report]])
    plain("1")  # type: ignore[arg-type]  # mypy must check this call


async def types_of_jobs() -> None:
    """Never run: mypy reads it."""
    assert_type(await coroutine(1), Report)
    assert_type(plain.submit(1), JobHandle[Report])
    assert_type(await coroutine.submit_async(1), JobHandle[Report])
    assert_type(coroutine.using(delay=1).submit(1).result(), Report)
    assert_type(coroutine.job(1), JobRequest[Report])
    assert_type(app.submit_many(plain.job(n) for n in range(3)), list[JobHandle[Report]])
    coroutine.submit("1")  # type: ignore[arg-type]  # mypy must check this submission


def types_of_events() -> None:
    """Never run: mypy reads it."""
    assert_type(Happened(1), Happened)
    Happened("1")  # type: ignore[arg-type]  # mypy must check the fields
    # mypy does not resolve a class decorator that is a method of an object (python/mypy#16527). If mypy does it one
    # day, it reports this ignore, and README.md and docs/how-to.md need no @dataclass any more.
    Plain(1)  # type: ignore[call-arg]


def types_of_any() -> None:
    """Never run: mypy reads it."""
    # ``Any`` may be a coroutine or not, so both overloads fit, and for a type checker the task is ``Any``.
    assert_type(anything, Any)
    assert_type(something.submit(1), JobHandle[object])
    something.submit("1")  # type: ignore[arg-type]  # mypy must check this submission


def types_of_subclasses() -> None:
    """Never run: mypy reads it."""
    handles: list[JobHandle[int]] = [flag.submit()]  # a bool is an int, so its handle is a handle of an int
    requests: list[JobRequest[int]] = [flag.job()]
    tasks: list[Task[[], int]] = [flag]
    assert_type(handles[0].result(), int)
    assert_type(requests[0].task, Task[Any, int])
    assert_type(tasks[0].submit().result(), int)


def test_the_class_of_a_task_agrees_with_its_type() -> None:
    """With and without options, a plain function becomes a `PlainTask` and a coroutine function an `AsyncTask`."""
    assert type(plain) is PlainTask
    assert type(coroutine) is AsyncTask
    assert type(handler) is AsyncTask
    assert plain(3) == Report(3, dt.date(2026, 1, 2))


def wrapped(fn: Callable[[int], Awaitable[Report]]) -> Callable[[int], Awaitable[Report]]:
    """A decorator whose wrapper is no coroutine function."""

    def around(rows: int) -> Awaitable[Report]:
        return fn(rows)

    return around


def _coroutine(rows: int) -> Coroutine[Any, Any, Report]:
    return coroutine(rows)


@pytest.mark.parametrize("fn", [plain.fn, coroutine.fn, wrapped(coroutine), _coroutine])
def test_a_result_is_decoded_as_the_type_inside_awaitable_or_coroutine(fn: Callable[..., Any]) -> None:
    """The functions return the result itself, an ``Awaitable`` or a ``Coroutine``."""
    task = App("others").task(fn)
    assert task.decode_result({"rows": 3, "on": "2026-01-02"}, "1") == Report(3, dt.date(2026, 1, 2))


def _python_in(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_first_examples_pass_a_strict_type_checker(tmp_path: Path) -> None:
    """The first examples of README.md and docs/tutorial.md pass mypy --strict unchanged."""
    readme = _python_in("README.md")[0]
    shop, own_code = _python_in("docs/tutorial.md")[:2]
    given = 'async def deliver(to: str, template: str) -> str: ...\n\n\nrecipients = ["c@example.org"]\n'
    inside = "async def example() -> None:\n" + textwrap.indent(readme, "    ")
    for name, code in {"shop": shop, "own_code": own_code, "readme": f"{given}\n\n{inside}"}.items():
        (tmp_path / f"{name}.py").write_text(code, "utf-8")
    files = [str(each) for each in sorted(tmp_path.glob("*.py"))]
    mypy = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--disable-error-code=empty-body"]
    done = subprocess.run([*mypy, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
