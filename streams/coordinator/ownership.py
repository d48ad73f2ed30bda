"""Decide whether this instance may still act for its partitions. This module does not use rows.

An instance can lose its partitions without noticing the loss, if its process was paused or its machine was suspended.
The clocks of the process then show a gap. From then on until the broker has confirmed its membership, the instance
writes no row, starts no timer decision, and allows no further offset to be committed.

It may still send releases and other records that follow from events that it has read already. They are harmless:
decisions are a function of the log, so another owner makes the same ones, with the same ids, and workers drop a release
that is sent twice by its (job, run, release). A row that was on its way when the process was paused may also reach the
changelog late. `jobledger.streams.coordinator.table` detects such a write.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jobledger.process.logger import get_logger
from jobledger.streams.coordinator.faust.faust_app import Group

LOG = get_logger("jobledger.coordinator")

#: Seconds that a clock may advance between two calls of `Ownership.beat`. After a larger gap the process is treated as
#: paused.
GAP = 1.5


class Superseded(Exception):
    """Partitions were assigned or revoked while events were being processed, or the membership is not certain.

    The decisions on these events are dropped, and the events are read again.
    """


def clocks() -> tuple[float, float]:
    """Return wall time and time since boot, in seconds.

    The time since boot includes suspensions of the machine if the system has a clock for that.
    """
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time(), time.monotonic() if boot is None else time.clock_gettime(boot)


class Ownership:
    """Track whether this instance owns its partitions.

    ``epoch`` grows whenever partitions are assigned or revoked. ``generation``: the consumer group's generation; None
    during a rebalance. ``on_gap()`` is called when the clocks have jumped.
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
        """Whether the instance may write rows and timer decisions: no rebalance is under way, and the instance's
        membership is not in doubt."""
        self.beat()
        return not self._doubted and self.generation is not None and self._group.stable

    def beat(self) -> None:
        """Check whether this process was paused (SIGSTOP, a suspended machine) or its clock was set. The caller calls
        this a few times a second."""
        now = self._clocks()
        gap = max(abs(b - a) for a, b in zip(self._last_beat, now, strict=True))
        self._last_beat = now
        if gap > GAP:
            LOG.warning(
                "the clocks of this process jumped by %.1f s (it was paused, or its clock was set): until the broker "
                "confirms its group membership, it writes no row, starts no timer decision and allows no further "
                "offset to be committed; releases of events that it has read already may still be sent",
                gap,
            )
            self._doubted = True
            self._on_gap()

    def revoking(self) -> None:
        """Note that partitions are being revoked: nothing new is started; events being processed may be completed."""
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
        """Return whether this instance's membership is certain.

        Ask the broker first if the membership is in doubt or ``doubt`` is true.
        """
        self.beat()
        self._doubted = self._doubted or doubt
        if self._doubted and self._group.stable and await self._group.confirm():
            self._doubted = False
            LOG.info("the broker confirmed the group membership of this coordinator")
        return not self._doubted

    async def require(self, epoch: int) -> None:
        """Raise `Superseded` unless work that was started in ``epoch`` may continue."""
        if not await self.confirm() or epoch != self.epoch:
            raise Superseded
