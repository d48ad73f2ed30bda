"""The options of a task or queue that control how its jobs run: order, priority, limits, isolation, leases, adaptation.
Pure.

Policies are frozen values. `policy_of` validates the options of a task, `Limits.of` validates limits, and `Adaptive`
and `Breaker` validate themselves when they are created. Options that depend on the task's function or on the queue are
validated by `jobledger.definitions.task` and `jobledger.definitions.task_registry`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from jobledger.definitions.durations import Seconds, in_seconds
from jobledger.definitions.functions import check_plain
from jobledger.errors import ConfigError

T = TypeVar("T")

#: The levels of a queue with priorities, besides ``normal``.
PRIORITIES = ("high", "low")
Priority = Literal["high", "low"]
Isolation = Literal["process"]

#: Maximum timeout of a keyed job in seconds: while the job runs, the other jobs of its key wait.
KEYED_TIMEOUT_MOST_S = 60.0
#: Default of ``key_hold_max``: seconds after a job's first start in its worker. The delay before another attempt must
#: end within this time, because the job holds its key during the delay.
KEY_HOLD_MAX_S = 60.0
#: Jobs with a timeout above this many seconds are leased.
LONG_FROM_S = 60.0
#: Seconds until a job lease expires unless it is renewed: default, minimum, maximum.
LEASE_S, LEASE_LEAST_S, LEASE_MOST_S = 30.0, 5.0, 3600.0
MAX_EXPIRY_S = 366 * 24 * 3600.0

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(s|m|min|h|d)\s*")
_PER = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?\s*")
_UNIT = {None: 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_rate(rate: object, what: str = "rate") -> float:
    """Return starts per second, from ``"100/s"``, ``"30/min"``, ``"1000/h"``, ``"5/d"`` or a number per second. Raises
    `ConfigError` for anything else."""
    value = rate
    if isinstance(rate, str) and (match := _RATE.fullmatch(rate)):
        value = float(match[1]) / _PER[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(
            f"{what}={rate!r} is not a rate: write '100/s', '30/min', '1000/h' or a number per second above 0"
        )
    return float(value)


def parse_size(size: object, what: str = "max_memory") -> int:
    """Return bytes, from ``"512MiB"``, ``"2GB"`` or a number of bytes. Raises `ConfigError` for anything else."""
    value = size
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        value = round(float(match[1]) * _UNIT[match[2]])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{what}={size!r} is not a size: write '512MiB', '2GB' or a number of bytes above 0")
    return value


def check_priority(priority: object, what: str = "priority") -> Priority | None:
    """Return ``priority`` if it is ``high`` or ``low``; None for ``normal`` and None. Raises `ConfigError` for anything
    else."""
    if priority in (None, "normal"):
        return None
    if priority not in PRIORITIES:
        raise ConfigError(f"{what}={priority!r} is not 'high', 'normal' or 'low'")
    return "high" if priority == "high" else "low"


def check_expiry(seconds: object, what: str = "expires_in") -> float | None:
    """Return ``seconds``, a number or a `timedelta`, as a number of seconds; None for None. Raises `ConfigError` unless
    the duration is above 0 and at most 366 days."""
    if seconds is None:
        return None
    duration = in_seconds(seconds)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration <= MAX_EXPIRY_S:
        raise ConfigError(
            f"{what}={seconds!r} is not a number of seconds above 0, at most {MAX_EXPIRY_S:.0f} (366 days)"
        )
    return float(duration)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for all workers together: ``rate`` in starts per second, ``concurrency`` in jobs at once; None: no
    limit."""

    rate: float | None = None
    concurrency: int | None = None

    @classmethod
    def of(cls, rate: object, concurrency: object, what: str) -> Limits:
        """Validate limits as a user wrote them, and return them. Raises `ConfigError` that names ``what``."""
        if concurrency is not None and (
            isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
        ):
            raise ConfigError(f"{what}: concurrency={concurrency!r} is not a whole number from 1 up")
        return cls(None if rate is None else parse_rate(rate, f"{what}: rate"), concurrency)

    def __bool__(self) -> bool:
        return self.rate is not None or self.concurrency is not None


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Adapt a task's concurrency in each worker to the task's attempts. The concurrency increases while attempts are
    fast and succeed, and decreases when attempts are slow or fail.

    The method is additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase and Decrease
    Algorithms for Congestion Avoidance in Computer Networks", 1989). It is driven by errors, and by the latency
    compared with its long-run minimum, as in TCP Vegas (Brakmo and Peterson, 1995). ``least``, ``most``: bounds of the
    concurrency, in jobs at once. ``tolerance``: the highest acceptable latency, as a multiple of the lowest one.
    ``backoff``: the factor, between 0 and 1, by which the concurrency is multiplied after a bad window. Raises
    `ConfigError`.
    """

    least: int = 1
    most: int = 100
    tolerance: float = 2.0
    backoff: float = 0.7

    def __post_init__(self) -> None:
        for name in ("least", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Adaptive({name}={value!r}) is not a whole number from 1 up")
        if self.least > self.most:
            raise ConfigError(f"Adaptive(least={self.least}) is above most={self.most}")
        if not self.tolerance > 1.0:
            raise ConfigError(f"Adaptive(tolerance={self.tolerance!r}) is not a number above 1")
        if not 0.0 < self.backoff < 1.0:
            raise ConfigError(f"Adaptive(backoff={self.backoff!r}) is not between 0 and 1")


@dataclass(frozen=True, slots=True)
class Breaker:
    """A circuit breaker (M. Nygard, "Release It!", 2007). After ``failures`` failed attempts in a row of a task in a
    worker, the task's other jobs wait in that worker, which uses up no attempts. If too many jobs wait, the newest
    waiting jobs without a key are snoozed. After ``reset`` seconds, or a `timedelta`, one job is started as a trial.

    An attempt counts as failed if it is retried or was the last one. A job that was rejected, snoozed or cancelled does
    not count. Raises `ConfigError`.
    """

    failures: int = 5
    reset: float = 30.0

    if TYPE_CHECKING:

        def __init__(self, failures: int = 5, reset: Seconds = 30.0) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.failures, bool) or not isinstance(self.failures, int) or self.failures < 1:
            raise ConfigError(f"Breaker(failures={self.failures!r}) is not a whole number from 1 up")
        reset: object = in_seconds(self.reset)
        if isinstance(reset, bool) or not isinstance(reset, int | float) or not 0 < reset <= 86400:
            raise ConfigError(f"Breaker(reset={self.reset!r}) is not a number of seconds above 0, at most a day")
        object.__setattr__(self, "reset", float(reset))


class HandlerOptions(TypedDict, total=False):
    """Options that `App.task` and `App.on` have in common. `App.task` describes them."""

    priority: Literal["high", "normal", "low"] | None
    rate: str | float | None
    concurrency: int | None
    isolation: Literal["process"] | None
    max_memory: str | int | None
    long: bool | None
    lease: Seconds
    expires_in: Seconds | None
    adaptive: Adaptive | bool | None
    breaker: Breaker | bool | None


class PolicyOptions(HandlerOptions, total=False):
    """The options of a task of which its `Policy` is made: those of a handler, and those of an ordering key."""

    key: str | Callable[..., Any] | None
    key_hold_max: Seconds


@dataclass(frozen=True, slots=True)
class Policy:
    """How the jobs of one task run, apart from retries. ``App.task`` describes each option; all values are
    validated."""

    key: str | Callable[..., Any] | None = None
    key_hold_max: float = KEY_HOLD_MAX_S
    priority: Priority | None = None
    limits: Limits = Limits()
    isolation: Isolation | None = None
    max_memory: int | None = None
    long: bool = False
    lease: float = LEASE_S
    expires_in: float | None = None
    adaptive: Adaptive | None = None
    breaker: Breaker | None = None


PLAIN = Policy()


def policy_of(task: str, options: PolicyOptions, *, timeout: float | None, is_async: bool) -> Policy:
    """Return a task's policy from the options that its author wrote. Raises `ConfigError` that names an option, or a
    combination of options, that is not possible."""
    what = f"task {task!r}"
    key, isolation, max_memory = options.get("key"), options.get("isolation"), options.get("max_memory")
    _check_key(what, key)
    _check_isolation(what, isolation, max_memory)
    lease_s = _lease_s(what, options.get("lease", LEASE_S))
    level = check_priority(options.get("priority"), f"{what}: priority")
    leased = _is_leased(what, timeout, options.get("long"))
    if key is not None:
        check_keyed(what, timeout, leased, level, bounded=is_async or isolation is not None)
    return Policy(
        key=key,
        key_hold_max=_hold_s(what, options.get("key_hold_max", KEY_HOLD_MAX_S)),
        priority=level,
        adaptive=_switched(what, "adaptive", options.get("adaptive"), Adaptive),
        breaker=_switched(what, "breaker", options.get("breaker"), Breaker),
        limits=Limits.of(options.get("rate"), options.get("concurrency"), what),
        isolation=isolation,
        max_memory=None if max_memory is None else parse_size(max_memory, f"{what}: max_memory"),
        long=leased,
        lease=lease_s,
        expires_in=check_expiry(options.get("expires_in"), f"{what}: expires_in"),
    )


def _check_key(what: str, key: object) -> None:
    if key is not None and not callable(key) and (not isinstance(key, str) or not key):
        raise ConfigError(f"{what}: key={key!r} is neither the name of a parameter nor a function of the arguments")
    check_plain(key, f"{what}: key=…")


def _check_isolation(what: str, isolation: object, max_memory: object) -> None:
    if isolation not in (None, "process"):
        raise ConfigError(
            f"{what}: isolation={isolation!r} is not 'process': write 'process', or leave the option out; "
            "then `async def` runs on the event loop and a plain function in a thread"
        )
    if max_memory is not None and isolation != "process":
        raise ConfigError(
            f"{what}: max_memory={max_memory!r} needs isolation='process': only a process has a memory of its own"
        )


def _lease_s(what: str, lease: object) -> float:
    seconds = in_seconds(lease)
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not LEASE_LEAST_S <= seconds <= LEASE_MOST_S
    ):
        raise ConfigError(
            f"{what}: lease={lease!r} is not a number of seconds from {LEASE_LEAST_S:g} to {LEASE_MOST_S:g}"
        )
    return float(seconds)


def _hold_s(what: str, key_hold_max: object) -> float:
    seconds = in_seconds(key_hold_max)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise ConfigError(f"{what}: key_hold_max={key_hold_max!r} is not a number of seconds above 0, at most an hour")
    return float(seconds)


def _is_leased(what: str, timeout: float | None, long: bool | None) -> bool:
    above = timeout is not None and timeout > LONG_FROM_S
    if long is None:
        return above
    if above and not long:
        raise ConfigError(
            f"{what}: timeout={timeout:g} is above {LONG_FROM_S:g} s, so its jobs are leased: long=False is not possible"
        )
    return bool(long)


def _switched(what: str, name: str, option: object, kind: type[T]) -> T | None:
    """Return the value of an option that is True for the defaults of its class ``kind``, False, None or an object of
    this class."""
    if option in (None, False):
        return None
    if option is True:
        return kind()
    if not isinstance(option, kind):
        raise ConfigError(f"{what}: {name}={option!r} is neither True nor a {kind.__name__}(…)")
    return option


def check_keyed(what: str, timeout: float | None, long: bool, priority: str | None, *, bounded: bool) -> None:
    """Raise `ConfigError` unless jobs with these options can be kept in the order of a key. ``bounded``: whether the
    jobs can be stopped while they run."""
    if not bounded:
        raise ConfigError(
            f"{what}: a keyed job blocks all later jobs of its key, and a thread cannot be stopped: "
            "make the task `async def`, or give it isolation='process'"
        )
    if timeout is None or timeout > KEYED_TIMEOUT_MOST_S or long:
        raise ConfigError(
            f"{what}: a keyed job blocks all later jobs of its key, so it needs a timeout of at most "
            f"{KEYED_TIMEOUT_MOST_S:g} s, and cannot be long: it has timeout={timeout!r}"
        )
    if priority is not None:
        raise ConfigError(
            f"{what}: priority={priority!r} would let jobs of one key overtake each other: use either a key or a priority"
        )
