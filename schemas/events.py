"""The frozen types of `job_event.avsc`: an event, and its facts. No I/O, no Avro.

Field names and order are those of the schema; a test checks this. Times are microseconds since the epoch, UTC, as plain
integers, because these types are on the hot path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec


class JobLinks(msgspec.Struct, frozen=True, gc=False):
    """What a job is linked with beside its parent. ``copy_of``: the id of the job of which this one is a copy with
    other arguments; ``copied_by``, ``copy_reason``: who asked for the copy, and why."""

    copy_of: str | None = None
    copied_by: str | None = None
    copy_reason: str | None = None


class JobSpec(msgspec.Struct, frozen=True, gc=False):
    """The whole job. ``args``: JSON object by parameter name; ``tags``: texts by which users find the job; ``parent``:
    a job id.

    ``expires_in_ms`` counts from the append time of the submission; in records derived from a submission,
    ``expires_at`` is set instead. ``priority``: ``high`` or ``low``; None: normal. ``links``: None for most jobs.
    """

    args: bytes
    tags: dict[str, str] = {}
    parent: str | None = None
    expires_in_ms: int | None = None
    expires_at: int | None = None
    priority: str | None = None
    links: JobLinks | None = None


class ErrorInfo(msgspec.Struct, frozen=True, gc=False):
    """An exception as text."""

    type: str
    message: str
    traceback: str | None = None


class Redrive(msgspec.Struct, frozen=True, gc=False):
    """Who asked for a further run of a job that had ended, and why. ``plan``: the id of the plan that carried it
    out."""

    by: str
    reason: str | None = None
    plan: str | None = None


class JobSubmitted(msgspec.Struct, frozen=True, gc=False):
    """A job was submitted, or a job that had ended was redriven (``redrive``, from the second run on). With
    ``delay_ms`` or ``due_at`` the coordinator must release the job first."""

    spec: JobSpec
    delay_ms: int | None = None
    due_at: int | None = None
    redrive: Redrive | None = None

    @property
    def conditioned(self) -> bool:
        """Whether the coordinator must release the job before a worker may run it."""
        return self.delay_ms is not None or self.due_at is not None


class JobDue(msgspec.Struct, frozen=True, gc=False):
    """The coordinator released the job to the workers."""

    spec: JobSpec
    due_at: int


class JobStarted(msgspec.Struct, frozen=True, gc=False):
    """A worker is about to run this release. ``takeover``: the number of earlier starts of the release without an
    outcome that are in the log.

    ``version``: the version of the app's code in the worker, if it is known. ``waits``: the milliseconds that the
    release waited in the worker, by cause.
    """

    worker: str
    version: str | None
    waits: dict[str, int]
    work_topic: str
    work_offset: int
    takeover: int = 0


class JobProgressed(msgspec.Struct, frozen=True, gc=False):
    """The job reported its progress."""

    sequence: int
    done: int
    total: int | None = None
    message: str | None = None


class JobRetried(msgspec.Struct, frozen=True, gc=False):
    """The attempt failed. Release + 1 and attempt + 1 follow ``delay_ms`` after this record's append time.

    ``in_place``: the same release continues with attempt + 1, and its worker holds the job's key meanwhile.
    """

    error: ErrorInfo
    delay_ms: int
    duration_us: int = 0
    in_place: bool = False


class JobSnoozed(msgspec.Struct, frozen=True, gc=False):
    """The job asked to run later. Release + 1 and the same attempt follow ``delay_ms`` after this record's append time.

    ``in_place``: the same release continues, and its worker holds the job's key meanwhile.
    """

    delay_ms: int
    reason: str | None = None
    duration_us: int = 0
    in_place: bool = False


class JobSucceeded(msgspec.Struct, frozen=True, gc=False):
    """The job succeeded. ``result``: JSON, or None."""

    result: bytes | None = None
    duration_us: int = 0


#: Why a job failed and is not retried.
FailureReason = Literal[
    "exhausted",
    "rejected",
    "never",
    "timeout",
    "bad-arguments",
    "bad-result",
    "too-large",
    "unknown-task",
    "crashed",
    "key-held",
]


class JobFailedFact(msgspec.Struct, frozen=True, gc=False):
    """The job failed. ``reason`` is one of `FailureReason`."""

    reason: str
    error: ErrorInfo
    duration_us: int = 0


class JobCancelledFact(msgspec.Struct, frozen=True, gc=False):
    """The job ended because a cancel was requested."""

    by: str
    reason: str | None = None


class JobExpiredFact(msgspec.Struct, frozen=True, gc=False):
    """The job was not started before its expiry."""

    expired_at: int


class ReleaseRequested(msgspec.Struct, frozen=True, gc=False):
    """Derived: the request to release this job again. The event's header has the next release and attempt."""

    spec: JobSpec
    delay_ms: int | None = None
    due_at: int | None = None


class ReleaseDecided(msgspec.Struct, frozen=True, gc=False):
    """The coordinator's timer found that this release was due at ``due_at``."""

    due_at: int


