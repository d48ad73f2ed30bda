"""The coordinator's rules: they compute a new row, releases and timers from a row, an event and its append time.

This module is pure: it uses no clock, no Kafka, no Faust and no database. The caller passes the time. A decision
depends only on the events of the partition up to the event that is decided on. So an instance that was paused repeats
decisions and never contradicts earlier ones.

A release has three steps:

1. An event asks for the release (`JobSubmitted` with a delay or a due time, or `ReleaseRequested`). The row becomes
   `Scheduled`, and a timer is set.
2. At the due time the timer writes `ReleaseDecided` to the log, and nothing else.
3. The coordinator reads `ReleaseDecided` back. If this record was appended at or after the due time, and the row is
   still scheduled for exactly this (run, release), the job is released (`JobDue`) and the row becomes a `Marker`. If
   the job has expired before, its run ends as expired. If the job was cancelled before, the job has no such row any
   more.

While a worker runs a long job with a job lease, the job's row is `Held`. The worker sends the closing fact only to the
coordinator. The coordinator passes it on to the lifecycle topic if the row is still `Held` for this release, which
means that the end of the lease has not been decided. If the lease ends without an outcome, the job is released again.
So a run has one outcome on the lifecycle topic. After a crash of the coordinator, this outcome may be there twice, with
the same `event_id`.

A row contains the offset of the event from which the row was made. Rows are durable before that offset is committed. So
after a crash the table is ahead of the committed offset, and events that the table contains already are skipped.

`schedule_rows` defines the rows, and `derived_events` builds the records that derive from rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from jobledger.schemas.event_factory import Release, derived
from jobledger.schemas.events import (
    CRASHES_TAG,
    CancelRequested,
    DeadLettered,
    ErrorInfo,
    Fact,
    JobCancelledFact,
    JobEvent,
    JobExpiredFact,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobSubmitted,
    JobSucceeded,
    Leased,
    LeaseRenewed,
    ReleaseDecided,
    ReleaseOverdue,
    ReleaseRequested,
    crashes_of,
    lasting,
    later,
)
from jobledger.streams.coordinator.rules.schedule_rows import Floor, Held, Kept, Marker, Row, Scheduled, row_key
from jobledger.streams.coordinator.rules.timers import wake_at

#: A run fails after this number of job leases that ended without an outcome. Each time the worker died, stopped
#: responding or could not reach the cluster, perhaps not because of the job (docs/adr/0010-leases.md). If only a
#: child process dies, the worker itself judges the job, after `CRASHES` starts
#: (`jobledger.consumers.running.placement`).
LEASES_LOST = 10

K = TypeVar("K", bound=Kept)


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where an event is in the coordination topic, and when it was appended there.

    ``offset``: the event's offset, with the partition's shift added (`jobledger.streams.coordinator.table`).
    ``appended_ms``: the append time, ms of the broker's clock.
    """

    partition: int
    offset: int
    appended_ms: int


class Decision(msgspec.Struct, frozen=True):
    """The decision on one event.

    ``verdict``: the decision's name in the metrics. ``row``: the row to write; None if the row does not change.
    ``release``: the release to send before the row is written; None if no release is sent. ``events``: events to write
    before the row, `DeadLettered` to the dead letters and all others to the lifecycle topic; if the source of an event
    is empty, the caller fills in the coordinator's source. ``wake_at``: the time at which a timer must look at the
    job's row, µs of the broker's clock; None: no new timer.
    """

    verdict: str
    row: Row | None = None
    release: Kept | None = None
    wake_at: int | None = None
    events: tuple[JobEvent, ...] = ()


_SEEN = Decision("seen")
_PASSED = Decision("passed")
_UNEXPECTED = Decision("unexpected")
_STALE_DECISION = Decision("stale-decision")
_STALE_LEASE = Decision("stale-lease")
_ENDED = Decision("ended")


