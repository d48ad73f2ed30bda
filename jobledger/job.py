"""A job's states, the fold of its facts, and its status as users see it. Pure: no Kafka, no Avro, no database, no
clock.

A job's `Life` is a join-semilattice: `join` is commutative, associative and idempotent. To fold a fact is to join the
life with another life that holds only this fact (`of`). So the result does not depend on duplicates, replays, or the
order between topics. The design is the state-based CRDT of Shapiro, Preguiça, Baquero and Zawirski (2011): a product of
slots, each of which keeps the greatest value that it received, in a total order that uses no clocks.

* ``run``: the greatest. The slots are those of this run; of smaller runs only the positions are kept. A pair that is
  compared first by a chain (the run) and then by a semilattice is again a semilattice.
* ``head``: a submission before a release, a release before any other fact; then the lowest position.
* ``due``: the greatest (release, attempt), then the lowest position.
* ``start``, ``leased``: the greatest (release, attempt), then the highest position.
* ``close``: the greatest (release, attempt). If these are equal, a fact that ends the release is kept, not a fact in
  place. Of several facts that end the release the lowest position is kept, of several in place the highest.
* ``report``: the greatest (release, attempt, sequence), then the lowest position.
* ``end``: succeeded > failed > cancelled > expired, then the lowest position.
* ``positions``: the union, of which the `FIRST` earliest and the `LAST` latest are kept. This is still a semilattice: a
  position that is among the earliest of a union is among the earliest of the part from which it came. So dropping
  positions early loses none that dropping them late would have kept. The union has no positions of progress reports;
  the slot ``report`` holds that of the last one.

A fact that closes a release is folded only from the lifecycle topic (`of`). Derived records (release requests and
decisions, dead letters) are not folded, because they add nothing to the facts. Their positions are not kept either: a
timeline shows facts.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import msgspec

from jobledger.fingerprint import fingerprint
from jobledger.schemas import events as ev
from jobledger.schemas.events import ErrorInfo, Position, Recorded

#: The last millisecond of the year 9999.
_FAR_MS = 253_402_300_799_999

#: The name, without the namespace and its dot, of the topic on which the facts that close a release count
#: (`Names.lifecycle`). A namespace has no dot, and the work topic of a queue with this name is another topic.
LIFECYCLE = "lifecycle"

#: Maximum number of positions of a job that are kept: of the earliest, and of the latest.
FIRST, LAST = 64, 192


class State(enum.StrEnum):
    """The state of a job."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether this state ends the run."""
        return self in ENDS


#: The states that end a run, the strongest first: if the log holds two outcomes of a run, the stronger one is shown.
ENDS = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED)


class Transition(NamedTuple):
    """One transition of a job: the state before (None: the table does not know the job), the fact, and the state
    after."""

    before: State | None
    fact: type[Any]
    after: State
    note: str = ""


_S = State
#: Every transition of a job when each fact is read once and in order. A fact without a transition from the current
#: state is late or a duplicate, and does not change the state. `docs/draw.py` draws this table.
TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, ev.JobSubmitted, _S.QUEUED, "run now"),
    Transition(None, ev.JobSubmitted, _S.SCHEDULED, "with a delay, or a redrive"),
    Transition(_S.SCHEDULED, ev.JobDue, _S.QUEUED),
    Transition(_S.RETRYING, ev.JobDue, _S.QUEUED),
    Transition(_S.QUEUED, ev.JobLeased, _S.QUEUED, "a long job"),
    Transition(_S.QUEUED, ev.JobStarted, _S.RUNNING),
    Transition(_S.RUNNING, ev.JobStarted, _S.RUNNING, "taken over"),
    Transition(_S.RUNNING, ev.JobProgressed, _S.RUNNING),
    Transition(_S.RUNNING, ev.JobDue, _S.QUEUED, "its lease ended"),
    Transition(_S.RUNNING, ev.JobRetried, _S.RETRYING),
    Transition(_S.RETRYING, ev.JobStarted, _S.RUNNING, "in place, with a key"),
    Transition(_S.RUNNING, ev.JobSnoozed, _S.SCHEDULED),
    Transition(_S.SCHEDULED, ev.JobStarted, _S.RUNNING, "snoozed in place, with a key"),
    Transition(_S.QUEUED, ev.JobSnoozed, _S.SCHEDULED, "unknown task, or held back"),
    Transition(_S.RUNNING, ev.JobSucceeded, _S.SUCCEEDED),
    Transition(_S.RUNNING, ev.JobFailedFact, _S.FAILED),
    Transition(_S.QUEUED, ev.JobFailedFact, _S.FAILED, "cannot be run"),
    *(Transition(s, ev.JobFailedFact, _S.FAILED, "too large for its work topic") for s in (_S.SCHEDULED, _S.RETRYING)),
    *(Transition(s, ev.JobCancelledFact, _S.CANCELLED) for s in (_S.SCHEDULED, _S.QUEUED, _S.RUNNING, _S.RETRYING)),
    *(Transition(s, ev.JobExpiredFact, _S.EXPIRED) for s in (_S.SCHEDULED, _S.QUEUED, _S.RETRYING)),
)

