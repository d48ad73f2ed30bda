"""What the write side does alike on every database: the lease, and which rows need not be looked for.

SQL that all of them understand, with ``?`` for a value; a backend says how a statement is run and how a transaction
begins and ends.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from jobledger.errors import LeaseLost
from jobledger.job import Life
from jobledger.streams.store.address import shown
from jobledger.streams.store.protocol import Changes, Partition
from jobledger.streams.store.rows import Row, life_of
from jobledger.streams.store.tables import SCHEMA_VERSION, TOPIC

#: Seconds a writer may be silent before another one takes over.
LEASE_S = 10.0


_TOPIC = "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class Cursor(Protocol):
    """What came of a statement."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


class SqlStore(ABC):
    """The half of `Store` that does not depend on the database.

    ``lease_s``: seconds after which a silent writer may be replaced. ``holder``: who writes, ``host:pid`` by default.
    ``clock``: seconds; None: the backend's own.
    """

    #: Appended to a query whose row the transaction is about to change.
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

    # -- what a backend brings ----------------------------------------------------------------------------------------

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Turns the driver's errors into `StoreError`."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """Commits at its end, or takes everything back."""

    def _reading(self) -> AbstractContextManager[None]:
        """Around queries that belong to no transaction."""
        return self._errors()

    @abstractmethod
    def _run(self, sql: str, *values: object) -> Cursor:
        """Run a statement, in the transaction if there is one."""

    @abstractmethod
    def _run_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for each row."""

    @abstractmethod
    def _states(self, job_ids: Sequence[str]) -> Iterable[tuple[str, bytes, bytes | None]]:
        """(job id, slots, result) of those rows that are there."""

    @abstractmethod
    def _put(self, rows: Sequence[Row], changes: Changes) -> None:
        """Write all of it, in the transaction; ``rows``: the jobs' in order of their ids."""

    @abstractmethod
    def _gone(self, holder: str, epoch: int) -> bool:
        """Whether the holder of a lease that still runs is known to have ended."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Give the connection back."""

    def _now(self) -> tuple[str, tuple[int, ...]]:
        """The time in milliseconds: an expression, and its values."""
        assert self._clock is not None, "a backend without a clock of its own is given one"
        return "?", (int(self._clock() * 1000),)

    def _take(self, epoch: int) -> None:
        """Write down that the lease is ours, under this epoch."""
        now, at = self._now()
        self._run(
            f"UPDATE lease SET epoch = ?, holder = ?, until_ms = {now} + ?",
            *(epoch, self._holder, *at, self._lease_ms),
        )

    def _first_rows(self) -> None:
        """The first rows of tables that were just made."""
        self._run("INSERT INTO lease (id, epoch, holder, until_ms) VALUES (1, 0, '', 0)")
        said = {"schema_version": str(SCHEMA_VERSION), "namespace": self.namespace}
        self._run_many("INSERT INTO meta (key, value) VALUES (?, ?)", list(said.items()))

    # -- the lease ----------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Become the writer, unless another one's lease runs."""
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
        """Hold the lease longer. Raises `LeaseLost`."""
        with self._transaction():
            self._own()

    def release(self) -> None:
        """Let another writer in at once. Does nothing if the lease is not ours."""
        if self._epoch is not None:
            with self._transaction():
                self._run("UPDATE lease SET holder = '', until_ms = 0 WHERE epoch = ? AND holder = ?", *self._mine())
            self._epoch = None

    def _own(self) -> None:
        """The beginning of every transaction of a writer: none but the lease's holder gets past it."""
        if self._epoch is None:
            raise LeaseLost(
                f"the lease of the status table {self.url} is not held by this materializer: it was given back, or never acquired"
            )
        now, at = self._now()
        mine = self._run(
            f"UPDATE lease SET until_ms = {now} + ? WHERE epoch = ? AND holder = ?",
            *(*at, self._lease_ms, *self._mine()),
        )
        if mine.rowcount != 1:
            epoch, holder = self._run("SELECT epoch, holder FROM lease").fetchone()
            raise LeaseLost(
                f"the status table {self.url} is written by {holder or 'another materializer'} now (epoch {epoch}, "
                f"this one had {self._epoch}); this one stops, and can be started again as a standby"
            )

    def _mine(self) -> tuple[int | None, str]:
        # The holder, too: a database that lost its last seconds in a crash may give an epoch out a second time.
        return self._epoch, self._holder

    def holder(self) -> str:
        """Who has the lease: ``host:pid``, or nothing."""
        with self._reading():
            (holder,) = self._run("SELECT holder FROM lease").fetchone()
        return str(holder)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def offsets(self) -> dict[Partition, int]:
        """The next offset to be read of every partition."""
        with self._reading():
            rows = self._run("SELECT topic, partition, next_offset FROM offsets").fetchall()
        return {(topic, partition): offset for topic, partition, offset in rows}

    def topics(self) -> dict[str, str]:
        """The ids of the topics that the offsets are of, as far as they are known."""
        with self._reading():
            rows = self._run("SELECT key, value FROM meta WHERE key LIKE ?", f"{TOPIC}%").fetchall()
        return {key.removeprefix(TOPIC): value for key, value in rows}

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """The fold states of those jobs that the table knows."""
        # Ids that are ordered by time are mostly new ones beyond the last row: no need to look. Only the lease's
        # holder may reason like that, for nobody else adds rows.
        wanted = [i for i in job_ids if i <= self._greatest] if self._epoch is not None else list(job_ids)
        if not wanted:
            return {}
        with self._reading():
            return {job_id: life_of(slots, result) for job_id, slots, result in self._states(wanted)}

    def write(self, changes: Changes) -> None:
        """Write all of it, or nothing: rows, tags, counters, offsets."""
        # In order of the ids rows are appended to the tree, or lie beside one another in it.
        rows = sorted(changes.jobs)
        with self._transaction():
            self._own()
            self._put(rows, changes)
            if changes.topics:
                self._run_many(_TOPIC, [(f"{TOPIC}{topic}", found) for topic, found in changes.topics.items()])
        if rows:
            self._greatest = max(self._greatest, rows[-1][0])

    def carry(self, job_ids: Sequence[str]) -> None:
        """Mark rows that are there as carried over from the table before."""
        with self._transaction():
            self._own()
            self._run_many("UPDATE jobs SET carried = 1 WHERE job_id = ?", [(i,) for i in job_ids])

    def size(self) -> int:
        """How many jobs there are."""
        with self._reading():
            (number,) = self._run("SELECT count(*) FROM jobs").fetchone()
        return int(number)

    def _last(self) -> str:
        (greatest,) = self._run("SELECT max(job_id) FROM jobs").fetchone()
        return greatest or ""

    def close(self) -> None:
        """Release the lease and the connection."""
        try:
            self.release()
        finally:
            self._disconnect()
