"""What a status table is: its revision, its size, and its writer. Reads no jobs."""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select, text

from jobledger.streams.status.store.protocol import About
from jobledger.streams.status.store.tables import counters, lease


def about(db: Connection, revision: int, schema: str | None) -> About:
    """Return the facts about a table; see `StatusReader.about`. ``schema``: that of PostgreSQL; None: SQLite."""
    number = db.execute(select(func.sum(counters.c.jobs))).scalar()
    row = db.execute(select(lease.c.holder, lease.c.until_ms)).first()
    if schema is None:
        size = db.execute(text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")).scalar()
        now_ms = time.time() * 1000
    else:
        # The lease is by the server's clock.
        tables = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = "
        size = db.execute(
            text(f"{tables}(SELECT oid FROM pg_namespace WHERE nspname = :name)"), {"name": schema}
        ).scalar()
        now_ms = float(db.execute(text("SELECT extract(epoch FROM clock_timestamp()) * 1000")).scalar_one())
    holder, until_ms = ("", 0) if row is None else row
    return About(revision, int(number or 0), int(size or 0), holder, bool(holder) and until_ms > now_ms)
