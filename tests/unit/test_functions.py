"""The functions that may be tasks, hooks and folds; and the forms of a time span."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import enum
import fractions
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table

from jobledger import App, Breaker, Queue, Retry, RetryLater, Settings, Snooze
from jobledger.definitions.context import current_job, enter
from jobledger.definitions.middleware import runner
from jobledger.definitions.policy import check_expiry
from jobledger.errors import ConfigError
from tests.running_job import running_job


def shop() -> App:
    """Return an app that does not connect."""
    return App("shop", settings=Settings())


def plain(x: int) -> int:
    """A plain function."""
    return x


def generates(x: int) -> Iterator[int]:
    """A generator: its code runs only in an iteration."""
    yield x


async def generates_async(x: int) -> AsyncIterator[int]:
    """An async generator."""
    yield x


async def coroutine(x: int) -> int:
    """An async function."""
    await asyncio.sleep(0)
    return x + 1


class Service:
    """A class with all kinds of methods, and with objects that can be called."""

    def __call__(self, x: int) -> int:
        return x

    def method(self, x: int) -> int:
        """A method of an object."""
        return x

    @classmethod
    def of_class(cls, x: int) -> int:
        """A class method."""
        return x

    @staticmethod
    def of_nobody(x: int) -> int:
        """A static method, which is a plain function."""
        return x


REFUSED: list[tuple[Any, str]] = [
    (generates, "generates is a generator.*none of its code"),
    (generates_async, "generates_async is a generator"),
    (Service.method, r"Service\.method is a method, and a job has no self"),
    (Service().method, r"Service\.method is a method.*Depends"),
    (Service.of_class, r"Service\.of_class is a method"),
    (Service().of_class, r"Service\.of_class is a method"),
    (staticmethod(plain), "plain is a staticmethod"),
    (classmethod(coroutine), "coroutine is a classmethod"),  # type: ignore[arg-type]  # wrong on purpose
    (Service(), "is a callable object"),
    (Service, "Service is a class"),
    (functools.partial(plain, 1), r"partial\(plain, …\) is a partial.*write a function"),
    (functools.partial(generates, 1), "partial"),
    (print, "print is a builtin"),
    ([].append, "append is a"),
    (7, "7 is not a function"),
]


@pytest.mark.parametrize(
    ("given", "expected"), REFUSED, ids=lambda v: getattr(v, "__qualname__", None) or type(v).__name__
)
@pytest.mark.parametrize("name", [None, "named"])
def test_a_task_that_a_worker_could_not_run_is_refused_when_it_is_declared(
    given: Any, expected: str, name: str | None
) -> None:
    """Generators, methods, partials, classes and objects are refused. Each error has a remedy."""
    with pytest.raises(ConfigError, match=expected):
        shop().task(name=name)(given)


def test_a_task_cannot_be_declared_as_a_task_again() -> None:
    """The task's function can be declared again."""
    task = shop().task(plain)
    with pytest.raises(ConfigError, match=r"is a task already.*task\.fn"):
        shop().task(task)
    assert shop().task(task.fn)(3) == 3


def test_static_decorated_cached_and_lambda_functions_can_be_tasks() -> None:
    """Plain functions and coroutines can be tasks, too."""
    app = shop()
    for given in (plain, coroutine, Service.of_nobody, functools.cache(plain), lambda x: x):
        app.task(name=f"t{len(app.tasks)}")(given)
    assert [task.is_async for task in app.tasks.values()] == [False, True, False, False, False]


