"""The settler: what a delivery report makes of a record."""

from __future__ import annotations

from typing import Any, cast

from jobledger.config import Settings
from jobledger.consumers.offsets import PartitionOffsets, Restored
from jobledger.consumers.settle import Settler, new_arrived
from jobledger.consumers.work import Lease, Partition, Work


class Report:
    """A delivery report as the client gives it: an offset, or none, of a record that the broker had already."""

    def __init__(self, offset: int | None) -> None:
        self._offset = offset

    def offset(self) -> int | None:
        return self._offset

    def topic(self) -> str:
        return "shop.lifecycle"

    def timestamp(self) -> tuple[int, int]:
        return 2, 1_000


def test_an_end_that_the_broker_had_already_is_an_end() -> None:
    """A leader that dies after it wrote a record leaves an acknowledgement without an offset: the record is done, and the
    floor stays where it can be found."""
    arrived = new_arrived()
    settler = Settler(
        Settings(),
        cast(Any, None),
        arrived,
        fail=lambda error: None,
        too_large=lambda work, size, where: None,
        each_tick=lambda: None,
    )
    partition = Partition("shop.jobs.mail", 0, Lease(3.0), -1, None)
    offsets = partition.offsets = PartitionOffsets(Restored(0), start_floor=50)
    works = [Work(partition, offset, None, arrived) for offset in range(3)]
    for work in works:
        assert offsets.receive(work.offset)
        partition.live[work.offset] = work
    works[0].closing_delivered(None, cast(Any, Report(60)))
    works[1].remaining = 2
    works[1].closing_delivered(None, cast(Any, Report(None)))
    works[2].noted_delivered(None, cast(Any, Report(None)))
    settler.drain()
    assert list(partition.live) == [1, 2], "the first is done, the second waits for what derives from it"
    assert offsets.floor == 61, "neither of the others can stand below the last known outcome"
    works[1].derived_delivered(None, cast(Any, Report(None)))
    settler.drain()
    assert list(partition.live) == [2]
    works[2].closing_delivered(None, cast(Any, Report(None)))
    settler.drain()
    assert not partition.live
    assert offsets.base == 3
