"""Searches the status table for jobs that match filters, a bounded number of rows at a time.

An index yields rows in the order of the page, and the rows are compared with the filters that the index does not answer.
So a search for rare jobs, or for jobs that do not exist, could read the whole table. It stops after a number of rows, and
says where it can be continued.

The functions need an open connection; `SqlReader` opens it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    and_,
    case,
    exists,
    func,
    select,
    true,
    tuple_,
    union_all,
)

from jobledger.job import State
from jobledger.streams.status.store.filters import (
    begins,
    by_id,
    conditions_of,
    given,
    states_looked_at,
    tags_of,
    texts_of,
    times_of,
)
from jobledger.streams.status.store.protocol import Filters
from jobledger.streams.status.store.tables import counters, jobs, tags, unfinished

#: Number of rows that a search reads first, by how much each further read is larger, and how many it reads at most at
#: once.
_FIRST, _FACTOR, _ONCE_MOST = 200, 4, 20_000
#: Largest number of scans of one search: each is a subquery, of which SQLite accepts 500.
_SCANS_MOST = 50
#: The rows of a tag are read, unless another index has at most this number of rows.
_FEW = 10_000
_TIMES = frozenset({"since_ms", "until_ms"})
_STATES = tuple(state.value for state in State)

#: The place of a row in the order of a page: the time of submission and the id, or only the id.
Place = tuple[Any, ...]


class Scan(NamedTuple):
    """Rows of ``source``, which is `jobs` or `tags`. One index contains them in the order of the page."""

    source: FromClause
    conditions: Sequence[ColumnElement[bool]]


class Search(NamedTuple):
    """How jobs are found. ``scans``: together they contain all jobs that match, each once. ``order``: the columns of the
    order, descending, in each scan. ``checks``: conditions that only the rows of the scans are compared with."""

    scans: Sequence[Scan]
    order: Sequence[str]
    checks: Sequence[ColumnElement[bool]]

    def read(self, number: int, place: Place | None) -> Select[Any]:
        """Return a query for the columns of the order of the first ``number`` rows of the scans after ``place``."""
        parts = [self._scan(scan, number, place) for scan in self.scans]
        if len(parts) == 1:
            return parts[0]
        joined = union_all(*(select(part.subquery()) for part in parts)).subquery()
        return select(joined).order_by(*(joined.c[name].desc() for name in self.order)).limit(number)

    def _scan(self, scan: Scan, number: int, place: Place | None) -> Select[Any]:
        columns = [scan.source.c[name] for name in self.order]
        query = select(*columns).where(*scan.conditions)
        if place is not None:
            query = query.where(tuple_(*columns) < place)
        return query.order_by(*(column.desc() for column in columns)).limit(number)


class Part(NamedTuple):
    """What a search has found. ``rows``: those that match. ``place``: that of the last row that was looked at; None: all
    rows were."""

    rows: list[Row[Any]]
    place: Place | None


def plan(db: Connection, *, by_task: bool, **filters: Unpack[Filters]) -> Search:
    """Return how the jobs that match these filters are found with the fewest reads. ``by_task``: whether the table has
    the index by task. Raises `ConfigError` for an unknown state and a number that is too small."""
    names = given(filters)
    checks = conditions_of(filters)
    times = times_of(filters, jobs.c.submitted_ms)
    wanted_tags = tags_of(filters.get("tag"))
    order = ("submitted_ms", "job_id")
    if by_id(filters):
        prefix = filters.get("id_prefix")
        assert prefix is not None
        return Search([Scan(jobs, begins(prefix))], ("job_id",), checks + times if names != {"id_prefix"} else [])

    def search(index: str, scans: Sequence[Scan]) -> Search:
        """Return the search by an index that answers one filter."""
        has_tags = [] if index == "tag" and len(wanted_tags) == 1 else _has(wanted_tags)
        return Search(scans, order, [] if names <= {index} | _TIMES and not has_tags else [*checks, *has_tags])

    for index, column, wanted in (
        ("key", jobs.c.key, filters.get("key")),
        ("fingerprint", jobs.c.fingerprint, filters.get("fingerprint")),
    ):
        values = texts_of(wanted)
        if values is not None and len(values) <= _SCANS_MOST:
            return search(index, [Scan(jobs, [column == each, *times]) for each in values])
    if names <= _TIMES:
        return search("", [Scan(jobs, times or [true()])])
    found = _counted(db, filters)
    if not found.states:
        return Search([], order, [])
    indexes: list[tuple[int, str, Sequence[Scan]]] = [(found.jobs, "", [Scan(jobs, times or [true()])])]
    if State.SUCCEEDED.value not in found.states:
        scans = [Scan(jobs, [jobs.c.state == each, unfinished, *times]) for each in found.states]
        indexes.append((found.of_states, "state", scans))
    if by_task and names & {"task", "queue"} and len(found.tasks) <= _SCANS_MOST:
        scans = [Scan(jobs, [jobs.c.task == each, *times]) for each in found.tasks]
        indexes.append((found.of_tasks, "task", scans))
    number, index, fewest = min(indexes, key=lambda each: each[0])
    if wanted_tags and number > _FEW:
        name, value = next(iter(wanted_tags.items()))
        tagged = [tags.c.name == name, tags.c.value == value, *times_of(filters, tags.c.submitted_ms)]
        return search("tag", [Scan(tags, tagged)])
    return search(index, fewest)


class _Counted(NamedTuple):
    """The states and the tasks that jobs that match can have, and how many jobs have these states, and these tasks.
    ``jobs``: number of all jobs."""

    jobs: int
    states: Sequence[str]
    of_states: int
    tasks: Sequence[str]
    of_tasks: int


def _counted(db: Connection, filters: Filters) -> _Counted:
    states = states_looked_at(filters)
    if states is None:
        # A job that has succeeded has no error.
        failed = filters.get("error") is not None or filters.get("error_text") is not None
        states = [each for each in _STATES if not failed or each != State.SUCCEEDED.value]
    tasks, queues = texts_of(filters.get("task")), texts_of(filters.get("queue"))
    by_state: Counter[str] = Counter()
    by_task: Counter[str] = Counter()
    found_states: set[str] = set()
    found_tasks: set[str] = set()
    columns = (counters.c.task, counters.c.queue, counters.c.state, counters.c.jobs)
    for task, queue, state, number in db.execute(select(*columns).where(counters.c.jobs != 0)):
        by_state[state] += number
        by_task[task] += number
        if state in states and (tasks is None or task in tasks) and (queues is None or queue in queues):
            found_states.add(state)
            found_tasks.add(task)
    return _Counted(
        by_state.total(),
        sorted(found_states),
        sum(by_state[each] for each in found_states),
        sorted(found_tasks),
        sum(by_task[each] for each in found_tasks),
    )


def _has(wanted: Mapping[str, str]) -> list[ColumnElement[bool]]:
    """Return the conditions that a job has these tags."""
    return [
        exists().where(
            tags.c.name == name,
            tags.c.value == value,
            tags.c.submitted_ms == jobs.c.submitted_ms,
            tags.c.job_id == jobs.c.job_id,
        )
        for name, value in wanted.items()
    ]


def run(
    db: Connection, search: Search, columns: Sequence[ColumnElement[Any]], place: Place | None, limit: int, most: int
) -> Part:
    """Return ``limit`` rows that match, or fewer if there are no more, or if ``most`` rows were looked at.

    ``columns``: those of `jobs` that are wanted; they follow the columns of the order. ``place``: the search begins after
    it.
    """
    rows: list[Row[Any]] = []
    looked_at = 0
    step = max(_FIRST, 2 * limit) if search.checks else limit
    while search.scans:
        step = min(step, most - looked_at, _ONCE_MOST)
        wanted = limit - len(rows)
        found = db.execute(_matching(search, columns, place, step).limit(wanted)).all()
        rows += found
        if len(found) == wanted:
            return Part(rows, tuple(rows[-1][: len(search.order)]))
        last = _last(db, search, place, step)
        looked_at += step
        if last is None or looked_at >= most:
            return Part(rows, last)
        place, step = last, step * _FACTOR
    return Part(rows, None)


def count(db: Connection, search: Search, limit: int, most: int) -> tuple[int, bool]:
    """Return how many jobs match, and whether there are no more: at most ``limit`` are counted, and ``most`` rows are
    looked at."""
    if not search.scans:
        return 0, True
    step = most if search.checks else limit + 1
    matching = _matching(search, (), None, step).limit(limit + 1).subquery()
    number = db.execute(select(func.count()).select_from(matching)).scalar() or 0
    if number > limit:
        return limit, False
    return number, not search.checks or _last(db, search, None, most + 1) is None


def _matching(search: Search, columns: Sequence[ColumnElement[Any]], place: Place | None, step: int) -> Select[Any]:
    """Return a query for the rows that match among the next ``step`` rows."""
    if not search.checks and len(search.scans) == 1 and search.scans[0].source is jobs:
        return search.read(step, place).add_columns(*columns)
    read = search.read(step, place).subquery()
    order = [read.c[name] for name in search.order]
    query = select(*order, *columns).order_by(*(column.desc() for column in order))
    if columns or search.checks:
        query = query.select_from(read.join(jobs, jobs.c.job_id == read.c.job_id))
    if search.checks:
        # As one value, so that no database uses another index for one of the conditions: that index could have far more
        # rows than are to be read.
        query = query.where(case((and_(*search.checks), 1), else_=0) == 1)
    return query


def _last(db: Connection, search: Search, place: Place | None, step: int) -> Place | None:
    """Return the place of the last of the next ``step`` rows; None: there are fewer."""
    row = db.execute(search.read(step, place).offset(step - 1).limit(1)).first()
    return None if row is None else tuple(row)