def unawaited(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper is no coroutine function."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def test_hooks_of_a_plain_function_that_returns_a_coroutine_run_after_its_end() -> None:
    """The coroutine is awaited before the hooks that run after the task's code: here in a new event loop, in a worker
    in the worker's loop."""
    app = shop()
    reported: list[Any] = []

    @app.middleware
    class Says:
        def after(self, job: Any, result: Any) -> None:
            reported.append((job.job_id, result))

    task = app.task(name="task")(unawaited(coroutine))
    assert not task.is_async
    enter(running_job("00000000-0000-7000-8000-000000000001"))
    try:
        assert runner(task, app.registry.hooks)(x=1) == 2
        assert reported == [(current_job().job_id, 2)]
    finally:
        enter(None)


def test_an_async_function_or_generator_is_refused_where_a_value_is_needed() -> None:
    """This holds for keys, folds, hooks and the function that chooses the tasks of a hook. A coroutine object would be
    a true value or a key."""
    app = shop()
    with pytest.raises(ConfigError, match=r"key=….*coroutine is async"):
        app.task(key=coroutine, timeout=5)(coroutine)
    with pytest.raises(ConfigError, match=r"tasks=….*coroutine is async"):
        app.registry.hooks.add_around(generates, coroutine)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ConfigError, match=r"before is a generator"):

        @app.middleware
        class Wrong:
            def before(self, job: Any) -> Iterator[None]:
                yield

    @app.event
    @dataclasses.dataclass(frozen=True)
    class Sent:
        n: int

    table = Table("sent", MetaData(), Column("n", Integer, primary_key=True))

    async def fold(row: Any, event: Sent) -> Any:
        return row

    with pytest.raises(ConfigError, match=r"the fold.*is async"):
        app.projection(Sent, table=table, key=lambda event: event.n)(fold)


class Many(enum.Enum):
    MINUTE = dt.timedelta(minutes=1)


class Float(float):
    """A subclass of float, like numpy's."""


SPANS = [dt.timedelta(minutes=1), Float(60.0), fractions.Fraction(60), 60, 60.0]


@pytest.mark.parametrize("span", SPANS, ids=lambda v: type(v).__name__)
def test_a_time_span_is_a_number_of_seconds_or_a_timedelta(span: Any) -> None:
    """This holds for delays, expiries, time limits, leases, retries, snoozes and breakers."""
    app = shop()
    task = app.task(timeout=span, lease=span, key_hold_max=span, expires_in=span, breaker=Breaker(reset=span))(plain)
    assert task.timeout == task.policy.lease == task.policy.key_hold_max == task.policy.expires_in == 60.0
    assert task.policy.breaker is not None
    assert task.policy.breaker.reset == 60.0
    request = task.using(delay=span, expires_in=span).job(1)
    assert (request.delay_ms, request.expires_in_ms) == (60_000, 60_000)
    retry = Retry(initial=span, cap=span)
    assert (retry.initial, retry.cap) == (60.0, 60.0)
    assert (RetryLater(span).delay, Snooze(span).delay) == (60.0, 60.0)
    assert str(RetryLater(span)) == "retry in 60 s"
    assert check_expiry(span) == 60.0


@pytest.mark.parametrize("span", ["1", True, Many.MINUTE, dt.timedelta(-1), float("nan"), 1j], ids=str)
def test_a_wrong_time_span_is_refused_with_its_value(span: Any) -> None:
    """The error shows the given value."""
    app = shop()
    task = app.task(plain)
    gives: tuple[Callable[[], Any], ...] = (
        lambda: task.using(delay=span),
        lambda: task.using(expires_in=span),
        lambda: app.task(timeout=span)(plain),
        lambda: app.task(lease=span)(plain),
        lambda: Retry(initial=span),
        lambda: Snooze(span),
        lambda: Breaker(reset=span),
        lambda: app.client.wait("7", timeout=span),
        lambda: app.event(retention_days=span)(type("E", (), {"__annotations__": {"x": int}})),
    )
    for give in gives:
        with pytest.raises(ConfigError) as caught:
            give()
        assert repr(span) in str(caught.value)


def test_retention_days_are_a_number_or_a_timedelta() -> None:
    """`retention_days` is the time for which an event is kept."""
    app = shop()
    app.event(retention_days=dt.timedelta(days=7))(dataclasses.make_dataclass("Sent", [("n", int)]))
    assert app.events["Sent"].retention_days == 7.0


def test_names_may_be_members_of_an_enum() -> None:
    """The names of topics contain the text of the member, and not its formatted name."""

    class Names(str, enum.Enum):  # noqa: UP042  # an enum that is formatted as the member's name
        SHOP = "shop"
        MAIL = "mail"
        HIGH = "high"

    app = App(Names.SHOP, settings=Settings(), queues=[Queue(Names.MAIL, priorities=True)])
    task = app.task(queue=Names.MAIL, priority=Names.HIGH)(plain)  # type: ignore[call-overload]  # a member of an enum for a str
    request = task.using(queue=Names.MAIL).job(1)
    _, record = app.client._outgoing(request, None)
    assert record.topic == "shop.jobs.mail.high"
    assert sorted(app.lanes) == ["mail", "mail.high", "mail.low"]
