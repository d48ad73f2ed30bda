"""The status database in one SQLite file, in WAL mode: readers never wait for the writer, and the writer never waits
for readers.

``synchronous=NORMAL``: a commit is not forced to disk, so a power cut may undo the last transactions, each as a whole.
No record is lost by that, because the offsets are in the same transactions: the missing records are read from the log
again.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import quote

import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError
from sqlalchemy.schema import CreateIndex, CreateTable

from jobledger.errors import ConfigError, StoreError
from jobledger.process import forks
from jobledger.process.retrying import retry_until
from jobledger.streams.status.store import time_limit
from jobledger.streams.status.store.protocol import Changes
from jobledger.streams.status.store.reader import SqlReader, foreign, judge, not_found
from jobledger.streams.status.store.rows import COLUMNS, RARE, Row
from jobledger.streams.status.store.tables import REVISION, metadata
from jobledger.streams.status.store.writer import LEASE_S, SqlStore

#: Seconds that a statement waits for another writer, such as a standby that requests the lease, or a rebuild's swap.
BUSY_TIMEOUT_S = 10.0
#: Prefix of temporary folders beside a table.
SCRATCH = ".rebuild-"
#: Number of pages in the write-ahead log after which they are moved into the file: 32 MB in pages of 8 kB.
_CHECKPOINT_PAGES = 4_000
_PAGE_BYTES = 8_192
_CACHE_KB = 64 * 1024
#: Number of ids in one query.
_IDS_A_QUERY = 500


def _upsert(columns: Sequence[str]) -> str:
    """Return the statement that writes rows with these columns; all other columns are null afterwards."""
    values = [
        *(f"{name}=excluded.{name}" for name in columns[1:]),
        *(f"{name}=NULL" for name in COLUMNS[len(columns) :]),
    ]
    return (
        f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
        f"ON CONFLICT (job_id) DO UPDATE SET {', '.join(values)}"
    )


_UPSERT_JOB = _upsert(COLUMNS)
#: For jobs whose rare columns are all null: a quarter less time, because each value costs.
_UPSERT_PLAIN_JOB = _upsert(COLUMNS[:RARE])
_NONE = (None,) * (len(COLUMNS) - RARE)
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
    """Return the file that a ``sqlite:///`` URL names. Raises `ConfigError` if the URL names no file."""
    try:
        database = sqlalchemy.make_url(url).database
    except ArgumentError:
        database = None
    if not database or database == ":memory:":
        raise ConfigError(f"JOBLEDGER_STATUS_URL={url!r} names no file: write sqlite:///folder/status.db")
    return Path(database).expanduser()


