"""The outcome of an attempt, from the exception of its code."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.state.outcome import (
    MESSAGE_LIMIT,
    TRACEBACK_LIMIT,
    Failed,
    Retried,
    Snoozed,
    decide,
    error_info,
    judge,
    ran_out,
    unknown_task,
)
from jobledger.definitions.retry import Reject, Retry, RetryLater, Snooze
from jobledger.errors import TaskTimedOut, type_of
from jobledger.schemas.events import UNKNOWN_TASK_TAG
from tests.evil import EXCEPTIONS

PLAIN = Retry(max_attempts=3, initial=10.0, factor=2.0, cap=300.0, jitter=False, never=(KeyError,))


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("held", lambda: None)


def test_an_error_is_retried_after_its_backoff_until_attempts_run_out() -> None:
    """Attempts 1 and 2 of 3 are retried, and the third is the last one."""
    outcomes = [decide(PLAIN, attempt, ValueError("x"), 0.0) for attempt in (1, 2, 3)]
    assert [o.delay_ms for o in outcomes[:2] if isinstance(o, Retried)] == [10_000, 20_000]
    assert isinstance(outcomes[2], Failed)
    assert outcomes[2].reason == "exhausted"
    assert outcomes[2].error.type == "ValueError"


def test_errors_outside_the_policy_fail_at_once() -> None:
    """`never` wins over `on`, and an exception that `on` does not cover is not retried."""
    for error in (KeyError("k"), SystemExit(3), KeyboardInterrupt()):
        outcome = decide(PLAIN, 1, error, 0.0)
        assert isinstance(outcome, Failed)
        assert outcome.reason == "never"


def test_reject_fails_at_once_and_names_its_reason() -> None:
    """The job fails although attempts are left."""
    outcome = decide(PLAIN, 1, Reject("no such city"), 0.0)
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.error.message) == ("rejected", "no such city")


def test_retry_later_counts_as_an_attempt_and_snooze_does_not() -> None:
    """`RetryLater` has its own delay, and fails the last attempt. `Snooze` may be repeated forever."""
    assert decide(PLAIN, 2, RetryLater(1.5), 0.9) == Retried(error_info(RetryLater(1.5)), 1500)
    last = decide(PLAIN, 3, RetryLater(1.5), 0.9)
    assert isinstance(last, Failed)
    assert last.reason == "exhausted"
    assert decide(PLAIN, 99, Snooze(2, "later"), 0.9) == Snoozed(2000, "later")


def test_a_timeout_is_retried_and_the_last_one_fails_the_job_as_timeout() -> None:
    """The end of a task's time limit counts as `TimeoutError`. A `TimeoutError` that the code raises is an ordinary
    error."""
    assert isinstance(decide(PLAIN, 1, TimeoutError(), 0.0, timed_out=True), Retried)
    last = decide(PLAIN, 3, TimeoutError(), 0.0, timed_out=True)
    own = decide(PLAIN, 3, TimeoutError(), 0.0)
    assert isinstance(last, Failed)
    assert isinstance(own, Failed)
    assert (last.reason, own.reason) == ("timeout", "exhausted")


def test_a_cancellation_by_the_jobs_own_code_is_a_failed_attempt() -> None:
    """Such an attempt is retried like one that raised an error."""
    assert isinstance(decide(PLAIN, 1, asyncio.CancelledError(), 0.0), Retried)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.integers(1, 50))
def test_delays_stay_within_the_policy(attempt: int, uniform: float, attempts: int) -> None:
    """For any attempt and any random number, the delay is between half the initial delay and the cap, or the job
    fails."""
    retry = Retry(max_attempts=attempts, initial=2.0, factor=3.0, cap=60.0)
    outcome = decide(retry, attempt, ValueError(), uniform)
    if isinstance(outcome, Retried):
        assert attempt < attempts
        assert timedelta(seconds=1) <= timedelta(milliseconds=outcome.delay_ms) <= timedelta(seconds=60)
    else:
        assert attempt >= attempts


@pytest.mark.parametrize("error", [Unprintable(), Unpicklable(), ValueError("\ud800 lone"), BaseException()])
def test_every_exception_becomes_text(error: BaseException) -> None:
    """Also for an exception that cannot be printed, pickled or encoded, the text has the type."""
    info = error_info(error)
    assert info.type.endswith(type(error).__qualname__)
    info.message.encode()
    (info.traceback or "").encode()


def test_long_texts_are_cut() -> None:
    """A message is cut at its end, and a traceback at its beginning."""
    try:
        raise ValueError("a" * 100_000 + "z")
    except ValueError as error:
        info = error_info(error)
    assert info.message == "a" * MESSAGE_LIMIT
    assert info.traceback is not None
    assert len(info.traceback) == TRACEBACK_LIMIT
    assert info.traceback.endswith("z\n")


def test_an_unknown_task_is_snoozed_with_backoff_and_then_fails() -> None:
    """A deployment may add the task later, so the job waits. It fails when the bound is reached."""
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
def test_an_exception_whose_methods_raise_is_judged_by_its_type(name: str) -> None:
    """Its text and its traceback have everything that can be read."""
    try:
        raise EXCEPTIONS[name]()
    except BaseException as caught:  # noqa: BLE001  # pytest itself could not show this exception
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
def test_a_snooze_with_a_wrong_delay_fails_the_job(delay: object) -> None:
    """A user's subclass of `Snooze` may set a wrong delay. The error of the job has the reason."""
    outcome = judge(PLAIN, 1, SpoiltSnooze(delay), 0.0)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "never"
    assert "Jobledger could not examine this exception" in outcome.error.message


