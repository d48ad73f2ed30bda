"""What a type checker is told of tasks, jobs and results; `make lint` runs mypy over this file."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, assert_type

import pytest

from jobledger import App, AsyncTask, JobHandle, JobRequest, PlainTask, Task

app = App("typed")


@dataclass
class Report:
    """What a job results in."""

    rows: int
    on: dt.date


@app.task
def plain(rows: int) -> Report:
    """A plain task without options."""
    return Report(rows, dt.date(2026, 1, 2))


@app.task(retry=2)
async def coroutine(rows: int) -> Report:
    """A task of a coroutine, with options."""
    return Report(rows, dt.date(2026, 1, 2))


@app.task
def flag() -> bool:
    """A task whose result is a subclass of another's."""
    return True


@app.event
@dataclass(frozen=True)
class Happened:
    """An event."""

    rows: int


@app.on(Happened)
async def handler(event: Happened) -> None:
    """A handler."""


def told_of_tasks() -> None:
    """Never run: mypy reads it."""
    direct: PlainTask[[int], Report] = plain
    awaited: AsyncTask[[int], Report] = coroutine
    handling: AsyncTask[[Happened], None] = handler
    both: list[Task[[int], Report]] = [direct, awaited]
    assert_type(both[0].submit(1), JobHandle[Report])
    assert_type(handling.submit(Happened(1)), JobHandle[None])


def told_of_calls() -> None:
    """Never run: mypy reads it."""
    assert_type(plain(1), Report)
    coroutines = [coroutine(1)]
    assert_type(coroutines, list[Coroutine[Any, Any, Report]])
    plain("1")  # type: ignore[arg-type]  # the point: a call is checked


async def told_of_jobs() -> None:
    """Never run: mypy reads it."""
    assert_type(await coroutine(1), Report)
    assert_type(plain.submit(1), JobHandle[Report])
    assert_type(await coroutine.submit_async(1), JobHandle[Report])
    assert_type(coroutine.using(delay=1).submit(1).result(), Report)
    assert_type(coroutine.job(1), JobRequest[Report])
    assert_type(app.submit_many(plain.job(n) for n in range(3)), list[JobHandle[Report]])
    coroutine.submit("1")  # type: ignore[arg-type]  # the point: a submission is checked


def told_of_variance() -> None:
    """Never run: mypy reads it."""
    handles: list[JobHandle[int]] = [flag.submit()]  # a bool is an int, so its handle is one of an int
    requests: list[JobRequest[int]] = [flag.job()]
    tasks: list[Task[[], int]] = [flag]
    assert_type(handles[0].result(), int)
    assert_type(requests[0].task, Task[Any, int])
    assert_type(tasks[0].submit().result(), int)


def test_the_class_of_a_task_is_what_the_checker_was_told() -> None:
    """A plain function makes a `PlainTask`, a coroutine function an `AsyncTask`, with and without options."""
    assert type(plain) is PlainTask
    assert type(coroutine) is AsyncTask
    assert type(handler) is AsyncTask
    assert plain(3) == Report(3, dt.date(2026, 1, 2))


def wrapped(fn: Callable[[int], Awaitable[Report]]) -> Callable[[int], Awaitable[Report]]:
    """A decorator that hides that its function is a coroutine's."""

    def around(rows: int) -> Awaitable[Report]:
        return fn(rows)

    return around


def _coroutine(rows: int) -> Coroutine[Any, Any, Report]:
    return coroutine(rows)


@pytest.mark.parametrize("fn", [plain.fn, coroutine.fn, wrapped(coroutine), _coroutine])
def test_a_result_comes_back_as_what_the_checker_was_told(fn: Callable[..., Any]) -> None:
    """What stands behind ``Awaitable`` and ``Coroutine`` is what the job results in."""
    task = App("others").task(fn)
    assert task.decode_result({"rows": 3, "on": "2026-01-02"}, "1") == Report(3, dt.date(2026, 1, 2))
