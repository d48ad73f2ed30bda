"""The status database in PostgreSQL: a schema for each namespace, so the database may also contain other tables and
namespaces.

``synchronous_commit`` is off for writes from the log: a crash of the server may undo the last transactions, each as a
whole. No record is lost by that, because the offsets are in the same transactions. A writer that finds an earlier state
of the table than it committed (`CommitUnknown`) continues from that state. Transactions that acquire a lease or swap a
table are forced to disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, Self

import psycopg
from psycopg import errors, sql
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from jobledger.errors import CommitUnknown, StoreError, StoreUnavailable
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.streams.status.store.connecting import Address, lock_number, schema_beside
from jobledger.streams.status.store.protocol import Changes, Partition
from jobledger.streams.status.store.reader import judge
from jobledger.streams.status.store.rows import COLUMNS, Row
from jobledger.streams.status.store.tables import (
    REVISION,
    counters,
    jobs,
    lease,
    meta,
    metadata,
    offsets,
    plans,
    tags,
    workers,
)
from jobledger.streams.status.store.writer import LEASE_S, SqlStore

LOG = get_logger("jobledger.materializer")

#: How long a statement waits for a lock of another session, such as the lock of a reader during a rebuild's swap, or of
#: a manual change.
LOCK_TIMEOUT = "10s"
#: The same limit for a swap. Readers wait during a swap, so this limit is less than a reader's own limit.
#: `SWAP_PATIENCE_S`: seconds for which a swap is retried.
SWAP_LOCK_TIMEOUT, SWAP_PATIENCE_S = "2s", 60.0

#: The tables in the order in which a swap locks them. Readers use the tables in the same order, which prevents
#: deadlocks.
_TABLES = (jobs, tags, counters, offsets, plans, workers, lease, meta)
_COLUMNS = ", ".join(f'"{name}"' for name in COLUMNS)
#: The types of `COLUMNS`, as COPY's binary format needs them.
_TYPES = ["text"] * 4 + ["int8"] * 6 + ["text", "bytea", "int8"] + ["text"] * 5 + ["bytea"]
_set = ", ".join(f'"{name}" = excluded."{name}"' for name in COLUMNS[1:])
_INCOMING = (
    "CREATE TEMPORARY TABLE incoming ("
    + ", ".join(f'"{name}" {kind}' for name, kind in zip(COLUMNS, _TYPES, strict=True))
    + ") ON COMMIT DELETE ROWS"
)
_COPY = f"COPY incoming ({_COLUMNS}) FROM STDIN (FORMAT BINARY)"
_UPSERT_JOBS = (
    f"INSERT INTO jobs ({_COLUMNS}) SELECT {_COLUMNS} FROM incoming ON CONFLICT (job_id) DO UPDATE SET {_set}"
)
_TAGS = "unnest(%s::text[], %s::text[], %s::bigint[], %s::text[])"
_TAGS_GONE = (
    f"DELETE FROM tags USING {_TAGS} AS gone (name, value, submitted_ms, job_id) WHERE tags.name = gone.name "
    "AND tags.value = gone.value AND tags.submitted_ms = gone.submitted_ms AND tags.job_id = gone.job_id"
)
_TAGS_NEW = f"INSERT INTO tags (name, value, submitted_ms, job_id) SELECT * FROM {_TAGS} ON CONFLICT DO NOTHING"
_COUNT = (
    "INSERT INTO counters AS known (task, queue, state, jobs) "
    "SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[]) "
    "ON CONFLICT (task, queue, state) DO UPDATE SET jobs = known.jobs + excluded.jobs"
)
_PLACES = "unnest(%s::text[], %s::int[], %s::bigint[])"
_OFFSET = (
    f"INSERT INTO offsets (topic, partition, next_offset) SELECT * FROM {_PLACES} "
    "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset"
)
_RESET = (
    f"INSERT INTO offsets AS known (topic, partition, next_offset, resets) SELECT *, 1 FROM {_PLACES} "
    "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset, resets = known.resets + 1"
)


class PostgresStore(SqlStore):
    """`Store` in a schema of a PostgreSQL database. Creates the schema if it is missing.

    ``lease_s``: seconds after which a writer that does not renew its lease may be replaced, by the database's clock
    unless ``clock`` is given (for tests). A writer whose connection has ended is replaced at once. ``schema``: schema
    of the tables; None: the namespace's own schema. Raises `StoreUnavailable` if the server does not answer,
    `StoreError` if the database refuses access or the tables belong to another namespace, version or program.
    """

    FOR_UPDATE: ClassVar[str] = " FOR UPDATE"

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        lease_s: float = LEASE_S,
        holder: str | None = None,
        clock: Callable[[], float] | None = None,
        schema: str | None = None,
    ) -> None:
        super().__init__(url, namespace, lease_s=lease_s, holder=holder, clock=clock)
        self._url, self._address = url, Address(url, namespace)
        self.schema = schema or self._address.schema
        self._db: psycopg.Connection[Any] | None = None
        #: Whether this session holds the advisory lock that shows other processes that it is connected.
        self._holds_session_lock = False
        #: The offsets that this writer last read from or committed to the table; None: not known.
        self._committed_offsets: Mapping[Partition, int] | None = None
        try:
            self._make()
        except BaseException:
            self._disconnect()
            raise

    # -- the connection -----------------------------------------------------------------------------------------------

    def _connected(self) -> psycopg.Connection[Any]:
        """Return the connection; connect again if it broke. Raises `CommitUnknown` if the table then differs from what
        this writer committed."""
        if self._db is not None and not self._db.closed:
            return self._db
        self._db = None
        db = self._address.connect()
        try:
            db.execute("SET synchronous_commit = off")
            db.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
            db.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(self.schema)))
            db.execute(_INCOMING)
            if self._epoch is not None:
                self._mark(db, self._epoch)
                if self._committed_offsets is not None:
                    self._check(db)
            db.commit()
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _check(self, db: psycopg.Connection[Any]) -> None:
        _await_lease(db)
        stored = _offsets(db)
        if stored != self._committed_offsets:
            raise CommitUnknown(
                f"the status table in {self._address.place} differs from what this writer committed: the connection broke in a "
                "commit, or a crash of the server undid the last commits"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.Error, SQLAlchemyError) as exc:
            raise self._address.explain(exc, "written") from exc

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            db = self._connected()
            try:
                yield
                db.commit()
            except BaseException:
                with suppress(psycopg.Error):  # the connection broke: the next statement connects again
                    db.rollback()
                raise

    def _reading(self) -> AbstractContextManager[None]:
        return self._transaction()  # otherwise the query's transaction would stay open

    def _run(self, sql: str, *values: object) -> psycopg.Cursor[Any]:
        return self._connected().execute(sql.replace("?", "%s"), values)

    def _run_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        self._connected().cursor().executemany(sql.replace("?", "%s"), rows)

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- the tables ---------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        with self._transaction():
            if not self._tables_exist():
                self._durable()
                # If two processes start at the same time, the second process waits here, and then finds the tables.
                self._run("SELECT pg_advisory_xact_lock(?)", lock_number(self.schema))
                if not self._tables_exist():
                    self._create()
            if self._revision() < REVISION:
                self._durable()
                self._run("SELECT pg_advisory_xact_lock(?)", lock_number(self.schema))
                if (revision := self._revision()) < REVISION:
                    self._add_missing(revision, postgresql.dialect())  # type: ignore[no-untyped-call]  # not typed

    def _revision(self) -> int:
        """Return the revision of the tables. Raises `StoreError` if they belong to something else."""
        # Name the schema in the query: PostgreSQL silently ignores a schema in the search path that this user may not
        # use.
        asking = sql.SQL("SELECT key, value FROM {}").format(sql.Identifier(self.schema, meta.name))
        rows: dict[str, str] = dict(self._connected().execute(asking).fetchall())
        return judge(rows, self.url, self.namespace)

    def _tables_exist(self) -> bool:
        query = "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ?"
        names = {
            name for (name,) in self._run(query + " AND c.relkind IN ('r', 'p', 'v', 'm')", self.schema).fetchall()
        }
        if names and meta.name not in names:
            raise StoreError(
                f"schema {self.schema!r} of {self._address.place} belongs to another program: it has no table 'meta'. "
                "Set "
                "JOBLEDGER_STATUS_URL to another database"
            )
        return bool(names)

    def _create(self) -> None:
        ((encoding,),) = self._run("SHOW server_encoding").fetchall()
        if encoding != "UTF8":
            raise StoreError(
                f"{self._address.place} is encoded in {encoding}, which cannot store every text: create a database with "
                "`createdb --encoding=UTF8 --template=template0`"
            )
        db, dialect = self._connected(), postgresql.dialect()  # type: ignore[no-untyped-call]  # dialects are not typed
        if db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (self.schema,)).fetchone() is None:
            db.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.schema)))
        for table in metadata.sorted_tables:
            db.execute(str(CreateTable(table).compile(dialect=dialect)))
            for index in sorted(table.indexes, key=lambda i: str(i.name)):
                db.execute(str(CreateIndex(index).compile(dialect=dialect)))
        self._first_rows()

    def _durable(self) -> None:
        """Force this transaction to disk at its commit."""
        self._run("SET LOCAL synchronous_commit = on")

    # -- the lease ----------------------------------------------------------------------------------------------------

    def _now(self) -> tuple[str, tuple[int, ...]]:
        if self._clock is not None:
            return super()._now()
        return "(extract(epoch FROM clock_timestamp()) * 1000)::bigint", ()  # one clock for all machines

    def _gone(self, holder: str, epoch: int) -> bool:
        # A writer's connection holds an advisory lock as long as the connection is open. If the lock is free, the
        # connection has ended, on whichever machine the writer runs.
        ((free,),) = self._run("SELECT pg_try_advisory_xact_lock(?, ?)", *self._mark_of(epoch)).fetchall()
        return bool(free)

    def _take(self, epoch: int) -> None:
        self._durable()
        super()._take(epoch)
        self._mark(self._connected(), epoch)
        self._committed_offsets = None

    def _own(self) -> None:
        super()._own()
        if not self._holds_session_lock and self._epoch is not None:
            self._mark(self._connected(), self._epoch)

    def _mark(self, db: psycopg.Connection[Any], epoch: int) -> None:
        # Do not wait for the lock. If the server has not noticed the end of this writer's previous session, that
        # session still holds the lock, and the next transaction tries again. If another process holds the lock, that
        # process has found this writer gone, and takes over.
        ((self._holds_session_lock,),) = db.execute(
            "SELECT pg_try_advisory_lock(%s, %s)", self._mark_of(epoch)
        ).fetchall()

    def _mark_of(self, epoch: int) -> tuple[int, int]:
        return lock_number(self.schema) >> 32, epoch & 0x7FFFFFFF

    # -- rows ---------------------------------------------------------------------------------------------------------

    def offsets(self) -> dict[Partition, int]:
        """Return the next offset to read of every partition. A writer continues from these offsets."""
        self._committed_offsets = None
        with self._transaction():
            if self._epoch is not None:
                _await_lease(self._connected())
            stored = _offsets(self._connected())
            if self._epoch is not None:
                self._greatest = self._last()
        self._committed_offsets = stored
        return dict(stored)

    def _states(self, job_ids: Sequence[str]) -> Iterable[tuple[str, bytes, bytes | None]]:
        return self._run("SELECT job_id, slots, result FROM jobs WHERE job_id = ANY(?)", list(job_ids)).fetchall()

    def write(self, changes: Changes) -> None:
        """Write all changes (rows, plans, workers, tags, counters, offsets, topic ids) in one transaction."""
        super().write(changes)
        if self._committed_offsets is not None:
            self._committed_offsets = {**self._committed_offsets, **changes.resets, **changes.offsets}

    def _put(self, rows: Sequence[Row], changes: Changes) -> None:
        cursor = self._connected().cursor()
        if rows:
            with cursor.copy(_COPY) as incoming:
                incoming.set_types(_TYPES)
                for row in rows:
                    incoming.write_row(row)
            cursor.execute(_UPSERT_JOBS)
        counts = [(*key, number) for key, number in changes.counts.items() if number]
        resets = [(*key, start) for key, start in changes.resets.items()]
        reached = [(*key, offset) for key, offset in changes.offsets.items()]
        for statement, values in (
            (_TAGS_GONE, changes.tags_gone),
            (_TAGS_NEW, changes.tags_new),
            (_COUNT, counts),
            (_RESET, resets),
            (_OFFSET, reached),
        ):
            if values:
                cursor.execute(statement, [list(column) for column in zip(*values, strict=True)])

    # -- a table beside this one --------------------------------------------------------------------------------------

    @contextmanager
    def beside(self) -> Iterator[Self]:
        """Create an empty table of the same namespace for `replace_with`, and acquire its lease. The table is deleted
        when the block ends.

        The table is in a separate schema. If a rebuild is killed, the next rebuild deletes the schema that was left.
        """
        schema = schema_beside(self.schema)
        drop_schema = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema))
        with self._transaction():
            self._own()
            self._connected().execute(drop_schema)
        try:
            with type(self)(self._url, self.namespace, schema=schema) as new:
                new.acquire()
                yield new
        finally:
            try:
                with self._transaction():
                    self._connected().execute(drop_schema)
            except StoreError as exc:
                LOG.warning("schema %s could not be dropped; the next rebuild drops it: %s", schema, exc)

    def replace_with(self, other: Self) -> None:
        """Replace this table with ``other`` in one transaction. Readers see either the old or the new table.

        The call needs the lease and releases it: a writer of either table must acquire the lease again. Privileges
        granted on the old tables are granted on the new tables. Raises `StoreError` if views depend on the tables: the
        views would be dropped.
        """

        def on_retry(error: StoreUnavailable, seconds: float) -> None:
            LOG.info("the new table has not replaced the status table yet: %s", error)
            self.renew()

        retry_until(
            time.monotonic() + SWAP_PATIENCE_S,
            partial(self._swap, other),
            StoreUnavailable,
            pause=0.5,  # lets the readers run that waited for the swap's lock
            again=lambda error: isinstance(error.__cause__, errors.LockNotAvailable),
            on_retry=on_retry,
        )

    def _swap(self, other: Self) -> None:
        with self._transaction():
            self._durable()
            self._run(f"SET LOCAL lock_timeout = '{SWAP_LOCK_TIMEOUT}'")
            self._own()
            assert self._epoch is not None
            db = self._connected()
            for table in _TABLES:
                old_table, new_table = sql.Identifier(self.schema, table.name), sql.Identifier(other.schema, table.name)
                db.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(old_table))
                granted = db.execute(
                    "SELECT acl.privilege_type, r.rolname, acl.is_grantable "
                    "FROM pg_class c, aclexplode(c.relacl) acl LEFT JOIN pg_roles r ON r.oid = acl.grantee "
                    "WHERE c.oid = %s::regclass AND acl.grantee <> c.relowner",
                    (old_table.as_string(db),),
                ).fetchall()
                try:
                    db.execute(sql.SQL("DROP TABLE {}").format(old_table))
                except errors.DependentObjectsStillExist as exc:
                    raise StoreError(
                        f"the status table {self.url} is not replaced, because {exc.diag.message_detail}. Drop that "
                        "object, "
                        "rebuild, and create the object again"
                    ) from exc
                db.execute(
                    sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(new_table, sql.Identifier(self.schema)),
                )
                for privilege, role, grantable in granted:
                    db.execute(
                        sql.SQL("GRANT {} ON {} TO {} {}").format(
                            *(
                                sql.SQL(privilege),
                                old_table,
                                sql.SQL("PUBLIC") if role is None else sql.Identifier(role),
                            ),
                            sql.SQL("WITH GRANT OPTION" if grantable else ""),
                        )
                    )
            db.execute("UPDATE lease SET epoch = %s, holder = '', until_ms = 0", (self._epoch + 1,))
        self._epoch = other._epoch = None
        self._greatest = ""


def _await_lease(db: psycopg.Connection[Any]) -> None:
    """Wait until the transaction of a broken connection has ended: the server may still be committing it. Every
    transaction that writes holds the lock of the lease's row from its first statement to its end."""
    db.execute("SELECT 1 FROM lease FOR UPDATE")


def _offsets(db: psycopg.Connection[Any]) -> dict[Partition, int]:
    rows = db.execute("SELECT topic, partition, next_offset FROM offsets").fetchall()
    return {(topic, partition): offset for topic, partition, offset in rows}
