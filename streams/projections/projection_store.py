"""The database of projections: derives its URL, opens it, and distinguishes temporary errors from other errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    event,
    func,
    select,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from jobledger.definitions.projection import RESERVED
from jobledger.errors import ConfigError, StoreError, StoreUnavailable
from jobledger.process.file_lock import locked
from jobledger.streams.status.store.address import shown
from jobledger.streams.status.store.sqlite import namespace_in

#: Seconds that a statement waits for another writer of a SQLite file.
BUSY_S = 30.0
#: SQLite's primary result codes that may be temporary: BUSY, LOCKED, IOERR, FULL, CANTOPEN.
_SQLITE_PASSING = {5, 6, 10, 13, 14}
#: PostgreSQL's codes for a transaction that it aborted because of another one: serialization failure, deadlock.
_POSTGRES_PASSING = {"40001", "40P01"}
#: Number of the advisory lock for creating tables. Any number that no other program uses.
_MAKING = 0x6A6F_626C_6564_6765


_metadata = MetaData()
#: The next offset of each projection in each partition.
offsets_table = Table(
    f"{RESERVED}projections",
    _metadata,
    Column("namespace", Text, nullable=False),
    Column("projection", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    PrimaryKeyConstraint("namespace", "projection", "topic", "partition"),
)


#: The ids of the topics to which the offsets of `offsets_table` belong. A topic that was deleted and recreated has
#: another id.
topics_table = Table(
    f"{RESERVED}projection_topics",
    _metadata,
    Column("namespace", Text, nullable=False),
    Column("projection", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("topic_id", Text, nullable=False),
    PrimaryKeyConstraint("namespace", "projection", "topic"),
)


def database_of(status_url: str) -> str:
    """Return the URL of the projections' database. For PostgreSQL it is the status table's database. For SQLite it is a
    separate file beside the status table: a rebuild replaces that table's whole content, and SQLite allows one writer
    at a time. Raises `ConfigError`."""
    scheme = status_url.partition(":")[0]
    if scheme == "sqlite":
        path = sqlalchemy.make_url(status_url).database
        if not path or path == ":memory:":
            raise ConfigError(f"JOBLEDGER_STATUS_URL={status_url!r} names no file: write sqlite:///folder/status.db")
        stem, dot, suffix = path.rpartition(".")
        return f"sqlite:///{stem if dot else suffix}-projections.{suffix if dot else 'db'}"
    if scheme == "postgresql":
        return status_url
    raise ConfigError(
        f"JOBLEDGER_STATUS_URL={shown(status_url)!r} is of a kind that is not known: write sqlite:///folder/status.db or "
        "postgresql://user:password@host/database"
    )


class ProjectionStore:
    """An engine for the database of `database_of`. Use a store from one thread, and close it. Raises `ConfigError`.

    SQLite is used in WAL mode, and each transaction in SQLite takes the write lock at its beginning.
    """

    def __init__(self, status_url: str, namespace: str) -> None:
        url = database_of(status_url)
        self._url = url
        if url.startswith("sqlite"):
            self._address = None
            self.engine = _sqlite(url)
        else:
            from jobledger.streams.status.store.connecting import Address  # imported late: its driver is an extra

            self._address = address = Address(url, namespace)
            # A restarted server has closed the connections in the pool.
            self.engine = sqlalchemy.create_engine(address.url, creator=address.connect, pool_pre_ping=True)

    def begin_snapshot(self) -> Any:
        """Begin a transaction that sees the database as it is at its first statement, whatever is written meanwhile."""
        engine = self.engine
        if self._address is not None:
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        return engine.begin()

    def make(self, *tables: Table) -> None:
        """Create the tables that are missing. Several processes may do so at once.

        Raises `StoreError` if the file is the status table of a namespace: a rebuild of that table would replace the
        whole file.
        """
        with self.engine.begin() as db:
            if self._address is None:
                self._refuse_status_table()
            if self._address is not None:
                # Two processes that check and then create at the same time would create the same table, and one of them
                # would fail.
                db.execute(select(func.pg_advisory_xact_lock(_MAKING)))
            for table in tables:
                table.create(db, checkfirst=True)

    def _refuse_status_table(self) -> None:
        owner = namespace_in(Path(self._url.removeprefix("sqlite:///")))
        if owner is not None:
            raise StoreError(
                f"the tables of projections would be in {self._url}, beside the status table, but that file is the "
                "status table "
                f"of namespace {owner!r}: set JOBLEDGER_STATUS_URL to another file for one of the two"
            )

    @contextmanager
    def alone(self, name: str, what: str) -> Iterator[None]:
        """Hold the lock of this name in this database. Only one process at a time can hold it, and it is released if
        the process dies. Raises `StoreError` if another process holds the lock. ``what``: the activity, for the error
        message.

        The lock is an advisory lock in PostgreSQL, and a lock file beside a SQLite file.
        """
        busy = StoreError(f"another process has begun {what}: wait until it has ended")
        with ExitStack() as held:
            if self._address is None:
                path = Path(self._url.removeprefix("sqlite:///"))
                try:
                    held.enter_context(locked(path.with_name(f"{path.name}.{name}.lock"), timeout=0))
                except TimeoutError as exc:
                    raise busy from exc
            else:
                from jobledger.streams.status.store.connecting import (
                    lock_number,  # imported late: its driver is an extra
                )

                db = held.enter_context(self.engine.connect())
                db.detach()  # the lock belongs to the session: close it at the end, do not return it to the pool
                if not db.execute(select(func.pg_try_advisory_lock(lock_number(name)))).scalar_one():
                    raise busy
                db.commit()
            yield

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def explain(self, exc: SQLAlchemyError | StoreError, who: str) -> StoreError:
        """Turn the driver's error into a `StoreError`, or into `StoreUnavailable` if it may be temporary. ``who``: the
        projection, for the message."""
        cause: Any = getattr(exc, "orig", None) or exc
        if self._address is None:
            # An error that Python's module raises itself, for a value that it cannot bind, has no code.
            passing = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF in _SQLITE_PASSING
            return (StoreUnavailable if passing else StoreError)(f"{who}: {shown(self._url)}: {cause}")
        code, message = getattr(cause, "sqlstate", None), str(cause).partition("\n")[0]
        if code in _POSTGRES_PASSING:
            return StoreUnavailable(f"{who}: {self._address.place}: {message}")
        if code == "42501":  # insufficient_privilege
            return StoreError(
                f"{who} cannot be kept in {self._address.place} by user {self._address.user!r}: {message}. Its "
                "table and `jobledger_projections` are created in the first schema of the user's search path: grant "
                "the right "
                "with GRANT CREATE ON SCHEMA, or add `?options=-csearch_path%3Dyours` to JOBLEDGER_STATUS_URL"
            )
        error = self._address.explain(exc, "reached")
        return type(error)(f"{who}: {error}")


def folded(status_url: str, namespace: str) -> dict[str, dict[tuple[str, int], int]]:
    """Return the next offsets of every projection of a namespace in this database: by the projection's name, then by
    topic and partition.

    Empty if the SQLite file or the table does not exist. Raises `StoreError`.
    """
    url = database_of(status_url)
    if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
        return {}
    offsets: dict[str, dict[tuple[str, int], int]] = {}
    store = ProjectionStore(status_url, namespace)
    try:
        with store.engine.begin() as db:
            if not url.startswith("sqlite"):
                from jobledger.streams.status.store.connecting import bounded  # imported late: its driver is an extra

                db.exec_driver_sql(bounded(lock_timeout="4s", statement_timeout="5s"))
            if sqlalchemy.inspect(db).has_table(offsets_table.name):
                for row in db.execute(select(offsets_table).where(offsets_table.c.namespace == namespace)):
                    offsets.setdefault(row.projection, {})[row.topic, row.partition] = row.next_offset
    except (DBAPIError, StoreError) as exc:
        raise store.explain(exc, f"the offsets of the projections of {namespace}") from exc
    finally:
        store.close()
    return offsets


def _sqlite(url: str) -> Engine:
    Path(url.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "connect")
    def _(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
