"""Defines the status database's tables once, for DDL and queries. Opens no connections."""

from __future__ import annotations

from dataclasses import dataclass

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

#: The version of these tables, stored in `meta`. A database of another version is refused; a new database is filled
#: from the log.
SCHEMA_VERSION = 1
#: The revision of these tables, stored in `meta`; without an entry it is 1. A higher revision only adds columns, tables
#: and indexes, so that readers of earlier revisions can still read the tables. A writer adds what an earlier revision
#: lacks (`ADDED`). Rows that were written before have no values in added columns until the next fact of their job.
REVISION = 4

metadata = MetaData()

# Texts are compared byte by byte, as in SQLite and Python. A language's collation is slower, and would order ids
# differently in the database than in Python.
Text = PlainText().with_variant(postgresql.TEXT(collation="C"), "postgresql")

#: One row per job. Times are milliseconds of the broker's clock. ``submitted_ms`` is never null: while the submission
#: is not known, it is the time of the fact by which the job is known. ``result``: JSON, of a job that succeeded.
#: ``slots``: the fold's state (msgpack of `jobledger.job.Life`, without the result). ``carried``: 1 if a rebuild copied
#: the row from the previous table, because the log no longer holds all facts of the job. ``fingerprint``: the same for
#: errors of the same kind. ``key``: the ordering key. ``version``: that of the last start. ``actor``: who
#: cancelled the job, or asked for its present run.
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
    Column("fingerprint", Text),
    Column("key", Text),
    Column("version", Text),
    Column("actor", Text),
    Column("result", LargeBinary),
    Column("slots", LargeBinary, nullable=False),
    Column("carried", SmallInteger, nullable=False, server_default="0"),
    # Rows are stored in the primary key's tree: UUIDv7 ids are appended to it, and no second tree is needed.
    sqlite_with_rowid=False,
)

# All jobs by time, and by task and time; jobs that have not succeeded, by state and time; jobs that wait for a due time. A job that succeeds
# leaves the last two, so these hold only jobs that are unfinished or ended otherwise. Jobs with an error, by its
# fingerprint and time, and jobs with a key, by key and time: most jobs have neither.
# The states are literals, because a planner uses a partial index only if it can prove the condition without parameters.
unfinished = jobs.c.state != literal_column("'succeeded'")
waiting = jobs.c.state.in_((literal_column("'scheduled'"), literal_column("'retrying'")))
Index("jobs_by_time", jobs.c.submitted_ms, jobs.c.job_id)
Index("jobs_by_task", jobs.c.task, jobs.c.submitted_ms, jobs.c.job_id)
Index(
    "jobs_by_state",
    *(jobs.c.state, jobs.c.submitted_ms, jobs.c.job_id),
    sqlite_where=unfinished,
    postgresql_where=unfinished,
)
Index("jobs_due", jobs.c.due_ms, jobs.c.job_id, sqlite_where=waiting, postgresql_where=waiting)
with_error, with_key = jobs.c.fingerprint.is_not(None), jobs.c.key.is_not(None)
Index(
    "jobs_by_error",
    *(jobs.c.fingerprint, jobs.c.submitted_ms, jobs.c.job_id),
    sqlite_where=with_error,
    postgresql_where=with_error,
)
Index(
    "jobs_by_key",
    *(jobs.c.key, jobs.c.submitted_ms, jobs.c.job_id),
    sqlite_where=with_key,
    postgresql_where=with_key,
)

#: One row per tag of a job, written when the tags become known. The key includes the submission time, so that pages are
#: read in the order of that time.
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

#: Number of jobs of each task, queue and state; updated in the transaction that writes the rows.
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

#: Every record below ``next_offset`` is included in the rows. ``resets``: how often reading restarted at the log's
#: start, because the log no longer had the next offset or the topic was recreated.
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

#: One row per plan. ``actor``: who made it. ``slots``: the fold's state (msgpack of `jobledger.plan.PlanStatus`).
plans = Table(
    "plans",
    metadata,
    Column("plan", Text, primary_key=True),
    Column("action", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text),
    Column("opened_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
    Column("matched", BigInteger, nullable=False),
    Column("done", BigInteger, nullable=False),
    Column("skipped", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("slots", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

#: One row per worker that reports (`jobledger.worker_status`). ``slots_count``: how many jobs it may run at once.
#: ``slots``: everything that its last report says (msgpack of `jobledger.worker_status.WorkerStatus`).
workers = Table(
    "workers",
    metadata,
    Column("worker", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("version", Text),
    Column("reported_ms", BigInteger, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("slots_count", BigInteger, nullable=False),
    Column("running", BigInteger, nullable=False),
    Column("slots", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

#: One row with the writer's lease. Every transaction of a writer first checks that the row has the writer's own epoch
#: and holder.
lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
)

#: Prefix of the keys in `meta` that store ids of topics.
TOPIC = "topic:"

#: ``schema_version``, ``revision``, ``namespace``, and the id of each topic to which `offsets` belong. A recreated topic has another
#: id, and its offsets restart.
meta = Table("meta", metadata, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))


@dataclass(frozen=True, slots=True)
class Additions:
    """What a revision added: columns and indexes of `jobs`, and tables."""

    columns: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


ADDED: dict[int, Additions] = {
    2: Additions(("fingerprint", "key", "version", "actor"), ("jobs_by_error", "jobs_by_key"), (plans,)),
    3: Additions(tables=(workers,)),
    4: Additions(indexes=("jobs_by_task",)),
}
