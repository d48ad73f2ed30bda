"""The filters of lists and counts as conditions in SQL. Runs no queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from sqlalchemy import ColumnElement, FromClause, Select, and_, func, or_, select

from jobledger.errors import ConfigError
from jobledger.job import State
from jobledger.streams.status.store.protocol import Filters, Wanted
from jobledger.streams.status.store.rows import key_text, plain
from jobledger.streams.status.store.tables import jobs, tags, unfinished

#: The filters by a column that the first revision of the table did not have.
ADDED_LATER = ("key", "version", "fingerprint")
#: The filters that the counters can answer.
COUNTED = frozenset({"state", "task", "queue"})
#: The states of jobs that can be late.
LATE = (State.SCHEDULED.value, State.RETRYING.value, State.QUEUED.value)
#: The greatest character: every text that begins with a prefix is less than the prefix with this character.
_LAST_CHARACTER = "\U0010ffff"


class Selection(NamedTuple):
    """The rows that match filters.

    ``source``: `jobs`, joined with the tags. ``conditions``: those of the filters. ``order``: the columns by which the
    rows are ordered, descending: the time of submission and the id, or only the id.
    """

    source: FromClause
    conditions: Sequence[ColumnElement[bool]]
    order: tuple[ColumnElement[Any], ...]

    def rows(self, columns: Sequence[ColumnElement[Any]]) -> Select[Any]:
        """Return a query for these columns of the rows, in no order."""
        return select(*columns).select_from(self.source).where(*self.conditions)


def given(filters: Filters) -> set[str]:
    """Return the names of the filters that have a value."""
    return {name for name, value in filters.items() if value is not None and (name != "tag" or value)}


def selection(**filters: Unpack[Filters]) -> Selection:
    """Return the rows that match every filter. Raises `ConfigError` for an unknown state and a number that is too
    small."""
    source, order = _tagged(tags_of(filters.get("tag")))
    conditions = conditions_of(filters)
    if by_id(filters):
        # The rows are read in the order of the primary key. A sort by time would have to read all of them first.
        order = (jobs.c.job_id,)
    elif filters.get("id_prefix") is None:
        states = states_looked_at(filters)
        if states is not None and State.SUCCEEDED.value not in states:
            conditions.append(unfinished)  # implied by the states, but needed for the use of the partial index
    conditions += times_of(filters, order[0] if len(order) > 1 else jobs.c.submitted_ms)
    return Selection(source, conditions, order)


def conditions_of(filters: Filters) -> list[ColumnElement[bool]]:
    """Return the conditions of filters, without those on tags and on the time of submission. Raises as `selection`
    does."""
    conditions: list[ColumnElement[bool]] = []
    if (prefix := filters.get("id_prefix")) is not None:
        conditions += begins(prefix)
    if (states := states_looked_at(filters)) is not None:
        conditions.append(jobs.c.state.in_(states))
    for column, wanted in (
        (jobs.c.task, filters.get("task")),
        (jobs.c.queue, filters.get("queue")),
        (jobs.c.key, filters.get("key")),
        (jobs.c.version, filters.get("version")),
        (jobs.c.error_type, filters.get("error")),
        (jobs.c.fingerprint, filters.get("fingerprint")),
    ):
        if (values := texts_of(wanted)) is not None:
            conditions.append(column.in_(values))
    if (late_ms := filters.get("late_ms")) is not None:
        begin = func.coalesce(jobs.c.due_ms, jobs.c.submitted_ms)
        queued = and_(jobs.c.state == State.QUEUED.value, begin <= late_ms)
        conditions.append(or_(jobs.c.due_ms <= late_ms, queued))
    if (least := filters.get("attempts_least")) is not None:
        if least < 1:
            raise ConfigError(f"attempts_least={least!r} is too small: the first attempt has number 1")
        conditions.append(jobs.c.attempt >= least)
    if (text := filters.get("error_text")) is not None:
        conditions.append(jobs.c.error_message.icontains(plain(text), autoescape=True))
    return conditions


def times_of(filters: Filters, submitted_ms: ColumnElement[Any]) -> list[ColumnElement[bool]]:
    """Return the conditions on the time of submission. ``submitted_ms``: the column that has it."""
    times = []
    if (since_ms := filters.get("since_ms")) is not None:
        times.append(submitted_ms >= since_ms)
    if (until_ms := filters.get("until_ms")) is not None:
        times.append(submitted_ms < until_ms)
    return times


def by_id(filters: Filters) -> bool:
    """Return whether the rows are in the order of their ids, not of their submission."""
    return filters.get("id_prefix") is not None and not given(filters) & {"tag", "key", "fingerprint"}


def begins(prefix: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions for ids that begin with ``prefix``."""
    # A range uses the primary key's index. LIKE would need its wildcards escaped, and another index.
    begin = plain(prefix)
    return jobs.c.job_id >= begin, jobs.c.job_id < begin + _LAST_CHARACTER


def states_of(wanted: Wanted) -> list[str] | None:
    """Return the states of a filter; None: no filter. Raises `ConfigError` for an unknown state."""
    states = _any_of(wanted)
    if unknown := [each for each in states or () if each not in list(State)]:
        raise ConfigError(f"state={unknown[0]!r} is not a state; the states are {', '.join(State)}")
    return None if states is None else [str(each) for each in states]


def states_looked_at(filters: Filters) -> list[str] | None:
    """Return the states to which the filters limit the jobs; None: all states. Raises `ConfigError` for an unknown
    state."""
    states = states_of(filters.get("state"))
    if states is None and filters.get("attempts_least") is not None:
        states = [State.RETRYING.value]  # no index has the attempts of all jobs
    if filters.get("late_ms") is not None:
        # They are named so that the partial index is used, however many jobs have ended.
        states = [each for each in LATE if states is None or each in states]
    return states


def texts_of(wanted: Wanted) -> list[str] | None:
    """Return the different values of a filter as the table stores them; None: no filter."""
    values = _any_of(wanted)
    return None if values is None else list(dict.fromkeys(map(key_text, values)))


def tags_of(tag: tuple[str, str] | Mapping[str, str] | None) -> dict[str, str]:
    """Return the tags of a filter by name, as the table stores them."""
    wanted = dict([tag]) if isinstance(tag, tuple) else dict(tag or {})
    return {key_text(name): key_text(value) for name, value in wanted.items()}


def _any_of(wanted: Wanted) -> list[str] | None:
    """Return a filter's values as a list; None: no filter."""
    return [wanted] if isinstance(wanted, str) else None if wanted is None else list(wanted)


def _tagged(wanted: Mapping[str, str]) -> tuple[FromClause, tuple[ColumnElement[Any], ...]]:
    """Return `jobs` joined with all of these tags, and the columns by which to order the rows."""
    source: FromClause = jobs
    order: tuple[ColumnElement[Any], ...] = (jobs.c.submitted_ms, jobs.c.job_id)
    for number, (name, value) in enumerate(wanted.items()):
        table = tags.alias(f"tag{number}")
        columns = (table.c.submitted_ms, table.c.job_id)
        # The rows of one tag are read in the order of the page; the rows of the other tags are looked up by their whole
        # key.
        same = order[1] == columns[1] if number == 0 else and_(order[0] == columns[0], order[1] == columns[1])
        source = source.join(table, and_(same, table.c.name == name, table.c.value == value))
        order = columns
    return source, order
