"""The protocols of a status database: the write side for the one materializer, the read side for all other processes.

`tests/contract/test_store.py` tests them on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, Unpack

import msgspec

from jobledger.errors import JobNotFound
from jobledger.job import JobStatus, Life, State
from jobledger.plan import PlanStatus
from jobledger.schemas.events import Position
from jobledger.streams.status.store.removal import Piece, Walk
from jobledger.worker_status import WorkerStatus

#: A partition: (topic, number).
Partition = tuple[str, int]
#: The values that a filter accepts: one value, any of several, or None for all. A `State` is a ``str``, too.
Wanted = str | Iterable[str] | None
#: A tag's row: (name, value, submitted_ms, job_id).
TagRow = tuple[str, str, int, str]


class Filters(TypedDict, total=False):
    """The filters of `StatusReader.jobs`; a job must match all of them.

    ``state``, ``task``, ``queue``, ``key``, ``version``, ``error``, ``fingerprint``: one value, or any of several.
    ``error``: the type of an error. ``tag``: one tag, or all of several. ``since_ms``: only jobs submitted at this time
    or later. ``until_ms``: only jobs submitted before this time. ``id_prefix``: only jobs whose ids begin with this
    text; a page is then in descending order of ids, unless a tag, key or fingerprint is given. ``attempts_least``: only
    jobs whose last known fact belongs to an attempt with this number or a greater one; without ``state`` only retrying
    jobs. ``late_ms``: only jobs that could have started at this time and have not started. These are scheduled,
    retrying and queued jobs with a due time of ``late_ms`` or earlier, and queued jobs without a due time that were
    submitted at ``late_ms`` or earlier. ``error_text``: only jobs whose error message contains this text in its first 500
    characters; the case of letters does not count. Times are milliseconds of the broker's clock.
    """

    state: Wanted
    task: Wanted
    queue: Wanted
    tag: tuple[str, str] | Mapping[str, str] | None
    since_ms: int | None
    late_ms: int | None
    key: Wanted
    version: Wanted
    error: Wanted
    fingerprint: Wanted
    until_ms: int | None
    id_prefix: str | None
    attempts_least: int | None
    error_text: str | None


class Found(msgspec.Struct, frozen=True):
    """A part of a list of jobs. ``after``: the id of a job with which the search can be continued; None: all jobs were
    looked at. ``searched_ms``: the time of submission up to which jobs were looked at, in milliseconds of the broker's
    clock; None: all were, or they are in the order of their ids."""

    jobs: list[JobStatus]
    after: str | None = None
    searched_ms: int | None = None


class Counted(msgspec.Struct, frozen=True):
    """The number of jobs that match filters. ``exact``: False if there may be more."""

    jobs: int
    exact: bool


class QueueSummary(msgspec.Struct, frozen=True):
    """The numbers of a queue's jobs by state.

    ``depth``: number of queued jobs, which could start now. ``oldest_ms``: since when the queued job that
    waits longest could start: the end of its delay or backoff, else its submission (milliseconds of the broker's
    clock). None: no job is queued, or the queue's jobs are behind too many others to be looked at.
    """

    queue: str
    scheduled: int
    depth: int
    running: int
    retrying: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    oldest_ms: int | None = None


class ErrorGroup(msgspec.Struct, frozen=True):
    """Failed and retrying jobs with errors of the same kind (`jobledger.fingerprint`).

    ``type``, ``message``: of the error of ``job_id``, the job of the group that was submitted last. ``jobs``: number of
    jobs; with ``exact`` False there are more. ``first_ms``, ``last_ms``: when the first and the last job of the group
    were *submitted*, in milliseconds of the broker's clock; an error itself is later. ``tasks``, ``versions``: numbers
    of the counted jobs by task and by the version of the code (empty text: not known). ``again``: number of the counted
    jobs that had this error in a later run than the first one: they had been redriven before.
    """

    fingerprint: str
    type: str
    message: str
    job_id: str
    jobs: int
    exact: bool
    first_ms: int
    last_ms: int
    tasks: dict[str, int]
    versions: dict[str, int]
    again: int = 0


class About(msgspec.Struct, frozen=True):
    """Facts about a status table. ``revision``: see `tables.REVISION`. ``jobs``: number of jobs. ``size_bytes``: bytes on
    disk. ``holder``: who holds the writer's lease, ``host:pid``; empty: nobody. ``held``: whether this lease is valid
    now."""

    revision: int
    jobs: int
    size_bytes: int
    holder: str
    held: bool


class LastSuccess(msgspec.Struct, frozen=True):
    """A job that succeeded: the version of the code that ran it, if it is known, and when it ended (milliseconds of the
    broker's clock)."""

    version: str | None
    ended_ms: int
    job_id: str


class Count(msgspec.Struct, frozen=True):
    """The number of jobs of a task and queue in a state."""

    task: str
    queue: str
    state: State
    jobs: int


class Overdue(msgspec.Struct, frozen=True):
    """A job that was due for ``release`` and ``attempt`` at ``due_ms`` and still waits.

    ``spec_at``: the position of a record that contains the whole job; None if the table knows no such record.
    """

    job_id: str
    task: str
    queue: str
    run: int
    release: int
    attempt: int
    due_ms: int
    spec_at: Position | None


@dataclass(slots=True)
class Changes:
    """The changes that one transaction writes. ``jobs``: rows with the columns of `rows.COLUMNS`. ``counts``:
    differences of the counters, by task, queue and state.

    ``resets``: the log's start for each partition whose next offset the log no longer had, or whose topic was
    recreated. ``topics``: new ids of the topics to which the offsets belong. ``plans``: plans with their new state.
    ``removed``: limits in ms up to which rows of ended jobs are not in the table, by state. ``workers``: the last report
    of each worker that reported, or None for a worker that has ended. ``workers_before_ms``: rows of workers that
    reported last before this time (milliseconds of the broker's clock) are removed, before ``workers`` are written;
    None: no rows.
    """

    jobs: list[tuple[Any, ...]] = field(default_factory=list)
    tags_gone: list[TagRow] = field(default_factory=list)
    tags_new: list[TagRow] = field(default_factory=list)
    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    offsets: dict[Partition, int] = field(default_factory=dict)
    resets: dict[Partition, int] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    plans: list[PlanStatus] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    workers: dict[str, WorkerStatus | None] = field(default_factory=dict)
    workers_before_ms: int | None = None


class StatusReader(Protocol):
    """The read side. Its methods never write. Several threads may call them at the same time, also while a writer
    writes. Every method raises `StoreError` if the database cannot be read."""

    def job(self, job_id: str) -> JobStatus:
        """Return one job's status. Raises `JobNotFound`."""

    def states(self, job_ids: Sequence[str]) -> dict[str, State]:
        """Return the states of those jobs that the table knows."""

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Return the statuses of those jobs that the table knows."""

    def unknown(self, job_id: str) -> JobNotFound:
        """Return the error for a job that the table does not know."""

    def jobs(self, *, after: str | None = None, limit: int = 100, **filters: Unpack[Filters]) -> list[JobStatus]:
        """Return a page of the jobs that match every given filter, newest submission first.

        ``after``: the last job id of the previous page. Raises `JobNotFound` if ``after`` does not exist, `ConfigError`
        for an unknown state, `StoreError` for a filter whose column the table does not have yet.
        """

    def search(
        self, *, after: str | None = None, limit: int = 100, most: int = 2_000, **filters: Unpack[Filters]
    ) -> Found:
        """Return the jobs that `jobs` would return, or the first of them if ``most`` rows of the table were compared with
        the filters. So the time does not depend on the number of jobs. Raises as `jobs` does."""

    def ids(self, prefix: str, limit: int = 10) -> list[str]:
        """Return the first ``limit`` ids, in ascending order, that begin with ``prefix``."""

    def counts(self) -> list[Count]:
        """Return the number of jobs of each task and queue in each state, without zeros."""

    def counts_by_state(self) -> dict[str, int]:
        """Return the number of jobs in each state, including states without jobs."""

    def count(self, limit: int = 10_000, *, most: int = 50_000, **filters: Unpack[Filters]) -> Counted:
        """Return the number of jobs that match every filter of `jobs`.

        With only ``state``, ``task`` and ``queue`` the number is that of the counters. Otherwise jobs are counted up to
        ``limit``, and at most ``most`` rows of the table are compared with the filters; ``exact`` is False if there may
        be more. Raises as `jobs` does.
        """

    def about(self) -> About:
        """Return the table's revision, its size, and whether a materializer writes it now."""

    def queues(self) -> list[QueueSummary]:
        """Return the queues that the table knows, by name. ``oldest_ms`` is searched among the 10,000 queued jobs that
        were submitted first."""

    def errors(self, since_ms: int | None = None, limit: int = 50) -> list[ErrorGroup]:
        """Return failed and retrying jobs in groups of errors of the same kind, the group with the last submission
        first.

        ``since_ms``: only groups with a job submitted at this time or later; ``jobs``, ``tasks`` and ``versions`` count
        only these jobs. At most 500 jobs of each group are counted, those that were submitted last. With more than 2,000
        kinds of errors, only that many are looked at. Raises `StoreError` for a table without fingerprints.
        """

    def last_success(self, *tasks: str) -> dict[str, LastSuccess]:
        """Return the job of each task that succeeded and was submitted last, by task, searched among the 10,000 jobs of
        all tasks that were submitted last. Tasks without such a job are left out. Raises `StoreError` for a table
        without versions."""

    def offsets(self) -> dict[Partition, int]:
        """Return the next offset to read of every partition."""

    def topics(self) -> dict[str, str]:
        """Return the known ids of the topics to which the offsets belong."""

    def reached(self, position: Position) -> bool:
        """Return whether the table includes the record at this position."""

    def overdue(self, now_ms: int, bound_ms: int, limit: int = 1000, after: Overdue | None = None) -> list[Overdue]:
        """Return a page of the scheduled and retrying jobs that were due at least ``bound_ms`` ago, earliest first.

        ``now_ms``: the present time of the broker's clock. ``after``: the last job of the previous page.
        """

    def open_lives(self, limit: int, *, waiting: bool = False, before_ms: int | None = None) -> list[tuple[str, Life]]:
        """Return at most ``limit`` queued and running jobs: state by state, and in each state the oldest submission
        first.

        ``waiting``: include scheduled and retrying jobs. ``before_ms``: only jobs submitted earlier.
        """

    def lives_of(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """Return the fold states of those jobs that the table knows, by the ids that were asked for."""

    def chosen(self, limit: int | None = None, **filters: Unpack[Filters]) -> Iterator[tuple[str, int]]:
        """Yield the id and the run of each job that matches every filter of `jobs`, newest submission first, from one
        snapshot."""

    def plans(self, limit: int = 100, *, after: str | None = None) -> list[PlanStatus]:
        """Return a page of the plans, the last one first. ``after``: the last plan of the page before. Raises
        `PlanNotFound` if ``after`` does not exist."""

    def plan(self, plan_id: str) -> PlanStatus:
        """Return one plan. Raises `PlanNotFound`."""

    def open_plans(self) -> list[PlanStatus]:
        """Return the plans that have not ended, the last one first."""

    def removed(self) -> dict[str, int]:
        """Return the limits in ms up to which rows of ended jobs were removed, by state. Every record that was appended
        before the greatest of them was included in the table."""

    def workers(self, limit: int = 1_000, *, before_ms: int | None = None) -> list[WorkerStatus]:
        """Return at most ``limit`` workers, those that reported last, in order of their ids.

        ``before_ms``: only workers whose last report is from before this time, in milliseconds of the broker's clock.
        """

    def lives(self) -> Iterator[tuple[str, Life]]:
        """Yield every job with its fold state, in order of ids, from one snapshot."""

    def close(self) -> None:
        """Close the connections."""


class Store(Protocol):
    """The write side, for one thread. Every write raises `LeaseLost` if another writer has taken over the store.

    A method raises `CommitUnknown` once if the table differs from what this writer committed: a connection broke during
    a commit, or a crash undid the last commits. A write that raises this error changed nothing: the caller discards
    cached states and continues from `offsets`.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def acquire(self) -> bool:
        """Become the writer and return True; return False while another writer's lease is valid. Every other write
        needs the lease."""

    def renew(self) -> None:
        """Extend the lease."""

    def release(self) -> None:
        """Release the lease, so that another writer can take over at once. Does nothing if this writer does not hold
        the lease."""

    def offsets(self) -> dict[Partition, int]:
        """Return the next offset to read of every partition. After `CommitUnknown` a writer continues from these
        offsets."""

    def topics(self) -> dict[str, str]:
        """Return the known ids of the topics to which the offsets belong."""

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """Return the fold states of those jobs that the table knows."""

    def load_plans(self, plan_ids: Sequence[str]) -> dict[str, PlanStatus]:
        """Return those plans that the table knows."""

    def write(self, changes: Changes) -> None:
        """Write all changes (rows, plans, workers, tags, counters, offsets, topic ids) in one transaction."""

    def carry(self, job_ids: Sequence[str]) -> None:
        """Mark existing rows as carried over from the previous table."""

    def removed(self) -> dict[str, int]:
        """Return the limits in ms up to which rows of ended jobs were removed, by state."""

    def reread(self) -> set[Partition]:
        """Return the partitions that were read again from their start at some time."""

    def plan_is_open(self, listed_since_ms: int) -> bool:
        """Return whether there is a plan that has not ended. A plan that is still being listed counts only if it was
        opened at ``listed_since_ms`` or later: the caller of an older one has died."""

    def remove(self, walk: Walk, most: int, spare: Callable[[Sequence[str]], Container[str]] | None = None) -> Piece:
        """Read the next ``most`` rows of a walk and remove those that go, with their tags, in one transaction that
        keeps the counters right and stores the walk's limit.

        ``spare``: gets the ids of the rows that would go, and returns those that stay.
        """

    def beside(self) -> AbstractContextManager[Self]:
        """Create an empty table of the same namespace for `replace_with`, and acquire its lease. The table is deleted
        when the block ends."""

    def replace_with(self, other: Self) -> None:
        """Replace this table with ``other`` (of `beside`) in one transaction. Readers see either the old or the new
        table.

        The call needs the lease and releases it: a writer of either table must acquire the lease again.
        """

    def size(self) -> int:
        """Return the number of jobs."""

    def holder(self) -> str:
        """Return the holder of the lease: ``host:pid`` by default, or an empty text if no writer holds it."""

    def close(self) -> None:
        """Release the lease and close the connection."""