def test_a_traceback_shows_its_causes_unless_they_are_too_many() -> None:
    """Ten causes are shown. Of a chain of thousands, only the last exception is shown."""

    def chained(length: int) -> str:
        error = ValueError("number 0")
        for number in range(1, length):
            after = ValueError(f"number {number}")
            after.__cause__ = after.__context__ = error
            error = after
        return error_info(error).traceback or ""

    assert all(f"number {n}" in chained(10) for n in range(10))
    assert chained(5_000) == "ValueError: number 4999\n"


#: The exceptions of a group, by the outcome that they decide; the gravest first.
LEAVES: dict[str, list[BaseException]] = {
    "rejected": [Reject("no such city")],
    "never": [KeyError("k"), SystemExit(1)],
    "failed": [ValueError("x"), TimeoutError(), asyncio.CancelledError()],
    "later": [RetryLater(7), RetryLater(2)],
    "snooze": [Snooze(30, "a"), Snooze(30, "b"), Snooze(4)],
}
ANY_LEAF = st.sampled_from([leaf for some in LEAVES.values() for leaf in some])


@st.composite
def nested(draw: st.DrawFn, given: list[BaseException]) -> BaseException:
    """A group with these leaves, in any order and with any nesting."""
    rest = list(draw(st.permutations(given)))
    while len(rest) > 1 or draw(st.booleans()):
        count = draw(st.integers(1, len(rest)))
        rest = [BaseExceptionGroup("g", rest[:count]), *rest[count:]]
        rest = list(draw(st.permutations(rest)))
    return rest[0] if len(rest) == 1 else BaseExceptionGroup("g", rest)


def of_group(attempt: int, given: list[BaseException]) -> tuple[str, int | None]:
    """Return the expected outcome and delay of a group with these leaves."""
    kinds = {kind for kind, some in LEAVES.items() if any(leaf in some for leaf in given)}
    asked = [leaf.delay for leaf in given if isinstance(leaf, RetryLater | Snooze)]
    if kinds & {"rejected", "never"}:
        return ("rejected" if "rejected" in kinds else "never"), None
    if kinds == {"snooze"}:
        return "snoozed", round(max(asked) * 1000)
    if attempt >= PLAIN.max_attempts:
        return "exhausted", None
    return "retried", round(max(asked) * 1000) if asked else round(PLAIN.delay_after(attempt, 0.0) * 1000)


@given(st.data(), st.integers(1, 4), st.lists(ANY_LEAF, min_size=1, max_size=6))
def test_the_outcome_of_an_exception_group_depends_only_on_its_leaves(
    data: st.DataObject, attempt: int, given: list[BaseException]
) -> None:
    """The order and the nesting of the leaves do not matter. `Reject`, or else an exception that is not retried, fails
    the job. If all leaves are `Snooze`, the job is snoozed. Otherwise the attempt failed, and the longest requested
    delay or the backoff counts."""
    error = data.draw(nested(given))
    outcome = decide(PLAIN, attempt, error, 0.0)
    match outcome:
        case Failed(reason, info):
            decided: tuple[str, int | None] = (reason, None)
        case Retried(info, delay_ms):
            decided = ("retried", delay_ms)
        case Snoozed(delay_ms):
            assert outcome == decide(PLAIN, attempt, BaseExceptionGroup("flat", given), 0.0)
            assert ("snoozed", delay_ms) == of_group(attempt, given)
            return
    assert decided == of_group(attempt, given)
    for leaf in given:
        assert (
            f"{type(leaf).__name__}: {leaf}" if isinstance(error, BaseExceptionGroup) else str(leaf)
        ) in info.message


def test_a_retry_policy_may_name_a_class_of_exception_groups() -> None:
    """In `on`, the class covers all exceptions of the group except `Reject`, `RetryLater` and those that `never` names.
    In `never`, the class fails the job."""

    class Ours(ExceptionGroup[Exception]):
        pass

    group = Ours("g", [ValueError(), ExceptionGroup("inner", [OSError()])])
    for policy, retried in (
        (Retry(on=(OSError,)), False),
        (Retry(on=(OSError, ValueError)), True),
        (Retry(on=(Ours,)), True),
        (Retry(on=(Ours,), never=(OSError,)), False),
        (Retry(never=(Ours,)), False),
        (Retry(never=(ExceptionGroup,)), False),
    ):
        assert policy.retries(group) is retried
        assert isinstance(decide(policy, 1, group, 0.0), Retried if retried else Failed)
    assert isinstance(decide(Retry(on=(OSError,)), 1, ExceptionGroup("g", [RetryLater(1), OSError()]), 0.0), Retried)
    rejected = decide(Retry(on=(Ours,)), 1, Ours("g", [Reject("no")]), 0.0)
    assert isinstance(rejected, Failed)
    assert rejected.reason == "rejected"


def test_the_message_of_a_large_exception_group_is_cut() -> None:
    """The message has as many leaves as fit."""
    info = error_info(ExceptionGroup("many", [ValueError(n) for n in range(100_000)]))
    assert info.message.startswith("many (100000 sub-exceptions): ValueError: 0; ValueError: 1; ")
    assert len(info.message) == MESSAGE_LIMIT


def test_a_time_limit_inside_an_exception_group_is_recognised() -> None:
    """The last attempt fails as `timeout`, also if the code put the exception of its time limit into a group."""
    group = BaseExceptionGroup("g", [TaskTimedOut()])
    assert ran_out(group)
    last = decide(PLAIN, 3, group, 0.0, timed_out=True)
    assert isinstance(last, Failed)
    assert last.reason == "timeout"
    assert isinstance(decide(PLAIN, 1, group, 0.0, timed_out=True), Retried)
