"""The documents of the API: the requests, which are read with msgspec, and the answers, for the OpenAPI.

An answer is not validated: it is written from the status table and the log as it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from jobledger.job import State
from jobledger.plan import PlanState

#: Largest number of jobs in one request.
BATCH_MOST, IDS_MOST = 1_000, 10_000

#: An integer: beyond ±(2**53 - 1) it is text, unless ``integers=number`` asks for numbers.
Exact = int | str


class Submission(msgspec.Struct, forbid_unknown_fields=True):
    """A job to submit. ``args``: by parameter name. ``delay``, ``expires_in``: seconds. The other options are those of
    `Task.using`."""

    task: str
    args: dict[str, Any] = {}
    delay: float | None = None
    tags: dict[str, str] | None = None
    queue: str | None = None
    key: str | None = None
    priority: Literal["high", "normal", "low"] | None = None
    expires_in: float | None = None
    job_id: str | None = None


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    """Jobs to submit together."""

    jobs: Annotated[list[Submission], msgspec.Meta(min_length=1, max_length=BATCH_MOST)]


class Reason(msgspec.Struct, forbid_unknown_fields=True):
    """The reason of an action, which is written to the log."""

    reason: str | None = None


class Cancel(msgspec.Struct, forbid_unknown_fields=True):
    """A cancel. ``run``: the run to cancel; None: the present run."""

    reason: str | None = None
    run: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)] | None = None


class Redrive(msgspec.Struct, forbid_unknown_fields=True):
    """A redrive of one job. ``queue``: the queue in which the job runs; None: its own queue."""

    reason: str | None = None
    queue: str | None = None


class NewLimits(msgspec.Struct, forbid_unknown_fields=True):
    """Limits for all workers together. Without ``rate`` (``"100/s"``) and ``concurrency`` the limits in the code apply
    again."""

    rate: str | float | None = None
    concurrency: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)] | None = None
    reason: str | None = None


class Where(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The filters of a plan; a job must match all of them. ``late``: seconds. ``since``, ``until``: ISO 8601."""

    state: State | list[State] | None = None
    task: str | list[str] | None = None
    queue: str | list[str] | None = None
    tag: dict[str, str] | None = None
    key: str | list[str] | None = None
    version: str | list[str] | None = None
    error: str | list[str] | None = None
    fingerprint: str | list[str] | None = None
    since: str | None = None
    until: str | None = None
    id_prefix: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    attempts_least: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)] | None = None
    error_text: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    late: float | None = None


class NewPlan(msgspec.Struct, forbid_unknown_fields=True):
    """An action on many jobs, which ``where`` or ``ids`` choose. ``queue``: where redriven jobs run; None: their own
    queues. ``rate``: how many in a time (``"50/s"``). ``dry_run``: only count."""

    action: Literal["redrive", "cancel"]
    where: Where | None = None
    ids: Annotated[list[str], msgspec.Meta(min_length=1, max_length=IDS_MOST)] | None = None
    queue: str | None = None
    rate: str | float | None = None
    dry_run: bool = False
    reason: str | None = None


# -- answers -------------------------------------------------------------------------------------------------------


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Submitted(_Answer):
    """A job that the log has acknowledged. ``position``: may be passed as ``at_least``."""

    job_id: str
    position: str
    task: str
    queue: str


class SubmittedBatch(_Answer):
    """The jobs of a batch, in the order of the request."""

    jobs: list[Submitted]


class Requested(_Answer):
    """What was requested, and that the log has acknowledged it."""

    requested: str


class Progress(_Answer):
    """The progress that a job has reported."""

    done: Exact
    total: Exact | None = None
    message: str | None = None


class Error(_Answer):
    """An exception of a job."""

    type: str
    message: str
    traceback: str | None = None


class Job(_Answer):
    """A job as the status table knows it. Times are the broker's, in ISO 8601. ``args``: from the log; null with
    ``args_error`` if they are not known, or were not asked for."""

    job_id: str
    task: str
    queue: str
    state: State
    run: int
    attempt: int
    release: int
    tags: dict[str, str]
    parent: str | None
    submitted_at: str | None
    due_at: str | None
    started_at: str | None
    ended_at: str | None
    progress: Progress | None
    result: Any = None
    error: Error | None
    reason: str | None
    duration: float | None
    positions: list[str]
    partial: bool
    key: str | None
    worker: str | None
    version: str | None
    by: str | None
    fingerprint: str | None
    args: Any = None
    args_error: str | None = None


class JobPage(_Answer):
    """A page of jobs, newest first. ``next``: the address of the next page; null: this is the last one.
    ``searched_to``: the time of submission up to which jobs were compared with the filters, if the page ends there; null:
    the page is full, or all jobs were compared."""

    jobs: list[Job]
    next: str | None
    searched_to: str | None