def decide(row: Row | None, floor: int, event: JobEvent, place: Place) -> Decision:
    """Decide on the event at ``place``.

    ``row``: the job's row after the events before this one. ``floor``: the partition's floor.
    """
    if place.offset <= floor or (row is not None and place.offset <= row.offset):
        return _SEEN
    if isinstance(row, Marker) and row.run_ended and event.run <= row.run:
        return _ENDED
    fact = event.fact
    match fact:
        case JobSubmitted():
            # A submission with a delay or a due time is release 0. The event asks for the first release of its run.
            due = _due(fact.delay_ms, fact.due_at, place.appended_ms)
            return _requested(row, event, fact.spec, max(event.release, 1), due, place, "scheduled")
        case ReleaseRequested():
            due = _due(fact.delay_ms, fact.due_at, place.appended_ms)
            return _requested(row, event, fact.spec, event.release, due, place, "scheduled")
        case ReleaseDecided():
            return _decided(row, event, place)
        case ReleaseOverdue():
            return _overdue(row, event, fact, place)
        case Leased():
            return _leased(row, event, fact, place)
        case LeaseRenewed():
            return _renewed(row, event, fact, place)
        case CancelRequested():
            return _cancelled(row, event, fact, place)
        case JobRetried() | JobSnoozed() | JobSucceeded() | JobFailedFact() | JobCancelledFact():
            return _closed(row, event, fact, place)
        case _:
            return _UNEXPECTED


def _due(delay_ms: int | None, due_at: int | None, appended_ms: int) -> int:
    if due_at is not None:
        return due_at
    return later(appended_ms, delay_ms or 0)


def _requested(
    row: Row | None, event: JobEvent, spec: JobSpec, release: int, due: int, place: Place, verdict: str
) -> Decision:
    """Schedule a release. Only a release's first request counts. A request for an earlier release changes nothing."""
    if row is not None and (event.run, release) <= (row.run, row.release):
        return _PASSED
    scheduled = _kept(Scheduled, event, spec, release, event.attempt, due, place)
    return Decision(verdict, row=scheduled, wake_at=wake_at(scheduled.acts_at))


def _decided(row: Row | None, event: JobEvent, place: Place) -> Decision:
    if not isinstance(row, Kept) or (row.run, row.release) != (event.run, event.release):
        return _STALE_DECISION
    appended = place.appended_ms * 1000
    if appended < row.acts_at:
        # Only the broker's clock counts. The clock of the deciding instance was ahead, or the lease was renewed.
        return Decision("early", wake_at=wake_at(row.acts_at))
    if isinstance(row, Held):
        return _lost(row, place)
    if row.expires_at is not None and appended >= row.expires_at:
        return _ended(row, "expired", JobExpiredFact(row.expires_at), place)
    return Decision("released", row=_marker(row.run, row.release, place), release=row)


def _overdue(row: Row | None, event: JobEvent, fact: ReleaseOverdue, place: Place) -> Decision:
    """Repeat the release that the event names, and never start a new release.

    If the request for the release was lost, schedule the release. If the release is kept, set its timer again.
    Otherwise send the release again. Change nothing if a later release exists.
    """
    named = (event.run, event.release)
    if row is None or (row.run, row.release) < named:
        return _requested(row, event, fact.spec, event.release, fact.due_at, place, "recreated")
    if (row.run, row.release) > named:
        return _PASSED
    if isinstance(row, Kept):
        return Decision("looked-again", wake_at=wake_at(row.acts_at))
    again = _kept(Scheduled, event, fact.spec, event.release, event.attempt, fact.due_at, place)
    return Decision("sent-again", release=again)


def _kept(
    kind: type[K], job: Release, spec: JobSpec, release: int, attempt: int, due: int, place: Place, *more: Any
) -> K:
    """Build the row that keeps a release. ``job``: the event or the row with the job's other values. ``more``: values
    of the fields that only ``kind`` has, in order."""
    # By position: with names of fields, an event would cost a microsecond more.
    spec = lasting(spec, place.appended_ms)
    return kind(
        place.partition,
        place.offset,
        job.run,
        release,
        attempt,
        due,
        job.job_id,
        job.task,
        job.queue,
        job.key,
        job.home,
        job.trace,
        spec.args,
        spec.tags,
        spec.parent,
        spec.expires_at,
        spec.priority,
        *more,
    )


