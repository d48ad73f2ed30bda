"""What the coordinator decides: a row, an event and its append time in; a new row, releases and timers out.

Pure: no clock, no Kafka, no Faust, no database; whoever drives it passes the time. Every decision is a function of what
stands in the partition up to the event, so an instance that was paused repeats decisions and never contradicts them.

A release lives through three steps. Something asks for it (`JobSubmitted` with a condition, `ReleaseRequested`): the
row is `Scheduled` and a timer is set. The timer passes and writes `ReleaseDecided` to the log, nothing else. When that
is read back, appended at or past the due time, and the row still is scheduled for exactly this (run, release), the job
is let go (`JobDue`) and the row becomes a `Released` marker. What was cancelled or has expired meanwhile ends here.

A long job's release has a `Held` row while a worker runs it on a lease. Its end comes here first and is passed on to
lifecycle if the lease still stands; a lease that ends by itself lets the job go again. So of a run there is one end.

Rows carry the offset of the event that made them: rows are durable before the offset is committed, so after a crash the
table is ahead of the log's reader, and what it has seen is skipped.

Rows themselves are in `schedules`, what is written of them in `derived`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from jobledger.schemas.events import (
    CRASHES_TAG,
    CancelRequested,
    DeadLettered,
    ErrorInfo,
    Fact,
    JobCancelled,
    JobEvent,
    JobExpired,
    JobFailed,
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
from jobledger.streams.derived import derived_id
from jobledger.streams.schedules import Floor, Held, Kept, Released, Row, Scheduled, row_key
from jobledger.streams.timers import wake_at

#: Leases of a run that ended without a word, after which it fails: its workers died each time, perhaps of something
#: else (docs/adr/0009-suspects.md). What dies in a child process is judged there, after three.
LEASES_LOST = 10


class Decision(msgspec.Struct, frozen=True):
    """What one event comes to.

    ``verdict`` names it for metrics. ``row``: to be written, None if nothing changes. ``release``: to be let go
    before the row is written. ``facts``: to be written before it, those of the dead letters there and the
    others on lifecycle; an empty source is the coordinator's. ``wake_at``: µs of the broker's clock at which
    the timer of this job shall look again.
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
    """Judge the event at ``offset`` of ``partition``, appended at ``appended_ms`` of the broker's clock.

    ``row``: the job's row as the events before this one left it; ``floor``: the partition's.
    """
    if offset <= floor or (row is not None and offset <= row.offset):
        return _SEEN
    if isinstance(row, Released) and row.closed and event.run <= row.run:
        return _ENDED
    fact = event.fact
    match fact:
        case JobSubmitted():
            # A conditioned submission is release 0: what it asks for is the first release of its run.
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
        case JobRetried() | JobSnoozed() | JobSucceeded() | JobFailed() | JobCancelled():
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
    """The first request of a release wins; one that was passed, or asked for before, changes nothing."""
    if row is not None and (event.run, release) <= (row.run, row.release):
        return _PASSED
    made = _schedule(event, spec, release, due, partition, offset, appended_ms)
    return Decision(verdict, row=made, wake_at=wake_at(made.acts_at))


def _decided(row: Row | None, event: JobEvent, partition: int, offset: int, appended_ms: int) -> Decision:
    if not isinstance(row, Kept) or (row.run, row.release) != (event.run, event.release):
        return _STALE_DECISION
    if appended_ms * 1000 < row.acts_at:
        # The deciding instance's clock is ahead of the broker's, whose clock alone counts; or the lease was renewed.
        return Decision("early", wake_at=wake_at(row.acts_at))
    if isinstance(row, Held):
        return _lost(row, partition, offset, appended_ms)
    if row.expires_at is not None and appended_ms * 1000 >= row.expires_at:
        return _ended(row, "expired", JobExpired(row.expires_at), partition, offset, appended_ms)
    marker = Released(partition, offset, row.run, row.release, appended_ms)
    return Decision("released", row=marker, release=row)