class Count(_Answer):
    """Number of jobs. ``exact`` false: there are at least this many. ``states``: the numbers by state, if the only filters
    are states, tasks and queues."""

    count: int
    exact: bool
    states: dict[str, int] | None


class Timeline(_Answer):
    """A job's events in the order of their append times. An entry with ``error`` is a position that cannot be read."""

    job_id: str
    events: list[dict[str, Any]]


class Cause(_Answer):
    """One cause for which a job is where it is: a word of a fixed list, and a sentence. ``since``: since when it holds."""

    cause: str
    since: str | None
    detail: str


class Explanation(_Answer):
    """Why a job is where it is, the most decisive cause first. ``likely_start``: when the next attempt probably starts;
    ``likely_start_note``: how that time was computed, or why there is none."""

    job_id: str
    state: str
    causes: list[Cause]
    likely_start: str | None
    likely_start_note: str


class LastSuccess(_Answer):
    """The last job of a task that succeeded."""

    version: str | None
    ended_at: str
    job_id: str


class ErrorGroup(_Answer):
    """Failed and retrying jobs with errors of the same kind. ``job_id``: the job that was submitted last. ``exact``
    false: there are more jobs. ``first_seen``, ``last_seen``: times of submissions. ``tasks``, ``versions``: numbers of
    jobs. ``again``: number of jobs that had the error again after a redrive."""

    fingerprint: str
    type: str
    message: str
    job_id: str
    jobs: int
    exact: bool
    first_seen: Any
    last_seen: Any
    tasks: dict[str, int]
    versions: dict[str, int]
    again: int
    last_success: dict[str, LastSuccess]


class ErrorGroups(_Answer):
    """Groups of errors."""

    errors: list[ErrorGroup]


class Worker(_Answer):
    """A worker as its last report says. ``jobs``: the jobs that have run for the longest time, with their starts."""

    worker: str
    host: str
    pid: int
    version: str | None
    jobledger: str
    started_at: str
    reported_at: str
    lanes: list[str]
    more_lanes: int
    tasks: list[str]
    more_tasks: int
    slots: int
    running: int
    jobs: dict[str, str]
    memory_bytes: int | None
    partitions: int
    queues: list[str]
    state: Literal["alive", "silent"]


class Workers(_Answer):
    """All workers that report, and workers whose last report is at most about ten minutes old."""

    workers: list[Worker]


class DeadLetter(_Answer):
    """A dead letter. ``job_id`` and ``task`` are null for a rejected record; ``key`` and ``value`` are then the beginning
    of the record."""

    job_id: str | None
    task: str | None
    what: str
    why: str
    key: str | None
    value: str | None
    appended_at: Any
    position: str


class DeadLetters(_Answer):
    """The last dead letters."""

    letters: list[DeadLetter]


class Plan(_Answer):
    """A plan: an action on many jobs. ``position``: the position of the fact that made the list of jobs
    complete; null: the list is not complete."""

    plan: str
    action: str
    state: PlanState
    position: str | None
    where: Any
    queue: str | None
    rate: float | None
    matched: int
    done: int
    skipped: int
    failed: int
    error: str | None
    by: str
    reason: str | None
    steered: str | None
    opened_at: str
    ended_at: str | None


class PlanPage(_Answer):
    """A page of plans, newest first."""

    plans: list[Plan]
    next: str | None


class MadePlan(_Answer):
    """A plan that the log has acknowledged, or (``plan`` null) the result of a dry run. ``examples``: ids of jobs."""

    plan: str | None
    matched: int
    examples: list[str]
    position: str | None


class Steered(_Answer):
    """A request to pause, resume or abort a plan. ``requested`` null: the plan had ended."""

    plan: str
    requested: str | None
    state: PlanState


class Queue(_Answer):
    """A queue, its limits and the commands in force. ``paused``, ``limited``: author and reason of the command."""

    queue: str
    partitions: int | None
    priorities: bool
    paused: str | None
    rate: float | None
    concurrency: int | None
    limited: str | None


class Queues(_Answer):
    """All queues, by name."""

    queues: list[Queue]


class Task(_Answer):
    """A task, its limits and the commands in force."""

    task: str
    queue: str | None
    paused: str | None
    rate: float | None
    concurrency: int | None
    limited: str | None


class Tasks(_Answer):
    """All tasks, by name."""

    tasks: list[Task]


class Me(_Answer):
    """The user of this request."""

    name: str
    role: Literal["read", "operate", "admin"]


class Health(_Answer):
    """The state of this process, or of what it needs."""

    status: Literal["ok"]


class Ready(_Answer):
    """What this process needs. ``broker``: Kafka answers; without it nothing can be changed, but jobs are shown."""

    status: Literal["ok"]
    table: bool
    broker: bool


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:jobledger:problem:job-not-found"])
    title: str
    status: int
    detail: str
