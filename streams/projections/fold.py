"""Turns records of the log into rows of a table, with the user's fold. Stores no offsets and begins no transactions."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from types import NoneType
from typing import Any

from confluent_kafka import Message
from sqlalchemy import Connection, Table, and_, bindparam, delete, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, StatementError

from jobledger.client.commands import is_copy
from jobledger.config import Settings
from jobledger.definitions.event_types import check_classes, event_id_of
from jobledger.definitions.projection import Projection, Where
from jobledger.errors import BadEvent, JobledgerError, SchemaError, UnknownFact, text_of, type_of
from jobledger.kafka.clients import position_of
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import recorded
from jobledger.log.schema_lookup import SchemaLookup, decoder
from jobledger.process.logger import get_logger
from jobledger.schemas.derive import is_pydantic
from jobledger.schemas.events import Position

LOG = get_logger("jobledger.projection")

#: Number of keys in one query.
KEYS_A_QUERY = 400

#: Types whose values cannot be changed in place.
_PLAIN = {NoneType, bool, int, float, str, bytes, Decimal, dt.datetime, dt.date, uuid.UUID}

Key = tuple[Any, ...]
#: (key, event or `Recorded`, `Where` with the event's id, position and time)
Item = tuple[Key, Any, Where]


#: Exceptions that a user's function may raise. For each of them, the error that is raised instead names the record.
#: KeyboardInterrupt is not included, because Ctrl-C is no error of the function.
PERSONS = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


def failed(projection: Projection, what: str, at: Position, why: str | BaseException) -> JobledgerError:
    """Return the error for the user's code or for a value that it returned. The error names the record at ``at``."""
    reason = why if isinstance(why, str) else f"{type_of(why)}: {text_of(why)}"
    return JobledgerError(
        f"projection {projection.name}: its {what} failed at {at} ({reason}); nothing of the batch was written. "
        "Correct "
        "the cause and start again: folding continues at this record"
    )


class Reading:
    """Turns records of the log into the arguments of a fold. ``unreadable``: number of skipped records that could not
    be read."""

    def __init__(self, projection: Projection, settings: Settings, names: Names, queues: Sequence[str]) -> None:
        self._projection, self._names = projection, names
        self._columns = [column.name for column in projection.table.primary_key.columns]
        self._lookup = SchemaLookup(settings, names)
        self._decode = decoder(settings, names).decode
        self._converters: dict[str, Callable[[Any], Any]] = {}
        for topic, kind in projection.events.items():
            self._converters[topic] = kind.cls.model_validate if is_pydantic(kind.cls) else kind.of
        standing = (names.lifecycle, names.coordination, names.dead_letter, names.control)
        self.topics = sorted(projection.events) or [*standing, *(names.jobs(q) for q in queues)]
        self.unreadable = 0

    def check(self) -> None:
        """Raise `IncompatibleEvent` for a class that cannot read events written with its earlier versions. Such events
        would be skipped, and a verification would skip them, too. Raises `BrokerUnavailable`, `TopicMissing`."""
        if self._projection.events:
            check_classes(self._projection.events.values(), self._lookup.all())

    def items(self, messages: Sequence[Message]) -> Iterator[Item]:
        """Yield (key, event, where) for each record that the projection uses. Skips and counts unreadable records.
        Raises `UnknownFact`, and `JobledgerError` if the projection's ``key=`` fails."""
        projection = self._projection
        for message in messages:
            appended_ms = message.timestamp()[1]
            if projection.start_ms is not None and appended_ms < projection.start_ms:
                continue
            position = position_of(message)
            if message.value() is None and position.topic == self._names.control:
                continue  # a tombstone: the control command was removed
            try:
                if projection.facts:
                    item: Any = recorded(message, self._decode)
                    if not isinstance(item.event.fact, projection.facts) or is_copy(item, self._names):
                        continue
                    event_id = item.event.event_id
                else:
                    kind = projection.events[position.topic]
                    if kind.passes(message.value()):
                        continue
                    by_id = self._lookup.of_others if kind.foreign else self._lookup.by_id
                    plain = kind.decode(message.value(), self._lookup, by_id)
                    event_id = event_id_of(
                        dict(message.headers() or ()), position.topic, position.partition, position.offset
                    )
                    item = self._converters[position.topic](plain)
            except UnknownFact as exc:
                raise UnknownFact(
                    exc.fact, f"{position} carries the fact {exc.fact!r}: upgrade this projection"
                ) from exc
            except (SchemaError, BadEvent, ValueError) as exc:
                self.unreadable += 1
                LOG.error("%s is skipped by projection %s: %s", position, projection.name, exc)
                continue
            key = self._key(item, position)
            if key is not None:
                yield key, item, Where(event_id, position, appended_ms)

    def _key(self, item: Any, position: Position) -> Key | None:
        try:
            key = self._projection.key(item)
            if key is None:
                return None
            key = key if isinstance(key, tuple) else (key,)
            hash(key)
        except PERSONS as exc:
            raise failed(self._projection, "key=", position, exc) from exc
        if len(key) != len(self._columns):
            raise failed(
                self._projection,
                "key=",
                position,
                f"{key!r} does not have one value for each of {', '.join(self._columns)}",
            )
        return key


