"""What becomes of a job after its code ended."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.outcome import (
    MESSAGE_LIMIT,
    TRACEBACK_LIMIT,
    UNKNOWN_TASK_TAG,
    Failed,
    Retried,
    Snoozed,
    decide,
    error_info,
    judge,
    unknown_task,
)
from jobledger.errors import type_of
from jobledger.retry import Reject, Retry, RetryLater, Snooze
from tests.evil import EXCEPTIONS

PLAIN = Retry(max_attempts=3, initial=10.0, factor=2.0, cap=300.0, jitter=False, never=(KeyError,))


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("held", lambda: None)


def test_an_error_is_retried_after_its_backoff_until_attempts_run_out() -> None:
    """Attempts 1 and 2 of 3 are followed by another, the third is the last."""
    outcomes = [decide(PLAIN, attempt, ValueError("x"), 0.0) for attempt in (1, 2, 3)]
    assert [o.delay_ms for o in outcomes[:2] if isinstance(o, Retried)] == [10_000, 20_000]
    assert isinstance(outcomes[2], Failed)
    assert outcomes[2].reason == "exhausted"
    assert outcomes[2].error.type == "ValueError"


def test_errors_outside_the_policy_fail_at_once() -> None:
    """`never` wins over `on`, and what `on` does not name is not retried."""
    for error in (KeyError("k"), SystemExit(3), KeyboardInterrupt()):
        outcome = decide(PLAIN, 1, error, 0.0)
        assert isinstance(outcome, Failed)
        assert outcome.reason == "never"


def test_reject_fails_at_once_and_names_its_reason() -> None:
    """`Reject` needs no attempts to be left."""
    outcome = decide(PLAIN, 1, Reject("no such city"), 0.0)
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.error.message) == ("rejected", "no such city")


def test_retry_later_burns_attempts_and_snooze_does_not() -> None:
    """`RetryLater` keeps its own delay and ends with the attempts; `Snooze` goes on for ever."""
    assert decide(PLAIN, 2, RetryLater(1.5), 0.9) == Retried(error_info(RetryLater(1.5)), 1500)
    last = decide(PLAIN, 3, RetryLater(1.5), 0.9)
    assert isinstance(last, Failed)
    assert last.reason == "exhausted"
    assert decide(PLAIN, 99, Snooze(2, "later"), 0.9) == Snoozed(2000, "later")


def test_a_timeout_is_retried_and_names_itself_when_it_is_the_last() -> None:
    """A task's time limit counts as `TimeoutError`; a `TimeoutError` of its own is any error."""
    assert isinstance(decide(PLAIN, 1, TimeoutError(), 0.0, timed_out=True), Retried)
    last = decide(PLAIN, 3, TimeoutError(), 0.0, timed_out=True)
    own = decide(PLAIN, 3, TimeoutError(), 0.0)
    assert isinstance(last, Failed)
    assert isinstance(own, Failed)
    assert (last.reason, own.reason) == ("timeout", "exhausted")


def test_a_cancellation_from_inside_is_a_failed_attempt() -> None:
    """Code that cancelled itself is tried again like code that raised."""
    assert isinstance(decide(PLAIN, 1, asyncio.CancelledError(), 0.0), Retried)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.integers(1, 50))
def test_delays_stay_within_the_policy(attempt: int, uniform: float, attempts: int) -> None:
    """Any attempt and any chance give a delay between half the initial one and the cap, or the end."""
    retry = Retry(max_attempts=attempts, initial=2.0, factor=3.0, cap=60.0)
    outcome = decide(retry, attempt, ValueError(), uniform)
    if isinstance(outcome, Retried):
        assert attempt < attempts
        assert timedelta(seconds=1) <= timedelta(milliseconds=outcome.delay_ms) <= timedelta(seconds=60)
    else:
        assert attempt >= attempts


@pytest.mark.parametrize("error", [Unprintable(), Unpicklable(), ValueError("\ud800 lone"), BaseException()])
def test_every_exception_becomes_text(error: BaseException) -> None:
    """Exceptions that cannot be printed, pickled or encoded still say what they were."""
    info = error_info(error)
    assert info.type.endswith(type(error).__qualname__)
    info.message.encode()
    (info.traceback or "").encode()


def test_long_texts_are_cut() -> None:
    """A message keeps its beginning, a traceback its end."""
    try:
        raise ValueError("a" * 100_000 + "z")
    except ValueError as error:
        info = error_info(error)
    assert info.message == "a" * MESSAGE_LIMIT
    assert info.traceback is not None
    assert len(info.traceback) == TRACEBACK_LIMIT
    assert info.traceback.endswith("z\n")


def test_an_unknown_task_is_snoozed_with_backoff_and_then_fails() -> None:
    """A task that no deployment brings is given up after the bound, a task on its way is waited for."""
    backoff = Retry(max_attempts=3, initial=10, factor=2, cap=600, jitter=False)
    tags: dict[str, str] = {"tenant": "acme"}
    delays = []
    while True:
        outcome = unknown_task("lost", ["known"], tags, backoff, 0.0)
        if isinstance(outcome, Failed):
            break
        delays.append(outcome.delay_ms)
        assert outcome.tags is not None
        tags = dict(outcome.tags)
    assert delays == [10_000, 20_000, 40_000]
    assert tags == {"tenant": "acme", UNKNOWN_TASK_TAG: "3"}
    assert outcome.reason == "unknown-task"
    assert "known" in outcome.error.message


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_that_breaks_when_it_is_looked_at_is_judged(name: str) -> None:
    """By its type, as any other; its text and its traceback say what can be said."""
    try:
        raise EXCEPTIONS[name]()
    except BaseException as caught:  # noqa: BLE001  # what breaks would break pytest's own look at it
        error = caught
    outcome = judge(PLAIN, 3, error, 0.0)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "exhausted"
    assert outcome.error.type.endswith(type_of(error))
    assert "test_outcome.py" in (outcome.error.traceback or "")
    assert isinstance(judge(PLAIN, 1, error, 0.0), Retried)


class SpoiltSnooze(Snooze):
    def __init__(self, delay: object) -> None:
        self.delay = delay  # type: ignore[assignment]


@pytest.mark.parametrize("delay", [None, "soon", float("nan"), 1e300, -1, True])
def test_a_word_to_the_worker_that_makes_no_sense_fails_the_job(delay: object) -> None:
    """A subclass of `Snooze` whose delay is none: the job fails, and its error tells why."""
    outcome = judge(PLAIN, 1, SpoiltSnooze(delay), 0.0)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "never"
    assert "what it means for the job cannot be told" in outcome.error.message


def test_a_traceback_shows_its_causes_unless_they_are_too_many() -> None:
    """Ten causes are shown, of a chain of thousands only the last exception."""

    def chained(length: int) -> str:
        error = ValueError("number 0")
        for number in range(1, length):
            after = ValueError(f"number {number}")
            after.__cause__ = after.__context__ = error
            error = after
        return error_info(error).traceback or ""

    assert all(f"number {n}" in chained(10) for n in range(10))
    assert chained(5_000) == "ValueError: number 4999\n"
