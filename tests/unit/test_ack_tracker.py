"""The ack tracker: the effect of a delivery report on a work record."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from jobledger.config import Settings
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.state.event_loop import LoopCalls
from jobledger.consumers.state.offset_tracker import PartitionOffsets
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.log.commit_metadata import Restored
from jobledger.log.writer import Outgoing


class Report:
    """A delivery report as Kafka's client gives it. If the broker had the record already, the report has no offset."""

    def __init__(self, offset: int | None) -> None:
        self._offset = offset

    def offset(self) -> int | None:
        return self._offset

    def topic(self) -> str:
        return "shop.lifecycle"

    def timestamp(self) -> tuple[int, int]:
        return 2, 1_000


def made_reports() -> Reports:
    """Return reports that no dispatcher reads."""
    reports = Reports(LoopCalls(lambda error: None))
    reports.awake = True
    return reports


def test_an_acknowledgement_without_an_offset_closes_a_record() -> None:
    """If a leader dies after it wrote a record, the acknowledgement has no offset. The work record is done, and the
    floor stays below the closing fact."""
    reports = made_reports()
    arrived = reports.arrived
    ack_tracker = AckTracker(
        Settings(),
        cast(Any, SimpleNamespace(clock=BrokerClock())),
        cast(Any, None),
        reports,
    )
    partition = Partition("shop.jobs.mail", 0, OwnershipLease(3.0), -1, None)
    offsets = partition.offsets = PartitionOffsets(Restored(0), start_floor=50)
    works = [JobRun(partition, offset, None, arrived) for offset in range(3)]
    for work in works:
        assert offsets.receive(work.offset)
        partition.live[work.offset] = work
    works[0].settling_delivered(None, cast(Any, Report(60)))
    works[1].remaining = 2
    works[1].settling_delivered(None, cast(Any, Report(None)))
    works[2].continuing_delivered(None, cast(Any, Report(None)))
    ack_tracker.drain()
    assert list(partition.live) == [1, 2], "the first is done, the second waits for what derives from it"
    assert offsets.floor == 61, "neither of the others can stand below the last known outcome"
    works[1].derived_delivered(None, cast(Any, Report(None)))
    ack_tracker.drain()
    assert list(partition.live) == [2]
    works[2].settling_delivered(None, cast(Any, Report(None)))
    ack_tracker.drain()
    assert not partition.live
    assert offsets.watermark == 3


def test_derived_records_wait_until_the_ownership_of_the_partition_is_confirmed() -> None:
    """After a pause a worker requests no retry before the group has confirmed its partition. If another worker has the
    partition, no retry is requested, because the other worker may have closed the job."""
    reports, sent = made_reports(), list[str]()
    arrived = reports.arrived
    sender = SimpleNamespace(
        polled_at=float("inf"), clock=BrokerClock(), check=lambda: None, send=lambda topic, *_: sent.append(topic)
    )
    ack_tracker = AckTracker(
        Settings(),
        cast(Any, sender),
        cast(Any, None),
        reports,
    )
    lease = OwnershipLease(3600.0)  # this lease is over
    partition = Partition("shop.jobs.mail", 0, lease, -1, None)
    offsets = partition.offsets = PartitionOffsets(Restored(0), start_floor=50)
    works = [JobRun(partition, offset, None, arrived) for offset in range(2)]
    for work in works:
        assert offsets.receive(work.offset)
        work.derived, work.remaining = [Outgoing(f"shop.{work.offset}", b"1", None)], 2
    works[0].settling_delivered(None, cast(Any, Report(60)))
    ack_tracker.tick()
    assert (sent, lease.wanted) == ([], True)
    lease.confirm(time.monotonic())
    ack_tracker.tick()
    assert sent == ["shop.0"]
    lease.until = 0.0
    works[1].settling_delivered(None, cast(Any, Report(61)))
    ack_tracker.tick()
    partition.give_up()
    partition.gone = True
    lease.confirm(time.monotonic())
    ack_tracker.tick()
    ack_tracker.tick()
    assert sent == ["shop.0"], "the next owner's"
    assert offsets.floor == 60, "it finds the outcomes"
