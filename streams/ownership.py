"""Whether this instance may still act for its partitions. Knows no rows.

An instance can lose its partitions without noticing: it was paused, or its machine slept. Then its clock shows a gap,
and it sends nothing until the broker has confirmed its membership. What slips through all the same is harmless, since
decisions are repeated and never contradicted, and is found out at the changelog (`jobledger.streams.table`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jobledger.logger import get_logger
from jobledger.streams.faust_app import Group

LOG = get_logger("jobledger.coordinator")

#: Seconds without a beat after which this process is taken to have stood still.
GAP = 1.5


class Superseded(Exception):
    """The partitions were taken away in the middle of something: it is dropped, and its events are read again."""


def clocks() -> tuple[float, float]:
    """Wall time, and time since boot that includes a suspension where the system tells it; seconds."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time(), time.monotonic() if boot is None else time.clock_gettime(boot)


class Ownership:
    """``epoch`` grows whenever partitions come or go; ``generation`` is the group's, None while they are moving.

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
        """Whether neither a rebalance nor a doubt stands against acting."""
        self.beat()
        return not self._doubted and self.generation is not None and self._group.settled

    def beat(self) -> None:
        """To be called a few times a second: notices that this process stood still (SIGSTOP, a suspended machine) or
        that its clock was set."""
        now = self._clocks()
        gap = max(abs(b - a) for a, b in zip(self._last_beat, now, strict=True))
        self._last_beat = now
        if gap > GAP:
            LOG.warning("this process was paused for %.1f s: nothing is sent until the group confirms it", gap)
            self._doubted = True
            self._on_gap()

    def lost(self) -> None:
        """The partitions are being taken away: nothing new is begun, what was begun may end."""
        self.generation = None

    def moved(self) -> None:
        """What was begun under the old assignment must not go on."""
        self.epoch += 1

    def gained(self) -> None:
        """Rows are restored for the current assignment."""
        self.epoch += 1
        self.generation = self._group.generation
        self._doubted = False
        self._last_beat = self._clocks()

    async def confirm(self, *, doubt: bool = False) -> bool:
        """Whether this instance may act; in doubt, or with ``doubt``, the broker is asked."""
        self.beat()
        self._doubted = self._doubted or doubt
        if self._doubted and self._group.settled and await self._group.confirm():
            self._doubted = False
            LOG.info("the group confirmed this coordinator")
        return not self._doubted

    async def certain(self, epoch: int) -> None:
        """Go on with what was begun in ``epoch``, or raise `Superseded`."""
        if not await self.confirm() or epoch != self.epoch:
            raise Superseded
