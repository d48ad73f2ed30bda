"""Decides whether this instance may still act for its partitions. Knows no rows.

An instance can lose its partitions without noticing, if it was paused or its machine was suspended. Its clocks then
show a gap, and it sends nothing until the broker has confirmed its membership. A late write that still gets through is
harmless, because repeated decisions never contradict earlier ones. It is detected at the changelog
(`jobledger.streams.coordinator.table`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jobledger.process.logger import get_logger
from jobledger.streams.coordinator.faust.faust_app import Group

LOG = get_logger("jobledger.coordinator")

#: Seconds that a clock may advance between two beats; beyond that the process counts as paused.
GAP = 1.5


class Superseded(Exception):
    """The partitions moved while events were being processed. The work is dropped, and the events are read again."""


def clocks() -> tuple[float, float]:
    """Return wall time and time since boot, in seconds. The latter includes suspensions if the system supports it."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time(), time.monotonic() if boot is None else time.clock_gettime(boot)


class Ownership:
    """Track whether this instance owns its partitions.

    ``epoch`` grows whenever partitions are assigned or revoked. ``generation``: the group's; None during a rebalance.
    ``on_gap()`` is called when the clocks jumped.
    """

    def __init__(
        self,
        group: Group,
        on_gap: Callable[[], None] = lambda: None,
        clocks: Callable[[], tuple[float, float]] = clocks,
    ) -> None:
        self._group, self._on_gap, self._clocks = group, on_gap, clocks
        self.epoch = 0
        self.generation: int | None = None
        self._doubted = False
        self._last_beat = clocks()

    @property
    def undisputed(self) -> bool:
        """Whether the instance may act: no rebalance is under way and its membership is not in doubt."""
        self.beat()
        return not self._doubted and self.generation is not None and self._group.settled

    def beat(self) -> None:
        """Check whether this process was paused (SIGSTOP, a suspended machine) or its clock was set. To be called a few
        times a second."""
        now = self._clocks()
        gap = max(abs(b - a) for a, b in zip(self._last_beat, now, strict=True))
        self._last_beat = now
        if gap > GAP:
            LOG.warning("this process was paused for %.1f s: nothing is sent until the group confirms it", gap)
            self._doubted = True
            self._on_gap()

    def lost(self) -> None:
        """Note that partitions are being revoked: nothing new is started, events being processed may be completed."""
        self.generation = None

    def moved(self) -> None:
        """Start a new epoch: work started under the old assignment must not continue."""
        self.epoch += 1

    def gained(self) -> None:
        """Note that the rows of the current assignment are restored: the instance may act."""
        self.epoch += 1
        self.generation = self._group.generation
        self._doubted = False
        self._last_beat = self._clocks()

    async def confirm(self, *, doubt: bool = False) -> bool:
        """Return whether this instance's membership is certain. In doubt, or if ``doubt`` is set, ask the broker."""
        self.beat()
        self._doubted = self._doubted or doubt
        if self._doubted and self._group.settled and await self._group.confirm():
            self._doubted = False
            LOG.info("the group confirmed this coordinator")
        return not self._doubted

    async def certain(self, epoch: int) -> None:
        """Return if work started in ``epoch`` may continue; otherwise raise `Superseded`."""
        if not await self.confirm() or epoch != self.epoch:
            raise Superseded
