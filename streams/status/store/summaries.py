"""Queries of the status table that summarise many jobs: counts, queues, groups of errors, last successes.

Each query reads a bounded number of rows, however many jobs the table has. Numbers beyond the bound are reported as not
known, never as zero. The functions need an open connection; `SqlReader` opens it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Unpack

from sqlalchemy import Connection, Row, case, func, literal, select, tuple_, union_all

from jobledger.job import State
from jobledger.streams.status.store import searches
from jobledger.streams.status.store.filters import COUNTED, given, states_of, texts_of
from jobledger.streams.status.store.protocol import Counted, ErrorGroup, Filters, LastSuccess, QueueSummary
from jobledger.streams.status.store.rows import key_text
from jobledger.streams.status.store.tables import counters, jobs, unfinished

#: Maximum number of queued jobs that are read to find the oldest of each queue, and of jobs for the last successes.
SCAN_MOST = 10_000
#: Number of rows that such a scan reads first, because these are mostly enough, and the factor by which each further read
#: is larger.
_SCAN_FIRST, _SCAN_FACTOR = 100, 4
#: Maximum number of fingerprints that are read.
FINGERPRINTS_MOST = 2_000
#: Maximum number of jobs of a group of errors that are counted.
GROUP_MOST = 500
#: Number of groups in one query.
_GROUPS_A_QUERY = 50


def count(db: Connection, limit: int, most: int, by_task: bool, **filters: Unpack[Filters]) -> Counted:
    """Count jobs; see `StatusReader.count`. ``by_task``: whether the table has the index by task."""
    if given(filters) <= COUNTED:
        return _by_counters(db, filters)
    return Counted(*searches.count(db, searches.plan(db, by_task=by_task, **filters), limit, most))


def _by_counters(db: Connection, filters: Filters) -> Counted:
    query = select(func.sum(counters.c.jobs))
    states = states_of(filters.get("state"))
    for column, wanted in (
        (counters.c.state, states),
        (counters.c.task, texts_of(filters.get("task"))),
        (counters.c.queue, texts_of(filters.get("queue"))),
    ):
        if wanted is not None:
            query = query.where(column.in_(wanted))
    return Counted(int(db.execute(query).scalar() or 0), True)


def queues(db: Connection) -> list[QueueSummary]:
    """Return each queue with its numbers and its oldest waiting job; see `StatusReader.queues`."""
    query = select(counters.c.queue, counters.c.state, func.sum(counters.c.jobs))
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for queue, state, number in db.execute(query.group_by(counters.c.queue, counters.c.state)):
        if number:
            numbers[queue][state] = int(number)
    oldest = _oldest(db, [queue for queue, states in numbers.items() if states.get(State.QUEUED)])
    return [
        QueueSummary(queue=queue, oldest_ms=oldest.get(queue), **_by_state(states))
        for queue, states in sorted(numbers.items())
    ]


def _by_state(states: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of a `QueueSummary`, by its fields."""
    return {"depth" if state is State.QUEUED else state.value: states.get(state.value, 0) for state in State}


def _oldest(db: Connection, waiting: Collection[str]) -> dict[str, int]:
    """Return since when the oldest queued job of each queue could start. Queues whose jobs are not among the `SCAN_MOST`
    that were submitted first have no entry."""
    if not waiting:
        return {}
    left = set(waiting)
    oldest: dict[str, int] = {}
    columns = (jobs.c.submitted_ms, jobs.c.job_id, jobs.c.queue, jobs.c.due_ms)
    for submitted_ms, _, queue, due_ms in _scanned(db, columns, queued=True):
        begin = submitted_ms if due_ms is None else due_ms
        oldest[queue] = min(begin, oldest.get(queue, begin))
        # A job can start after its submission at the earliest. So no job that follows in the scan, which is in the
        # order of submission, is older than one that could start before this submission.
        left = {each for each in left if oldest.get(each, submitted_ms + 1) > submitted_ms}
        if not left:
            break
    return oldest


def last_success(db: Connection, tasks: Sequence[str]) -> dict[str, LastSuccess]:
    """Return the last success of each task; see `StatusReader.last_success`."""
    left = {key_text(task): task for task in tasks}
    known: dict[str, LastSuccess] = {}
    columns = (jobs.c.submitted_ms, jobs.c.job_id, jobs.c.task, jobs.c.state, jobs.c.version, jobs.c.ended_ms)
    for _, job_id, task, state, version, ended_ms in _scanned(db, columns, queued=False) if left else ():
        if state == State.SUCCEEDED.value and task in left:
            known[left.pop(task)] = LastSuccess(version, ended_ms, job_id)
            if not left:
                break
    return known