class ReleaseOverdue(msgspec.Struct, frozen=True, gc=False):
    """The watchdog found a release that is overdue."""

    spec: JobSpec
    due_at: int


class DeadLettered(msgspec.Struct, frozen=True, gc=False):
    """Derived from `JobFailedFact`: the complete failed job."""

    spec: JobSpec
    reason: str
    error: ErrorInfo


class RecordRejected(msgspec.Struct, frozen=True, gc=False):
    """Bytes that could not be read as an event, stored unchanged. The ``job_id`` of the event is empty."""

    topic: str
    partition: int
    offset: int
    raw_key: bytes | None
    raw_value: bytes | None
    error: str


class JobLeased(msgspec.Struct, frozen=True, gc=False):
    """A long job is now held by a lease of ``lease_ms`` from this record's append time, instead of by its work
    record."""

    worker: str
    lease_ms: int


class Leased(msgspec.Struct, frozen=True, gc=False):
    """Derived from `JobLeased`: the coordinator must release the job again if the lease ends before the job does.

    ``crashes``: the number of earlier leases of this run that ended before the job did.
    """

    spec: JobSpec
    worker: str
    lease_ms: int
    crashes: int = 0


class LeaseRenewed(msgspec.Struct, frozen=True, gc=False):
    """Derived: the worker of a leased job is alive. ``lease_ms`` 0 gives the job back at once."""

    worker: str
    lease_ms: int


class CancelRequested(msgspec.Struct, frozen=True, gc=False):
    """A cancel of this run of the job was requested."""

    by: str
    reason: str | None = None


class QueuePaused(msgspec.Struct, frozen=True, gc=False):
    """No job of the event's queue, or of its task if the queue is empty, may be started."""

    by: str
    reason: str | None = None


class QueueResumed(msgspec.Struct, frozen=True, gc=False):
    """Ends `QueuePaused`."""

    by: str
    reason: str | None = None


class QueueLimited(msgspec.Struct, frozen=True, gc=False):
    """Limits of the event's queue or task, for all workers together, instead of the limits in the code: ``rate`` per
    second, ``concurrency``.

    Without both, the limits in the code apply again.
    """

    rate: float | None = None
    concurrency: int | None = None
    by: str = ""
    reason: str | None = None


class PlanOpened(msgspec.Struct, frozen=True, gc=False):
    """A plan was made: something is to be done with many jobs. The plan's id is the event's ``job_id``.

    ``action``: ``redrive`` or ``cancel``. ``where``: the conditions by which the jobs were chosen, as a JSON object.
    ``queue``: where redriven jobs go; None: to their own queues. ``rate``: jobs per second; None: no limit.
    """

    action: str
    where: str
    queue: str | None
    rate: float | None
    by: str
    reason: str | None = None


class PlannedJob(msgspec.Struct, frozen=True, gc=False):
    """A job of a plan, with the run that it had when the plan was made."""

    job_id: str
    run: int


class PlanListed(msgspec.Struct, frozen=True, gc=False):
    """A part of a plan's jobs. ``part``: the part's number, from 0 up."""

    part: int
    jobs: list[PlannedJob]


class PlanSealed(msgspec.Struct, frozen=True, gc=False):
    """The list of a plan's jobs is complete, so the plan is carried out from now on."""

    parts: int
    jobs: int


class PlanAdvanced(msgspec.Struct, frozen=True, gc=False):
    """A part of a plan was carried out. ``skipped``: the number of jobs that had changed, so that nothing was to be
    done. ``failed``: the number of jobs for which the action was not possible; ``error``: the first of them, and
    why."""

    part: int
    done: int
    skipped: int
    failed: int
    error: str | None = None


class PlanSteered(msgspec.Struct, frozen=True, gc=False):
    """Somebody paused, resumed or aborted a plan. ``to``: ``paused``, ``running`` or ``aborted``."""

    to: str
    by: str
    reason: str | None = None


class RunningJob(msgspec.Struct, frozen=True, gc=False):
    """A job that a worker runs. ``started_at``: when its present attempt began, on the worker's clock."""

    job_id: str
    started_at: int


class WorkerReported(msgspec.Struct, frozen=True, gc=False):
    """A worker's report about itself. The worker's id, ``host:pid``, is the event's ``job_id``.

    ``version``: the version of the app's code, if it is known; ``jobledger``: that of Jobledger. ``lanes``: the lanes
    that the worker serves; ``tasks``: the first tasks that it knows, by name. ``more_lanes``, ``more_tasks``: how many
    are left out, because the report would be too large. ``slots``: how many jobs the worker may run at once;
    ``running``: how many it runs; ``jobs``: those of them that have run for the longest time. ``memory_bytes``: of the
    worker's process, without child processes; None: not known. ``partitions``: how many it owns.
    """

    host: str
    pid: int
    version: str | None
    jobledger: str
    started_at: int
    lanes: list[str]
    more_lanes: int
    tasks: list[str]
    more_tasks: int
    slots: int
    running: int
    jobs: list[RunningJob]
    memory_bytes: int | None
    partitions: int


