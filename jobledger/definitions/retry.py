"""The retry policy: whether an attempt is followed by another attempt, and after which delay. Pure.

Backoff is exponential with jitter over the upper half: ``delay = raw/2 + u·raw/2`` with ``raw = min(cap, initial ·
factor^(attempt-1))`` ("equal jitter", AWS Architecture Blog, "Exponential Backoff And Jitter", 2015). The delay is
never close to zero, and retries of many jobs are still spread in time.
"""

from __future__ import annotations

import math
from asyncio import CancelledError
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobledger.definitions.durations import Seconds, in_seconds
from jobledger.errors import ConfigError, TaskTimedOut, is_a, members_of

#: Exceptions that are not an `Exception` but are treated as one: a cancellation that nobody requested, and an expired
#: timeout.
_COUNTS_AS: tuple[tuple[type[BaseException], type[Exception]], ...] = (
    (CancelledError, Exception),
    (TaskTimedOut, TimeoutError),
)

MAX_DELAY_S = 366 * 24 * 3600.0


class JobControl(Exception):
    """Base of the exceptions with which a task decides what happens to its job. They are not errors of the job."""


class RetryLater(JobControl):
    """Raise this to retry the job after ``delay``: seconds, or a `timedelta`. This uses up an attempt; when no attempts
    are left, the job fails."""

    def __init__(self, delay: Seconds, reason: str = "") -> None:
        self.delay = check_delay(delay, "RetryLater(delay)")
        self.reason = reason
        super().__init__(reason or f"retry in {self.delay:g} s")


class Snooze(JobControl):
    """Raise this to run the job again after ``delay`` (seconds, or a `timedelta`) without using up an attempt."""

    def __init__(self, delay: Seconds, reason: str = "") -> None:
        self.delay = check_delay(delay, "Snooze(delay)")
        self.reason = reason
        super().__init__(reason or f"snooze for {self.delay:g} s")


class Reject(JobControl):
    """Raise this to fail the job at once, because no retry could help. ``reason``: a text for people."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def check_delay(delay: object, what: str) -> float:
    """Return ``delay`` in seconds, if it is a number of seconds or a `timedelta`, from 0 to 366 days. Raises
    `ConfigError` for anything else."""
    duration = in_seconds(delay)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 <= duration <= MAX_DELAY_S:
        raise ConfigError(f"{what}={delay!r} is not a number of seconds between 0 and {MAX_DELAY_S:.0f} (366 days)")
    return float(duration)


@dataclass(frozen=True, slots=True)
class Retry:
    """Which failed attempts are retried, and after which delay.

    ``max_attempts``: attempts in all, >= 1. ``initial``: the first delay. ``cap``: the longest delay. Both are seconds,
    or a `timedelta`. ``factor``: growth of the delay per attempt, >= 1. ``jitter``: whether each delay is chosen at
    random from its upper half. ``on``: only these exceptions are retried. ``never``: exceptions that are not retried,
    even if ``on`` contains one of their base classes. Timeouts count as `TimeoutError`. For an `ExceptionGroup`, the
    exceptions in the group decide: see `retries`. Raises `ConfigError`.
    """

    max_attempts: int = 5
    initial: float = 1.0
    factor: float = 2.0
    cap: float = 300.0
    jitter: bool = True
    on: tuple[type[BaseException], ...] = (Exception,)
    never: tuple[type[BaseException], ...] = ()

    if TYPE_CHECKING:

        def __init__(
            self,
            max_attempts: int = 5,
            initial: Seconds = 1.0,
            factor: float = 2.0,
            cap: Seconds = 300.0,
            jitter: bool = True,
            on: tuple[type[BaseException], ...] = (Exception,),
            never: tuple[type[BaseException], ...] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise ConfigError(f"Retry(max_attempts={self.max_attempts!r}) is not a whole number from 1 up")
        object.__setattr__(self, "initial", check_delay(self.initial, "Retry(initial)"))
        object.__setattr__(self, "cap", check_delay(self.cap, "Retry(cap)"))
        if not isinstance(self.factor, int | float) or not math.isfinite(self.factor) or self.factor < 1:
            raise ConfigError(f"Retry(factor={self.factor!r}) is not a number from 1 up")
        object.__setattr__(self, "on", _exceptions(self.on, "on"))
        object.__setattr__(self, "never", _exceptions(self.never, "never"))

    def retries(self, error: BaseException) -> bool:
        """Return whether an attempt that raised this exception is retried.

        A group is retried if neither the group nor any exception in it matches ``never``, and each leaf, or a group
        that contains the leaf, matches ``on``. A `JobControl` is not passed to this method, because it decides itself
        what happens; a `JobControl` in a group is ignored.
        """
        todo, seen = [(error, False)], set()
        while todo:
            each, named = todo.pop()
            if (id(each), named) in seen or is_a(each, JobControl):
                continue
            seen.add((id(each), named))
            kinds = [type(each), *(counts for kind, counts in _COUNTS_AS if is_a(each, kind))]
            if any(issubclass(kind, self.never) for kind in kinds):
                return False
            named = named or any(issubclass(kind, self.on) for kind in kinds)
            members = members_of(each)
            todo += [(member, named) for member in members]
            if not members and not named:
                return False
        return True

    def delay_after(self, attempt: int, uniform: float) -> float:
        """Return the seconds between the failure of ``attempt`` (1, 2, …) and the next attempt. ``uniform``: a random
        number from [0, 1)."""
        # Above this exponent the power may overflow. Nearly every factor above 1 has reached the cap before.
        exponent = min(attempt - 1, 1000)
        try:
            raw = min(self.cap, self.initial * self.factor**exponent)
        except OverflowError:
            raw = self.cap
        return raw / 2 + uniform * raw / 2 if self.jitter else raw


def _exceptions(given: object, which: str) -> tuple[type[BaseException], ...]:
    items: tuple[object, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
    for item in items:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise ConfigError(f"Retry({which}=…): {item!r} is not an exception class")
    return items  # type: ignore[return-value]  # checked one by one above


#: A policy without retries.
NO_RETRY = Retry(max_attempts=1)
