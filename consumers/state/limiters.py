"""Decides how many jobs may begin now, by limits for all workers, pauses, adaptive concurrency and circuit breakers.
Uses no clock, client or lock; runs on one thread.

A gate returns how many more jobs may begin (`free`), counts each job that begins or ends, and returns when to ask again
(`seconds_until_open`). Limits hold for all workers together without a common counter: each partition number of a queue
carries a share of the limit, and a worker has the shares of the partitions that it owns (`share_of`). So a limit is
kept exactly while no partition changes its owner; during a change, both owners may use a share for a moment. If all
jobs are in one partition, only the shares of that partition's owner are used.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from jobledger.definitions.policy import Adaptive, Breaker, Limits
from jobledger.process.wording import counted

#: A number of jobs that means "no limit", because it is larger than any real number of jobs.
ENDLESS = 1 << 30
#: Size of a token bucket, in seconds of its rate: this bounds how many jobs begin at once after a time without starts.
BURST_S = 0.1


class Gate(Protocol):
    """One condition for jobs to begin. Times are seconds of a monotonic clock. ``waiting_queues``: the wait queues
    that wait for the gate to open."""

    waiting_queues: deque[Any]
    name: str

    def free(self, now: float) -> int:
        """Return how many more jobs may begin now."""
        ...

    def begin(self, now: float) -> None:
        """Count a job that begins."""
        ...

    def end(self, now: float, seconds: float, good: bool | None, began: float) -> None:
        """Count the end of a job that ran for ``seconds``. ``good``: whether the service that the job calls worked;
        None: not known. ``began``: the time with which `begin` counted the job."""
        ...

    def seconds_until_open(self, now: float) -> float | None:
        """Return the seconds until the gate may open by itself; None: only an event opens the gate."""
        ...

    @property
    def cause(self) -> str:
        """The word for what holds jobs back, in the facts of jobs that waited."""
        ...

    def describe(self) -> str:
        """Describe for people what holds jobs back."""
        ...

    def passes_in(self, waiting: int) -> float:
        """Estimate the seconds until ``waiting`` jobs have passed the gate. Jobs are snoozed for about that time."""
        ...


def share_of(limit: int, owned: Iterable[int], total: int) -> int:
    """Return the part of ``limit`` that the ``owned`` ones of ``total`` partitions carry. The parts of all owners add
    up to ``limit``.

    The part is never 0 for a worker that owns a partition. A limit below the number of partitions is refused where the
    limit is declared. If a worker meets such a limit nevertheless, it is better to exceed the limit than to start no
    jobs.
    """
    each, rest = divmod(limit, total)
    numbers = [n for n in owned if n < total]
    return max(1, sum(each + (n < rest) for n in numbers)) if numbers else 0


class Limiter:
    """The limits and the pause of a queue or a task. ``declared``: the limits in the app's code. ``overridden``: the
    limits that were set at run time; None: none were set."""

    __slots__ = (
        "_filled_at",
        "_limited",
        "_owned",
        "_tokens",
        "_total",
        "concurrency_share",
        "declared",
        "name",
        "overridden",
        "paused",
        "rate",
        "running",
        "waiting_queues",
    )

    def __init__(self, name: str, declared: Limits) -> None:
        self.name, self.declared = name, declared
        self.overridden: Limits | None = None
        self.paused: str | None = None  # by whom it was paused, and why
        self.waiting_queues: deque[Any] = deque()
        self.running = 0
        self._owned: list[int] = []
        self._total = 1
        self.rate: float | None = None  # starts a second that this worker may make; None: no limit
        self.concurrency_share: int | None = None  # jobs that this worker may run at once; None: no limit
        self._tokens, self._filled_at = 0.0, -math.inf
        self._divide()

    @property
    def limits(self) -> Limits:
        """The limits in force, for all workers together."""
        return self.declared if self.overridden is None else self.overridden

    @property
    def active(self) -> bool:
        """Whether this gate can hold jobs back at all: it is paused or has a limit."""
        return self.paused is not None or self._limited

    def override(self, limits: Limits | None) -> None:
        """Replace the declared limits from now on; None: use the declared limits again."""
        self.overridden = limits
        self._divide()

    def own(self, owned: Iterable[int], total: int) -> None:
        """Set which of ``total`` partitions this worker owns."""
        self._owned, self._total = sorted(owned), max(1, total)
        self._divide()

    def _divide(self) -> None:
        limits = self.limits
        self._limited = bool(limits)
        held = len([n for n in self._owned if n < self._total])
        self.rate = None if limits.rate is None else limits.rate * held / self._total
        self.concurrency_share = (
            None if limits.concurrency is None else share_of(limits.concurrency, self._owned, self._total)
        )

    def _fill(self, now: float) -> None:
        rate = self.rate
        assert rate is not None
        full = max(1.0, rate * BURST_S)
        self._tokens = min(full, self._tokens + (now - self._filled_at) * rate) if rate else 0.0
        self._filled_at = now

    def free(self, now: float) -> int:
        """See `Gate.free`."""
        if self.paused is not None:
            return 0
        free = ENDLESS if self.concurrency_share is None else self.concurrency_share - self.running
        if self.rate is not None and free > 0:
            self._fill(now)
            free = min(free, int(self._tokens + 1e-9))
        return max(0, free)

    def begin(self, now: float) -> None:
        """See `Gate.begin`."""
        self.running += 1
        if self.rate is not None:
            self._fill(now)
            self._tokens -= 1.0

    def end(self, now: float, seconds: float, good: bool | None, began: float) -> None:
        """See `Gate.end`."""
        self.running -= 1

    def seconds_until_open(self, now: float) -> float | None:
        """See `Gate.seconds_until_open`."""
        if self.paused is not None or not self.rate:
            return None
        if self.concurrency_share is not None and self.running >= self.concurrency_share:
            return None
        self._fill(now)
        return max(0.0, (1.0 - self._tokens) / self.rate)

    @property
    def cause(self) -> str:
        """See `Gate.cause`."""
        return "limit" if self.paused is None else "pause"

    def describe(self) -> str:
        """See `Gate.describe`."""
        limits = self.limits
        if self.paused is not None:
            return f"{self.name}: paused {self.paused}"
        restrictions = [] if limits.rate is None else [f"{limits.rate:g} a second"]
        restrictions += [] if limits.concurrency is None else [f"{limits.concurrency} at once"]
        return f"{self.name}: {' and '.join(restrictions)} for all workers"

    def passes_in(self, waiting: int) -> float:
        """See `Gate.passes_in`."""
        if self.paused is not None:
            return 60.0
        return waiting / self.rate if self.rate else 30.0


class AdaptiveGate:
    """Applies an `Adaptive` policy: adapts the task's concurrency in this worker to the service that the task calls.

    The concurrency is adapted once in each window. A window lasts at least `WINDOW_S` seconds, and until as many jobs
    have ended as may run at once, or 50 if that is less. If more than a tenth of the jobs failed, or the mean latency
    is above ``tolerance`` times the best mean, the concurrency is multiplied by ``backoff``. Otherwise, if all of the
    concurrency was used, the concurrency grows by one. The best mean may grow by a hundredth in each window without
    failures, so that a service that has become permanently slower is not compared with its former latency for ever.
    """

    WINDOW_S = 0.5
    FAILED_SHARE = 0.1

    __slots__ = (
        "_began_at",
        "_best",
        "_failed",
        "_full",
        "_seconds",
        "_timed",
        "limit",
        "name",
        "policy",
        "running",
        "waiting_queues",
    )

    def __init__(self, name: str, policy: Adaptive) -> None:
        self.name, self.policy = name, policy
        self.limit = float(min(policy.most, max(policy.least, 10)))
        self.running = 0
        self.waiting_queues: deque[Any] = deque()
        self._best: float | None = None
        self._reset(-math.inf)

    def _reset(self, now: float) -> None:
        self._began_at = now
        self._seconds, self._timed, self._failed, self._full = 0.0, 0, 0, False

    def free(self, now: float) -> int:
        """See `Gate.free`."""
        free = int(self.limit) - self.running
        if free <= 0:
            self._full = True
        return max(0, free)

    def begin(self, now: float) -> None:
        """See `Gate.begin`."""
        self.running += 1
        if self._began_at == -math.inf:
            self._began_at = now

    def end(self, now: float, seconds: float, good: bool | None, began: float) -> None:
        """See `Gate.end`."""
        self.running -= 1
        if good is None:
            return
        self._timed += 1
        self._seconds += seconds
        self._failed += not good
        if now - self._began_at >= self.WINDOW_S and self._timed >= min(int(self.limit), 50):
            self._judge(now)

    def _judge(self, now: float) -> None:
        policy = self.policy
        mean = self._seconds / self._timed
        slow = self._best is not None and mean > self._best * policy.tolerance
        if slow or self._failed > self._timed * self.FAILED_SHARE:
            self.limit = max(float(policy.least), self.limit * policy.backoff)
        elif self._full:
            self.limit = min(float(policy.most), self.limit + 1.0)
        if not self._failed:
            self._best = mean if self._best is None else min(mean, self._best * 1.01)
        self._reset(now)

    def seconds_until_open(self, now: float) -> float | None:
        """See `Gate.seconds_until_open`."""
        return None

    @property
    def cause(self) -> str:
        """See `Gate.cause`."""
        return "limit"

    def describe(self) -> str:
        """See `Gate.describe`."""
        return f"{self.name}: {int(self.limit)} at once in a worker, adapted to latency and errors"

    def passes_in(self, waiting: int) -> float:
        """See `Gate.passes_in`."""
        return 10.0


class BreakerGate:
    """Applies a `Breaker` policy. While the circuit is closed, jobs begin. After ``failures`` failures in a row the
    circuit is open, and no job begins for ``reset`` seconds. Then one job may try; its success closes the circuit. The
    outcomes of jobs that began before the circuit opened count only while the circuit is closed."""

    __slots__ = ("_failures", "_open_until", "_trying", "name", "policy", "trips", "waiting_queues")

    def __init__(self, name: str, policy: Breaker) -> None:
        self.name, self.policy = name, policy
        self.waiting_queues: deque[Any] = deque()
        self._failures = 0
        self._open_until: float | None = None
        self._trying = False
        self.trips = 0

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: jobs are held back, except one job that may try."""
        return self._open_until is not None

    def free(self, now: float) -> int:
        """See `Gate.free`."""
        if self._open_until is None:
            return ENDLESS
        return 0 if now < self._open_until or self._trying else 1

    def begin(self, now: float) -> None:
        """See `Gate.begin`."""
        if self._open_until is not None and now >= self._open_until:
            self._trying = True

    def end(self, now: float, seconds: float, good: bool | None, began: float) -> None:
        """See `Gate.end`."""
        if self._open_until is not None and began < self._open_until:
            return  # not the trial: the job began before the circuit opened
        self._trying = False
        if good:
            self._failures, self._open_until = 0, None
        elif good is not None:
            self._failures += 1
            if self._failures >= self.policy.failures:
                self.trips += 1
                self._open_until = now + self.policy.reset
        elif self._open_until is not None:
            self._open_until = now  # the trial showed nothing about the service: another job may try

    def seconds_until_open(self, now: float) -> float | None:
        """See `Gate.seconds_until_open`."""
        return None if self._open_until is None or self._trying else max(0.0, self._open_until - now)

    @property
    def cause(self) -> str:
        """See `Gate.cause`."""
        return "circuit"

    def describe(self) -> str:
        """See `Gate.describe`."""
        return f"{self.name}: its circuit is open after {counted(self._failures, 'failure')} in a row"

    def passes_in(self, waiting: int) -> float:
        """See `Gate.passes_in`."""
        return self.policy.reset


class Slots:
    """A limited number of slots for running jobs: for example the job threads, or the child processes."""

    __slots__ = ("most", "name", "running", "waiting_queues")

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most, self.running = name, most, 0
        self.waiting_queues: deque[Any] = deque()

    @property
    def cause(self) -> str:
        """See `Gate.cause`."""
        return "slots"

    def free(self, now: float) -> int:
        """See `Gate.free`."""
        return max(0, self.most - self.running)

    def seconds_until_open(self, now: float) -> float | None:
        """See `Gate.seconds_until_open`."""
        return None


def closed_gate(gates: Iterable[Gate], now: float) -> Gate | None:
    """Return the first gate that lets no more jobs begin; None if there is no such gate."""
    for gate in gates:
        if gate.free(now) <= 0:
            return gate
    return None