Fact = (
    JobSubmitted
    | JobDue
    | JobStarted
    | JobProgressed
    | JobRetried
    | JobSnoozed
    | JobSucceeded
    | JobFailedFact
    | JobCancelledFact
    | JobExpiredFact
    | ReleaseRequested
    | ReleaseDecided
    | ReleaseOverdue
    | DeadLettered
    | RecordRejected
    | JobLeased
    | Leased
    | LeaseRenewed
    | CancelRequested
    | QueuePaused
    | QueueResumed
    | QueueLimited
    | PlanOpened
    | PlanListed
    | PlanSealed
    | PlanAdvanced
    | PlanSteered
    | WorkerReported
)


def fact_name(fact: Fact | type[Fact]) -> str:
    """Return the name of a fact, or of a class of facts: in the schema, in the output of commands and in messages.

    This is the name of the class without the ending ``Fact``, which distinguishes `JobFailedFact`, `JobCancelledFact`
    and `JobExpiredFact` from the exceptions ``JobFailed``, ``JobCancelled`` and ``JobExpired``.
    """
    return (fact if isinstance(fact, type) else type(fact)).__name__.removesuffix("Fact")


#: Facts that end one release (unless `in_place`): the work record is done once such a fact is durable.
CLOSING = (JobRetried, JobSnoozed, JobSucceeded, JobFailedFact, JobCancelledFact, JobExpiredFact)
#: Facts after which a work record is done, because the log has a closing fact or a lease of its release.
SETTLING = (*CLOSING, JobLeased)
#: Facts that end a run.
TERMINAL = (JobSucceeded, JobFailedFact, JobCancelledFact, JobExpiredFact)
#: Facts that may be on a work topic.
WORK = (JobSubmitted, JobDue)


def closes(fact: Fact) -> bool:
    """Return whether ``fact`` ends its release."""
    return isinstance(fact, CLOSING) and not getattr(fact, "in_place", False)


def settles(fact: Fact) -> bool:
    """Return whether the work record of the fact's release is done after ``fact``."""
    return isinstance(fact, SETTLING) and not getattr(fact, "in_place", False)


#: A tag that the coordinator adds to a job whose lease expired without an outcome: the number of such leases in this
#: run.
CRASHES_TAG = "jl-crashes"
#: The tag in which a worker counts how often a job was snoozed for an unknown task. Task code never sees it.
UNKNOWN_TASK_TAG = "jl-unknown-task"
_CRASHES_MOST = 1 << 20  # a tag may hold any number


#: The last microsecond of the year 9999. A valid record may have any 64-bit number of milliseconds, and times computed
#: from it must fit into 64 bits.
FAR_US = 253_402_300_799_999_999


def later(appended_ms: int, delay_ms: int) -> int:
    """Return the time ``delay_ms`` after an append time, in µs of the broker's clock; not before the append time, and
    `FAR_US` at most."""
    return min((appended_ms + max(delay_ms, 0)) * 1000, FAR_US)


def crashes_of(tags: Mapping[str, str]) -> int:
    """Return the number of leases of the run that expired without an outcome, according to its tags."""
    try:
        return min(max(0, int(tags.get(CRASHES_TAG, "0"))), _CRASHES_MOST)
    except ValueError:
        return 0


def users_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags without those that Jobledger itself adds. They belong to one run of one job."""
    return {name: value for name, value in tags.items() if name not in (CRASHES_TAG, UNKNOWN_TASK_TAG)}


def lasting(spec: JobSpec, appended_ms: int) -> JobSpec:
    """Return the job of a submission that was appended at ``appended_ms`` as derived records contain it: with its
    expiry as a time."""
    if spec.expires_in_ms is None:
        return spec
    at = later(appended_ms, spec.expires_in_ms) if spec.expires_at is None else spec.expires_at
    return msgspec.structs.replace(spec, expires_in_ms=None, expires_at=at)


class JobEvent(msgspec.Struct, frozen=True, gc=False):
    """One change in a job's life. ``occurred_at`` is the writer's clock: for people, not for decisions."""

    event_id: str
    job_id: str
    run: int
    attempt: int
    release: int
    occurred_at: int
    task: str
    queue: str
    key: str | None
    home: str | None
    source: str
    trace: str | None
    fact: Fact


class Position(msgspec.Struct, frozen=True, order=True, gc=False):
    """A record's position in the log."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Return the position whose ``str`` is ``text``. Raises `ValueError` that names the text."""
        try:
            head, offset = text.rsplit("@", 1)
            topic, partition = head.removesuffix("]").rsplit("[", 1)
            return cls(topic, int(partition), int(offset))
        except ValueError:
            raise ValueError(f"{text!r} is not a position such as shop.jobs.mail[3]@41") from None


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """An event as it was read, with its position and the time at which the broker appended it (milliseconds since the
    epoch)."""

    event: JobEvent
    position: Position
    appended_ms: int
