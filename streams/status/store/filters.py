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
#: The greatest character: every text that begins with a prefix is less than the prefix with this character.
_LAST_CHARACTER = "\U0010ffff"


class Selection(NamedTuple):
    """The rows that match filters.

    ``source``: `jobs`, joined with the tags. ``found``: conditions by which an index finds the rows. ``checked``:
    conditions that need the row itself. ``order``: the columns by which the rows are ordered, descending.
    """

    source: FromClause
    found: Sequence[ColumnElement[bool]]
    checked: Sequence[ColumnElement[bool]]
    order: tuple[ColumnElement[Any], ...]

    def rows(self, columns: Sequence[ColumnElement[Any]]) -> Select[Any]:
        """Return a query for these columns of the rows, in no order."""
        return select(*columns).select_from(self.source).where(*self.found, *self.checked)


def given(filters: Filters) -> set[str]:
    """Return the names of the filters that have a value."""
    return {name for name, value in filters.items() if value is not None and (name != "tag" or value)}


def selection(**filters: Unpack[Filters]) -> Selection:
    """Return the rows that match every filter. Raises `ConfigError` for an unknown state and a number that is too
    small."""
    names = given(filters)
    source, order = _tagged(filters.get("tag"))
    found: list[ColumnElement[bool]] = []
    checked: list[ColumnElement[bool]] = []
    prefix = filters.get("id_prefix")
    if prefix is not None:
        found += begins(prefix)
        if not names & {"tag", "key", "fingerprint"}:
            # The rows are read in the order of the primary key. A sort by time would have to read all of them first.
            order = (jobs.c.job_id,)
    states = _states(filters)
    if states is not None:
        found.append(jobs.c.state.in_(states))
        if State.SUCCEEDED.value not in states and prefix is None:
            found.append(unfinished)  # implied by the states, but needed for the use of the partial index
    for conditions, column, wanted in (
        (checked, jobs.c.task, filters.get("task")),
        (checked, jobs.c.queue, filters.get("queue")),
        (found, jobs.c.key, filters.get("key")),
        (checked, jobs.c.version, filters.get("version")),
        (checked, jobs.c.error_type, filters.get("error")),
        (found, jobs.c.fingerprint, filters.get("fingerprint")),
    ):
        values = _any_of(wanted)
        if values is not None:
            conditions.append(column.in_([key_text(each) for each in values]))
    if (since_ms := filters.get("since_ms")) is not None:
        found.append(order[0] >= since_ms if len(order) > 1 else jobs.c.submitted_ms >= since_ms)
    if (until_ms := filters.get("until_ms")) is not None:
        found.append(order[0] < until_ms if len(order) > 1 else jobs.c.submitted_ms < until_ms)
    if (late_ms := filters.get("late_ms")) is not None:
        begin = func.coalesce(jobs.c.due_ms, jobs.c.submitted_ms)
        queued = and_(jobs.c.state == State.QUEUED.value, begin <= late_ms)
        # The states are named so that the partial index is used, however many jobs have ended.
        open_ = [each.value for each in (State.SCHEDULED, State.RETRYING, State.QUEUED)]
        found += [unfinished, jobs.c.state.in_(open_)]
        checked.append(or_(jobs.c.due_ms <= late_ms, queued))
    if (least := filters.get("attempts_least")) is not None:
        checked.append(jobs.c.attempt >= _at_least_one(least))
    return Selection(source, found, checked, order)


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


def keys_of(wanted: Wanted) -> set[str] | None:
    """Return the values of a filter as the table stores them; None: no filter."""
    values = _any_of(wanted)
    return None if values is None else {key_text(each) for each in values}


def _states(filters: Filters) -> list[str] | None:
    states = states_of(filters.get("state"))
    if states is None and filters.get("attempts_least") is not None:
        return [State.RETRYING.value]  # no index has the attempts of all jobs
    return states


def _at_least_one(number: int) -> int:
    if number < 1:
        raise ConfigError(f"attempts_least={number!r} is too small: the first attempt has number 1")
    return number


def _any_of(wanted: Wanted) -> list[str] | None:
    """Return a filter's values as a list; None: no filter."""
    return [wanted] if isinstance(wanted, str) else None if wanted is None else list(wanted)


def _tagged(tag: tuple[str, str] | Mapping[str, str] | None) -> tuple[FromClause, tuple[ColumnElement[Any], ...]]:
    """Return `jobs` joined with all of these tags, and the columns by which to order the rows."""
    source: FromClause = jobs
    order: tuple[ColumnElement[Any], ...] = (jobs.c.submitted_ms, jobs.c.job_id)
    wanted = dict([tag]) if isinstance(tag, tuple) else dict(tag or {})
    for number, (name, value) in enumerate(wanted.items()):
        table = tags.alias(f"tag{number}")
        columns = (table.c.submitted_ms, table.c.job_id)
        # The rows of the first tag are read in the order of the page; the rows of the other tags are looked up by their
        # whole key.
        same = order[1] == columns[1] if number == 0 else and_(order[0] == columns[0], order[1] == columns[1])
        has_tag = and_(table.c.name == key_text(name), table.c.value == key_text(value))
        source, order = source.join(table, and_(same, has_tag)), columns
    return source, order
