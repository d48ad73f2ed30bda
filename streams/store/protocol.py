"""What a status database must do: the write side for the one materializer, the read side for everybody.

`tests/contract/test_store.py` holds every backend to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from jobledger.errors import JobNotFound
from jobledger.job import JobStatus, Life, State
from jobledger.schemas.events import Position

#: A partition of a topic.
Partition = tuple[str, int]
#: What a filter lets pass: one value, any of several, or None for all. A `State` is a ``str``, too.
Wanted = str | Iterable[str] | None
#: A tag's row: (name, value, submitted_ms, job_id).
TagRow = tuple[str, str, int, str]


class Count(msgspec.Struct, frozen=True):
    """How many jobs of a task and queue are in a state."""

    task: str
    queue: str
    state: State
    jobs: int


class Overdue(msgspec.Struct, frozen=True):
    """A job that waits for ``release`` and ``attempt`` since ``due_ms``.

    ``spec_at``: where a record stands that carries the whole job; None if the table has seen none.
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
    """What one transaction writes. ``jobs``: rows in the order of `rows.COLUMNS`; ``counts``: differences.

    ``resets``: partitions whose next offset the log no longer had, with the log's start. ``topics``: ids of the topics that
    the offsets are of, as far as they are new.
    """

    jobs: list[tuple[Any, ...]] = field(default_factory=list)
    tags_gone: list[TagRow] = field(default_factory=list)
    tags_new: list[TagRow] = field(default_factory=list)
    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    offsets: dict[Partition, int] = field(default_factory=dict)
    resets: dict[Partition, int] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)


class StatusReader(Protocol):
    """The read side. Never writes; safe from several threads, beside a writer. Raises `StoreError` if it is away."""

    def job(self, job_id: str) -> JobStatus:
        """One job. Raises `JobNotFound`."""

    def states(self, job_ids: Sequence[str]) -> dict[str, State]:
        """The states of those jobs that the table knows."""

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Those jobs that the table knows."""

    def unknown(self, job_id: str) -> JobNotFound:
        """The error for a job that the table does not know."""

    def jobs(
        self,
        *,
        state: Wanted = None,
        task: Wanted = None,
        queue: Wanted = None,
        tag: tuple[str, str] | Mapping[str, str] | None = None,
        since_ms: int | None = None,
        late_ms: int | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[JobStatus]:
        """A page of the jobs that match every given filter, newest submission first.

        ``state``, ``task``, ``queue``: one, or any of several. ``tag``: one, or all of several. ``since_ms``: submitted
        then or later. ``late_ms``: not started, though they could have been then: those that wait for a time that was
        over, and those queued that were due, or if no time was set submitted. ``after``: the last job id of the page before. Raises `JobNotFound` if there is no such job, `ConfigError` for
        a state that does not exist.
        """

    def ids(self, prefix: str, limit: int = 10) -> list[str]:
        """The first ids in their order that begin with ``prefix``."""

    def counts(self) -> list[Count]:
        """How many jobs of each task and queue are in each state, without zeros."""

    def counts_by_state(self) -> dict[str, int]:
        """How many jobs are in each state; every state is there."""

    def offsets(self) -> dict[Partition, int]:
        """The next offset to be read of every partition."""

    def topics(self) -> dict[str, str]:
        """The ids of the topics that the offsets are of, as far as they are known."""

    def reached(self, position: Position) -> bool:
        """Whether the record at this position is in the table."""

    def overdue(self, now_ms: int, bound_ms: int, limit: int = 1000, after: Overdue | None = None) -> list[Overdue]:
        """A page of the scheduled and retrying jobs that were due ``bound_ms`` ago or longer, the longest first.

        ``now_ms``: the broker's clock. ``after``: the last one of the page before.
        """

    def open_lives(self, limit: int, *, waiting: bool = False, before_ms: int | None = None) -> list[tuple[str, Life]]:
        """At most ``limit`` queued and running jobs, the oldest submission of each state first.

        ``waiting``: scheduled and retrying ones, too. ``before_ms``: only those submitted earlier.
        """

    def lives(self) -> Iterator[tuple[str, Life]]:
        """Every job with its fold state, in order of ids, in one snapshot."""

    def close(self) -> None:
        """Give the connections back."""


class Store(Protocol):
    """The write side, for one thread. Every write raises `LeaseLost` if another writer took the store over.

    `CommitUnknown` is raised once if the table is not where this writer left it: a connection broke in a commit, or the
    database lost its last moments in a crash. What was read and folded since is void, and nothing was written.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def acquire(self) -> bool:
        """Become the writer, unless another one's lease runs. Must be true before anything is written."""

    def renew(self) -> None:
        """Hold the lease longer."""

    def release(self) -> None:
        """Let another writer in at once. Does nothing if the lease is not ours."""

    def offsets(self) -> dict[Partition, int]:
        """The next offset to be read of every partition. After `CommitUnknown` a writer begins here again."""

    def topics(self) -> dict[str, str]:
        """The ids of the topics that the offsets are of, as far as they are known."""

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """The fold states of those jobs that the table knows."""

    def write(self, changes: Changes) -> None:
        """Write all of it, or nothing: rows, tags, counters, offsets."""

    def carry(self, job_ids: Sequence[str]) -> None:
        """Mark rows that are there as carried over from the table before."""

    def beside(self) -> AbstractContextManager[Self]:
        """An empty table of the same namespace, leased, that this one can be replaced
        with; gone when the block ends."""

    def replace_with(self, other: Self) -> None:
        """Take over everything that ``other`` (of `beside`) holds, in one transaction; readers see either or.

        Needs the lease, which ends with it: whoever wrote either before must acquire it again.
        """

    def size(self) -> int:
        """How many jobs there are."""

    def holder(self) -> str:
        """Who has the lease: ``host:pid``, or nothing."""

    def close(self) -> None:
        """Release the lease and the connection."""
