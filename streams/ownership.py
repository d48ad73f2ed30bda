"""Whether this instance may still act for its partitions. Knows no rows.

An instance can lose its partitions without noticing: it was paused, or its machine slept. Then its clock shows a gap, and
it sends nothing until the broker has confirmed its membership. What slips through is harmless (decisions are repeated,
never contradicted) or is found out by `Overtaken`.
"""

from __future__ import annotations

import logging

from jobledger.errors import JobledgerError
from jobledger.streams.faust_app import Group

LOG = logging.getLogger("jobledger.coordinator")


class Superseded(Exception):
    """The partitions were taken away in the middle of something: it is dropped, and its events are read again."""


class Overtaken(JobledgerError):
    """Somebody else wrote to a changelog partition that this instance takes for its own: it must start anew."""


class Ownership:
    """``epoch`` grows whenever partitions come or go; ``generation`` is the group's, None while they are moving."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.epoch = 0
        self.generation: int | None = None
        self._doubted = False

    @property
    def undisputed(self) -> bool:
        """Whether neither a rebalance nor a doubt stands against acting."""
        return not self._doubted and self.generation is not None and self._group.settled

    def doubt(self) -> None:
        """This process stood still: it may have been replaced."""
        self._doubted = True

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

    async def confirm(self) -> bool:
        """Whether this instance may act; in doubt the broker is asked."""
        if self._doubted and self._group.settled and await self._group.confirm():
            self._doubted = False
            LOG.info("the group confirmed this coordinator")
        return not self._doubted

    async def certain(self, epoch: int) -> None:
        """Go on with what was begun in ``epoch``, or raise `Superseded`."""
        if not await self.confirm() or epoch != self.epoch:
            raise Superseded
