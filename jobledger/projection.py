"""Projections: a person's own table, folded from domain events or from what happens to
jobs. What it is, not how it runs."""

from __future__ import annotations

import datetime as dt
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jobledger.domain import EventType
from jobledger.errors import ConfigError
from jobledger.functions import check_plain
from jobledger.schemas.events import Fact, Position

if TYPE_CHECKING:
    from sqlalchemy import Table

#: At most 45: `jobledger_<name>_rebuild` is a table, and PostgreSQL's names have 63 characters.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,44}")
#: What names in the status database begin with that are not a person's own.
RESERVED = "jobledger_"


class Where(NamedTuple):
    """Where a folded record stands: its event's id, its place, and when the broker appended it (ms since the epoch)."""

    event_id: str
    position: Position
    appended_ms: int


#: A row before (None: there is none), the event or `Recorded` fact, and, if it is asked for, where that stands; the row
#: after, None to delete it. A column that the row after leaves out keeps its value, a new row's its default or NULL.
Fold = Callable[..., Mapping[str, Any] | None]


class Projection:
    """A fold into one table. ``events``: types whose events are folded; ``facts``: or
    kinds of job facts, as `Recorded`.

    ``key(event)``: the primary key of the row that an event changes, a tuple for several columns; None passes it over.
    ``start``: events before this time are passed over. Raises `ConfigError`.
    """

    def __init__(
        self,
        fold: Fold,
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
                f"projection {name!r}: a name is small letters, digits and '_', at most 45, a letter first; give name=…"
            )
        check_plain(fold, f"projection {name!r}: the fold")
        check_plain(key, f"projection {name!r}: key=…")
        self.fold, self.name, self.table, self.key = fold, name, table, key
        self.events = {event.topic: event for event in events}
        self.facts = tuple(facts)
        if bool(self.events) == bool(self.facts):
            raise ConfigError(f"projection {name!r}: name event classes, or facts=…, and not both")
        unknown = [f for f in self.facts if f not in Fact.__args__]
        if unknown:
            raise ConfigError(
                f"projection {name!r}: {unknown} are no facts; there are {[f.__name__ for f in Fact.__args__]}"
            )
        if not table.primary_key.columns:
            raise ConfigError(
                f"projection {name!r}: table {table.name!r} has no primary key, so no row could be found again"
            )
        for column in table.columns:
            made = column.default is not None and not column.default.is_scalar
            if made or column.server_default is not None or column.onupdate is not None:
                raise ConfigError(
                    f"projection {name!r}: column {table.name}.{column.name} has a value that is made elsewhere "
                    "(server_default, computed, onupdate, or a function as default): a fold of the same log would not come "
                    "to the same; give it a plain default=…, or let the fold name it"
                )
        if table.name.startswith(RESERVED):
            raise ConfigError(f"projection {name!r}: table names that begin with {RESERVED!r} are Jobledger's own")
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
