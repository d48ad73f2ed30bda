"""Timers of rows, with one heap for each partition.

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
