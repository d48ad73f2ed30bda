"""The causes for which a job is where it is, and the rules that find them. Pure: no Kafka, no database, no clock.

Each rule examines a `jobledger.situation.Situation` and yields the causes that it finds; `RULES` has the rules of each
state. `jobledger.explain` makes an explanation from the causes.
"""

from __future__ import annotations

import enum
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jobledger.job import Close, Life, State, Visible, moment, released_at
from jobledger.process.wording import counted
from jobledger.situation import Limit, Scope, Situation

#: Milliseconds for which a release may be late, or the table behind, before this is a cause.
LATE_MS = 2_000
#: The share of a limited rate at which the limit counts as reached.
REACHED = 0.8
#: The share of a job lease after which its worker counts as silent: the worker renews it after each third.
SILENT = 0.7
#: Maximum characters of a text of another writer in a detail.
TEXT_MOST = 300
#: Categories of characters that are not shown: control characters, changes of the writing direction and other marks,
#: halves of surrogate pairs.
_HIDDEN = ("Cc", "Cf", "Cs")


class CauseKind(enum.StrEnum):
    """Why a job is where it is. The members are in the order in which an explanation lists them: first causes that
    could make the other causes untrue, then the causes that hold the job the longest."""

    #: The job's run has ended.
    ENDED = "ended"
    #: The job is listed in a plan that has not reached it yet.
    WAITS_IN_PLAN = "waits-in-plan"
    #: The status table does not know the job.
    UNKNOWN_JOB = "unknown-job"
    #: The status table cannot be read, so nothing is known about the job.
    TABLE_UNREADABLE = "table-unreadable"
    #: The status table has not read the last records, so the job may be in another state.
    TABLE_BEHIND = "table-behind"
    #: A cancel was requested, and the job has not been closed yet.
    CANCEL_REQUESTED = "cancel-requested"
    #: The worker of the running attempt has no partition or no lease any more, or no longer reports.
    WORKER_GONE = "worker-gone"
    #: An attempt runs.
    RUNNING = "running"
    #: The last attempt failed, and the next one has to wait.
    BACKS_OFF = "backs-off"
    #: A worker that does not know the job's task has put the job off, or will do so.
    UNKNOWN_TASK = "unknown-task"
    #: The job asked to run again later, or a worker put the job off.
    SNOOZED = "snoozed"
    #: The job was submitted with a delay.
    DELAYED = "delayed"
    #: The job is due, and the coordinator has not released it.
    NOT_RELEASED = "not-released"
    #: The job's queue is paused.
    QUEUE_PAUSED = "queue-paused"
    #: The job's task is paused.
    TASK_PAUSED = "task-paused"
    #: No worker has the job's partition.
    NO_WORKER = "no-worker"
    #: An earlier job with the same key has not ended.
    KEY_HELD = "key-held"
    #: The limit of the job's queue is reached.
    QUEUE_LIMIT = "queue-limit"
    #: The limit of the job's task is reached.
    TASK_LIMIT = "task-limit"
    #: The tenants of the job's queue take turns.
    TENANT_TURNS = "tenant-turns"
    #: The workers have committed the job's record as done, and the status table does not know the outcome yet.
    RECORD_DONE = "record-done"
    #: Open jobs are before the job in its partition.
    JOBS_BEFORE = "jobs-before"
    #: Nothing is before the job: a worker starts it when a place is free.
    WAITS_FOR_SLOT = "waits-for-slot"
    #: A source could not be read, so causes may be missing.
    SOURCE_UNREAD = "source-unread"


class SeenCause(NamedTuple):
    """A cause that a rule has found; ``since_ms``: as `Cause.since`, in milliseconds."""

    kind: CauseKind
    since_ms: int | None
    detail: str


Seen = Iterator[SeenCause]
Rule = Callable[[Situation, Life, Visible], Seen]


