"""Decide whether this instance may still act for its partitions. This module does not use rows.

An instance can lose its partitions without noticing the loss, if its process was paused or its machine was suspended.
The clocks of the process then show a gap, and the instance sends nothing until the broker has confirmed its membership.
A late write that still reaches the broker is harmless, because repeated decisions never contradict earlier ones.
`jobledger.streams.coordinator.table` detects such a write at the changelog.
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
        """Whether the instance may act: no rebalance is under way, and the instance's membership is not in doubt."""
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
                "the clocks of this process jumped by %.1f s (it was paused, or its clock was set): nothing is sent until the "
                "broker confirms its group membership",
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
