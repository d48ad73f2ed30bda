"""The database that projections live in: where it is, how it is opened, and which of its errors pass by themselves."""

from __future__ import annotations

import sqlite3
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

from jobledger.errors import ConfigError, StoreError, StoreUnavailable
from jobledger.kafka.jars import locked
from jobledger.projection import RESERVED
from jobledger.streams.store.address import shown
from jobledger.streams.store.sqlite import namespace_in

#: Seconds a statement waits for another writer of a SQLite file.
BUSY_S = 30.0
#: SQLite's primary result codes that may pass by themselves: BUSY, LOCKED, IOERR, FULL, CANTOPEN.
_SQLITE_PASSING = {5, 6, 10, 13, 14}
#: Of two transactions that cannot both be done, PostgreSQL gives up one: serialization, deadlock.
_POSTGRES_PASSING = {"40001", "40P01"}
#: The advisory lock under which tables are made: any number that nobody else uses.
_MAKING = 0x6A6F_626C_6564_6765


_metadata = MetaData()
#: How far each projection is.
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


#: The ids of the topics that those offsets are of: a topic that was deleted and made again is another one.
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
    """Where projections live, by the status table's URL: the same PostgreSQL database; beside a SQLite file, one of its
    own, since a rebuild swaps that file and SQLite has one writer at a time. Raises `ConfigError`."""
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
    """An engine for `database_of`. Use it from one thread, and close it. Raises `ConfigError`.

    SQLite is in WAL mode, and every transaction of it a writer's from its first statement.
    """

    def __init__(self, status_url: str, namespace: str) -> None:
        url = database_of(status_url)
        self._url = url
        if url.startswith("sqlite"):
            self._address = None
            self.engine = _sqlite(url)
        else:
            from jobledger.streams.store.connecting import Address  # late: its driver is an extra

            self._address = address = Address(url, namespace)
            # A server that was started again has closed what is in the pool.
            self.engine = sqlalchemy.create_engine(address.url, creator=address.connect, pool_pre_ping=True)

    def begin_snapshot(self) -> Any:
        """A transaction that sees the database as it is at its first statement, whoever writes meanwhile."""
        engine = self.engine
        if self._address is not None:
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        return engine.begin()

    def make(self, *tables: Table) -> None:
        """Make those of the tables that are missing. Several processes may do so at once.

        Raises `StoreError` if the file is the status table of a namespace: a rebuild would replace all of it.
        """
        with self.engine.begin() as db:
            if self._address is None:
                self._refuse_status_table()
            if self._address is not None:
                # Two that look, and then make, would collide.
                db.execute(select(func.pg_advisory_xact_lock(_MAKING)))
            for table in tables:
                table.create(db, checkfirst=True)

    def _refuse_status_table(self) -> None:
        owner = namespace_in(Path(self._url.removeprefix("sqlite:///")))
        if owner is not None:
            raise StoreError(
                f"projections are kept beside the status table, in {self._url}, and that file is the status table of "
                f"namespace {owner!r}: set JOBLEDGER_STATUS_URL to another file for one of the two"
            )

    @contextmanager
    def alone(self, name: str, what: str) -> Iterator[None]:
        """Hold ``name`` in this database, among all processes; whoever dies gives it back. Raises `StoreError` if another
        has it. ``what``: for people."""
        busy = StoreError(f"{what} is under way in another process: wait until it has ended")
        with ExitStack() as held:
            if self._address is None:
                path = Path(self._url.removeprefix("sqlite:///"))
                try:
                    held.enter_context(locked(path.with_name(f"{path.name}.{name}.lock"), timeout=0))
                except TimeoutError as exc:
                    raise busy from exc
            else:
                from jobledger.streams.store.connecting import lock_number  # late: its driver is an extra

                db = held.enter_context(self.engine.connect())
                db.detach()  # the lock is the session's, which ends here with it, not in the pool
                if not db.execute(select(func.pg_try_advisory_lock(lock_number(name)))).scalar_one():
                    raise busy
                db.commit()
            yield

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def explain(self, exc: SQLAlchemyError | StoreError, who: str) -> StoreError:
        """The driver's error as ours, `StoreUnavailable` if it may pass by itself;
        ``who``: the projection, for people."""
        cause: Any = getattr(exc, "orig", None) or exc
        if self._address is None:
            passing = isinstance(cause, sqlite3.Error) and (cause.sqlite_errorcode or 0) & 0xFF in _SQLITE_PASSING
            return (StoreUnavailable if passing else StoreError)(f"{who}: {shown(self._url)}: {cause}")
        code, said = getattr(cause, "sqlstate", None), str(cause).partition("\n")[0]
        if code in _POSTGRES_PASSING:
            return StoreUnavailable(f"{who}: {self._address.place}: {said}")
        if code == "42501":  # insufficient_privilege
            return StoreError(
                f"{who} cannot be kept in {self._address.place} by user {self._address.user!r}: {said}. Its "
                "table and `jobledger_projections` are made in the user's own schema search path: GRANT CREATE ON SCHEMA "
                "helps, or `?options=-csearch_path%3Dyours` in JOBLEDGER_STATUS_URL"
            )
        found = self._address.explain(exc, "reached")
        return type(found)(f"{who}: {found}")


def folded(status_url: str, namespace: str) -> dict[str, dict[tuple[str, int], int]]:
    """How far every projection of a namespace is in this database: next offsets by topic and partition, by its name.

    Empty if there is no such database or table. Raises `StoreError`.
    """
    url = database_of(status_url)
    if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
        return {}
    found: dict[str, dict[tuple[str, int], int]] = {}
    store = ProjectionStore(status_url, namespace)
    try:
        with store.engine.begin() as db:
            if not url.startswith("sqlite"):
                from jobledger.streams.store.connecting import bounded  # late: its driver is an extra

                db.exec_driver_sql(bounded(lock_timeout="4s", statement_timeout="5s"))
            if sqlalchemy.inspect(db).has_table(offsets_table.name):
                for row in db.execute(select(offsets_table).where(offsets_table.c.namespace == namespace)):
                    found.setdefault(row.projection, {})[row.topic, row.partition] = row.next_offset
    except (DBAPIError, StoreError) as exc:
        raise store.explain(exc, f"how far the projections of {namespace} are") from exc
    finally:
        store.close()
    return found


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
