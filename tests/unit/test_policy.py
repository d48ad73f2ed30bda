"""The checks of policies: impossible options, and options that exclude each other, are refused when the app is loaded,
with a remedy."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from jobledger import Adaptive, App, BadArguments, Breaker, ConfigError, Queue, Settings
from jobledger.consumers.state.outcome import Cancelled, Failed, Retried, Snoozed, Succeeded, answered, holding
from jobledger.definitions.policy import Limits, parse_rate, parse_size
from jobledger.schemas.events import ErrorInfo, JobSpec, lasting


def app_of(**options: Any) -> App:
    return App("shop", settings=Settings(bootstrap="127.0.0.1:1"), **options)


def task_of(app: App, fn: Any = None, **options: Any) -> Any:
    """Return a task; the options may be some that ``App.task`` does not have."""
    return app.registry.add(fn or ship, **options)


async def ship(order: str, to: str = "home") -> None:
    """A coroutine as a task."""


def ship_in_thread(order: str) -> None:
    """A plain function as a task."""


def test_long_jobs_are_leased() -> None:
    """A task is long if its time limit is above a minute, or with `long=True`. The options reach the task."""
    assert task_of(app_of(), ship_in_thread, long=True, lease=10).policy.lease == 10
    assert task_of(app_of(), ship_in_thread, timeout=61).policy.long
    assert not task_of(app_of(), ship_in_thread, timeout=60).policy.long
    with pytest.raises(ConfigError, match="lease=1 is not a number of seconds from 5 to 3600"):
        app_of().task(long=True, lease=1)(ship_in_thread)


@pytest.mark.parametrize(
    ("rate", "a_second"),
    [("100/s", 100.0), ("30/min", 0.5), ("30/m", 0.5), ("3600/h", 1.0), (" 86400 / d ", 1.0), (7, 7.0)],
)
def test_rates_are_read(rate: Any, a_second: float) -> None:
    """A rate is a number, a slash and a unit. A number alone counts for a second."""
    assert parse_rate(rate) == a_second


@pytest.mark.parametrize("rate", ["fast", "0/s", "-1/s", 0, -1, float("nan"), float("inf"), True, "10/week", None])
def test_a_wrong_rate_is_refused(rate: Any) -> None:
    """The error has the value and an example."""
    with pytest.raises(ConfigError, match=r"is not a rate: write '100/s'"):
        parse_rate(rate)


def test_sizes_are_read() -> None:
    """The units are powers of two and of ten. Anything else is refused."""
    assert [parse_size(s) for s in ("512MiB", "2GB", "1.5 KiB", 7)] == [512 * 2**20, 2 * 10**9, 1536, 7]
    for wrong in ("much", "0", 0, True, "5 miles"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key": "order"}, "needs a timeout of at most 60 s"),
        ({"key": "order", "timeout": 61}, "needs a timeout of at most 60 s"),
        ({"key": "order", "timeout": 5, "priority": "high"}, "use either a key or a priority"),
        ({"key": "no such", "timeout": 5}, "is not one of its parameters"),
        ({"key": "", "timeout": 5}, "neither the name of a parameter nor a function"),
        ({"key": "order", "timeout": 5, "key_hold_max": 0}, "key_hold_max=0"),
        ({"priority": "urgent"}, "not 'high', 'normal' or 'low'"),
        ({"rate": "often"}, "is not a rate"),
        ({"concurrency": 0}, "concurrency=0 is not a whole number"),
        ({"isolation": "container"}, "is not 'process'"),
        ({"max_memory": "1GiB"}, "needs isolation='process'"),
        ({"isolation": "process", "max_memory": "much"}, "is not a size"),
        ({"timeout": 90, "long": False}, "long=False is not possible"),
        ({"long": True, "lease": 1}, "lease=1 is not a number of seconds from 5"),
        ({"expires_in": -1}, "expires_in=-1"),
        ({"adaptive": 5}, "neither True nor a Adaptive"),
        ({"breaker": "yes"}, "neither True nor a Breaker"),
    ],
)
def test_wrong_options_of_a_task_are_refused(options: dict[str, Any], says: str) -> None:
    """The error names the option, with a remedy."""
    with pytest.raises(ConfigError, match=says):
        task_of(app_of(), **options)


def test_a_key_for_a_plain_function_is_refused() -> None:
    """A thread cannot be ended, so a job in a thread could hold its key forever."""
    with pytest.raises(ConfigError, match="make the task `async def`, or give it isolation='process'"):
        app_of().task(key="order", timeout=5)(ship_in_thread)
    with pytest.raises(ConfigError, match="make the task `async def`"):
        app_of().task(key="order")(ship_in_thread)
    assert task_of(app_of(), ship_in_thread, key="order", timeout=5, isolation="process").policy.key == "order"


def test_contradicting_bounds_of_adaptive_and_breaker_are_refused() -> None:
    """`True` means the default policy."""
    for make, says in (
        (lambda: Adaptive(least=5, most=2), "least=5"),
        (lambda: Adaptive(tolerance=1.0), "tolerance"),
        (lambda: Adaptive(backoff=1.5), "backoff"),
        (lambda: Adaptive(least=0), "least=0"),
        (lambda: Breaker(failures=0), "failures=0"),
        (lambda: Breaker(reset=0), "reset=0"),
    ):
        with pytest.raises(ConfigError, match=says):
            make()
    policy = app_of().task(adaptive=True, breaker=True)(ship).policy
    assert (policy.adaptive, policy.breaker) == (Adaptive(), Breaker())


def test_a_limit_below_the_number_of_partitions_is_refused() -> None:
    """Each partition has a share of the limit. The error has a possible number of partitions."""
    app = app_of(queues=[Queue("mail", 6, concurrency=5)])
    with pytest.raises(ConfigError, match=r"fewer partitions, for example Queue\('mail', partitions=5\)"):
        app.check()
    app = app_of(queues=[Queue("mail", 6, priorities=True)])
    app.task(queue="mail", concurrency=17)(ship)
    with pytest.raises(ConfigError, match=r"the 18 partitions, those of all priorities counted, .*partitions=5"):
        app.check()
    app_of(queues=[Queue("mail", 6, concurrency=6)]).check()


def test_keys_come_from_a_parameter_or_a_function() -> None:
    """A key is a whole number or a short text. The submission refuses any other key."""
    app = app_of()
    by_name = app.task(name="a", key="order", timeout=5)(ship)
    assert by_name.job("o-1").key == "o-1"
    assert by_name.using(key="other").job("o-1").key == "other"
    by_function = app.task(name="b", key=lambda order, to="home": f"{to}/{order}", timeout=5)(ship)
    assert by_function.job("o-1", to="x").key == "x/o-1"
    assert by_function.job("o-1").key == "home/o-1"
    with pytest.raises(BadArguments, match="has the ordering key 'to', which was not given"):
        app.task(name="c", key="to", timeout=5)(ship).job("o-1")
    with pytest.raises(BadArguments, match="1 to 500 characters"):
        by_name.job("x" * 501)
    for wrong in ("", "x" * 501, 5):
        with pytest.raises(ConfigError, match="1 to 500 characters"):
            by_name.using(key=wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ConfigError, match="needs a timeout"):
        app.task(name="d")(ship).using(key="k")


def test_a_priority_needs_a_queue_with_priorities() -> None:
    """The priorities of a declared queue must be declared, too. An undeclared queue has priorities if a task has
    one."""
    app = app_of(queues=["mail"])
    with pytest.raises(ConfigError, match=r"declare it as Queue\('mail', priorities=True\)"):
        app.task(queue="mail", priority="high")(ship)
    task = app.task(queue="mail")(ship)
    with pytest.raises(ConfigError, match="has no priorities"):
        task.using(priority="low")
    assert task.using(priority="normal").job("o").priority is None
    free = app_of()
    assert free.task(priority="high")(ship).job("o").priority == "high"
    assert list(free.lanes) == ["default.high", "default", "default.low"]


def test_a_limited_task_stays_in_its_queue() -> None:
    """The limit is shared among the partitions of the task's own queue."""
    app = app_of(queues=["mail", "other"])
    task = app.task(queue="mail", rate="5/s")(ship)
    with pytest.raises(ConfigError, match="has limits, which are shared among the partitions of its queue 'mail'"):
        task.using(queue="other")
    assert Limits.of("5/s", None, "x")
    assert not Limits()


