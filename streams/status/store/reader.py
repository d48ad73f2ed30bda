"""The read side of a status database, in SQL that every backend understands. Opens no databases and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, Unpack

from sqlalchemy import Column, Connection, Engine, Row, func, inspect, null, select, tuple_
from sqlalchemy.exc import SQLAlchemyError

from jobledger import job as fold
from jobledger.errors import JobNotFound, PlanNotFound, StoreError, StoreNotFound
from jobledger.job import JobStatus, Life, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.process import forks
from jobledger.schemas.events import Position
from jobledger.streams.status.store import searches, summaries
from jobledger.streams.status.store.about import about
from jobledger.streams.status.store.address import shown
from jobledger.streams.status.store.filters import ADDED_LATER, Selection, begins, selection
from jobledger.streams.status.store.protocol import (
    About,
    Count,
    Counted,
    ErrorGroup,
    Filters,
    Found,
    LastSuccess,
    Overdue,
    Partition,
    QueueSummary,
)
from jobledger.streams.status.store.removal import REMOVED
from jobledger.streams.status.store.rows import COLUMNS, key_text, life_of, life_of_row, plan_of, worker_of
from jobledger.streams.status.store.rows import Row as JobRow
from jobledger.streams.status.store.tables import (
    ADDED,
    REVISION,
    SCHEMA_VERSION,
    TOPIC,
    counters,
    jobs,
    meta,
    offsets,
    plans,
    unfinished,
    waiting,
    workers,
)
from jobledger.streams.status.store.time_limit import WALK
from jobledger.worker_status import WorkerStatus

#: What a thread does while it takes a connection from the pool or returns one, for an error message. The pool's locks
#: are not reentrant: a query from a signal handler would block on them.
_POOL_ACTIVITY = "asking the status table"
_LIFE = (jobs.c.job_id, jobs.c.slots, jobs.c.result)
#: Number of ids in one query: SQLite accepts 999 values in a statement, or more, depending on its build.
_IDS_A_QUERY = 500
#: Number of rows that `SqlReader.jobs` compares with the filters in one query. The query must end within the time limit.
_READ_AT_ONCE = 100_000
_STATES = {state.value: state for state in State}


class SqlReader:
    """`StatusReader` on an engine. ``url``: shown in errors. `close` disposes of the engine.

    ``schema``: schema of the tables; None: the engine's default. ``explain``: turns a database's error into a
    `StoreError`; None: the driver's message is used. ``bounds``: two statements that limit how long a transaction waits
    and how long its statements run: the first statement for a query, the second for reading the whole table; None: the
    engine has its own limits (`jobledger.streams.status.store.time_limit`).
    """

    def __init__(
        self,
        engine: Engine,
        url: str,
        namespace: str,
        *,
        schema: str | None = None,
        explain: Callable[[Exception, str], StoreError] | None = None,
        bounds: tuple[str, str] | None = None,
    ) -> None:
        self._engine, self._url, self._namespace, self._schema = engine, shown(url), namespace, schema
        self._explain, self._bounds = explain, bounds
        self._pool_section = forks.Alone()
        self._revision = REVISION

    def checked(self) -> Self:
        """Return this reader. If it does not read this namespace's table, close it and raise `StoreNotFound` or
        `StoreError`."""
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        return self

    def _check(self) -> None:
        with self._reading() as db:
            names = inspect(db).get_table_names(self._schema)
            if meta.name not in names:
                raise foreign(self._url) if names else not_found(self._url)
            rows: dict[str, str] = {row.key: row.value for row in db.execute(select(meta.c.key, meta.c.value))}
        self._revision = judge(rows, self._url, self._namespace)

    def _has(self, revision: int) -> bool:
        """Return whether the table has this revision. A materializer may have brought the table to it since this reader
        was opened, for example in a service that was upgraded first."""
        if self._revision < revision:
            with self._reading() as db:
                value = db.execute(select(meta.c.value).where(meta.c.key == "revision")).scalar() or "1"
            self._revision = int(value) if value.isdecimal() else 1
        return self._revision >= revision

    def job(self, job_id: str) -> JobStatus:
        """Return one job's status. Raises `JobNotFound`."""
        with self._reading() as db:
            row = db.execute(select(*_LIFE).where(jobs.c.job_id == key_text(job_id))).first()
        if row is None:
            raise self.unknown(job_id)
        return _status(row)

    def unknown(self, job_id: str) -> JobNotFound:
        """Return the error for a job that the table does not know."""
        why = ""
        if self.removed():
            why = ". Rows of jobs that ended some time ago are removed from it (JOBLEDGER_TABLE_RETENTION)"
        return JobNotFound(f"the status table {self._url} knows no job {job_id}{why}")

    def states(self, job_ids: Sequence[str]) -> dict[str, State]:
        """Return the states of those jobs that the table knows."""
        return {row.job_id: _STATES[row.state] for row in self._by_id(job_ids, jobs.c.job_id, jobs.c.state)}

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Return the statuses of those jobs that the table knows."""
        return {row.job_id: _status(row) for row in self._by_id(job_ids, *_LIFE)}

    def _by_id(self, job_ids: Sequence[str], *columns: Column[Any]) -> list[Row[Any]]:
        keys = [key_text(job_id) for job_id in job_ids]
        rows: list[Row[Any]] = []
        with self._reading() as db:
            for begin in range(0, len(keys), _IDS_A_QUERY):
                query = select(*columns).where(jobs.c.job_id.in_(keys[begin : begin + _IDS_A_QUERY]))
                rows += db.execute(query).all()
        return rows

    def jobs(self, *, after: str | None = None, limit: int = 100, **filters: Unpack[Filters]) -> list[JobStatus]:
        """Return a page of the jobs that match every given filter, newest submission first; see `StatusReader.jobs`."""
        place = self._place(after)
        rows: list[Row[Any]] = []
        while True:
            # Each query ends within the time limit, however rare the jobs are.
            part = self._search(place, limit - len(rows), _READ_AT_ONCE, **filters)
            rows += part.rows
            place = part.place
            if len(rows) >= limit or place is None:
                return [_status(row) for row in rows]

    def search(
        self, *, after: str | None = None, limit: int = 100, most: int = 2_000, **filters: Unpack[Filters]
    ) -> Found:
        """Return the next jobs that match every given filter; see `StatusReader.search`."""
        rows, place = self._search(self._place(after), limit, most, **filters)
        found = [_status(row) for row in rows]
        return Found(found) if place is None else Found(found, place[-1], place[0] if len(place) > 1 else None)

    def _search(self, place: searches.Place | None, limit: int, most: int, **filters: Unpack[Filters]) -> searches.Part:
        self._need(*(name for name in ADDED_LATER if filters.get(name) is not None))
        by_task = self._has(4)
        with self._reading() as db:
            found = searches.plan(db, by_task=by_task, **filters)
            if place is not None:
                place = place[-len(found.order) :]
            return searches.run(db, found, (jobs.c.slots, jobs.c.result), place, limit, most)

    def _place(self, after: str | None) -> searches.Place | None:
        """Return the place of a job in a list by time. Raises `JobNotFound`."""
        if after is None:
            return None
        with self._reading() as db:
            last = db.execute(select(jobs.c.submitted_ms).where(jobs.c.job_id == key_text(after))).scalar()
        if last is None:
            raise JobNotFound(f"after={after!r}: the status table {self._url} knows no such job")
        return last, key_text(after)

    def _selection(self, **filters: Unpack[Filters]) -> Selection:
        self._need(*(name for name in ADDED_LATER if filters.get(name) is not None))
        return selection(**filters)

    def _need(self, *columns: str) -> None:
        """Raise `StoreError` if the table does not have these columns, which revision 2 added."""
        if columns and not self._has(2):
            raise StoreError(
                f"the status table {self._url} was written by an earlier version, and has no column {columns[0]!r}: "
                "start `jobledger streams` of this version once, which adds it"
            )

    def chosen(self, limit: int | None = None, **filters: Unpack[Filters]) -> Iterator[tuple[str, int]]:
        """Yield the id and the run of each job that matches every filter; see `StatusReader.chosen`."""
        selected = self._selection(**filters)
        query = selected.rows((jobs.c.job_id, jobs.c.run))
        query = query.order_by(*(column.desc() for column in selected.order)).limit(limit)
        with self._reading(walk=True) as db:
            for row in db.execute(query.execution_options(yield_per=1000)):
                yield row[0], row[1]

    def lives_of(self, job_ids: Sequence[str]) -> dict[str, Life]:
        """Return the fold states of those jobs that the table knows, by the ids that were asked for."""
        known = {row.job_id: life_of(row.slots, row.result) for row in self._by_id(job_ids, *_LIFE)}
        return {job_id: life for job_id in job_ids if (life := known.get(key_text(job_id))) is not None}

    def plans(self, limit: int = 100, *, after: str | None = None) -> list[PlanStatus]:
        """Return a page of the plans, the last one first. A table of revision 1 has none."""
        if not self._has(2):
            return []
        order = (plans.c.opened_ms, plans.c.plan)
        query = select(plans.c.slots).order_by(*(column.desc() for column in order)).limit(limit)
        if after is not None:
            query = query.where(tuple_(*order) < (self.plan(after).opened_ms, key_text(after)))
        with self._reading() as db:
            return [plan_of(row.slots) for row in db.execute(query)]

    def open_plans(self) -> list[PlanStatus]:
        """Return the plans that have not ended, the last one first. A table of revision 1 has none."""
        if not self._has(2):
            return []
        open_ = [state.value for state in PlanState if not state.ended]
        query = select(plans.c.slots).where(plans.c.state.in_(open_)).order_by(plans.c.opened_ms.desc(), plans.c.plan)
        with self._reading() as db:
            return [plan_of(row.slots) for row in db.execute(query)]

    def plan(self, plan_id: str) -> PlanStatus:
        """Return one plan. Raises `PlanNotFound`."""
        row = None
        if self._has(2):
            with self._reading() as db:
                row = db.execute(select(plans.c.slots).where(plans.c.plan == key_text(plan_id))).first()
        if row is None:
            raise PlanNotFound(f"the status table {self._url} knows no plan {plan_id}")
        return plan_of(row.slots)

    def workers(self, limit: int = 1_000, *, before_ms: int | None = None) -> list[WorkerStatus]:
        """Return the workers that reported last, in order of their ids; see `StatusReader.workers`. A table of revision
        2 or less has none."""
        if not self._has(3):
            return []
        query = select(workers.c.slots).order_by(workers.c.reported_ms.desc(), workers.c.worker).limit(limit)
        if before_ms is not None:
            query = query.where(workers.c.reported_ms < before_ms)
        with self._reading() as db:
            found = [worker_of(row.slots) for row in db.execute(query)]
        return sorted(found, key=lambda status: status.worker)

    def ids(self, prefix: str, limit: int = 10) -> list[str]:
        """Return the first ``limit`` ids, in ascending order, that begin with ``prefix``."""
        query = select(jobs.c.job_id).where(*begins(prefix))
        with self._reading() as db:
            return [row.job_id for row in db.execute(query.order_by(jobs.c.job_id).limit(limit))]

    def counts(self) -> list[Count]:
        """Return the number of jobs of each task and queue in each state, without zeros."""
        columns = (counters.c.task, counters.c.queue, counters.c.state, counters.c.jobs)
        with self._reading() as db:
            rows = db.execute(select(*columns).where(counters.c.jobs != 0).order_by(*columns[:3])).all()
        return [Count(task, queue, State(state), number) for task, queue, state, number in rows]

    def counts_by_state(self) -> dict[str, int]:
        """Return the number of jobs in each state, including states without jobs."""
        query = select(counters.c.state, func.sum(counters.c.jobs)).group_by(counters.c.state)
        with self._reading() as db:
            numbers = {state: int(number) for state, number in db.execute(query)}
        return {state.value: numbers.get(state.value, 0) for state in State}

    def count(self, limit: int = 10_000, *, most: int = 50_000, **filters: Unpack[Filters]) -> Counted:
        """Return the number of jobs that match every filter; see `StatusReader.count`."""
        self._need(*(name for name in ADDED_LATER if filters.get(name) is not None))
        by_task = self._has(4)
        with self._reading() as db:
            return summaries.count(db, limit, most, by_task, **filters)

    def about(self) -> About:
        """Return facts about the table; see `StatusReader.about`."""
        self._has(REVISION)
        with self._reading() as db:
            return about(db, self._revision, self._schema)

    def queues(self) -> list[QueueSummary]:
        """Return the queues with the numbers of their jobs; see `StatusReader.queues`."""
        with self._reading() as db:
            return summaries.queues(db)

    def errors(self, since_ms: int | None = None, limit: int = 50) -> list[ErrorGroup]:
        """Return groups of failed and retrying jobs; see `StatusReader.errors`."""
        self._need("fingerprint")
        with self._reading() as db:
            return summaries.errors(db, since_ms, limit)

    def last_success(self, *tasks: str) -> dict[str, LastSuccess]:
        """Return the last success of each task; see `StatusReader.last_success`."""
        self._need("version")
        with self._reading() as db:
            return summaries.last_success(db, tasks)

    def offsets(self) -> dict[Partition, int]:
        """Return the next offset to read of every partition."""
        query = select(offsets.c.topic, offsets.c.partition, offsets.c.next_offset)
        with self._reading() as db:
            return {(topic, partition): offset for topic, partition, offset in db.execute(query)}

    def topics(self) -> dict[str, str]:
        """Return the known ids of the topics to which the offsets belong."""
        return self._settings(TOPIC)

    def removed(self) -> dict[str, int]:
        """Return the limits in ms up to which rows of ended jobs were removed, by state."""
        return {state: int(ms) for state, ms in self._settings(REMOVED).items()}

    def _settings(self, prefix: str) -> dict[str, str]:
        """Return the entries of `meta` whose keys begin with ``prefix``, without the prefix."""
        query = select(meta.c.key, meta.c.value).where(meta.c.key.startswith(prefix, autoescape=True))
        with self._reading() as db:
            return {key.removeprefix(prefix): value for key, value in db.execute(query)}

    def reached(self, position: Position) -> bool:
        """Return whether the table includes the record at this position."""
        query = select(offsets.c.next_offset).where(
            offsets.c.topic == position.topic, offsets.c.partition == position.partition
        )
        with self._reading() as db:
            next_offset = db.execute(query).scalar()
        return next_offset is not None and next_offset > position.offset

    def overdue(self, now_ms: int, bound_ms: int, limit: int = 1000, after: Overdue | None = None) -> list[Overdue]:
        """Return a page of the scheduled and retrying jobs that were due at least ``bound_ms`` ago; see
        `StatusReader.overdue`."""
        query = select(*_LIFE).where(waiting, jobs.c.due_ms <= now_ms - bound_ms)
        if after is not None:
            query = query.where(tuple_(jobs.c.due_ms, jobs.c.job_id) > (after.due_ms, after.job_id))
        query = query.order_by(jobs.c.due_ms, jobs.c.job_id).limit(limit)
        with self._reading() as db:
            rows = db.execute(query).all()
        return [_overdue(row) for row in rows]

    def open_lives(self, limit: int, *, waiting: bool = False, before_ms: int | None = None) -> list[tuple[str, Life]]:
        """Return jobs that have not ended, the oldest submission of each state first; see `StatusReader.open_lives`."""
        states = [State.QUEUED, State.RUNNING, *((State.SCHEDULED, State.RETRYING) if waiting else ())]
        lives: list[tuple[str, Life]] = []
        with self._reading() as db:
            for state in states:
                query = select(*_LIFE).where(jobs.c.state == str(state), unfinished)
                if before_ms is not None:
                    query = query.where(jobs.c.submitted_ms < before_ms)
                query = query.order_by(jobs.c.submitted_ms, jobs.c.job_id).limit(limit - len(lives))
                lives += [(row.job_id, life_of(row.slots, row.result)) for row in db.execute(query)]
        return lives

    def lives(self) -> Iterator[tuple[str, Life]]:
        """Yield every job with its fold state, in order of ids, from one snapshot."""
        for row in self.rows():
            yield row[0], life_of_row(row)

    def rows(self) -> Iterator[JobRow]:
        """Yield every job's row with the columns of `COLUMNS`, in order of ids, from one snapshot."""
        # A table of an earlier revision does not have all columns.
        self._has(REVISION)
        lacking = {name for number, added in ADDED.items() if number > self._revision for name in added.columns}
        query = select(*(null() if name in lacking else jobs.c[name] for name in COLUMNS)).order_by(jobs.c.job_id)
        with self._reading(walk=True) as db:
            for row in db.execute(query.execution_options(yield_per=1000)):
                yield tuple(row)

    def counters_hold(self) -> bool:
        """Return whether the counters match the rows. Reads the whole table."""
        columns = (jobs.c.task, jobs.c.queue, jobs.c.state)
        with self._reading(walk=True) as db:
            counted = {tuple(row) for row in db.execute(select(*columns, func.count()).group_by(*columns))}
        return counted == {(each.task, each.queue, each.state.value, each.jobs) for each in self.counts()}

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _reading(self, *, walk: bool = False) -> _Reading:
        return _Reading(self, None if self._bounds is None else self._bounds[walk], walk)

    def _away(self, cause: Exception) -> StoreError:
        if self._explain is not None:
            return self._explain(cause, "read")
        return StoreError(f"the status table {self._url} cannot be read: {getattr(cause, 'orig', None) or cause}")


