"""Defines the outcomes of a job as frozen values, and the rules that choose between them. Pure.

`jobledger.consumers.recording.worker_events` builds the records of an outcome. Random numbers are arguments, so that
the rules are functions.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobledger.definitions.retry import Reject, Retry, RetryLater, Snooze, check_delay
from jobledger.errors import TaskTimedOut, is_a, leaves, members_of, text_of, traceback_of, type_of
from jobledger.schemas.events import UNKNOWN_TASK_TAG, ErrorInfo, FailureReason

#: Characters of an exception's message that are kept, from its beginning.
MESSAGE_LIMIT = 4_096
#: Characters of a traceback that are kept, from its end.
TRACEBACK_LIMIT = 16_384
#: Maximum number of exceptions that a traceback shows: the exception itself, its causes, and members of groups.
RELATED_MOST = 500
#: Characters of a class name that are kept, from its beginning.
TYPE_LIMIT = 500

_CAUSES = [BaseException.__dict__[name].__get__ for name in ("__cause__", "__context__")]


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The job's code returned. ``result``: what the code returned, as JSON, or None."""

    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class Retried:
    """The attempt failed, and another one follows after ``delay_ms``."""

    error: ErrorInfo
    delay_ms: int
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The same attempt is made again after ``delay_ms``. ``tags`` replace the job's tags; None keeps them.

    ``in_place``, here and in `Retried`: the attempt is made in the same release, and the job holds its key meanwhile.
    """

    delay_ms: int
    reason: str | None = None
    tags: Mapping[str, str] | None = None
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The job has failed, and no other attempt follows."""

    reason: FailureReason
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job was cancelled, by ``by``."""

    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """The job was not started before its expiry ``at`` (µs, broker's clock)."""

    at: int


Outcome = Succeeded | Retried | Snoozed | Failed | Cancelled | Expired


def holding(outcome: Retried | Snoozed, held_s: float, most_s: float, key: str) -> Retried | Snoozed | Failed:
    """Return the outcome of an attempt that is to be made again, for a job that has held its key for ``held_s`` s.

    The next attempt is made in place, so that no later job of the key overtakes this one. If the wait would hold the
    key for more than ``most_s`` seconds, the job fails instead.
    """
    if held_s + outcome.delay_ms / 1000 <= most_s:
        return replace(outcome, in_place=True)
    if isinstance(outcome, Retried):
        return Failed("key-held", outcome.error)
    if outcome.reason == "unknown-task":
        return Failed(
            "unknown-task", ErrorInfo("UnknownTask", f"no worker that knows the task took the job within {most_s:g} s")
        )
    reason = f": {outcome.reason}" if outcome.reason else ""
    what = f"a snooze of {outcome.delay_ms / 1000:g} s would hold key {key!r} for more than key_hold_max={most_s:g} s{reason}"
    return Failed("key-held", ErrorInfo("KeyHeld", printable(what, MESSAGE_LIMIT)))


def answered(outcome: Outcome | None) -> bool | None:
    """Return whether the service that the job calls worked; None if the outcome does not show that. An ``outcome`` of
    None is a success."""
    match outcome:
        case None | Succeeded():
            return True
        case Retried() | Failed(reason="exhausted" | "timeout" | "key-held"):
            return False
    return None


def judge(
    retry: Retry, attempt: int, error: BaseException, uniform: float, *, timed_out: bool = False
) -> Retried | Snoozed | Failed:
    """Return the outcome that `decide` returns, for any exception of a task's code. An exception that cannot be
    examined fails the job."""
    try:
        return decide(retry, attempt, error, uniform, timed_out=timed_out)
    except BaseException as broken:  # noqa: BLE001  # a user's exception may lack what its base class has
        info = error_info(error)
        why = f"{info.message} (Jobledger could not examine this exception: {type_of(broken)}: {text_of(broken)})"
        return Failed("never", ErrorInfo(info.type, printable(why, MESSAGE_LIMIT), info.traceback))


def decide(
    retry: Retry, attempt: int, error: BaseException, uniform: float, *, timed_out: bool = False
) -> Retried | Snoozed | Failed:
    """Return the outcome of an attempt (1, 2, …) that raised.

    ``uniform``: drawn from [0, 1) for the backoff's jitter. ``timed_out``: the task's own time limit ended the attempt.
    A `CancelledError` that was not requested from outside the task's code is a failure of the attempt, like any
    `Exception`.

    For an exception group, the leaves are judged in this order: if one leaf is a `Reject`, the job fails; if the retry
    policy does not retry the group, the job fails; if all leaves are `Snooze`, the same attempt is made again.
    Otherwise the attempt has failed, and the longest delay of a `RetryLater` or `Snooze` in the group replaces the
    backoff.
    """
    each = leaves(error)
    if any(is_a(leaf, Reject) for leaf in each):
        return Failed("rejected", error_info(error))
    if not retry.retries(error):
        return Failed("never", error_info(error))
    asked: list[Any] = [leaf for leaf in each if is_a(leaf, (Snooze, RetryLater))]
    if all(is_a(leaf, Snooze) for leaf in each):
        delay_ms, reason = max((_delay(leaf), printable(leaf.reason, MESSAGE_LIMIT)) for leaf in asked)
        return Snoozed(delay_ms, reason or None)
    info = error_info(error)
    if attempt >= retry.max_attempts:
        return Failed("timeout" if timed_out else "exhausted", info)
    return Retried(info, max(map(_delay, asked)) if asked else _ms(retry.delay_after(attempt, uniform)))


def bad_result(task: str, error: BaseException) -> Failed:
    """Return the outcome of an attempt whose result cannot be written as JSON."""
    info = error_info(error)
    why = f"the result of {task}() cannot be written as JSON: {info.message}"
    return Failed("bad-result", ErrorInfo(info.type, why, info.traceback))


def timeout_error(task: str, limit: float | None, error: BaseException) -> BaseException:
    """Return the error of an attempt that its time limit of ``limit`` seconds ended: ``error`` if it has a text, else a
    `TimeoutError` that names the limit."""
    if limit is None or text_of(error):
        return error
    named = TimeoutError(f"{task}() ran longer than its timeout of {limit:g} s")
    return named.with_traceback(traceback_of(error))


def unknown_task(
    task: str, known: list[str], tags: Mapping[str, str], backoff: Retry, uniform: float
) -> Snoozed | Failed:
    """Return the outcome of a job whose task this worker does not know: `Snoozed`, or `Failed` when ``backoff`` is
    exhausted.

    During a deployment, unknown tasks are normal for a while. The tag `UNKNOWN_TASK_TAG` carries the number of such
    snoozes, because the release and attempt numbers do not distinguish these snoozes from those that the task requests.
    """
    try:
        seen = max(0, int(tags.get(UNKNOWN_TASK_TAG, "0")))
    except ValueError:
        seen = 0
    what = f"task {task!r} is unknown to this worker; it has {', '.join(sorted(known)) or 'none'}"
    if seen >= backoff.max_attempts:
        return Failed("unknown-task", ErrorInfo("UnknownTask", printable(what, MESSAGE_LIMIT)))
    return Snoozed(
        _ms(backoff.delay_after(seen + 1, uniform)), "unknown-task", {**tags, UNKNOWN_TASK_TAG: str(seen + 1)}
    )


def error_info(error: BaseException) -> ErrorInfo:
    """Describe an exception as text of bounded length. Raises nothing, whatever the exception's own code does."""
    name, message = type_of(error, full=True), _message(error)
    trace = _trace(error, name, message)
    return ErrorInfo(
        printable(name, TYPE_LIMIT),
        printable(message, MESSAGE_LIMIT),
        printable(trace[-TRACEBACK_LIMIT:], TRACEBACK_LIMIT),
    )


def _message(error: BaseException) -> str:
    """Return an exception's text; for a group, also the texts of its leaves."""
    text = text_of(error)
    if members_of(error):
        for number, leaf in enumerate(leaves(error)):
            if len(text) > MESSAGE_LIMIT:
                break  # further text would not be kept
            text += f"{'; ' if number else ': '}{type_of(leaf)}: {text_of(leaf)[:MESSAGE_LIMIT]}"
    return text


def _trace(error: BaseException, name: str, message: str) -> str:
    """Return the traceback, with the tracebacks of the causes and of a group's members. The latter are omitted if there
    are too many of them, or if one of them cannot be formatted."""
    where = traceback_of(error)
    if len(_related(error)) <= RELATED_MOST:
        with contextlib.suppress(BaseException):  # the exception's attributes may raise anything
            return "".join(traceback.format_exception(type(error), error, where))
    try:
        frames = "".join(traceback.format_tb(where))
    except BaseException:  # noqa: BLE001  # source files are read through a loader, which may be the user's
        frames = ""
    head = f"Traceback (most recent call last):\n{frames}" if frames else ""
    return f"{head}{name}: {message}\n"


def _related(error: BaseException) -> list[BaseException]:
    """Return an exception, its causes, and the members of groups, a member as often as it occurs, because `traceback`
    shows it so often. Return at most one exception more than `RELATED_MOST`."""
    errors, seen = [error], {id(error)}
    for each in errors:
        errors += members_of(each)
        for get in _CAUSES:
            cause = get(each)
            if cause is not None and id(cause) not in seen:
                seen.add(id(cause))
                errors.append(cause)
        if len(errors) > RELATED_MOST:
            break
    return errors[: RELATED_MOST + 1]


def printable(text: object, limit: int) -> str:
    """Return at most ``limit`` characters that UTF-8 can encode: lone surrogates become question marks."""
    return str.__str__(str(text))[:limit].encode("utf-8", "replace").decode("utf-8")


def ran_out(error: BaseException) -> bool:
    """Return whether the error of an attempt whose time limit was over is a timeout, alone or in a group."""
    return any(is_a(leaf, (TimeoutError, TaskTimedOut)) for leaf in leaves(error))


def _delay(error: Any) -> int:
    """Return the delay of a `Snooze` or `RetryLater`, in ms. Raises `ConfigError` if a subclass made the delay
    invalid."""
    return _ms(check_delay(error.delay, f"{type_of(error)}.delay"))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
