"""The status database in one SQLite file, in WAL mode: readers never wait for the writer, nor it for them.

``synchronous=NORMAL``: a commit is not forced to disk, so a power cut may take the last transactions away, whole. That
loses nothing here: the offsets are in the same transactions, and what is missing is read from the log again.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError
from sqlalchemy.schema import CreateIndex, CreateTable

from jobledger.errors import ConfigError, LeaseLost, StoreError
from jobledger.job import Life
from jobledger.streams.store.protocol import Changes, Partition
from jobledger.streams.store.reader import SqlReader, judge, not_found
from jobledger.streams.store.rows import COLUMNS, life_of
from jobledger.streams.store.tables import SCHEMA_VERSION, metadata

#: Seconds a statement waits for another writer (a stand-by asking for the lease, a rebuild swapping).
BUSY_TIMEOUT_S = 10.0
#: Seconds a writer may be silent before another one takes over.
LEASE_S = 10.0
#: Pages in the write-ahead log before they are moved into the file: 32 MB of pages of 8 kB.
_CHECKPOINT_PAGES = 4_000
_PAGE_BYTES = 8_192
_CACHE_KB = 64 * 1024
#: Ids asked for in one statement.
_IDS_A_QUERY = 500

_set = ", ".join(f"{name}=excluded.{name}" for name in COLUMNS[1:])
_UPSERT_JOB = (
    f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    f"ON CONFLICT (job_id) DO UPDATE SET {_set}"
)
_COUNT = (
    "INSERT INTO counters (task, queue, state, jobs) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (task, queue, state) DO UPDATE SET jobs = jobs + excluded.jobs"
)
_OFFSET = (
    "INSERT INTO offsets (topic, partition, next_offset) VALUES (?, ?, ?) "
    "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset"
)
_RESET = (
    "INSERT INTO offsets (topic, partition, next_offset, resets) VALUES (?, ?, ?, 1) "
    "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset, resets = resets + 1"
)


def path_of(url: str) -> Path:
    """The file a ``sqlite:///`` URL names. Raises `ConfigError` if it names none."""
    try:
        database = sqlalchemy.make_url(url).database
    except ArgumentError:
        database = None
    if not database or database == ":memory:":
        raise ConfigError(f"JOBLEDGER_STATUS_URL={url!r} names no file: write sqlite:///folder/status.db")
    return Path(database).expanduser()