def _scanned(db: Connection, columns: Sequence[Any], *, queued: bool) -> Iterator[Row[*tuple[Any, ...]]]:
    """Yield `SCAN_MOST` rows or fewer, some at a time: of queued jobs the first submission first, else of all jobs the
    last submission first. The first two columns are those of the order."""
    order = (jobs.c.submitted_ms, jobs.c.job_id)
    query = select(*columns)
    if queued:
        query = query.where(jobs.c.state == State.QUEUED.value, unfinished).order_by(*order)
    else:
        query = query.order_by(*(column.desc() for column in order))
    page, size, left = query, _SCAN_FIRST, SCAN_MOST
    while left > 0:
        size = min(size, left)
        rows = db.execute(page.limit(size)).all()
        yield from rows
        if len(rows) < size:
            return
        last = tuple(rows[-1][:2])
        page = query.where(tuple_(*order) > last if queued else tuple_(*order) < last)
        left, size = left - size, size * _SCAN_FACTOR


def errors(db: Connection, since_ms: int | None, limit: int) -> list[ErrorGroup]:
    """Return failed and retrying jobs in groups; see `StatusReader.errors`."""
    newest = [row for row in _fingerprints(db) if since_ms is None or row.last_ms >= since_ms]
    newest.sort(key=lambda row: (-row.last_ms, row.fingerprint))
    groups: list[ErrorGroup] = []
    for begin in range(0, min(limit, len(newest)), _GROUPS_A_QUERY):
        some = newest[begin : min(begin + _GROUPS_A_QUERY, limit)]
        tasks, versions, again = _numbers(db, [row.fingerprint for row in some], since_ms)
        examples = _examples(db, [row.job_id for row in some])
        for row in some:
            error_type, message = examples.get(row.job_id, ("", ""))
            number = tasks[row.fingerprint].total()
            groups.append(
                ErrorGroup(
                    *(row.fingerprint, error_type, message, row.job_id),
                    *(min(number, GROUP_MOST), number <= GROUP_MOST, row.first_ms, row.last_ms),
                    dict(tasks[row.fingerprint].most_common()),
                    dict(versions[row.fingerprint].most_common()),
                    again[row.fingerprint],
                )
            )
    return groups


def _fingerprints(db: Connection) -> Sequence[Row[*tuple[Any, ...]]]:
    """Return the first `FINGERPRINTS_MOST` fingerprints, each with its first and its last submission and the last job.

    Both databases would read the whole index for DISTINCT. Here each step reads one entry: the least fingerprint that is
    greater than the one before (a loose index scan).
    """
    column = jobs.c.fingerprint
    steps = select(func.min(column).label("fingerprint")).where(column.is_not(None)).cte("steps", recursive=True)
    following = select(func.min(column)).where(column > steps.c.fingerprint).scalar_subquery()
    steps = steps.union_all(select(following).where(steps.c.fingerprint.is_not(None)))
    distinct = select(steps.c.fingerprint).where(steps.c.fingerprint.is_not(None)).limit(FINGERPRINTS_MOST).subquery()
    same = column == distinct.c.fingerprint
    last = (jobs.c.submitted_ms.desc(), jobs.c.job_id.desc())
    query = select(
        distinct.c.fingerprint,
        select(jobs.c.submitted_ms)
        .where(same)
        .order_by(jobs.c.submitted_ms)
        .limit(1)
        .scalar_subquery()
        .label("first_ms"),
        select(jobs.c.submitted_ms).where(same).order_by(*last).limit(1).scalar_subquery().label("last_ms"),
        select(jobs.c.job_id).where(same).order_by(*last).limit(1).scalar_subquery().label("job_id"),
    )
    # A group whose last job has left it meanwhile has no times.
    return [row for row in db.execute(query) if row.last_ms is not None]


def _numbers(
    db: Connection, fingerprints: Sequence[str], since_ms: int | None
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]], Counter[str]]:
    """Return the numbers of jobs by task and by version for each fingerprint, and the numbers of those in a later run than
    the first. At most `GROUP_MOST` + 1 jobs of each are counted, those that were submitted last."""
    parts = []
    for each in fingerprints:
        read = select(jobs.c.task, jobs.c.version, jobs.c.run).where(jobs.c.fingerprint == each)
        if since_ms is not None:
            read = read.where(jobs.c.submitted_ms >= since_ms)
        last = read.order_by(jobs.c.submitted_ms.desc(), jobs.c.job_id.desc()).limit(GROUP_MOST + 1).subquery()
        columns = (last.c.task, last.c.version, case((last.c.run > 1, 1), else_=0))
        parts.append(select(literal(each).label("fingerprint"), *columns, func.count()).group_by(*columns))
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    versions: dict[str, Counter[str]] = defaultdict(Counter)
    again: Counter[str] = Counter()
    for fingerprint, task, version, later_run, number in db.execute(union_all(*parts)) if parts else ():
        tasks[fingerprint][task] += number
        versions[fingerprint][version or ""] += number
        again[fingerprint] += number if later_run else 0
    return tasks, versions, again


def _examples(db: Connection, job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    query = select(jobs.c.job_id, jobs.c.error_type, jobs.c.error_message).where(jobs.c.job_id.in_(job_ids))
    return {job_id: (error_type or "", message or "") for job_id, error_type, message in db.execute(query)}