def _overdue(
    row: Row | None, event: JobEvent, fact: ReleaseOverdue, partition: int, offset: int, appended_ms: int
) -> Decision:
    """The release that is named, never a new one: sent again, looked at again, or, if
    its request was lost, scheduled."""
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
    """The first lease of a release counts; one that was given for it before, or after its end, changes nothing."""
    named = (event.run, event.release)
    if row is not None and (row.run, row.release) > named:
        return _PASSED
    if row is not None and (row.run, row.release) == named and not isinstance(row, Released):
        return _PASSED
    spec = lasting(fact.spec, appended_ms)
    made = Held(
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
    return Decision("leased", row=made, wake_at=wake_at(made.due))


def _renewed(
    row: Row | None, event: JobEvent, fact: LeaseRenewed, partition: int, offset: int, appended_ms: int
) -> Decision:
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if fact.lease_ms > 0:
        due = later(appended_ms, fact.lease_ms)
        # No timer: the one that is there looks again at the new time. Another one each time would be ever more of them.
        return Decision("renewed", row=msgspec.structs.replace(row, partition=partition, offset=offset, due=due))
    return _again("given-back", row, row.tags, partition, offset, appended_ms)


def _lost(row: Held, partition: int, offset: int, appended_ms: int) -> Decision:
    """The lease ended: its worker died, stood still or lost the cluster."""
    crashes = row.crashes + 1
    if crashes >= LEASES_LOST:
        error = ErrorInfo(
            "ProcessDied",
            f"its code was started {crashes} times and its lease ended each time, last with {row.worker}: the worker died, "
            "stood still, or could not reach the broker",
        )
        return _ended(row, "crashed", JobFailed("crashed", error), partition, offset, appended_ms)
    tags = {**row.tags, CRASHES_TAG: str(crashes)}
    return _again("lease-lost", row, tags, partition, offset, appended_ms)


def _again(verdict: str, row: Held, tags: dict[str, str], partition: int, offset: int, appended_ms: int) -> Decision:
    """Let the job go to the workers as its next release, at once."""
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
    fact: JobRetried | JobSnoozed | JobSucceeded | JobFailed | JobCancelled,
    partition: int,
    offset: int,
    appended_ms: int,
) -> Decision:
    """A worker says what its leased job came to: passed on, if the lease is still its own."""
    if not isinstance(row, Held) or (row.run, row.release) != (event.run, event.release):
        return _STALE_LEASE
    if isinstance(fact, JobRetried | JobSnoozed):
        due = later(appended_ms, fact.delay_ms)
        attempt = row.attempt + isinstance(fact, JobRetried)
        following = _following(row, attempt, due, partition, offset, row.tags)
        return Decision("lease-closed", row=following, wake_at=wake_at(following.acts_at), facts=(event,))
    marker = Released(partition, offset, row.run, row.release, appended_ms, True)
    facts: tuple[JobEvent, ...] = (event,)
    if isinstance(fact, JobFailed):
        facts += (_said(row, "dead-letter", DeadLettered(row.spec, fact.reason, fact.error), appended_ms),)
    return Decision("lease-closed", row=marker, facts=facts)


def _cancelled(
    row: Row | None, event: JobEvent, fact: CancelRequested, partition: int, offset: int, appended_ms: int
) -> Decision:
    """What waits here ends here; what runs, or waits for a worker, is the workers' affair."""
    if not isinstance(row, Scheduled) or row.run != event.run:
        return _PASSED
    return _ended(row, "cancelled", JobCancelled(fact.by, fact.reason), partition, offset, appended_ms)


def _ended(
    row: Kept, verdict: str, fact: JobCancelled | JobExpired | JobFailed, partition: int, offset: int, appended_ms: int
) -> Decision:
    """The coordinator ends a run itself."""
    marker = Released(partition, offset, row.run, row.release, appended_ms, True)
    facts: tuple[JobEvent, ...] = (_said(row, verdict, fact, appended_ms),)
    if isinstance(fact, JobFailed):
        facts += (_said(row, "dead-letter", DeadLettered(row.spec, fact.reason, fact.error), appended_ms),)
    return Decision(verdict, row=marker, facts=facts)


def _said(row: Kept, what: str, fact: Fact, appended_ms: int) -> JobEvent:
    return JobEvent(
        derived_id(row.job_id, row.run, row.release, what),
        row.job_id,
        row.run,
        row.attempt,
        row.release,
        appended_ms * 1000,
        row.task,
        row.queue,
        row.key,
        row.home,
        "",
        row.trace,
        fact,
    )


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


class Batch:
    """The decisions of consecutive events: each sees the rows as the ones before it left them, nothing is written.

    ``rows``: new rows by (partition, key), to be written after ``releases`` are acknowledged. ``releases``: jobs to let
    go, in order. ``facts``: what the coordinator says or passes on, to be written with them. ``timers``: (partition,
    key, µs) at which to look at a row. ``verdicts``: how many of each. ``closed``: lanes a release was held back for,
    because ``is_open(lane)`` was false. ``waiting``: by how much the number of scheduled rows changes, by partition.
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
            # Left as it is: scheduled, so that its timer tries again once the queue's topic is there.
            self.closed.add(released.lane)
            self.verdicts["held-back"] += 1
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
    """Whether a marker may go: the committed offset has passed it, and so have ``keep_ms`` milliseconds."""
    return isinstance(row, Released) and row.offset < committed and row.ended_ms + keep_ms <= now_ms


def raised_floor(floor: int, committed: int) -> int:
    """The floor to write before markers are swept: below the committed offset everything was dealt with, durably."""
    return max(floor, committed - 1)
