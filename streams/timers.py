"""When to look at a row: one heap per partition, and what the broker's clock reads. Pure: the time is passed in.

Timers decide nothing. They make the coordinator write down what it saw (`jobledger.streams.decisions`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def wake_at(due: int) -> int:
    """When to look at a release due at ``due`` µs: append times are whole milliseconds, so no sooner than the next."""
    return -(-due // 1000) * 1000


class Timers:
    """The timers of one partition: a heap of (µs, key).

    An entry only says when to look at a row; the row says whether anything is due, so entries need not be taken back.
    """

    def __init__(self, entries: Iterable[tuple[int, bytes]] = ()) -> None:
        self._heap = list(entries)
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, at: int, key: bytes) -> None:
        """Look at the row ``key`` at ``at`` µs."""
        heapq.heappush(self._heap, (at, key))

    def next(self) -> int | None:
        """When the first timer passes, µs; None without any."""
        return self._heap[0][0] if self._heap else None

    def pop_passed(self, now: int, limit: int) -> list[bytes]:
        """Keys whose time has come by ``now`` µs, earliest first, at most ``limit``."""
        passed: list[bytes] = []
        heap = self._heap
        while heap and heap[0][0] <= now and len(passed) < limit:
            passed.append(heapq.heappop(heap)[1])
        return passed


class BrokerClock:
    """What the broker's clock reads, from acknowledgements: append time against the time the acknowledgement came.

    An acknowledgement comes after the append, so ``received - appended`` is how far this clock is ahead plus a latency;
    the least one seen is the best estimate, and it errs towards late, never towards early (as in NTP's clock filter,
    RFC 5905, section 10). Samples older than ``window_us`` are forgotten, so a drift is followed.
    """

    def __init__(self, window_us: int = 60_000_000) -> None:
        self._window = window_us
        self._began = 0
        self._current: int | None = None
        self._previous: int | None = None

    @property
    def ahead_us(self) -> int:
        """How far this process's clock is ahead of the broker's, µs (behind: negative); 0 before the first sample."""
        known = [sample for sample in (self._current, self._previous) if sample is not None]
        return min(known, default=0)

    def observe(self, received_us: int, appended_ms: int) -> None:
        """An acknowledgement was received at ``received_us`` for a record appended at ``appended_ms``."""
        if received_us - self._began > self._window:
            self._previous, self._current, self._began = self._current, None, received_us
        sample = received_us - appended_ms * 1000
        if self._current is None or sample < self._current:
            self._current = sample

    def now(self, local_us: int) -> int:
        """The broker's clock when this process's reads ``local_us``."""
        return local_us - self.ahead_us

    def reset(self) -> None:
        """Forget all samples: this process's clock was set, or stood still."""
        self._current = self._previous = None