class _Reading:
    """A connection for one query. Turns the database's errors into `StoreError`."""

    def __init__(self, reader: SqlReader, bound: str | None, walk: bool) -> None:
        self._reader, self._bound, self._walk = reader, bound, walk
        self._db: Connection | None = None
        self._query: object = None

    def __enter__(self) -> Connection:
        self._query = forks.begin_query()
        try:
            with self._reader._pool_section(_POOL_ACTIVITY):
                self._db = db = self._reader._engine.connect()
            if self._walk:
                db.execution_options(**{WALK: True})
            if self._bound is not None:
                db.exec_driver_sql(self._bound)
        except BaseException as exc:
            self._end()
            if isinstance(exc, SQLAlchemyError):
                raise self._reader._away(exc) from exc
            raise
        return db

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end()
        if isinstance(error, SQLAlchemyError):
            raise self._reader._away(error) from error

    def _end(self) -> None:
        try:
            if self._db is not None:
                with self._reader._pool_section(_POOL_ACTIVITY):
                    self._db.close()
        finally:
            forks.end_query(self._query)


def not_found(url: str) -> StoreNotFound:
    """Return the error for a status table that does not exist yet."""
    return StoreNotFound(
        f"there is no status table at {shown(url)} yet: `jobledger streams MODULE:APP` creates it; if that is running, check that "
        "JOBLEDGER_STATUS_URL is the same there and here"
    )