def open_reader(url: str, namespace: str) -> SqlReader:
    """Return the read side of the file. Raises `StoreNotFound` if it is missing, `StoreError` if it is not this
    namespace's status table. The reader's queries raise `StoreTooSlow` if a statement takes longer than five seconds."""
    path = path_of(url)
    if not path.exists():
        raise not_found(url)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(_read_only(path), uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

    def explain(exc: Exception, doing: str) -> StoreError:
        return time_limit.explained(url, exc)

    return SqlReader(time_limit.limit(_engine(connect)), url, namespace, explain=explain).checked()


def _engine(connect: Callable[[], sqlite3.Connection]) -> Engine:
    return forks.pool(sqlalchemy.create_engine("sqlite://", creator=connect, poolclass=sqlalchemy.QueuePool))


def copy(url: str, namespace: str, path: Path) -> None:
    """Copy the status table, as it is at one moment, to ``path``. The table may be written meanwhile. Raises as
    `open_reader` does."""
    reader = open_reader(url, namespace)  # raises an error for another namespace's or program's file
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


def namespace_in(path: Path) -> str | None:
    """Return the namespace whose status table a file contains; None for any other file."""
    try:
        with closing(sqlite3.connect(_read_only(path), uri=True, timeout=BUSY_TIMEOUT_S)) as file:
            row = file.execute("SELECT value FROM meta WHERE key = 'namespace'").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


class SqliteStore(SqlStore):
    """`Store` in a SQLite file. Creates the file if it is missing.

    ``lease_s``: seconds after which a writer that does not renew its lease may be replaced. A writer on this machine
    whose process has ended is replaced at once. ``clock``: returns seconds; for tests. Raises `StoreError` if the file
    is not this namespace's status table.
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
        super().__init__(url, namespace, lease_s=lease_s, holder=holder, clock=clock)
        self.path = path_of(url)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
                    self._set(pragma)
                self._make()
        except BaseException:
            self._db.close()
            raise

    def _set(self, pragma: str) -> None:
        """Run a PRAGMA; retry while the file is busy. If two processes create a file at the same time, SQLite refuses
        to change the journal mode in one of them, and does not wait."""
        retry_until(
            time.monotonic() + BUSY_TIMEOUT_S,
            lambda: self._db.execute("PRAGMA " + pragma).fetchall(),
            sqlite3.OperationalError,
            pause=0.01,
            again=lambda error: error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY,
        )

    def _make(self) -> None:
        with self._transaction():
            names = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not names:
                dialect = sqlite.dialect()
                for table in metadata.sorted_tables:
                    self._db.execute(str(CreateTable(table).compile(dialect=dialect)))
                    for index in sorted(table.indexes, key=lambda i: str(i.name)):
                        self._db.execute(str(CreateIndex(index).compile(dialect=dialect)))
                self._first_rows()
            elif "meta" not in names:
                raise foreign(self.url)
            revision = judge(dict(self._db.execute("SELECT key, value FROM meta")), self.url, self.namespace)
            if revision < REVISION:
                self._add_missing(revision, sqlite.dialect())

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
                if self._db.in_transaction:  # some errors end the transaction
                    self._db.execute("ROLLBACK")
                raise

    def _run(self, sql: str, *values: object) -> sqlite3.Cursor:
        return self._db.execute(sql, values)

    def _run_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        self._db.executemany(sql, rows)

    def _states(self, job_ids: Sequence[str]) -> Iterator[tuple[str, bytes, bytes | None]]:
        for begin in range(0, len(job_ids), _IDS_A_QUERY):
            some = job_ids[begin : begin + _IDS_A_QUERY]
            marks = ", ".join("?" * len(some))
            yield from self._db.execute(f"SELECT job_id, slots, result FROM jobs WHERE job_id IN ({marks})", some)

    def _gone(self, holder: str, epoch: int) -> bool:
        # Only a process of this machine can be checked.
        host, _, pid = holder.rpartition(":")
        if host != socket.gethostname() or not pid.isdigit():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:  # the process runs, and belongs to another user
            return False
        return False

    def _disconnect(self) -> None:
        self._db.close()

    def _put(self, rows: Sequence[Row], changes: Changes) -> None:
        many = self._db.executemany
        many(_UPSERT_PLAIN_JOB, [row[:RARE] for row in rows if row[RARE:] == _NONE])
        many(_UPSERT_JOB, [row for row in rows if row[RARE:] != _NONE])
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

    @contextmanager
    def beside(self) -> Iterator[Self]:
        """Create an empty table of the same namespace for `replace_with`, and acquire its lease. The table is deleted
        when the block ends."""
        with (
            tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.path.parent) as folder,
            type(self)(f"sqlite:///{Path(folder) / 'new.db'}", self.namespace) as new,
        ):
            new.acquire()
            yield new

    def replace_with(self, other: Self) -> None:
        """Replace this table with ``other`` in one transaction of this file. Readers see either the old or the new
        table.

        The call needs the lease and releases it: a writer of either file must acquire the lease again.
        """
        with self._transaction():
            self._own()
        assert self._epoch is not None
        with other._transaction():
            other._db.execute("UPDATE lease SET epoch = ?, holder = '', until_ms = 0", (self._epoch + 1,))
        with self._errors():
            # SQLite's backup writes the pages through this file's write-ahead log, in one transaction.
            other._db.backup(self._db)
        self._epoch = other._epoch = None
        self._greatest = ""