def _marker(run: int, release: int, place: Place, run_ended: bool = False) -> Marker:
    return Marker(place.partition, place.offset, run, release, place.appended_ms, run_ended)


# -- leases -----------------------------------------------------------------------------------------------------------


def _leased(row: Row | None, event: JobEvent, fact: Leased, place: Place) -> Decision:
    """Record a job lease. Change nothing if the release is scheduled or leased already, or a later release exists."""
    named = (event.run, event.release)
    if row is not None and (row.run, row.release) > named:
        return _PASSED
    if row is not None and (row.run, row.release) == named and not isinstance(row, Marker):
        return _PASSED
    due = later(place.appended_ms, fact.lease_ms)
    crashes = crashes_of(fact.spec.tags)
    held = _kept(Held, event, fact.spec, event.release, event.attempt, due, place, fact.worker, crashes)
    return Decision("leased", row=held, wake_at=wake_at(held.due))


def _renewed(row: Row | None, event: JobEvent, fact: LeaseRenewed, place: Place) -> Decision:
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if fact.lease_ms > 0:
        due = later(place.appended_ms, fact.lease_ms)
        # Set no new timer: the existing timer looks at the row and is set again. With a new timer for each renewal, the
        # number of timers would grow.
        renewed = msgspec.structs.replace(row, partition=place.partition, offset=place.offset, due=due)
        return Decision("renewed", row=renewed)
    return _again("given-back", row, row.tags, place)


def _lost(row: Held, place: Place) -> Decision:
    """Handle a lease that ended without an outcome: the worker died, was paused or lost its connection to the cluster.

    Release the job again. If this is number `LEASES_LOST` of the run's leases that ended in this way, fail the run.
    """
    crashes = row.crashes + 1
    if crashes >= LEASES_LOST:
        error = ErrorInfo(
            "ProcessDied",
            f"its code was started {crashes} times and its lease ended each time, last with {row.worker}: the worker died, "
            "stopped responding, or could not reach the broker",
        )
        return _ended(row, "crashed", JobFailedFact("crashed", error), place)
    tags = {**row.tags, CRASHES_TAG: str(crashes)}
    return _again("lease-lost", row, tags, place)


def _again(verdict: str, row: Held, tags: dict[str, str], place: Place) -> Decision:
    """Release the job to the workers at once, as the next release."""
    following = _following(row, row.attempt, place.appended_ms * 1000, tags, place)
    return Decision(verdict, row=_marker(row.run, following.release, place), release=following)


def _following(row: Held, attempt: int, due: int, tags: dict[str, str], place: Place) -> Scheduled:
    spec = JobSpec(row.args, tags, row.parent, None, row.expires_at, row.priority)
    return _kept(Scheduled, row, spec, row.release + 1, attempt, due, place)


def _closed(
    row: Row | None,
    event: JobEvent,
    fact: JobRetried | JobSnoozed | JobSucceeded | JobFailedFact | JobCancelledFact,
    place: Place,
) -> Decision:
    """Pass on the closing fact that a worker reports for a leased job, if the row is still `Held` for this release."""
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if isinstance(fact, JobRetried | JobSnoozed):
        due = later(place.appended_ms, fact.delay_ms)
        attempt = row.attempt + isinstance(fact, JobRetried)
        following = _following(row, attempt, due, row.tags, place)
        return Decision("lease-closed", row=following, wake_at=wake_at(following.acts_at), events=(event,))
    events: tuple[JobEvent, ...] = (event,)
    if isinstance(fact, JobFailedFact):
        events += (_dead_letter(row, fact, place),)
    return Decision("lease-closed", row=_marker(row.run, row.release, place, True), events=events)


def _cancelled(row: Row | None, event: JobEvent, fact: CancelRequested, place: Place) -> Decision:
    """Cancel a release that is scheduled here. Workers handle the cancellation of other releases."""
    if not isinstance(row, Scheduled) or row.run != event.run:
        return _PASSED
    return _ended(row, "cancelled", JobCancelledFact(fact.by, fact.reason), place)