def foreign(url: str) -> StoreError:
    """Return the error for a database that has tables but no status table."""
    return StoreError(
        f"{shown(url)} is a database of another program: it has no table 'meta'. Set JOBLEDGER_STATUS_URL to a "
        "separate database"
    )


def judge(rows: dict[str, str], url: str, namespace: str) -> int:
    """Return the revision of the tables, from the rows of `meta`. Raises `StoreError` unless these have this schema
    version and this namespace."""
    version = rows.get("schema_version")
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"{url} has schema version {version}, but this Jobledger needs version {SCHEMA_VERSION}: set "
            "JOBLEDGER_STATUS_URL to a "
            "new address, and the table is rebuilt from the log"
        )
    if rows.get("namespace") != namespace:
        raise StoreError(
            f"{url} is the status table of namespace {rows.get('namespace')!r}, not of {namespace!r}: "
            "set JOBLEDGER_STATUS_URL to a separate database"
        )
    revision = rows.get("revision", "1")
    return int(revision) if revision.isdecimal() else 1


def _status(row: Row[*tuple[Any, ...]]) -> JobStatus:
    return fold.status(row.job_id, life_of(row.slots, row.result))


def _overdue(row: Row[*tuple[Any, ...]]) -> Overdue:
    life = life_of(row.slots, row.result)
    seen = fold.project(life)
    release, attempt = fold.awaited(seen)
    spec_position = life.head.at if life.head.rank < 2 else None
    return Overdue(
        row.job_id,
        seen.task,
        seen.queue,
        seen.run,
        release,
        attempt,
        seen.due_ms or 0,
        None if spec_position is None else Position(spec_position[1], spec_position[2], spec_position[3]),
    )