ERROR = ErrorInfo("E", "no")


def test_a_wait_in_place_is_limited_by_the_longest_time_for_a_key() -> None:
    """A retry or snooze is in place if its wait fits into `key_hold_max`. Otherwise the job fails, with its error or
    the reason of its wait."""
    assert holding(Retried(ERROR, 2000), 3.0, 5.0, "k") == Retried(ERROR, 2000, in_place=True)
    assert holding(Retried(ERROR, 2001), 3.0, 5.0, "k") == Failed("key-held", ERROR)
    assert holding(Snoozed(1000, "night"), 0.0, 5.0, "k") == Snoozed(1000, "night", in_place=True)
    late = holding(Snoozed(9000, "night"), 0.0, 5.0, "k")
    assert isinstance(late, Failed)
    assert "snooze of 9 s would hold key 'k' for more than key_hold_max=5 s: night" in late.error.message
    unknown = holding(Snoozed(9000, "unknown-task"), 0.0, 5.0, "k")
    assert isinstance(unknown, Failed)
    assert unknown.reason == "unknown-task"


@pytest.mark.parametrize(
    ("concurrency", "advice"),
    [(2, "use a queue without priorities"), (5, "for example Queue('mail', partitions=1)")],
)
def test_the_advice_for_a_limit_that_is_too_low_helps(concurrency: int, advice: str) -> None:
    """A queue with priorities has at least three partitions, so fewer partitions cannot help a limit of two."""
    with pytest.raises(ConfigError, match=re.escape(advice)):
        app_of(queues=[Queue("mail", 2, priorities=True, concurrency=concurrency)]).check()


def test_only_success_and_failure_count_as_answers_of_the_called_service() -> None:
    """Outcomes that people or the job itself decided do not count."""
    assert answered(None) is True
    assert answered(Succeeded()) is True
    assert answered(Retried(ERROR, 1)) is False
    assert answered(Failed("exhausted", ERROR)) is False
    assert [answered(o) for o in (Snoozed(1), Cancelled("ann"), Failed("rejected", ERROR))] == [None] * 3


def test_a_relative_expiry_becomes_a_time_once() -> None:
    """The expiry counts from the append time of the submission. An expiry that is a time already does not change."""
    assert lasting(JobSpec(b"{}", expires_in_ms=500), 1_000) == JobSpec(b"{}", expires_at=1_500_000)
    assert lasting(JobSpec(b"{}", expires_at=7), 1_000) == JobSpec(b"{}", expires_at=7)
    assert lasting(JobSpec(b"{}", expires_in_ms=500, expires_at=7), 1_000) == JobSpec(b"{}", expires_at=7)


def test_a_policy_does_not_change_the_function() -> None:
    """A direct call of the task calls its function."""
    task = app_of().task(key="order", timeout=5, rate="1/d")(ship)
    assert asyncio.run(task("o")) is None
