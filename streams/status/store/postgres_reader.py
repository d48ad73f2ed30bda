"""The read side of the status database in PostgreSQL, and a copy of the table for verification. Never writes to the
database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path

import sqlalchemy
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from jobledger.errors import StoreError
from jobledger.process import forks
from jobledger.streams.status.store.connecting import Address, bounded
from jobledger.streams.status.store.reader import SqlReader
from jobledger.streams.status.store.removal import REMOVED
from jobledger.streams.status.store.sqlite import SqliteStore
from jobledger.streams.status.store.tables import TOPIC, counters, jobs, meta, offsets, tags
from jobledger.streams.status.store.time_limit import STATEMENT_S

#: Seconds for which a reader retries the connection to a database that does not answer. (A materializer has its own
#: limit.)
READ_PATIENCE_S = 5.0
#: Limits for a reader's statement: how long it waits for a lock, and how long it runs. The first limit is shorter, so
#: that the error names the lock. For reading the whole table only the wait for a lock is limited here.
_WALK = bounded(lock_timeout="4s")
_QUESTION = bounded(lock_timeout="4s", statement_timeout=f"{STATEMENT_S:g}s")
#: Number of rows copied at a time.
_CHUNK = 2_000


def open_reader(url: str, namespace: str) -> SqlReader:
    """Return the read side of a namespace's tables.

    Raises `StoreNotFound` if there are no tables, `StoreUnavailable` if the server does not answer for five seconds or
    another session locks the tables for four seconds, `StoreTooSlow` if a statement takes longer than five seconds,
    `StoreError` if the database refuses access or the tables belong to another namespace, version or program,
    `ConfigError` for a URL without a database. The ``lock_timeout`` and ``statement_timeout`` of role, database or URL
    have precedence.
    """
    address = Address(url, namespace)
    engine, bounds = _engine(address), (_QUESTION, _WALK)
    return SqlReader(engine, url, namespace, schema=address.schema, explain=address.explain, bounds=bounds).checked()


def copy(url: str, namespace: str, path: Path) -> None:
    """Copy the table, as it is at one moment, into a SQLite file. Raises as `open_reader` does."""
    address = Address(url, namespace)
    open_reader(url, namespace).close()  # raises an error for another namespace's or program's tables
    SqliteStore(f"sqlite:///{path}", namespace).close()
    engine = _engine(address).execution_options(isolation_level="REPEATABLE READ")
    try:
        with closing(sqlite3.connect(path)) as target, engine.connect() as source, target:
            source.exec_driver_sql(_WALK)
            for table in (jobs, tags, counters, offsets):
                rows = source.execute(select(table).execution_options(yield_per=_CHUNK))
                marks = ", ".join("?" * len(table.columns))
                while some := [tuple(row) for row in islice(rows, _CHUNK)]:
                    target.executemany(f"INSERT INTO {table.name} VALUES ({marks})", some)
            for prefix in (TOPIC, REMOVED):
                kept = source.execute(select(meta).where(meta.c.key.startswith(prefix, autoescape=True)))
                target.executemany("INSERT INTO meta VALUES (?, ?)", [tuple(row) for row in kept])
    except SQLAlchemyError as exc:
        raise address.explain(exc, "copied") from exc
    except sqlite3.Error as exc:
        raise StoreError(f"a copy of the status table {address.shown} cannot be written: {exc}") from exc
    finally:
        engine.dispose()


def _engine(address: Address) -> Engine:
    engine = sqlalchemy.create_engine(
        address.url,
        creator=lambda: address.connect(READ_PATIENCE_S, shared=True),
        pool_pre_ping=True,  # a restarted server has closed the connections in the pool
        execution_options={"schema_translate_map": {None: address.schema}, "postgresql_readonly": True},
    )
    return forks.pool(engine)
