"""The coordinator's rules: they compute a new row, releases and timers from a row, an event and its append time.

This module is pure: it uses no clock, no Kafka, no Faust and no database. The caller passes the time. A decision
depends only on the events of the partition up to the event that is decided on. So an instance that was paused repeats
decisions and never contradicts earlier ones.

A release has three steps:

1. An event asks for the release (`JobSubmitted` with a delay or a due time, or `ReleaseRequested`). The row becomes
   `Scheduled`, and a timer is set.
2. At the due time the timer writes `ReleaseDecided` to the log, and nothing else.
3. The coordinator reads `ReleaseDecided` back. If this record was appended at or after the due time, and the row is
   still scheduled for exactly this (run, release), the job is released (`JobDue`) and the row becomes a `Released`
   marker. If the job has expired before, its run ends as expired. If the job was cancelled before, the job has no such
   row any more.

While a worker runs a long job with a job lease, the job's row is `Held`. The worker sends the closing fact to the
coordinator first. The coordinator passes the closing fact on to the lifecycle topic if the row is still `Held` for this
release, so that the end of the lease has not been decided. If the lease ends without an outcome, the job is released
again. So a run has one outcome on the lifecycle topic. After a crash of the coordinator, this outcome may be there
twice, with the same `event_id`.

A row contains the offset of the event from which the row was made. Rows are durable before that offset is committed. So
after a crash the table is ahead of the committed offset, and events that the table contains already are skipped.

`schedule_rows` defines the rows, and `derived_events` builds the records that derive from rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from jobledger.schemas.event_factory import derived
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
from jobledger.streams.coordinator.rules.schedule_rows import Floor, Held, Kept, Released, Row, Scheduled, row_key
from jobledger.streams.coordinator.rules.timers import wake_at

#: A run fails after this number of job leases that ended without an outcome. Each time the worker died, stopped
#: responding or could not reach the cluster, perhaps not because of the job (docs/adr/0010-leases.md). If only a
#: child process dies, the worker itself judges the job, after `CRASHES` starts
#: (`jobledger.consumers.running.placement`).
LEASES_LOST = 10


class Decision(msgspec.Struct, frozen=True):
    """The decision on one event.

    ``verdict``: the decision's name in the metrics. ``row``: the row to write; None if the row does not change.
    ``release``: the release to send before the row is written; None if no release is sent. ``facts``: events to write
    before the row, `DeadLettered` to the dead letters and all others to the lifecycle topic; if the source of an event
    is empty, the caller fills in the coordinator's source. ``wake_at``: the time at which a timer must look at the
    job's row, µs of the broker's clock; None: no new timer.
    """

    verdict: str
    row: Row | None = None
    release: Kept | None = None
    wake_at: int | None = None
    facts: tuple[JobEvent, ...] = ()


_SEEN = Decision("seen")
_PASSED = Decision("passed")
_UNEXPECTED = Decision("unexpected")
_STALE_DECISION = Decision("stale-decision")
_STALE_LEASE = Decision("stale-lease")
_ENDED = Decision("ended")


def decide(row: Row | None, floor: int, event: JobEvent, partition: int, offset: int, appended_ms: int) -> Decision:
    """Decide on the event at ``offset`` of ``partition``, appended at ``appended_ms`` of the broker's clock.

    ``row``: the job's row after the events before this one. ``floor``: the partition's floor.
    """
    if offset <= floor or (row is not None and offset <= row.offset):
        return _SEEN
    if isinstance(row, Released) and row.closed and event.run <= row.run:
        return _ENDED
    fact = event.fact
    match fact:
        case JobSubmitted():
            # A submission with a delay or a due time is release 0. The event asks for the first release of its run.
            due = _due(fact.delay_ms, fact.due_at, appended_ms)
            return _requested(
                row, event, fact.spec, max(event.release, 1), due, partition, offset, appended_ms, "scheduled"
            )
        case ReleaseRequested():
            due = _due(fact.delay_ms, fact.due_at, appended_ms)
            return _requested(row, event, fact.spec, event.release, due, partition, offset, appended_ms, "scheduled")
        case ReleaseDecided():
            return _decided(row, event, partition, offset, appended_ms)
        case ReleaseOverdue():
            return _overdue(row, event, fact, partition, offset, appended_ms)
        case Leased():
            return _leased(row, event, fact, partition, offset, appended_ms)
        case LeaseRenewed():
            return _renewed(row, event, fact, partition, offset, appended_ms)
        case CancelRequested():
            return _cancelled(row, event, fact, partition, offset, appended_ms)
        case JobRetried() | JobSnoozed() | JobSucceeded() | JobFailedFact() | JobCancelledFact():
            return _closed(row, event, fact, partition, offset, appended_ms)
        case _:
            return _UNEXPECTED


def _due(delay_ms: int | None, due_at: int | None, appended_ms: int) -> int:
    if due_at is not None:
        return due_at
    return later(appended_ms, delay_ms or 0)


def _requested(
    row: Row | None,
    event: JobEvent,
    spec: JobSpec,
    release: int,
    due: int,
    partition: int,
    offset: int,
    appended_ms: int,
    verdict: str,
) -> Decision:
    """Schedule a release. Only a release's first request counts. A request for an earlier release changes nothing."""
    if row is not None and (event.run, release) <= (row.run, row.release):
        return _PASSED
    scheduled = _schedule(event, spec, release, due, partition, offset, appended_ms)
    return Decision(verdict, row=scheduled, wake_at=wake_at(scheduled.acts_at))