def _ended(row: Kept, verdict: str, fact: JobCancelledFact | JobExpiredFact | JobFailedFact, place: Place) -> Decision:
    """End a run in the coordinator, with the event for the lifecycle topic and, for a failure, the dead letter."""
    events: tuple[JobEvent, ...] = (_derived_event(row, verdict, fact, place),)
    if isinstance(fact, JobFailedFact):
        events += (_dead_letter(row, fact, place),)
    return Decision(verdict, row=_marker(row.run, row.release, place, True), events=events)


def _dead_letter(row: Kept, fact: JobFailedFact, place: Place) -> JobEvent:
    return _derived_event(row, "dead-letter", DeadLettered(row.spec, fact.reason, fact.error), place)


def _derived_event(row: Kept, what: str, fact: Fact, place: Place) -> JobEvent:
    return derived(row, what, fact, place.appended_ms * 1000, "")


# -- a batch --------------------------------------------------------------------------------------------------------


class DecisionBatch:
    """Decide on consecutive events. The decision on an event uses the rows that the decisions before it have changed.

    The batch writes nothing. ``rows``: new rows by (partition, key), to be written after ``releases`` are acknowledged.
    ``releases``: releases to send, in order. ``events``: events that the coordinator makes or passes on, to be sent
    together with the releases. ``timers``: (partition, row key, time in µs at which to look at the row). ``verdicts``:
    number of decisions by verdict. ``held_back_lanes``: lanes for which a release was held back, because
    ``is_open(lane)`` was false. ``kept_change``: change of the number of `Kept` rows, by partition.
    """

    def __init__(
        self,
        row: Callable[[int, bytes], Row | None],
        floor: Callable[[int], int],
        is_open: Callable[[str], bool] = lambda lane: True,
    ) -> None:
        self._row, self._floor, self._is_open = row, floor, is_open
        self.rows: dict[tuple[int, bytes], Row] = {}
        self.releases: list[Kept] = []
        self.events: list[JobEvent] = []
        self.timers: list[tuple[int, bytes, int]] = []
        self.verdicts: Counter[str] = Counter()
        self.held_back_lanes: set[str] = set()
        self.kept_change: Counter[int] = Counter()

    def add(self, event: JobEvent, place: Place) -> None:
        """Decide on one more event."""
        partition = place.partition
        key = row_key(event.job_id)
        row = self.rows.get((partition, key)) or self._row(partition, key)
        decision = decide(row, self._floor(partition), event, place)
        released = decision.release
        if released is not None and not self._is_open(released.lane):
            # Release nothing. If the row is kept, its timer tries again once the work topic exists.
            self.held_back_lanes.add(released.lane)
            self.verdicts["held-back"] += 1
            if isinstance(row, Held) and isinstance(released, Scheduled):
                # The job lease has ended now. Schedule the next release, or the end of the lease would count as a crash.
                row = self.rows[partition, key] = released
            if isinstance(row, Kept):
                self.timers.append((partition, key, wake_at(row.acts_at)))
            return
        self.verdicts[decision.verdict] += 1
        if released is not None:
            self.releases.append(released)
        self.events += decision.events
        if decision.row is not None:
            self.rows[partition, key] = decision.row
            self.kept_change[partition] += isinstance(decision.row, Kept) - isinstance(row, Kept)
        if decision.wake_at is not None:
            self.timers.append((partition, key, decision.wake_at))


# -- sweep ----------------------------------------------------------------------------------------------------------


def sweepable(row: Row | Floor, committed: int, now_ms: int, keep_ms: int) -> bool:
    """Return whether a marker may be deleted: its offset is below ``committed`` and its age is at least ``keep_ms``."""
    return isinstance(row, Marker) and row.offset < committed and row.appended_ms + keep_ms <= now_ms


def raised_floor(floor: int, committed: int) -> int:
    """Return the floor to write before markers are swept: all events below the committed offset were processed."""
    return max(floor, committed - 1)