# -- slots ----------------------------------------------------------------------------------------------------------

#: A record's append time and its position: (milliseconds, topic, partition, offset).
At = tuple[int, str, int, int]


# Slots are serialised as arrays. They hold nothing that could refer back to them, so the garbage collector need not
# track them (gc=False).


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Identifies the job. ``rank``: 0 if the job is known from its submission, 1 from a release, 2 from another fact
    (then without tags and parent).

    ``release``, ``attempt``: as submitted. ``due_ms``: set if the submission had a delay or due time. ``key``: the
    ordering key. ``redrive``: who asked for this run, why, and by which plan, if it is not the first. ``copy``: the id
    of the job of which this one is a copy, who asked for the copy, and why.
    """

    rank: int
    at: At
    task: str
    queue: str
    release: int = 0
    attempt: int = 0
    due_ms: int | None = None
    tags: dict[str, str] = {}
    parent: str | None = None
    key: str | None = None
    redrive: tuple[str, str | None, str | None] | None = None
    copy: tuple[str, str | None, str | None] | None = None


class Due(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The job was released to the workers."""

    release: int
    attempt: int
    at: At
    due_ms: int


class Start(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A worker started an attempt. ``worker``: its name; empty in a slot that an earlier version wrote. ``version``:
    that of the app's code there, if it is known."""

    release: int
    attempt: int
    at: At
    worker: str = ""
    version: str | None = None


class Close(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An attempt ended and another attempt follows at ``due_ms``. Without an error the job was snoozed."""

    release: int
    attempt: int
    at: At
    due_ms: int
    duration_us: int
    error: ErrorInfo | None = None
    reason: str | None = None
    in_place: bool = False


class Report(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The last progress report."""

    release: int
    attempt: int
    sequence: int
    at: At
    done: int
    total: int | None
    message: str | None


class End(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The run ended; ``rank`` is the index of its state in `ENDS`. ``by``: who cancelled the job."""

    rank: int
    at: At
    release: int
    attempt: int
    duration_us: int = 0
    error: ErrorInfo | None = None
    reason: str | None = None
    result: bytes | None = None
    by: str | None = None


class Life(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The known facts of a job: its slots, and the positions of its facts in the order of their append times."""

    run: int
    head: Head
    due: Due | None = None
    start: Start | None = None
    close: Close | None = None
    report: Report | None = None
    end: End | None = None
    positions: tuple[At, ...] = ()
    #: The last release that is held by a lease instead of by its work record.
    leased: Start | None = None


# -- the fold -------------------------------------------------------------------------------------------------------


def of(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.Fact, at: At
) -> Life | None:
    """Return the life of a job of which only this fact is known; None if the fold ignores this kind of fact.

    A fact that closes a release counts only on the lifecycle topic. From other topics only its position and the job's
    head are kept: the worker of a leased job reports the outcome to the coordinator, possibly after its lease has
    ended, and the coordinator writes the outcome that counts to the lifecycle topic.
    """
    make = _MAKERS.get(fact.__class__)
    if make is None:
        return None
    life = make(run, release, attempt, task, queue, key, fact, at)
    if (life.end is not None or life.close is not None) and at[1].partition(".")[2] != LIFECYCLE:
        return Life(run, life.head, positions=life.positions)
    return life


def _submitted(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobSubmitted, at: At
) -> Life:
    spec = fact.spec
    due_ms: int | None = None
    if fact.due_at is not None:
        due_ms = fact.due_at // 1000
    elif fact.delay_ms is not None:
        due_ms = _later(at, fact.delay_ms)
    asked = fact.redrive
    redrive = None if asked is None else (asked.by, asked.reason, asked.plan)
    copy = None if spec.links is None else _copy(spec.links)
    head = Head(0, at, task, queue, release, attempt, due_ms, spec.tags, spec.parent, key, redrive, copy)
    return Life(run, head, None, None, None, None, None, (at,))


def _due(run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobDue, at: At) -> Life:
    links = fact.spec.links
    copy = None if links is None else _copy(links)
    head = Head(1, at, task, queue, 0, 0, None, fact.spec.tags, fact.spec.parent, key, None, copy)
    return Life(run, head, Due(release, attempt, at, fact.due_at // 1000), None, None, None, None, (at,))


def _started(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobStarted, at: At
) -> Life:
    start = Start(release, attempt, at, fact.worker, fact.version)
    return Life(run, Head(2, at, task, queue), None, start, None, None, None, (at,))


def _leased(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobLeased, at: At
) -> Life:
    leased = Start(release, attempt, at)
    return Life(run, Head(2, at, task, queue), None, None, None, None, None, (at,), leased)


def _progressed(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobProgressed, at: At
) -> Life:
    report = Report(release, attempt, fact.sequence, at, fact.done, fact.total, fact.message)
    return Life(run, Head(2, at, task, queue), None, None, None, report, None, ())


def _retried(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobRetried, at: At
) -> Life:
    close = Close(release, attempt, at, _later(at, fact.delay_ms), fact.duration_us, fact.error, None, fact.in_place)
    return Life(run, Head(2, at, task, queue), None, None, close, None, None, (at,))


def _snoozed(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobSnoozed, at: At
) -> Life:
    close = Close(release, attempt, at, _later(at, fact.delay_ms), fact.duration_us, None, fact.reason, fact.in_place)
    return Life(run, Head(2, at, task, queue), None, None, close, None, None, (at,))


def _succeeded(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobSucceeded, at: At
) -> Life:
    end = End(0, at, release, attempt, fact.duration_us, None, None, fact.result)
    return Life(run, Head(2, at, task, queue), None, None, None, None, end, (at,))


def _failed(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobFailedFact, at: At
) -> Life:
    end = End(1, at, release, attempt, fact.duration_us, fact.error, fact.reason)
    return Life(run, Head(2, at, task, queue), None, None, None, None, end, (at,))


def _cancelled(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobCancelledFact, at: At
) -> Life:
    end = End(2, at, release, attempt, 0, None, fact.reason or f"by {fact.by}", None, fact.by)
    return Life(run, Head(2, at, task, queue), None, None, None, None, end, (at,))


def _expired(
    run: int, release: int, attempt: int, task: str, queue: str, key: str | None, fact: ev.JobExpiredFact, at: At
) -> Life:
    return Life(run, Head(2, at, task, queue), None, None, None, None, End(3, at, release, attempt), (at,))


def _copy(links: ev.JobLinks) -> tuple[str, str | None, str | None] | None:
    return None if links.copy_of is None else (links.copy_of, links.copied_by, links.copy_reason)


def _later(at: At, delay_ms: int) -> int:
    """Return the append time plus a delay, at most `_FAR_MS`: even an extreme delay must fit the 64 bits of a
    database."""
    return min(at[0] + delay_ms, _FAR_MS)


_MAKERS: dict[type[Any], Callable[[int, int, int, str, str, str | None, Any, At], Life]] = {
    ev.JobSubmitted: _submitted,
    ev.JobDue: _due,
    ev.JobStarted: _started,
    ev.JobLeased: _leased,
    ev.JobProgressed: _progressed,
    ev.JobRetried: _retried,
    ev.JobSnoozed: _snoozed,
    ev.JobSucceeded: _succeeded,
    ev.JobFailedFact: _failed,
    ev.JobCancelledFact: _cancelled,
    ev.JobExpiredFact: _expired,
}


def apply(life: Life | None, recorded: Recorded) -> Life | None:
    """Return the life with one more fact of the same job. ``life`` None: no fact was known before."""
    event, position = recorded.event, recorded.position
    at = (recorded.appended_ms, position.topic, position.partition, position.offset)
    return join(life, of(event.run, event.release, event.attempt, event.task, event.queue, event.key, event.fact, at))


@overload
def join(a: Life, b: Life | None) -> Life: ...


@overload
def join(a: Life | None, b: Life) -> Life: ...


@overload
def join(a: Life | None, b: Life | None) -> Life | None: ...


def join(a: Life | None, b: Life | None) -> Life | None:
    """Return the smallest life that holds everything that two lives of the same job hold. None is a life that holds
    nothing."""
    if a is None or a is b:
        return b
    if b is None:
        return a
    positions = _union(a.positions, b.positions)
    if a.run != b.run:
        top = a if a.run > b.run else b
        return Life(top.run, top.head, top.due, top.start, top.close, top.report, top.end, positions, top.leased)
    head, other = a.head, b.head
    if other.rank < head.rank or (other.rank == head.rank and other.at[1:] < head.at[1:]):
        head = other
    due, start, close, report, end = a.due, a.start, a.close, a.report, a.end
    if b.due is not None:
        due = b.due if due is None else _first_due(due, b.due)
    if b.start is not None:
        start = b.start if start is None else max(start, b.start, key=_start_rank)
    if b.close is not None:
        close = b.close if close is None else _last_close(close, b.close)
    if b.report is not None:
        report = b.report if report is None else min(report, b.report, key=_report_rank)
    if b.end is not None:
        end = b.end if end is None else min(end, b.end, key=_end_rank)
    leased = a.leased
    if b.leased is not None:
        leased = b.leased if leased is None else max(leased, b.leased, key=_start_rank)
    return Life(a.run, head, due, start, close, report, end, positions, leased)


def _first_due(a: Due, b: Due) -> Due:
    """Return the slot with the greater (release, attempt); if these are equal, the slot that is first in the log."""
    mine, other = (a.release, a.attempt), (b.release, b.attempt)
    return a if mine > other or (mine == other and a.at[1:] <= b.at[1:]) else b


def _last_close(a: Close, b: Close) -> Close:
    """Return the slot with the greater (release, attempt). If these are equal, return the first in the log that ends
    the release; if both are in place, the last in the log, because a job can be snoozed in place several times in one
    attempt."""
    mine, other = (a.release, a.attempt, not a.in_place), (b.release, b.attempt, not b.in_place)
    if mine != other:
        return a if mine > other else b
    first, last = (a, b) if a.at[1:] <= b.at[1:] else (b, a)
    return last if a.in_place else first


def _start_rank(start: Start) -> tuple[int, int, tuple[str, int, int]]:
    return start.release, start.attempt, start.at[1:]


def _report_rank(report: Report) -> tuple[int, int, int, tuple[str, int, int]]:
    return -report.release, -report.attempt, -report.sequence, report.at[1:]


def _end_rank(end: End) -> tuple[int, tuple[str, int, int]]:
    return end.rank, end.at[1:]


def _union(a: tuple[At, ...], b: tuple[At, ...]) -> tuple[At, ...]:
    if not a or not b:
        return a or b
    if len(b) == 1:  # one more fact, which is nearly always the latest
        one = b[0]
        if one > a[-1]:
            union = a + b
        elif one in a:
            return a
        else:
            union = tuple(sorted((*a, one)))
    else:
        union = tuple(sorted({*a, *b}))
    return union if len(union) <= FIRST + LAST else union[:FIRST] + union[-LAST:]


# -- what users see ------------------------------------------------------------------------------------------------


#: A release number below every other.
_NEVER = -(1 << 31) - 1


class Visible(msgspec.Struct, frozen=True, gc=False):
    """The visible part of a life, from which rows and counters are computed. Times are the broker's, in milliseconds.

    ``since_ms``: the append time of the submission; while the submission is not known, the append time of the fact from
    which the job is known. ``started_ms``: the last start of this run.
    """

    state: State
    task: str
    queue: str
    run: int
    attempt: int
    release: int
    since_ms: int
    due_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    error: ErrorInfo | None = None
    reason: str | None = None
    duration_us: int | None = None


def project(life: Life) -> Visible:
    """Return the visible part of a life: the end of its run if the run has ended, else its last slot.

    The last slot has the greatest (release, attempt, phase); the phases are submission, release, start, close. A start
    whose offset is above that of a close in place is later than this close: both are in one partition.
    """
    head, start, end = life.head, life.start, life.end
    if end is not None:
        return _ended(life, head, start, end)
    state, due_ms = State.QUEUED, head.due_ms
    if due_ms is not None:
        state = State.SCHEDULED
    last = (head.release, head.attempt, 0) if head.rank == 0 else (_NEVER, 0, 0)
    due = life.due
    if due is not None and (due.release, due.attempt, 1) > last:
        last, state, due_ms = (due.release, due.attempt, 1), State.QUEUED, due.due_ms
    if start is not None and (start.release, start.attempt, 2) > last:
        last, state, due_ms = (start.release, start.attempt, 2), State.RUNNING, None
    report = life.report
    if report is not None and (report.release, report.attempt, 2) > last:
        last, state, due_ms = (report.release, report.attempt, 2), State.RUNNING, None
    close = life.close
    if close is not None and (close.release, close.attempt, 3) > last and not _continued(close, start):
        return _closed(life, head, start, close)
    started_ms = None if start is None else start.at[0]
    return Visible(state, head.task, head.queue, life.run, last[1], last[0], head.at[0], due_ms, started_ms)


def _ended(life: Life, head: Head, start: Start | None, end: End) -> Visible:
    return Visible(
        ENDS[end.rank],
        head.task,
        head.queue,
        life.run,
        end.attempt,
        end.release,
        head.at[0],
        None,
        None if start is None else start.at[0],
        end.at[0],
        end.error,
        end.reason,
        end.duration_us,
    )


def _closed(life: Life, head: Head, start: Start | None, close: Close) -> Visible:
    return Visible(
        State.SCHEDULED if close.error is None else State.RETRYING,
        head.task,
        head.queue,
        life.run,
        close.attempt,
        close.release,
        head.at[0],
        # In place the worker continues the same release: no release is due that could be late.
        None if close.in_place else close.due_ms,
        None if start is None else start.at[0],
        None,
        close.error,
        close.reason,
        close.duration_us,
    )


def _continued(close: Close, start: Start | None) -> bool:
    """Return whether an attempt that was closed in place was started again."""
    if start is None or not close.in_place or start.at[1:] < close.at[1:]:
        return False
    return (start.release, start.attempt) == (close.release, close.attempt)


def released_at(life: Life) -> At | None:
    """Return the append time and position of the record with the life's last release: the `JobDue`, or a submission
    without a delay. None if the life has no such record."""
    if life.due is not None:
        return life.due.at
    return life.head.at if life.head.rank == 0 and life.head.due_ms is None else None


def awaited(visible: Visible) -> tuple[int, int]:
    """Return the (release, attempt) for which a scheduled or retrying job waits."""
    return visible.release + 1, visible.attempt + (visible.state is State.RETRYING)


class Progress(msgspec.Struct, frozen=True):
    """The progress that a job has reported."""

    done: int
    total: int | None = None
    message: str | None = None


class JobStatus(msgspec.Struct, frozen=True):
    """One job as the status table knows it. Times are the broker's append times.

    ``attempt``, ``release``: those of the job's last known fact. ``started_at``: the job's last start. ``due_at``: set
    while the job waits for a release at a time (not for a retry in place); while the job is queued, the due time of its
    release. ``duration``: the seconds that the last attempt ran, if that attempt has ended; None while the job is
    queued or an attempt runs, and if no attempt was started. ``positions``: positions of the job's facts in the log, in
    the order of their append times: at most the 64 earliest and the 192 latest. ``partial``: the job's submission is
    not in the table (not read yet, or trimmed from the log before the table was built). Then ``submitted_at`` is not
    known, and tags, parent and key may be missing.

    ``key``: the ordering key. ``worker``: the worker of the last start, and ``version`` that of the app's code there, if
    it is known. ``by``: who cancelled the job, or else asked for this run, or else for this copy. ``fingerprint``: the
    same for errors of the same kind; see `jobledger.fingerprint`. ``copy_of``: the id of the job of which this one is a
    copy with other arguments; see `App.copy`. ``plan``: the id of the plan that redrove this run.
    """

    job_id: str
    task: str
    queue: str
    state: State
    run: int
    attempt: int
    release: int
    tags: dict[str, str] = {}
    parent: str | None = None
    submitted_at: dt.datetime | None = None
    due_at: dt.datetime | None = None
    started_at: dt.datetime | None = None
    ended_at: dt.datetime | None = None
    progress: Progress | None = None
    result: Any = None
    error: ErrorInfo | None = None
    reason: str | None = None
    duration: float | None = None
    positions: tuple[Position, ...] = ()
    partial: bool = False
    key: str | None = None
    worker: str | None = None
    version: str | None = None
    by: str | None = None
    fingerprint: str | None = None
    copy_of: str | None = None
    plan: str | None = None


def status(job_id: str, life: Life) -> JobStatus:
    """Return the status of a life as users see it."""
    seen, head, report, end = project(life), life.head, life.report, life.end
    positions = life.positions if report is None else _union(life.positions, (report.at,))
    return JobStatus(
        job_id=job_id,
        task=seen.task,
        queue=seen.queue,
        state=seen.state,
        run=seen.run,
        attempt=seen.attempt,
        release=seen.release,
        tags=head.tags,
        parent=head.parent,
        submitted_at=moment(head.at[0]) if head.rank == 0 else None,
        due_at=moment(seen.due_ms),
        started_at=moment(seen.started_ms),
        ended_at=moment(seen.ended_ms),
        progress=None if report is None else Progress(report.done, report.total, report.message),
        result=None if end is None or end.result is None else _decoded(end.result),
        error=seen.error,
        reason=seen.reason,
        duration=_ran(life, seen),
        positions=tuple(Position(topic, partition, offset) for _, topic, partition, offset in positions),
        partial=head.rank != 0,
        key=head.key,
        worker=None if life.start is None else life.start.worker or None,
        version=None if life.start is None else life.start.version,
        by=actor(life),
        fingerprint=None if seen.error is None else fingerprint(seen.error),
        copy_of=None if head.copy is None else head.copy[0],
        plan=None if head.redrive is None else head.redrive[2],
    )


def actor(life: Life) -> str | None:
    """Return who cancelled the job or, if nobody did, who asked for its present run or for this copy; None if nobody
    but the submitter asked for the job."""
    if life.end is not None and life.end.by is not None:
        return life.end.by
    head = life.head
    if head.redrive is not None:
        return head.redrive[0]
    return None if head.copy is None else head.copy[1]


def _ran(life: Life, seen: Visible) -> float | None:
    """Return the seconds that the ended attempt ran; None if no attempt has ended or the attempt was not started.

    If the closing fact has no duration, as for a cancel, the result is the time from the attempt's start to that fact.
    """
    if seen.duration_us is None or seen.duration_us > 0:
        return None if seen.duration_us is None else seen.duration_us / 1e6
    start, over = life.start, life.end or life.close
    if start is None or over is None or (start.release, start.attempt) != (over.release, over.attempt):
        return None
    return max(0, over.at[0] - start.at[0]) / 1000


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@overload
def moment(ms: int) -> dt.datetime: ...


@overload
def moment(ms: int | None) -> dt.datetime | None: ...


def moment(ms: int | None) -> dt.datetime | None:
    """Return milliseconds since the epoch as a time in UTC; None for None. A time outside the calendar becomes its
    first or last moment."""
    if ms is None:
        return None
    try:
        return _EPOCH + dt.timedelta(milliseconds=ms)
    except OverflowError:  # a due time outside the calendar: the job must still be shown
        return (dt.datetime.max if ms > 0 else dt.datetime.min).replace(tzinfo=dt.UTC)


def _decoded(result: bytes) -> Any:
    try:
        return msgspec.json.decode(result)
    except (ValueError, RecursionError):  # not written by a worker of Jobledger
        return result.decode("utf-8", "replace")