def _copied(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row) if _PLAIN.issuperset(map(type, row.values())) else copy.deepcopy(row)


class Fold:
    """Folds into one table: the live table, or a copy of it for `verify` and `rebuild`."""

    def __init__(self, projection: Projection, table: Table) -> None:
        self._projection, self.table = projection, table
        self._keys = list(table.primary_key.columns)
        self._names = [column.name for column in table.columns]
        self._key_names = [column.name for column in self._keys]
        # Values for those columns of a new row that the fold does not return. `Projection` refuses other kinds of
        # defaults.
        self._defaults = {
            column.name: None if column.default is None else column.default.arg  # type: ignore[attr-defined]
            for column in table.columns
            if column.default is not None or column.nullable
        }

    def apply(self, db: Connection, items: Sequence[Item]) -> None:
        """Fold items in their order. Each row is read and written once per batch. Raises a `JobledgerError` that names
        the record, if the fold fails or a column does not accept a value of its key or row."""
        at = {key: where.position for key, _, where in items}
        with self._fitting(db, at, {key: dict(zip(self._key_names, key, strict=True)) for key in at}):
            before = self._rows(db, list(at), at)
        # A fold may change its row argument, so it gets a copy; the row as read is needed for the comparison below.
        after = {key: row and _copied(row) for key, row in before.items()}
        fold, wants_where, names = self._projection.fold, self._projection.wants_where, self._key_names
        for key, item, where in items:
            row = after[key]
            # Columns that a fold does not return keep their values, within a batch and from one batch to the next.
            current = _copied(self._defaults) if row is None else row
            try:
                returned = fold(row, item, where) if wants_where else fold(row, item)
                after[key] = None if returned is None else {**current, **returned, **dict(zip(names, key, strict=True))}
            except PERSONS as exc:
                raise failed(self._projection, "fold", where.position, exc) from exc
        changed = {key: row for key, row in after.items() if row is not None and row != before.get(key)}
        with self._fitting(db, at, changed):
            self._write(db, list(changed.values()))
        deleted = [key for key, row in after.items() if row is None and before.get(key) is not None]
        if deleted:
            match = and_(*(column == bindparam(f"k_{column.name}") for column in self._keys))
            named = [dict(zip([f"k_{n}" for n in names], key, strict=True)) for key in deleted]
            db.execute(delete(self.table).where(match), named)

    @contextmanager
    def _fitting(
        self, db: Connection, at: Mapping[Key, Position], rows: Mapping[Key, Mapping[str, Any]]
    ) -> Iterator[None]:
        """Raise an error that names the record and the column if SQLAlchemy cannot convert a value of these rows."""
        try:
            yield
        except StatementError as exc:
            if isinstance(exc, DBAPIError):  # an error of the database itself
                raise
            for key, row in rows.items():
                for name, value in row.items():
                    try:
                        process = self.table.c[name].type.dialect_impl(db.dialect).bind_processor(db.dialect)
                        if process is not None:
                            process(value)
                    except Exception as why:
                        what = f"value {value!r:.200} for column {self.table.name}.{name} ({self.table.c[name].type!r})"
                        raise failed(self._projection, what, at[key], why) from why
            raise failed(self._projection, "batch", next(iter(at.values())), exc) from exc

    def _rows(self, db: Connection, keys: list[Key], at: Mapping[Key, Position]) -> dict[Key, dict[str, Any] | None]:
        rows: dict[Key, dict[str, Any] | None] = dict.fromkeys(keys)
        width = len(self._keys)
        for first in range(0, len(keys), KEYS_A_QUERY):
            some = keys[first : first + KEYS_A_QUERY]
            wanted = self._keys[0].in_([k[0] for k in some]) if width == 1 else tuple_(*self._keys).in_(some)
            for row in db.execute(select(self.table).where(wanted)).mappings():
                key = tuple(row[name] for name in self._key_names)
                if key not in rows:  # the key's row would never be found, and each batch would fold it from None
                    raise failed(
                        self._projection,
                        "key=",
                        at[some[0]],
                        f"the database stores one of {len(some)} keys like {some[0]!r} as {key!r}: give keys of the types of "
                        f"{', '.join(map(repr, self._keys))}",
                    )
                rows[key] = dict(row)
        return rows

    def _write(self, db: Connection, rows: list[dict[str, Any]]) -> None:
        # One statement for all rows with the same columns: columns that a fold does not return keep their values.
        by_columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            unknown = [name for name in row if name not in self._names]
            if unknown:
                raise JobledgerError(
                    f"projection {self._projection.name}: table {self.table.name} has no columns {unknown}, which the "
                    "fold returned"
                )
            by_columns.setdefault(tuple(sorted(row)), []).append(row)
        insert = postgresql.insert if db.dialect.name == "postgresql" else sqlite.insert
        for columns, some in by_columns.items():
            statement = insert(self.table)
            rest = {name: statement.excluded[name] for name in columns if name not in self._key_names}
            if rest:
                db.execute(statement.on_conflict_do_update(index_elements=self._keys, set_=rest), some)
            else:
                db.execute(statement.on_conflict_do_nothing(), some)
