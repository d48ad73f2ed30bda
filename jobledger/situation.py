"""What was observed about one job at one moment: the input of `jobledger.explain`. Pure: no Kafka, no database, no
clock.

`jobledger.client.explaining` gathers a `Situation`. A fact that could not be observed is None, and its source is named
in ``unread``. Times are milliseconds since the epoch, by the broker's clock unless stated.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from jobledger.job import Life
from jobledger.schemas.events import Position

#: What a control command is about.
Scope = Literal["queue", "task"]


class Pause(msgspec.Struct, frozen=True):
    """A queue or a task is paused. ``said``: author and reason (``by ann: their maintenance``)."""

    scope: Scope
    name: str
    said: str
    since_ms: int | None = None


class Limit(msgspec.Struct, frozen=True):
    """The limits in force of a queue or a task, for all workers together.

    ``rate``: starts a second; ``concurrency``: jobs at once. ``said``: author and reason, if they were set at run
    time; None: they are in the code. ``partitions``: the number of partitions among which the limits are divided.
    ``owned``: the number of these partitions that the owner of the job's partition has. ``running``: the number of jobs
    that run now; ``running_here``: the number of those in partitions of that owner. None: not known.
    """

    scope: Scope
    name: str
    rate: float | None
    concurrency: int | None
    said: str | None = None
    since_ms: int | None = None
    partitions: int = 1
    owned: int | None = None
    running: int | None = None
    running_here: int | None = None


class Group(msgspec.Struct, frozen=True):
    """The consumer group of a lane. ``assigned``: whether a member has the job's partition; None if the partition is
    not known. ``settling``: whether the group is assigning partitions now."""

    name: str
    members: int
    assigned: bool | None = None
    settling: bool = False


class Crew(msgspec.Struct, frozen=True):
    """The workers that serve the job's lane and still report, by their last reports.

    ``workers``: their number. ``slots``: how many jobs they may run at once; ``running``: how many they run.
    ``without_task``: how many of them do not know the job's task. ``silent_ms``: when the worker of the running attempt
    reported last, if it no longer reports.
    """

    workers: int
    slots: int = 0
    running: int = 0
    without_task: int = 0
    silent_ms: int | None = None


class Place(msgspec.Struct, frozen=True):
    """The job's work record in its partition. ``done``: whether the workers have committed it as done. ``before``: the
    number of open records before it; ``running``: how many of these are known to run."""

    position: Position
    done: bool = False
    before: int = 0
    running: int = 0


class Pace(msgspec.Struct, frozen=True):
    """How many jobs of the partition were started in the last ``seconds``: ``starts`` of all tasks, ``of_task`` of the
    job's task."""

    starts: int
    of_task: int
    seconds: float


class KeyHolder(msgspec.Struct, frozen=True):
    """The job that holds the key. ``since_ms``: its start, or its submission if it has not started. ``before``: the
    number of jobs with this key before the job, ``more``: at least so many."""

    key: str
    job_id: str
    state: str
    since_ms: int | None
    before: int
    more: bool = False


class Tenant(msgspec.Struct, frozen=True):
    """The job's tenant in a queue whose tenants take turns. ``value`` None: the job lacks the tag. ``before``: the
    number of queued jobs of this tenant that were submitted before, ``more``: at least so many; None: not known."""

    tag: str
    value: str | None
    before: int | None = None
    more: bool = False


class Lease(msgspec.Struct, frozen=True):
    """The job lease of a long job. ``renewed_ms``: when it was taken or last renewed; ``lease_ms``: how long it lasts
    from then on, 0 if it was given back."""

    worker: str
    renewed_ms: int
    lease_ms: int


class Coordinator(msgspec.Struct, frozen=True):
    """The coordinator of the job's partition of the coordination topic. ``members``: of its group. ``behind``: the
    number of records that it has not committed; ``since_ms``: when the first of these was appended."""

    members: int | None = None
    behind: int | None = None
    since_ms: int | None = None


class Lag(msgspec.Struct, frozen=True):
    """How far the status table is behind the partitions that have the job's facts. ``since_ms``: when the oldest record
    that the table has not read was appended."""

    records: int
    since_ms: int | None = None


class Cancel(msgspec.Struct, frozen=True):
    """A cancel of the job's run was requested. ``said``: author and reason."""

    said: str
    since_ms: int


class PlanWait(msgspec.Struct, frozen=True):
    """The job is listed in a plan that has not reached it. ``said``: author and reason of the plan. ``steered``: author
    and reason of the last pause or resume."""

    plan: str
    action: str
    state: str
    said: str
    since_ms: int
    steered: str | None = None


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All observed facts about a job.

    ``now_ms``: the time of this machine's clock. ``life``: the job in the status table; None: the table does not know
    the job, or ``table_error`` says why it cannot be read. ``awaited``: the position that the table must reach to know
    the job, if the caller knows it. ``crew``: None if no worker has ever reported. ``knows_task``: whether the app's code
    has the job's task; None: there is no code. ``gates``: the options of the task by which a worker may hold jobs back on
    its own; whether it does so now, only the worker knows. ``unread``: the sources that could not be read, each with the
    reason.
    """

    job_id: str
    now_ms: int
    life: Life | None = None
    table_error: str | None = None
    awaited: Position | None = None
    lag: Lag | None = None
    cancel: Cancel | None = None
    pauses: tuple[Pause, ...] = ()
    limits: tuple[Limit, ...] = ()
    group: Group | None = None
    crew: Crew | None = None
    place: Place | None = None
    pace: Pace | None = None
    key_holder: KeyHolder | None = None
    tenant: Tenant | None = None
    lease: Lease | None = None
    coordinator: Coordinator | None = None
    plans: tuple[PlanWait, ...] = ()
    knows_task: bool | None = None
    gates: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
