"""The part of the write side that is the same on every database: the lease, and the choice of rows that must be read.

Uses SQL that every backend understands, with ``?`` for a value. A backend runs the statements and begins and ends the
transactions.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from sqlalchemy.engine import Dialect
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from jobledger.errors import LeaseLost
from jobledger.job import Life, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.process.logger import get_logger
from jobledger.streams.status.store.address import shown
from jobledger.streams.status.store.protocol import Changes, Partition
from jobledger.streams.status.store.removal import REMOVED, Piece, Walk, Walked, tag_rows, to_remove
from jobledger.streams.status.store.rows import (
    PLAN_COLUMNS,
    WORKER_COLUMNS,
    Row,
    key_text,
    life_of,
    plan_of,
    plan_row,
    worker_row,
)
from jobledger.streams.status.store.tables import ADDED, REVISION, SCHEMA_VERSION, TOPIC, jobs
from jobledger.worker_status import WorkerStatus


def _upsert(table: str, columns: Sequence[str]) -> str:
    """Return the statement that writes a row with these columns, the first of which is the primary key."""
    values = ", ".join(f"{name} = excluded.{name}" for name in columns[1:])
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
        f"ON CONFLICT ({columns[0]}) DO UPDATE SET {values}"
    )


_PLAN, _WORKER = _upsert("plans", PLAN_COLUMNS), _upsert("workers", WORKER_COLUMNS)

LOG = get_logger("jobledger.materializer")

#: Duration of the lease in seconds. A writer that has not renewed its lease for this time may be replaced.
LEASE_S = 10.0


_WALKED = "SELECT job_id, state, task, queue, submitted_ms, ended_ms FROM jobs"
_FROM = "submitted_ms < ? AND (submitted_ms, job_id) > (?, ?) ORDER BY submitted_ms, job_id LIMIT ?"
#: All rows by time: the state of each is checked afterwards, because there may be few of a state among very many others.
_WALK_ALL = f"{_WALKED} WHERE {_FROM}"
#: The condition of the partial index `jobs_by_state` is repeated, so that it is used.
_WALK_STATE = f"{_WALKED} WHERE state = ? AND state != 'succeeded' AND {_FROM}"
#: Number of ids in one query for the states of rows.
_IDS_A_QUERY = 500

_SETTING = "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


class SqlStore(ABC):
    """The part of `Store` that does not depend on the database.

    ``lease_s``: seconds after which a writer that does not renew its lease may be replaced. ``holder``: this writer's
    name in the lease; ``host:pid`` by default. ``clock``: returns seconds; None: the backend's own clock.
    """

    #: Appended to a query for a row that the transaction will change.
    FOR_UPDATE: ClassVar[str] = ""

    def __init__(
        self, url: str, namespace: str, *, lease_s: float, holder: str | None, clock: Callable[[], float] | None
    ) -> None:
        self.url, self.namespace = shown(url), namespace
        self._lease_ms, self._clock = int(lease_s * 1000), clock
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}"
        self._epoch: int | None = None
        self._greatest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- implemented by a backend -------------------------------------------------------------------------------------

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Turn the driver's errors in the block into `StoreError`."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """Run the block in a transaction: commit at its end, roll back after an exception."""

    def _reading(self) -> AbstractContextManager[None]:
        """Run queries in the block that belong to no other transaction."""
        return self._errors()

    @abstractmethod
    def _run(self, sql: str, *values: object) -> Cursor:
        """Run a statement, in the present transaction if there is one."""

    @abstractmethod
    def _run_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for each row."""

    @abstractmethod
    def _states(self, job_ids: Sequence[str]) -> Iterable[tuple[str, bytes, bytes | None]]:
        """Return (job id, slots, result) of those rows that exist."""

    @abstractmethod
    def _put(self, rows: Sequence[Row], changes: Changes) -> None:
        """Write the changes, except ``changes.topics``, in the present transaction. ``rows``: the jobs' rows, sorted by
        id."""

    @abstractmethod
    def _gone(self, holder: str, epoch: int) -> bool:
        """Return whether the holder of a lease that has not expired is known to have ended."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the connection."""

    def _now(self) -> tuple[str, tuple[int, ...]]:
        """Return a SQL expression for the present time in milliseconds, and its values."""
        assert self._clock is not None, "a backend without a clock of its own is given one"
        return "?", (int(self._clock() * 1000),)

    def _take(self, epoch: int) -> None:
        """Store this writer as the lease's holder, with this epoch."""
        now, at = self._now()
        self._run(
            f"UPDATE lease SET epoch = ?, holder = ?, until_ms = {now} + ?",
            *(epoch, self._holder, *at, self._lease_ms),
        )

    def _first_rows(self) -> None:
        """Insert the first rows of new tables."""
        self._run("INSERT INTO lease (id, epoch, holder, until_ms) VALUES (1, 0, '', 0)")
        rows = {"schema_version": str(SCHEMA_VERSION), "revision": str(REVISION), "namespace": self.namespace}
        self._run_many("INSERT INTO meta (key, value) VALUES (?, ?)", list(rows.items()))

    def _add_missing(self, revision: int, dialect: Dialect) -> None:
        """Add to existing tables what revisions above ``revision`` added, in the present transaction."""
        for number in range(revision + 1, REVISION + 1):
            added = ADDED[number]
            for table in added.tables:
                self._run(str(CreateTable(table).compile(dialect=dialect)))
            for name in added.columns:
                self._run(f"ALTER TABLE jobs ADD COLUMN {CreateColumn(jobs.c[name]).compile(dialect=dialect)}")
            for index in jobs.indexes:
                if index.name in added.indexes:
                    self._run(str(CreateIndex(index).compile(dialect=dialect)))
        self._run(_SETTING, "revision", str(REVISION))
        LOG.info("the status table %s was brought from revision %d to %d", self.url, revision, REVISION)

    # -- the lease ----------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Become the writer; return False while another writer's lease is valid."""
        now, at = self._now()
        with self._transaction():
            query = f"SELECT epoch, holder, until_ms > {now} FROM lease{self.FOR_UPDATE}"
            epoch, holder, runs = self._run(query, *at).fetchone()
            if runs and not self._gone(holder, epoch):
                return False
            epoch += 1
            self._take(epoch)
            greatest = self._last()
        self._epoch, self._greatest = epoch, greatest
        return True

    def renew(self) -> None:
        """Extend the lease. Raises `LeaseLost`."""
        with self._transaction():
            self._own()

    def release(self) -> None:
        """Release the lease, so that another writer can take over at once. Does nothing if this writer does not hold
        the lease."""
        if self._epoch is not None:
            with self._transaction():
                self._run("UPDATE lease SET holder = '', until_ms = 0 WHERE epoch = ? AND holder = ?", *self._mine())
            self._epoch = None

    def _own(self) -> None:
        """Extend the lease at the beginning of every transaction that writes. Raises `LeaseLost` if this writer does
        not hold the lease."""
        if self._epoch is None:
            raise LeaseLost(
                f"the lease of the status table {self.url} is not held by this materializer: it was given back, or never acquired"
            )
        now, at = self._now()
        updated = self._run(
            f"UPDATE lease SET until_ms = {now} + ? WHERE epoch = ? AND holder = ?",
            *(*at, self._lease_ms, *self._mine()),
        )
        if updated.rowcount != 1:
            epoch, holder = self._run("SELECT epoch, holder FROM lease").fetchone()
            raise LeaseLost(
                f"the status table {self.url} is written by {holder or 'another materializer'} now (epoch {epoch}, "
                f"this one had {self._epoch}); this one stops, and can be started again as a standby"
            )

    def _mine(self) -> tuple[int | None, str]:
        # Compare the holder, too: a database that lost its last commits in a crash may assign an epoch twice.
        return self._epoch, self._holder

    def holder(self) -> str:
        """Return the holder of the lease: ``host:pid`` by default, or an empty text if no writer holds it."""
        with self._reading():
            (holder,) = self._run("SELECT holder FROM lease").fetchone()
        return str(holder)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def offsets(self) -> dict[Partition, int]:
        """Return the next offset to read of every partition."""
        with self._reading():
            rows = self._run("SELECT topic, partition, next_offset FROM offsets").fetchall()
        return {(topic, partition): offset for topic, partition, offset in rows}

    def topics(self) -> dict[str, str]:
        """Return the known ids of the topics to which the offsets belong."""
        with self._reading():
            rows = self._run("SELECT key, value FROM meta WHERE key LIKE ?", f"{TOPIC}%").fetchall()
        return {key.removeprefix(TOPIC): value for key, value in rows}

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """Return the fold states of those jobs that the table knows."""
        # Jobledger's ids are ordered by time, so most new ids are greater than the last row's id and need no query.
        # Only the lease's holder can rely on that, because no other process adds rows.
        wanted = [i for i in job_ids if i <= self._greatest] if self._epoch is not None else list(job_ids)
        if not wanted:
            return {}
        with self._reading():
            return {job_id: life_of(slots, result) for job_id, slots, result in self._states(wanted)}

    def load_plans(self, plan_ids: Sequence[str]) -> dict[str, PlanStatus]:
        """Return those plans that the table knows."""
        known: dict[str, PlanStatus] = {}
        with self._reading():
            for plan_id in plan_ids:  # few in one batch
                row = self._run("SELECT slots FROM plans WHERE plan = ?", key_text(plan_id)).fetchone()
                if row is not None:
                    known[plan_id] = plan_of(row[0])
        return known

    def write(self, changes: Changes) -> None:
        """Write all changes (rows, plans, workers, tags, counters, offsets, topic ids) in one transaction."""
        # Rows are sorted by id, so that they are appended to the primary key's tree, or are next to one another in it.
        rows = sorted(changes.jobs)
        with self._transaction():
            self._own()
            self._put(rows, changes)
            if changes.plans:
                self._run_many(_PLAN, [plan_row(plan) for plan in changes.plans])
            if changes.workers_before_ms is not None:
                self._run("DELETE FROM workers WHERE reported_ms < ?", changes.workers_before_ms)
            if changes.workers:
                self._put_workers(changes.workers)
            if changes.topics:
                self._run_many(_SETTING, [(f"{TOPIC}{topic}", topic_id) for topic, topic_id in changes.topics.items()])
            if changes.removed:
                self._run_many(_SETTING, [(f"{REMOVED}{state}", str(ms)) for state, ms in changes.removed.items()])
        if rows:
            self._greatest = max(self._greatest, rows[-1][0])

    def _put_workers(self, workers: Mapping[str, WorkerStatus | None]) -> None:
        known = [worker_row(status) for status in workers.values() if status is not None]
        ended = [(key_text(worker),) for worker, status in workers.items() if status is None]
        if ended:
            self._run_many("DELETE FROM workers WHERE worker = ?", ended)
        if known:
            self._run_many(_WORKER, known)

    def carry(self, job_ids: Sequence[str]) -> None:
        """Mark existing rows as carried over from the previous table."""
        with self._transaction():
            self._own()
            self._run_many("UPDATE jobs SET carried = 1 WHERE job_id = ?", [(i,) for i in job_ids])

    # -- removing rows ------------------------------------------------------------------------------------------------

    def removed(self) -> dict[str, int]:
        """Return the limits in ms up to which rows of ended jobs were removed, by state."""
        with self._reading():
            rows = self._run("SELECT key, value FROM meta WHERE key LIKE ?", f"{REMOVED}%").fetchall()
        return {key.removeprefix(REMOVED): int(value) for key, value in rows}

    def reread(self) -> set[Partition]:
        """Return the partitions that were read again from their start at some time."""
        with self._reading():
            rows = self._run("SELECT topic, partition FROM offsets WHERE resets > 0").fetchall()
        return {(topic, partition) for topic, partition in rows}

    def plan_is_open(self, listed_since_ms: int) -> bool:
        """Return whether there is a plan that has not ended; see `Store.plan_is_open`."""
        query = "SELECT 1 FROM plans WHERE state IN (?, ?) OR (state = ? AND opened_ms >= ?) LIMIT 1"
        states = (PlanState.RUNNING.value, PlanState.PAUSED.value, PlanState.LISTING.value)
        with self._reading():
            return self._run(query, *states, listed_since_ms).fetchone() is not None

    def remove(self, walk: Walk, most: int, spare: Callable[[Sequence[str]], Container[str]] | None = None) -> Piece:
        """Read the next ``most`` rows of a walk and remove those that go; see `Store.remove`."""
        with self._transaction():
            self._own()
            rows = self._walked(walk, most)
            wanted = to_remove(walk, rows)
            stay = spare([row.job_id for row in wanted]) if spare is not None and wanted else ()
            gone = self._removed_rows(walk, [row for row in wanted if row.job_id not in stay])
        after = (rows[-1].submitted_ms, rows[-1].job_id) if len(rows) == most else None
        return Piece(len(rows), gone, after)

    def _walked(self, walk: Walk, most: int) -> list[Walked]:
        place = (walk.before_ms, *walk.after, most)
        if walk.state is State.SUCCEEDED:
            found = self._run(_WALK_ALL, *place)
        else:
            found = self._run(_WALK_STATE, walk.state.value, *place)
        return [Walked(*row) for row in found.fetchall()]

    def _removed_rows(self, walk: Walk, rows: Sequence[Walked]) -> list[str]:
        """Remove those of these rows that go, in the present transaction, and return their ids."""
        changes, gone = Changes(), []
        for begin in range(0, len(rows), _IDS_A_QUERY):
            some = {row.job_id: row for row in rows[begin : begin + _IDS_A_QUERY]}
            marks = ", ".join("?" * len(some))
            query = f"SELECT job_id, slots FROM jobs WHERE job_id IN ({marks})"
            for job_id, slots in self._run(query, *some).fetchall():
                row, life = some[job_id], life_of(slots, None)
                if not walk.ends and not walk.old(life):
                    continue
                gone.append(job_id)
                changes.tags_gone += tag_rows(job_id, row.submitted_ms, life)
                key = (row.task, row.queue, row.state)
                changes.counts[key] = changes.counts.get(key, 0) - 1
        if gone:
            self._run_many("DELETE FROM jobs WHERE job_id = ?", [(job_id,) for job_id in gone])
            self._put([], changes)
            if walk.ends:
                self._note_removed(walk)
        return gone

    def _note_removed(self, walk: Walk) -> None:
        key = f"{REMOVED}{walk.state.value}"
        known = self._run("SELECT value FROM meta WHERE key = ?", key).fetchone()
        if known is None or int(known[0]) < walk.before_ms:
            self._run(_SETTING, key, str(walk.before_ms))

    def size(self) -> int:
        """Return the number of jobs."""
        with self._reading():
            (number,) = self._run("SELECT count(*) FROM jobs").fetchone()
        return int(number)

    def _last(self) -> str:
        (greatest,) = self._run("SELECT max(job_id) FROM jobs").fetchone()
        return greatest or ""

    def close(self) -> None:
        """Release the lease and close the connection."""
        try:
            self.release()
        finally:
            self._disconnect()