def _decided(row: Row | None, event: JobEvent, partition: int, offset: int, appended_ms: int) -> Decision:
    if not isinstance(row, Kept) or (row.run, row.release) != (event.run, event.release):
        return _STALE_DECISION
    if appended_ms * 1000 < row.acts_at:
        # Only the broker's clock counts. The clock of the deciding instance was ahead, or the lease was renewed.
        return Decision("early", wake_at=wake_at(row.acts_at))
    if isinstance(row, Held):
        return _lost(row, partition, offset, appended_ms)
    if row.expires_at is not None and appended_ms * 1000 >= row.expires_at:
        return _ended(row, "expired", JobExpiredFact(row.expires_at), partition, offset, appended_ms)
    marker = Released(partition, offset, row.run, row.release, appended_ms)
    return Decision("released", row=marker, release=row)


def _overdue(
    row: Row | None, event: JobEvent, fact: ReleaseOverdue, partition: int, offset: int, appended_ms: int
) -> Decision:
    """Repeat the release that the event names, and never start a new release.

    If the request for the release was lost, schedule the release. If the release is kept, set its timer again.
    Otherwise send the release again. Change nothing if a later release exists.
    """
    named = (event.run, event.release)
    if row is None or (row.run, row.release) < named:
        return _requested(
            row, event, fact.spec, event.release, fact.due_at, partition, offset, appended_ms, "recreated"
        )
    if (row.run, row.release) > named:
        return _PASSED
    if isinstance(row, Kept):
        return Decision("looked-again", wake_at=wake_at(row.acts_at))
    return Decision(
        "sent-again", release=_schedule(event, fact.spec, event.release, fact.due_at, partition, offset, appended_ms)
    )


# -- leases -----------------------------------------------------------------------------------------------------------


def _leased(row: Row | None, event: JobEvent, fact: Leased, partition: int, offset: int, appended_ms: int) -> Decision:
    """Record a job lease. Change nothing if the release is scheduled or leased already, or a later release exists."""
    named = (event.run, event.release)
    if row is not None and (row.run, row.release) > named:
        return _PASSED
    if row is not None and (row.run, row.release) == named and not isinstance(row, Released):
        return _PASSED
    spec = lasting(fact.spec, appended_ms)
    held = Held(
        partition,
        offset,
        event.run,
        event.release,
        event.attempt,
        later(appended_ms, fact.lease_ms),
        event.job_id,
        event.task,
        event.queue,
        event.key,
        event.home,
        event.trace,
        spec.args,
        spec.tags,
        spec.parent,
        spec.expires_at,
        spec.priority,
        fact.worker,
        crashes_of(spec.tags),
    )
    return Decision("leased", row=held, wake_at=wake_at(held.due))


def _renewed(
    row: Row | None, event: JobEvent, fact: LeaseRenewed, partition: int, offset: int, appended_ms: int
) -> Decision:
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if fact.lease_ms > 0:
        due = later(appended_ms, fact.lease_ms)
        # Set no new timer: the existing timer looks at the row and is set again. With a new timer for each renewal, the
        # number of timers would grow.
        return Decision("renewed", row=msgspec.structs.replace(row, partition=partition, offset=offset, due=due))
    return _again("given-back", row, row.tags, partition, offset, appended_ms)


def _lost(row: Held, partition: int, offset: int, appended_ms: int) -> Decision:
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
        return _ended(row, "crashed", JobFailedFact("crashed", error), partition, offset, appended_ms)
    tags = {**row.tags, CRASHES_TAG: str(crashes)}
    return _again("lease-lost", row, tags, partition, offset, appended_ms)


def _again(verdict: str, row: Held, tags: dict[str, str], partition: int, offset: int, appended_ms: int) -> Decision:
    """Release the job to the workers at once, as the next release."""
    following = _following(row, row.attempt, appended_ms * 1000, partition, offset, tags)
    marker = Released(partition, offset, row.run, following.release, appended_ms)
    return Decision(verdict, row=marker, release=following)


def _following(row: Held, attempt: int, due: int, partition: int, offset: int, tags: dict[str, str]) -> Scheduled:
    return Scheduled(
        partition,
        offset,
        row.run,
        row.release + 1,
        attempt,
        due,
        row.job_id,
        row.task,
        row.queue,
        row.key,
        row.home,
        row.trace,
        row.args,
        tags,
        row.parent,
        row.expires_at,
        row.priority,
    )


