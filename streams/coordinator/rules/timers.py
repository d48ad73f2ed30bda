"""Timers of rows, with one heap for each partition, and an estimate of the broker's clock.

This module is pure: the caller passes the time. Timers decide nothing. They make the coordinator write `ReleaseDecided`
to the log (`jobledger.streams.coordinator.rules.decisions`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def wake_at(due: int) -> int:
    """Return when to look at a release due at ``due`` µs: ``due`` rounded up to a whole millisecond, because append
    times are whole milliseconds."""
    return -(-due // 1000) * 1000


class Timers:
    """Hold the timers of one partition, as a heap of (µs, key).

    An entry only gives the time at which to look at a row. The row decides whether anything is due, so entries are
    never removed early.
    """

    def __init__(self, entries: Iterable[tuple[int, bytes]] = ()) -> None:
        self._heap = list(entries)
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, at: int, key: bytes) -> None:
        """Add a timer for the row ``key`` at ``at`` µs."""
        heapq.heappush(self._heap, (at, key))

    def next(self) -> int | None:
        """Return when the first timer is due, µs; None without timers."""
        return self._heap[0][0] if self._heap else None

    def pop_passed(self, now: int, limit: int) -> list[bytes]:
        """Remove and return the keys of timers that are due at ``now`` µs: the earliest first, at most ``limit``."""
        passed: list[bytes] = []
        heap = self._heap
        while heap and heap[0][0] <= now and len(passed) < limit:
            passed.append(heapq.heappop(heap)[1])
        return passed


class BrokerClock:
    """Estimate the broker's clock from acknowledgements, by comparing the append time with the time of receipt.

    An acknowledgement arrives after the append, so a sample ``received - appended`` is the time by which this process's
    clock is ahead, plus a latency. The smallest sample is the best estimate (as in NTP's clock filter, RFC 5905,
    section 10). The error of the estimate makes releases late, never early. Old samples are dropped after one to two
    windows of ``window_us``, so the estimate follows a drift of the clocks.
    """

    def __init__(self, window_us: int = 60_000_000) -> None:
        self._window = window_us
        self._began = 0
        self._current: int | None = None
        self._previous: int | None = None

    @property
    def ahead_us(self) -> int:
        """Time by which this process's clock is ahead of the broker's, µs; negative if behind; 0 without samples."""
        known = [sample for sample in (self._current, self._previous) if sample is not None]
        return min(known, default=0)

    def observe(self, received_us: int, appended_ms: int) -> None:
        """Take a sample: the acknowledgement of a record appended at ``appended_ms`` was received at
        ``received_us``."""
        if received_us - self._began > self._window:
            self._previous, self._current, self._began = self._current, None, received_us
        sample = received_us - appended_ms * 1000
        if self._current is None or sample < self._current:
            self._current = sample

    def now(self, local_us: int) -> int:
        """Return the estimated time of the broker's clock, µs, when this process's clock shows ``local_us``."""
        return local_us - self.ahead_us

    def reset(self) -> None:
        """Drop all samples, because this process was paused or its clock was set."""
        self._current = self._previous = None
