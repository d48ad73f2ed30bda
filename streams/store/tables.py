"""The status database's tables: one definition from which DDL and queries are made. No connections here."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    literal_column,
)
from sqlalchemy import Text as PlainText
from sqlalchemy.dialects import postgresql

#: Written into `meta`; a table of another version is refused, and `rebuild` makes one of this version.
SCHEMA_VERSION = 1

metadata = MetaData()

# Compared byte by byte everywhere, as SQLite and Python do: a language's order would make "beyond the last id" mean
# another thing in the database than here, and is slower.
Text = PlainText().with_variant(postgresql.TEXT(collation="C"), "postgresql")

#: A row per job. Times are milliseconds of the broker's clock. ``submitted_ms`` is never null: while the submission is
#: not known it is the time of the fact that the job is known by. ``result``: JSON, of a job that succeeded.
#: ``slots``: the fold's state (msgpack of `jobledger.job.Life`, without the result). ``carried``: 1 if a rebuild took
#: the row over from the table before, because the log no longer holds the job's beginning.
jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("run", BigInteger, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("release", BigInteger, nullable=False),
    Column("submitted_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger),
    Column("started_ms", BigInteger),
    Column("ended_ms", BigInteger),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("result", LargeBinary),
    Column("slots", LargeBinary, nullable=False),
    Column("carried", SmallInteger, nullable=False, server_default="0"),
    # Rows live in the primary key's tree: UUIDv7 ids append to it, and there is no second tree to keep.
    sqlite_with_rowid=False,
)

# Three indexes: newest first; what has not gone well, by state, newest first; what waits for a time. A job that goes
# well leaves the last two, so they stay as small as the unfinished and the failed are few.
# Written as literals, for a planner uses a partial index only for what it can prove without the parameters.
unfinished = jobs.c.state != literal_column("'succeeded'")
waiting = jobs.c.state.in_((literal_column("'scheduled'"), literal_column("'retrying'")))
Index("jobs_by_time", jobs.c.submitted_ms, jobs.c.job_id)
Index(
    "jobs_by_state",
    *(jobs.c.state, jobs.c.submitted_ms, jobs.c.job_id),
    sqlite_where=unfinished,
    postgresql_where=unfinished,
)
Index("jobs_due", jobs.c.due_ms, jobs.c.job_id, sqlite_where=waiting, postgresql_where=waiting)

#: A row per tag of a job, written when the tags become known. It carries the time so that a page is read in order.
tags = Table(
    "tags",
    metadata,
    Column("name", Text),
    Column("value", Text),
    Column("submitted_ms", BigInteger),
    Column("job_id", Text),
    PrimaryKeyConstraint("name", "value", "submitted_ms", "job_id"),
    sqlite_with_rowid=False,
)

#: How many jobs of a task and queue are in a state; moved in the transaction that moves the rows.
counters = Table(
    "counters",
    metadata,
    Column("task", Text),
    Column("queue", Text),
    Column("state", Text),
    Column("jobs", BigInteger, nullable=False),
    PrimaryKeyConstraint("task", "queue", "state"),
    sqlite_with_rowid=False,
)

#: What has been read: every record below ``next_offset`` is in the rows. ``resets``: how often the log no longer had
#: the offset that was to be read next, so reading went on at the log's start.
offsets = Table(
    "offsets",
    metadata,
    Column("topic", Text),
    Column("partition", Integer),
    Column("next_offset", BigInteger, nullable=False),
    Column("resets", Integer, nullable=False, server_default="0"),
    PrimaryKeyConstraint("topic", "partition"),
    sqlite_with_rowid=False,
)

#: Who may write: one row. Every transaction begins by finding its own epoch here.
lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
)

#: How the keys in `meta` begin under which ids of topics stand.
TOPIC = "topic:"

#: ``schema_version``, ``namespace``; and the id of each topic that `offsets` are of: a topic that was deleted and made
#: again is another one, whose offsets begin again.
meta = Table("meta", metadata, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))