def _closed(
    row: Row | None,
    event: JobEvent,
    fact: JobRetried | JobSnoozed | JobSucceeded | JobFailedFact | JobCancelledFact,
    partition: int,
    offset: int,
    appended_ms: int,
) -> Decision:
    """Pass on the closing fact that a worker reports for a leased job, if the row is still `Held` for this release."""
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if isinstance(fact, JobRetried | JobSnoozed):
        due = later(appended_ms, fact.delay_ms)
        attempt = row.attempt + isinstance(fact, JobRetried)
        following = _following(row, attempt, due, partition, offset, row.tags)
        return Decision("lease-closed", row=following, wake_at=wake_at(following.acts_at), facts=(event,))
    marker = Released(partition, offset, row.run, row.release, appended_ms, True)
    facts: tuple[JobEvent, ...] = (event,)
    if isinstance(fact, JobFailedFact):
        facts += (_derived_event(row, "dead-letter", DeadLettered(row.spec, fact.reason, fact.error), appended_ms),)
    return Decision("lease-closed", row=marker, facts=facts)


def _cancelled(
    row: Row | None, event: JobEvent, fact: CancelRequested, partition: int, offset: int, appended_ms: int
) -> Decision:
    """Cancel a release that is scheduled here. Workers handle the cancellation of other releases."""
    if not isinstance(row, Scheduled) or row.run != event.run:
        return _PASSED
    return _ended(row, "cancelled", JobCancelledFact(fact.by, fact.reason), partition, offset, appended_ms)


def _ended(
    row: Kept,
    verdict: str,
    fact: JobCancelledFact | JobExpiredFact | JobFailedFact,
    partition: int,
    offset: int,
    appended_ms: int,
) -> Decision:
    """End a run in the coordinator, with the event for the lifecycle topic and, for a failure, the dead letter."""
    marker = Released(partition, offset, row.run, row.release, appended_ms, True)
    facts: tuple[JobEvent, ...] = (_derived_event(row, verdict, fact, appended_ms),)
    if isinstance(fact, JobFailedFact):
        facts += (_derived_event(row, "dead-letter", DeadLettered(row.spec, fact.reason, fact.error), appended_ms),)
    return Decision(verdict, row=marker, facts=facts)


def _derived_event(row: Kept, what: str, fact: Fact, appended_ms: int) -> JobEvent:
    return derived(row, what, fact, appended_ms * 1000, "")


def _schedule(
    event: JobEvent, spec: JobSpec, release: int, due: int, partition: int, offset: int, appended_ms: int
) -> Scheduled:
    spec = lasting(spec, appended_ms)
    return Scheduled(
        partition,
        offset,
        event.run,
        release,
        event.attempt,
        due,
        event.job_id,
        event.task,
        event.queue,
        event.key,
        event.home,
        event.trace,
        spec.args,
        spec.tags,
        spec.parent,
        spec.expires_at,
        spec.priority,
    )


# -- a batch --------------------------------------------------------------------------------------------------------


class DecisionBatch:
    """Decide on consecutive events. The decision on an event uses the rows that the decisions before it have changed.

    The batch writes nothing. ``rows``: new rows by (partition, key), to be written after ``releases`` are acknowledged.
    ``releases``: releases to send, in order. ``facts``: events that the coordinator makes or passes on, to be sent
    together with the releases. ``timers``: (partition, row key, time in µs at which to look at the row). ``verdicts``:
    number of decisions by verdict. ``closed``: lanes for which a release was held back, because ``is_open(lane)`` was
    false. ``waiting``: change of the number of kept rows, by partition.
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
        self.facts: list[JobEvent] = []
        self.timers: list[tuple[int, bytes, int]] = []
        self.verdicts: Counter[str] = Counter()
        self.closed: set[str] = set()
        self.waiting: Counter[int] = Counter()

    def add(self, event: JobEvent, partition: int, offset: int, appended_ms: int) -> None:
        """Decide on one more event."""
        key = row_key(event.job_id)
        row = self.rows.get((partition, key)) or self._row(partition, key)
        decision = decide(row, self._floor(partition), event, partition, offset, appended_ms)
        released = decision.release
        if released is not None and not self._is_open(released.lane):
            # Release nothing. If the row is kept, its timer tries again once the work topic exists.
            self.closed.add(released.lane)
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
        self.facts += decision.facts
        if decision.row is not None:
            self.rows[partition, key] = decision.row
            self.waiting[partition] += isinstance(decision.row, Kept) - isinstance(row, Kept)
        if decision.wake_at is not None:
            self.timers.append((partition, key, decision.wake_at))


# -- sweep ----------------------------------------------------------------------------------------------------------


def sweepable(row: Row | Floor, committed: int, now_ms: int, keep_ms: int) -> bool:
    """Return whether a marker may be deleted: its offset is below ``committed`` and its age is at least ``keep_ms``."""
    return isinstance(row, Released) and row.offset < committed and row.ended_ms + keep_ms <= now_ms


def raised_floor(floor: int, committed: int) -> int:
    """Return the floor to write before markers are swept: all events below the committed offset were processed."""
    return max(floor, committed - 1)