def open_reader(url: str, namespace: str) -> SqlReader:
    """The read side of the file. Raises `StoreNotFound` if it is missing, `StoreError` if it is not ours."""
    path = path_of(url)
    if not path.exists():
        raise not_found(url)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(_read_only(path), uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

    reader = SqlReader(_engine(connect), url, namespace)
    try:
        reader.check()
    except BaseException:
        reader.close()
        raise
    return reader


def _engine(connect: Callable[[], sqlite3.Connection]) -> Engine:
    return sqlalchemy.create_engine("sqlite://", creator=connect, poolclass=sqlalchemy.QueuePool)


def copy(url: str, namespace: str, path: Path) -> None:
    """Copy the status table as it is at one moment, while it may be written. Raises as `open_reader` does."""
    reader = open_reader(url, namespace)  # refuses what is not ours
    try:
        source, target = sqlite3.connect(_read_only(path_of(url)), uri=True), sqlite3.connect(path)
        with closing(source), closing(target):
            source.backup(target)
    except sqlite3.Error as exc:
        raise StoreError(f"the status table {url} cannot be copied: {exc}") from exc
    finally:
        reader.close()


def _read_only(path: Path) -> str:
    return f"file:{quote(str(path.absolute()))}?mode=ro"


class SqliteStore:
    """`Store` in a SQLite file, which is made if it is missing.

    ``lease_s``: seconds after which a silent writer may be replaced. A writer of this machine whose process is gone is
    replaced at once. ``clock``: seconds, for tests. Raises `StoreError` if the file is not ours.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        lease_s: float = LEASE_S,
        holder: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url, self.namespace = url, namespace
        self.path = path_of(url)
        self._lease_ms, self._clock = int(lease_s * 1000), clock
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}"
        self._epoch: int | None = None
        self._greatest = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as exc:
            raise StoreError(f"the status table {url} cannot be opened: {exc}") from exc
        try:
            with self._errors():
                for pragma in (
                    f"page_size = {_PAGE_BYTES}",
                    "journal_mode = WAL",
                    "synchronous = NORMAL",
                    f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
                    f"journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES * 2}",
                    f"cache_size = -{_CACHE_KB}",
                ):
                    self._db.execute("PRAGMA " + pragma).fetchall()
                self._make()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        with self._transaction():
            names = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not names:
                dialect = sqlite.dialect()
                for table in metadata.sorted_tables:
                    self._db.execute(str(CreateTable(table).compile(dialect=dialect)))
                    for index in sorted(table.indexes, key=lambda i: str(i.name)):
                        self._db.execute(str(CreateIndex(index).compile(dialect=dialect)))
                self._db.execute("INSERT INTO lease (id, epoch, holder, until_ms) VALUES (1, 0, '', 0)")
                said = {"schema_version": str(SCHEMA_VERSION), "namespace": self.namespace}
                self._db.executemany("INSERT INTO meta (key, value) VALUES (?, ?)", said.items())
            elif "meta" not in names:
                raise StoreError(f"{self.url} is a database of something else: it has no table 'meta'")
            judge(dict(self._db.execute("SELECT key, value FROM meta")), self.url, self.namespace)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(f"the status table {self.url} cannot be written: {exc}") from exc

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors end it by themselves
                    self._db.execute("ROLLBACK")
                raise

    # -- the lease --------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Become the writer, unless another one's lease runs."""
        with self._transaction():
            epoch, holder, until = self._db.execute("SELECT epoch, holder, until_ms FROM lease").fetchone()
            now = self._now()
            if until > now and not _gone(holder):
                return False
            self._db.execute(
                "UPDATE lease SET epoch = ?, holder = ?, until_ms = ?", (epoch + 1, self._holder, self._until())
            )
            (greatest,) = self._db.execute("SELECT max(job_id) FROM jobs").fetchone()
        self._epoch, self._greatest = epoch + 1, greatest or ""
        return True

    def renew(self) -> None:
        """Hold the lease longer. Raises `LeaseLost`."""
        with self._transaction():
            self._own()

    def release(self) -> None:
        """Let another writer in at once. Does nothing if the lease is not ours."""
        if self._epoch is not None:
            with self._transaction():
                self._db.execute("UPDATE lease SET holder = '', until_ms = 0 WHERE epoch = ?", (self._epoch,))
            self._epoch = None

    def _own(self) -> None:
        mine = self._db.execute("UPDATE lease SET until_ms = ? WHERE epoch = ?", (self._until(), self._epoch))
        if mine.rowcount != 1:
            epoch, holder = self._db.execute("SELECT epoch, holder FROM lease").fetchone()
            raise LeaseLost(
                f"the status table {self.url} is written by {holder or 'another materializer'} now (epoch {epoch}, "
                f"this one had {self._epoch}); this one stops, and may be started again to stand by"
            )

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _until(self) -> int:
        return self._now() + self._lease_ms

    # -- rows -------------------------------------------------------------------------------------------------------

    def offsets(self) -> dict[Partition, int]:
        """The next offset to be read of every partition."""
        with self._errors():
            rows = self._db.execute("SELECT topic, partition, next_offset FROM offsets").fetchall()
        return {(topic, partition): offset for topic, partition, offset in rows}

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """The fold states of those jobs that the table knows."""
        # Ids that are ordered by time are mostly new ones beyond the last row: no need to look. Only the lease's
        # holder may reason like that, for nobody else adds rows.
        wanted = [i for i in job_ids if i <= self._greatest] if self._epoch is not None else list(job_ids)
        found: dict[str, Life] = {}
        with self._errors():
            for begin in range(0, len(wanted), _IDS_A_QUERY):
                some = wanted[begin : begin + _IDS_A_QUERY]
                marks = ", ".join("?" * len(some))
                for job_id, slots, result in self._db.execute(
                    f"SELECT job_id, slots, result FROM jobs WHERE job_id IN ({marks})", some
                ):
                    found[job_id] = life_of(slots, result)
        return found

    def write(self, changes: Changes) -> None:
        """Write all of it, or nothing: rows, tags, counters, offsets."""
        # In order of the ids rows are appended to the tree, or lie beside one another in it.
        rows = sorted(changes.jobs)
        with self._transaction():
            self._own()
            many = self._db.executemany
            many(_UPSERT_JOB, rows)
            if changes.tags_gone:
                many(
                    "DELETE FROM tags WHERE name = ? AND value = ? AND submitted_ms = ? AND job_id = ?",
                    changes.tags_gone,
                )
            if changes.tags_new:
                many(
                    "INSERT OR IGNORE INTO tags (name, value, submitted_ms, job_id) VALUES (?, ?, ?, ?)",
                    changes.tags_new,
                )
            many(_COUNT, [(*key, number) for key, number in changes.counts.items() if number])
            many(_RESET, [(*key, start) for key, start in changes.resets.items()])
            many(_OFFSET, [(*key, offset) for key, offset in changes.offsets.items()])
        if rows:
            self._greatest = max(self._greatest, rows[-1][0])

    def carry(self, job_ids: Sequence[str]) -> None:
        """Mark rows that are there as carried over from the table before."""
        with self._transaction():
            self._own()
            self._db.executemany("UPDATE jobs SET carried = 1 WHERE job_id = ?", [(i,) for i in job_ids])

    def replace_with(self, other: SqliteStore) -> None:
        """Take over everything that ``other`` holds, in one transaction of this file; readers see either or.

        Needs the lease, which ends with it: whoever wrote either file before must acquire it again.
        """
        with self._transaction():
            self._own()
        assert self._epoch is not None
        with other._transaction():
            other._db.execute("UPDATE lease SET epoch = ?, holder = '', until_ms = 0", (self._epoch + 1,))
        with self._errors():
            # SQLite's backup writes the pages through this file's write-ahead log, in one transaction.
            other._db.backup(self._db)
        self._epoch = None
        self._greatest = ""

    def size(self) -> int:
        """How many jobs there are."""
        with self._errors():
            (number,) = self._db.execute("SELECT count(*) FROM jobs").fetchone()
        return int(number)

    def holder(self) -> str:
        """Who has the lease: ``host:pid``, or nothing."""
        with self._errors():
            (holder,) = self._db.execute("SELECT holder FROM lease").fetchone()
        return str(holder)

    def close(self) -> None:
        """Release the lease and the connection."""
        try:
            self.release()
        finally:
            self._db.close()


def _gone(holder: str) -> bool:
    """Whether a holder was a process of this machine that has ended."""
    host, _, pid = holder.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's process: it lives
        return False
    return False
