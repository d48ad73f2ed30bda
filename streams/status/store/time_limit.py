"""The time limit for a reader's statements: the same on every database, so that a query over many rows ends with the
same error."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from sqlalchemy import Connection, Engine, event

from jobledger.errors import StoreError, StoreTooSlow

#: Seconds that a statement of a reader may run. Reading the whole table has no limit.
STATEMENT_S = 5.0
#: What the caller of a reader can do about a statement that takes longer.
ADVICE = (
    "Ask for fewer jobs: filter also by state, task, queue, key or tag, give a since= that is later, or count up to a "
    "smaller limit"
)
#: The option of a connection that reads the whole table, and has no limit.
WALK = "jobledger_walk"
#: Number of instructions of SQLite's virtual machine between two looks at the clock: some milliseconds. At each look the
#: thread takes Python's lock, for which it may wait as long as other threads compute.
_INSTRUCTIONS = 100_000


def limit(engine: Engine) -> Engine:
    """Let SQLite interrupt each statement of this engine that runs longer than `STATEMENT_S`, unless its connection has
    the option `WALK`. Return the engine."""
    event.listen(engine, "before_cursor_execute", _begin)
    return engine


def _begin(db: Connection, cursor: Any, *statement: object) -> None:
    raw: sqlite3.Connection = cursor.connection
    if db.get_execution_options().get(WALK):
        # The pool may have lent this connection to a query before.
        raw.set_progress_handler(None, 0)
        return
    deadline = time.monotonic() + STATEMENT_S
    raw.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS)


def explained(url: str, exc: Exception) -> StoreError:
    """Turn an error of SQLite into a `StoreError`. ``url``: shown in the error."""
    cause = getattr(exc, "orig", None) or exc
    head = f"the status table {url} cannot be read"
    if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return StoreTooSlow(f"{head}: a query took longer than {STATEMENT_S:g} s. {ADVICE}")
    return StoreError(f"{head}: {cause}")