def plain(text: str, most: int = TEXT_MOST) -> str:
    """Return a text on one line, of at most ``most`` characters, without characters that control a terminal or cannot be
    encoded."""
    line = "".join("�" if unicodedata.category(each) in _HIDDEN else each for each in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


# -- a job that the table does not know ---------------------------------------------------------------------------------


def unknown(s: Situation) -> Seen:
    """Yield why the job is not in the status table."""
    if s.table_error is not None:
        yield SeenCause(CauseKind.TABLE_UNREADABLE, None, f"nothing is known about the job: {s.table_error}")
        return
    yield SeenCause(CauseKind.UNKNOWN_JOB, None, f"the status table knows no job {s.job_id}")
    if s.awaited is not None:
        behind = "" if s.lag is None else f", and {counted(s.lag.records, 'record')} of its partition in all"
        yield SeenCause(
            CauseKind.TABLE_BEHIND,
            None if s.lag is None else s.lag.since_ms,
            f"the status table has not read the submission at {s.awaited} yet{behind}: "
            "is `jobledger streams MODULE:APP` running?",
        )


def unread(s: Situation) -> Seen:
    """Yield one cause that names the sources that could not be read."""
    if s.unread:
        yield SeenCause(CauseKind.SOURCE_UNREAD, None, f"causes may be missing: {'; '.join(s.unread)}")


def _table(s: Situation, life: Life, seen: Visible) -> Seen:
    lag = s.lag
    if lag is None or lag.records <= 0 or lag.since_ms is None or s.now_ms - lag.since_ms <= LATE_MS:
        return
    yield SeenCause(
        CauseKind.TABLE_BEHIND,
        lag.since_ms,
        f"the status table has not read {counted(lag.records, 'record')} of the job's partitions, the oldest of "
        f"{_at(lag.since_ms)}: the job may be in another state",
    )


# -- ended and running --------------------------------------------------------------------------------------------------


def _ended(s: Situation, life: Life, seen: Visible) -> Seen:
    if life.end is None:
        return
    text = f"run {seen.run} {_ENDED[seen.state]} at {_at(life.end.at[0])}"
    if life.end.by is not None:
        text += f" by {plain(life.end.by)}"
    if seen.error is not None:
        text += f": {_error(seen)}"
    if seen.reason and seen.reason != f"by {life.end.by}":
        text += f" ({plain(seen.reason)})"
    if life.start is not None and life.start.worker:
        text += f", on {plain(life.start.worker)}"
    yield SeenCause(CauseKind.ENDED, life.end.at[0], text)


def _plans(s: Situation, life: Life, seen: Visible) -> Seen:
    if not s.plans:
        return
    texts = []
    for each in s.plans:
        steered = f", last steered {plain(each.steered)}" if each.steered else ""
        texts.append(
            f"plan {each.plan} ({plain(each.action)}, {each.state}) of {_at(each.since_ms)}, made {plain(each.said)}{steered}"
        )
    since = min(each.since_ms for each in s.plans)
    yield SeenCause(CauseKind.WAITS_IN_PLAN, since, f"listed, and not reached yet, in {' and '.join(texts)}")


def _running(s: Situation, life: Life, seen: Visible) -> Seen:
    text = f"attempt {seen.attempt} of run {seen.run} runs"
    if life.start is not None:
        text += f" on {plain(life.start.worker) or 'a worker'}"
        if life.start.version:
            text += f", version {plain(life.start.version)}"
        text += f", since {_at(life.start.at[0])}"
    report = life.report
    if report is not None and (report.release, report.attempt) == (seen.release, seen.attempt):
        of = "" if report.total is None else f" of {report.total:,}"
        more = f" ({plain(report.message)})" if report.message else ""
        text += f"; progress {report.done:,}{of}{more} at {_at(report.at[0])}"
    yield SeenCause(CauseKind.RUNNING, seen.started_ms, text)


def _gone_lease(s: Situation, life: Life, seen: Visible) -> Seen:
    lease = s.lease
    if lease is None:
        return
    end, worker = lease.renewed_ms + lease.lease_ms, plain(lease.worker)
    if lease.lease_ms <= 0:
        yield SeenCause(CauseKind.WORKER_GONE, end, f"worker {worker} gave the job back at {_at(end)}: {_AGAIN}")
    elif s.now_ms > end:
        text = f"the job lease of worker {worker} ended at {_at(end)} without an outcome: {_AGAIN}"
        yield SeenCause(CauseKind.WORKER_GONE, end, text)
    elif s.now_ms - lease.renewed_ms > SILENT * lease.lease_ms:
        text = (
            f"worker {worker} has not renewed its job lease since {_at(lease.renewed_ms)}; the lease ends at {_at(end)}"
        )
        yield SeenCause(CauseKind.WORKER_GONE, lease.renewed_ms, text)


def _gone_owner(s: Situation, life: Life, seen: Visible) -> Seen:
    if _is_leased(life, seen) or s.lease is not None:
        return
    group, crew = s.group, s.crew
    if group is not None and not group.settling and (group.members == 0 or group.assigned is False):
        text = (
            f"{_nobody(s)}: the worker of the running attempt has ended or lost its partition, and the next owner of the "
            "partition runs the job again unless its outcome is in the log"
        )
        yield SeenCause(CauseKind.WORKER_GONE, None, text)
    elif crew is not None and crew.silent_ms is not None and life.start is not None:
        text = (
            f"worker {plain(life.start.worker)} has not reported since {_at(crew.silent_ms)}: it has died, is paused, or "
            "cannot reach the log"
        )
        yield SeenCause(CauseKind.WORKER_GONE, crew.silent_ms, text)


def _is_leased(life: Life, seen: Visible) -> bool:
    return life.leased is not None and life.leased.release == seen.release


_AGAIN = "the coordinator releases the job again"
_ENDED = {
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "was cancelled",
    State.EXPIRED: "expired",
}


# -- waiting for a time -------------------------------------------------------------------------------------------------


def due_of(life: Life, seen: Visible) -> tuple[int | None, Close | None]:
    """Return until when a scheduled or retrying job waits, and the fact that ended the attempt before, if there was
    one."""
    close = life.close
    if close is not None and (close.release, close.attempt) == (seen.release, seen.attempt):
        return close.due_ms, close
    return seen.due_ms, None


def _waits(s: Situation, life: Life, seen: Visible) -> Seen:
    due, close = due_of(life, seen)
    until = "" if due is None else f" until {_at(due)}"
    if close is None:
        asked = "" if life.head.redrive is None else f", redriven by {plain(life.head.redrive[0])}"
        yield SeenCause(CauseKind.DELAYED, life.head.at[0], f"run {seen.run} waits{until}{asked}")
    elif close.error is not None:
        text = (
            f"attempt {close.attempt} failed at {_at(close.at[0])} with {_error(seen)}; the next attempt waits{until}"
        )
        yield SeenCause(CauseKind.BACKS_OFF, close.at[0], text)
    elif close.reason == "unknown-task":
        text = (
            f"a worker that does not know task {plain(seen.task)} put the job off at {_at(close.at[0])}{until}: "
            "does every worker run the present code?"
        )
        yield SeenCause(CauseKind.UNKNOWN_TASK, close.at[0], text)
    else:
        why = f": {plain(close.reason)}" if close.reason else ""
        yield SeenCause(CauseKind.SNOOZED, close.at[0], f"the job was snoozed at {_at(close.at[0])}{until}{why}")


def _overdue(s: Situation, life: Life, seen: Visible) -> Seen:
    due, close = due_of(life, seen)
    if due is None or s.now_ms - due <= LATE_MS or (close is not None and close.in_place):
        return
    text = f"the job was due at {_at(due)}, and the coordinator has not released it"
    since, coordinator = due, s.coordinator
    if coordinator is not None and coordinator.members == 0:
        text += ": no coordinator runs (`jobledger streams MODULE:APP`)"
    elif coordinator is not None and coordinator.behind:
        text += f": it has not processed {counted(coordinator.behind, 'record')} of the job's partition"
        if coordinator.since_ms is not None:
            text += f", the oldest of {_at(coordinator.since_ms)}"
            since = max(due, coordinator.since_ms)
    yield SeenCause(CauseKind.NOT_RELEASED, since, text)


# -- waiting for a worker -----------------------------------------------------------------------------------------------


def _cancel(s: Situation, life: Life, seen: Visible) -> Seen:
    if s.cancel is not None:
        how = "is asked to stop" if seen.state is State.RUNNING else "is closed when its turn comes"
        text = f"a cancel was requested {plain(s.cancel.said)} at {_at(s.cancel.since_ms)}: the job {how}"
        yield SeenCause(CauseKind.CANCEL_REQUESTED, s.cancel.since_ms, text)


def _paused(s: Situation, life: Life, seen: Visible) -> Seen:
    kinds: dict[Scope, CauseKind] = {"queue": CauseKind.QUEUE_PAUSED, "task": CauseKind.TASK_PAUSED}
    for scope, kind in kinds.items():
        pause = next((each for each in s.pauses if each.scope == scope), None)
        if pause is not None:
            since = "" if pause.since_ms is None else f" since {_at(pause.since_ms)}"
            yield SeenCause(kind, pause.since_ms, f"{scope} {plain(pause.name)} is paused{since}, {plain(pause.said)}")


def _no_worker(s: Situation, life: Life, seen: Visible) -> Seen:
    group = s.group
    if group is not None and (group.members == 0 or group.assigned is False):
        yield SeenCause(CauseKind.NO_WORKER, None, _nobody(s))


def _unknown_task(s: Situation, life: Life, seen: Visible) -> Seen:
    close = life.close
    waits = seen.state is not State.QUEUED and close is not None and close.reason == "unknown-task"
    task, crew = plain(seen.task), s.crew
    if waits:
        return
    if crew is not None and crew.workers:
        if crew.without_task:
            number = f"{crew.without_task:,} of {counted(crew.workers, 'worker')}"
            text = f"{number} of the queue do not know task {task}, and put the job off"
            yield SeenCause(CauseKind.UNKNOWN_TASK, None, text)
    elif s.knows_task is False:
        text = f"the app's code here has no task {task}: workers with the same code put the job off"
        yield SeenCause(CauseKind.UNKNOWN_TASK, None, text)


def _nobody(s: Situation) -> str:
    group = s.group
    assert group is not None
    if group.members == 0:
        return f"no worker serves the queue: consumer group {group.name} has no member"
    partition = "the job's partition" if s.place is None else f"{s.place.position.topic}[{s.place.position.partition}]"
    why = "the group is assigning its partitions now" if group.settling else "no member has it"
    return (
        f"consumer group {group.name} has {counted(group.members, 'member')}, but no worker serves {partition}: {why}"
    )


def _key(s: Situation, life: Life, seen: Visible) -> Seen:
    holder = s.key_holder
    if holder is None:
        return
    since = "" if holder.since_ms is None else f" since {_at(holder.since_ms)}"
    text = f"key {plain(holder.key)!r} is held by job {plain(holder.job_id)}, which is {holder.state}{since}"
    if holder.before > 1:
        least = "at least " if holder.more else ""
        text += f"; {least}{counted(holder.before, 'job')} of this key must end before"
    yield SeenCause(CauseKind.KEY_HELD, holder.since_ms, text)


def _limits(s: Situation, life: Life, seen: Visible) -> Seen:
    for scope, kind in (("queue", CauseKind.QUEUE_LIMIT), ("task", CauseKind.TASK_LIMIT)):
        limit = next((each for each in s.limits if each.scope == scope), None)
        reached = None if limit is None else reached_limit(limit, s)
        if limit is None or reached == "":
            continue
        parts = [] if limit.rate is None else [f"{counted(limit.rate, 'start')} a second"]
        parts += [] if limit.concurrency is None else [f"{counted(limit.concurrency, 'job')} at once"]
        who = "in the code" if limit.said is None else f"set {plain(limit.said)}"
        text = f"{scope} {plain(limit.name)} is limited to {' and '.join(parts)} for all workers together ({who})"
        yield SeenCause(kind, limit.since_ms, f"{text}: {reached or 'whether the limit is reached is not known'}")


def reached_limit(limit: Limit, s: Situation) -> str | None:
    """Return a sentence that says how the limit is reached; empty if the limit is not reached, None if that is not
    known."""
    known = True
    if limit.concurrency is not None:
        if limit.running is None:
            known = False
        elif limit.running >= limit.concurrency:
            return f"{counted(limit.running, 'job')} run now"
        elif limit.running_here is not None and limit.owned is not None:
            share = max(1, limit.concurrency * limit.owned // limit.partitions)
            if limit.running_here >= share:
                return f"the worker of the job's partition has a share of {share}, and runs {limit.running_here}"
    if limit.rate is not None:
        if s.pace is None:
            return None
        share_rate = limit.rate / limit.partitions
        expected = share_rate * s.pace.seconds
        starts = s.pace.of_task if limit.scope == "task" else s.pace.starts
        if expected <= 1 or starts >= REACHED * expected:
            return (
                f"the share of the job's partition is {share_rate:g} starts a second, and {starts:,} were made in the last "
                f"{s.pace.seconds:.0f} s"
            )
    return "" if known else None


def _tenant(s: Situation, life: Life, seen: Visible) -> Seen:
    tenant = s.tenant
    if tenant is None or s.place is None or s.place.before <= s.place.running:
        return
    whose = (
        f"without tag {plain(tenant.tag)}" if tenant.value is None else f"of {plain(tenant.tag)}={plain(tenant.value)}"
    )
    text = f"the tenants of queue {plain(seen.queue)} take turns"
    if tenant.before is not None:
        least = "at least " if tenant.more else ""
        text += f"; {least}{counted(tenant.before, 'queued job')} {whose} came before this one"
    yield SeenCause(CauseKind.TENANT_TURNS, None, text)


def _before(s: Situation, life: Life, seen: Visible) -> Seen:
    place = s.place
    if place is None:
        return
    partition = f"{place.position.topic}[{place.position.partition}]"
    at = released_at(life)
    since = None if at is None else at[0]
    if place.done:
        text = (
            f"the workers have committed the job's record {place.position} as done, and the status table does not know "
        )
        text += "its start yet" if _is_leased(life, seen) else "its outcome yet"
        yield SeenCause(CauseKind.RECORD_DONE, since, text)
    elif place.before > place.running:
        text = f"{counted(place.before, 'job')} before it in {partition} {'has' if place.before == 1 else 'have'} not ended"
        if place.running:
            text += f"; {place.running:,} of them {'runs' if place.running == 1 else 'run'}"
        yield SeenCause(CauseKind.JOBS_BEFORE, since, text)


def waits_for_slot(s: Situation, life: Life) -> SeenCause:
    """Return the cause of a queued job that nothing in `HOLDING` holds."""
    at = released_at(life)
    released = "" if at is None else f"released at {_at(at[0])}; "
    if s.group is None:
        text = f"{released}whether a worker serves the queue is not known"
    else:
        text = f"{released}a worker has the partition, and starts the job when one of its places is free"
        if s.crew is not None and s.crew.workers:
            workers = counted(s.crew.workers, "worker")
            text += (
                f"; the queue has {workers}, with {counted(s.crew.running, 'job')} in {counted(s.crew.slots, 'place')}"
            )
    if s.gates:
        text += f"; the task has {' and '.join(s.gates)}: whether a worker holds the job back for that, only the worker knows"
    return SeenCause(CauseKind.WAITS_FOR_SLOT, None if at is None else at[0], text)


_WAITING: tuple[Rule, ...] = (_table, _plans, _cancel, _waits, _unknown_task, _overdue, _paused, _no_worker)
RULES: Mapping[State, tuple[Rule, ...]] = {
    State.SCHEDULED: _WAITING,
    State.RETRYING: _WAITING,
    State.QUEUED: (
        _table,
        _plans,
        _cancel,
        _gone_lease,
        _unknown_task,
        _paused,
        _no_worker,
        _key,
        _limits,
        _tenant,
        _before,
    ),
    State.RUNNING: (_table, _plans, _cancel, _gone_lease, _gone_owner, _running),
    **dict.fromkeys((State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED), (_ended, _plans)),
}

#: The causes that hold a queued job. If there is none of them, the job waits for a free place.
HOLDING = {
    CauseKind.CANCEL_REQUESTED,
    CauseKind.QUEUE_PAUSED,
    CauseKind.TASK_PAUSED,
    CauseKind.NO_WORKER,
    CauseKind.KEY_HELD,
    CauseKind.QUEUE_LIMIT,
    CauseKind.TASK_LIMIT,
    CauseKind.RECORD_DONE,
    CauseKind.JOBS_BEFORE,
}


# -- texts --------------------------------------------------------------------------------------------------------------


def _at(ms: int) -> str:
    return f"{moment(ms):%Y-%m-%d %H:%M:%S} UTC"


def _error(seen: Visible) -> str:
    error = seen.error
    if error is None:
        return "an unknown error"
    kind, message = plain(error.type), plain(error.message)
    return f"{kind}: {message}" if message else kind
