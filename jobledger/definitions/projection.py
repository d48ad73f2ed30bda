"""Declares projections: a user's own table, folded from domain events or from job facts. This module does not run
projections."""

from __future__ import annotations

import datetime as dt
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jobledger.definitions.event_types import EventType
from jobledger.definitions.functions import check_plain
from jobledger.errors import ConfigError
from jobledger.schemas.events import Fact, Position

if TYPE_CHECKING:
    from sqlalchemy import Table

#: At most 45 characters: `jobledger_<name>_rebuild` is the name of a table, and names in PostgreSQL have at most 63.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,44}")
#: Prefix of Jobledger's own table names in the status database.
RESERVED = "jobledger_"


class Where(NamedTuple):
    """Where a folded record is in the log: the event's id; the record's topic, partition and offset; and the time when
    the broker appended the record (ms since the epoch)."""

    event_id: str
    position: Position
    appended_ms: int


#: Takes the old row (None if there is none), the event or `Recorded` fact, and optionally the record's `Where`. Returns
#: the new row, or None to delete it. A column missing in the new row keeps its value; in an inserted row it gets its
#: default or NULL.
FoldFunction = Callable[..., Mapping[str, Any] | None]


class Projection:
    """A fold into one table. ``events``: the types whose events are folded. ``facts``: the kinds of job facts that are
    folded instead of events; the fold gets each fact as `Recorded`.

    ``key(event)``: the primary key of the row that an event changes, a tuple for several columns, or None to skip the
    event. ``start``: events before this time are skipped. Raises `ConfigError`.
    """

    def __init__(
        self,
        fold: FoldFunction,
        *,
        name: str,
        table: Table,
        key: Callable[[Any], Any],
        events: Iterable[EventType],
        facts: Iterable[type[Any]],
        start: dt.datetime | None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"projection {name!r}: a name has at most 45 lowercase letters, digits and '_', and begins with a letter; give name=…"
            )
        check_plain(fold, f"projection {name!r}: the fold")
        check_plain(key, f"projection {name!r}: key=…")
        self.fold, self.name, self.table, self.key = fold, name, table, key
        self.events = {event.topic: event for event in events}
        self.facts = tuple(facts)
        if bool(self.events) == bool(self.facts):
            raise ConfigError(f"projection {name!r}: give either event classes or facts=…")
        unknown = [f for f in self.facts if f not in Fact.__args__]
        if unknown:
            raise ConfigError(
                f"projection {name!r}: {unknown} are not facts; the facts are {[f.__name__ for f in Fact.__args__]}"
            )
        if not table.primary_key.columns:
            raise ConfigError(
                f"projection {name!r}: table {table.name!r} has no primary key, which is needed to find the row of an event"
            )
        for column in table.columns:
            computed = column.default is not None and not column.default.is_scalar
            if computed or column.server_default is not None or column.onupdate is not None:
                raise ConfigError(
                    f"projection {name!r}: column {table.name}.{column.name} gets its value outside the fold "
                    "(server_default, computed, onupdate, or a function as default): folding the same log again would give "
                    "another value; give it a plain default=…, or let the fold set it"
                )
        if table.name.startswith(RESERVED):
            raise ConfigError(
                f"projection {name!r}: table {table.name!r}: names that begin with {RESERVED!r} are Jobledger's "
                "own; rename the table"
            )
        if start is not None and start.tzinfo is None:
            raise ConfigError(f"projection {name!r}: start={start!r} has no time zone; write datetime(…, tzinfo=UTC)")
        self.start_ms = None if start is None else round(start.timestamp() * 1000)
        count = len(inspect.signature(fold).parameters)
        if count not in (2, 3):
            raise ConfigError(
                f"projection {name!r}: a fold takes (row, event) or (row, event, where), not {count} parameters"
            )
        self.wants_where = count == 3

    def __repr__(self) -> str:
        return f"<projection {self.name} into {self.table.name}>"
