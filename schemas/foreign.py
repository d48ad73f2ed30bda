"""Reads Avro records of other programs as plain values of one of the app's event classes. Pure.

A record is read with the schema with which it was written. Fields that the class does not have are left out. The others
must fit the class's own schema by field name; the names of records, enums and fixed types do not matter. This is
checked once per schema: a field that cannot be read is reported then, and not for each record.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import fastavro

from jobledger.errors import IncompatibleEvent, NotAnEvent

#: Converts a value that fastavro has read to a value that the class accepts; None: no conversion is needed.
Fit = Callable[[Any], Any] | None

_TEXT = "string"
_NUMBERS = {"long": ("int", "long"), "double": ("int", "long", "float", "double")}
_TIMES = ("timestamp-millis", "timestamp-micros", "local-timestamp-millis", "local-timestamp-micros")


class ForeignSchema:
    """Reads records of one writer's schema ``written`` as values of the class ``name`` with the schema ``ours``.

    Raises `IncompatibleEvent` with the name of a field that does not fit; `ValueError` or fastavro's errors if
    ``written`` is not a schema.
    """

    def __init__(self, name: str, written: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        self._name = name
        theirs = fastavro.parse_schema(json.loads(json.dumps(written)))
        mine = fastavro.parse_schema(json.loads(json.dumps(ours)))
        assert isinstance(theirs, dict)
        self._theirs, self._ours = _named(theirs), _named(mine)
        self._known: dict[tuple[int, int], list[Fit]] = {}
        #: The writer's types whose logical type is kept because the class accepts it, by identity.
        self._converted: set[int] = set()
        fit = self._fit(theirs, mine, name)
        self._fit_record: Callable[[Any], Any] = fit or (lambda value: value)
        # Parsed again without the logical types that `_fit` removed: the class takes the number as it was written.
        plain = {key: value for key, value in theirs.items() if not key.startswith("__")}
        self._schema = fastavro.parse_schema(json.loads(json.dumps(plain)))

    def read(self, data: bytes) -> dict[str, Any]:
        """Return a datum's values by field. Raises `NotAnEvent` for a value that the class does not accept, and
        fastavro's errors for bytes that do not have the schema."""
        return self._fit_record(fastavro.schemaless_reader(io.BytesIO(data), self._schema, None))  # type: ignore[no-any-return]

    # -- compare the schemas ------------------------------------------------------------------------------------------

    def _fit(self, theirs: Any, ours: Any, where: str) -> Fit:
        theirs, ours = _resolved(theirs, self._theirs), _resolved(ours, self._ours)
        if isinstance(ours, list):
            return self._fit_one_of(theirs, ours, where)
        if isinstance(theirs, list):
            return self._fit_union(theirs, ours, where)
        kind, wanted = _kind(theirs), _kind(ours)
        if wanted == "record" and kind == "record":
            return self._fit_fields(theirs, ours, where)
        if wanted == "array" and kind == "array":
            each = self._fit(theirs["items"], ours["items"], f"{where}[]")
            return None if each is None else lambda values: [each(value) for value in values]
        if wanted == "map" and kind == "map":
            of = self._fit(theirs["values"], ours["values"], f"{where}{{}}")
            return None if of is None else lambda values: {key: of(value) for key, value in values.items()}
        return self._fit_plain(theirs, ours, where)

    def _fit_fields(self, theirs: Any, ours: Any, where: str) -> Fit:
        known = self._known.get((id(theirs), id(ours)))
        if known is not None:  # a record that contains its own type
            return lambda value: known[0](value)  # type: ignore[misc]  # set below, before the first value
        holder = self._known[id(theirs), id(ours)] = []
        fields = {alias: field for field in theirs["fields"] for alias in field.get("aliases", ())}
        fields |= {field["name"]: field for field in theirs["fields"]}
        taken: list[tuple[str, str, Fit]] = []
        for field in ours["fields"]:
            name = field["name"]
            written = fields.get(name)
            if written is not None:
                taken.append((name, written["name"], self._fit(written["type"], field["type"], f"{where}.{name}")))
            elif "default" not in field:
                raise IncompatibleEvent(
                    f"{where}.{name}: the schema of the topic's records has no such field. Give it a default in the class, or "
                    f"use the name in that schema: {', '.join(sorted(fields))}"
                )

        def fit(record: Any) -> Any:
            return {name: record[key] if of is None else of(record[key]) for name, key, of in taken}

        holder.append(fit)
        return fit

    def _fit_one_of(self, theirs: Any, ours: list[Any], where: str) -> Fit:
        """Fit ``theirs`` to a union ``ours``: a type that may be null, or one of several plain types."""
        branches = [each for each in ours if each != "null"]
        if theirs == "null" and len(branches) < len(ours):
            return None
        if isinstance(theirs, list):
            fits = [self._fit_one_of(each, ours, where) for each in theirs if each != "null"]
            return self._of_several(fits, len(branches) < len(ours), where)
        problem: IncompatibleEvent | None = None
        # Branches of the same type first, before those that need a conversion.
        for branch in sorted(branches, key=lambda each: _kind(_resolved(each, self._ours)) != _kind(theirs)):
            try:
                return self._fit(theirs, branch, where)
            except IncompatibleEvent as exc:
                problem = exc
        raise problem or self._unfit(theirs, ours, where)

    def _fit_union(self, theirs: list[Any], ours: Any, where: str) -> Fit:
        """Fit a union ``theirs``. A null is refused only when a record has a null, because many schemas allow null in
        every field although it is never written."""
        fits = [self._fit(each, ours, where) for each in theirs if each != "null"]
        return self._of_several(fits, "null" not in theirs or ours == "null", where)

    def _of_several(self, fits: list[Fit], nullable: bool, where: str) -> Fit:
        changed = [fit for fit in fits if fit is not None]
        if len(fits) > 1 and changed:
            raise IncompatibleEvent(
                f"{where}: the topic's records have one of {len(fits)} types there, which a class cannot distinguish. Leave "
                "the field out of the class"
            )
        fit = changed[0] if changed else None

        def of(value: Any) -> Any:
            if value is not None:
                return value if fit is None else fit(value)
            if nullable:
                return None
            raise NotAnEvent(f"{where} is null, but its class does not allow null: annotate it with | None")

        return fit if nullable and fit is None else of

    def _fit_plain(self, theirs: Any, ours: Any, where: str) -> Fit:
        kind, wanted = _kind(theirs), _kind(ours)
        logical, meant = _logical(theirs), _logical(ours)
        times = (
            (kind == "long" and logical in _TIMES)
            if meant == "timestamp-micros"
            else (kind, logical) == ("int", "date")
        )
        if meant in ("timestamp-micros", "date") and times:
            self._converted.add(id(theirs))
            return None
        if meant in ("timestamp-micros", "date"):
            raise self._unfit(theirs, ours, where)
        if kind in _NUMBERS.get(wanted, ()) or (wanted == "bytes" and kind in ("bytes", "fixed")):
            if logical is not None:
                if id(theirs) in self._converted:  # two fields of the class need this type in different forms
                    raise self._unfit(theirs, ours, where)
                del theirs["logicalType"]  # read the number as it was written
            return None
        if wanted == "bytes" and kind == _TEXT:
            return lambda text: text.encode()
        if wanted == _TEXT and logical in ("decimal", "uuid"):
            self._converted.add(id(theirs))
            return _uuid if kind == "fixed" and logical == "uuid" else str
        if wanted == _TEXT and kind in (_TEXT, "enum"):
            return None
        if wanted == _TEXT and kind == "bytes" and logical is None:
            return _text
        if kind == wanted and kind in ("boolean", "null"):
            return None
        raise self._unfit(theirs, ours, where)

    def _unfit(self, theirs: Any, ours: Any, where: str) -> IncompatibleEvent:
        return IncompatibleEvent(
            f"{where}: the topic's records have {_shown(theirs)} there, but its class takes {_shown(ours)}. Annotate the field "
            "with the other type, or leave it out of the class"
        )


def _uuid(value: bytes) -> str:
    return str(uuid.UUID(bytes=value))


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise NotAnEvent(f"{value[:20]!r} is not UTF-8 text: {exc}") from exc


def _named(schema: Any) -> dict[str, Any]:
    """Return every type that is defined in a parsed schema, by its full name."""
    types: dict[str, Any] = {}

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for each in node:
                walk(each)
        elif isinstance(node, dict):
            if "name" in node and node.get("type") in ("record", "enum", "fixed", "error"):
                types[node["name"]] = node
            for key in ("type", "items", "values"):
                walk(node.get(key))
            for field in node.get("fields", ()):
                walk(field["type"])

    walk(schema)
    return types


def _resolved(schema: Any, named: Mapping[str, Any]) -> Any:
    return named.get(schema, schema) if isinstance(schema, str) else schema


def _kind(schema: Any) -> str:
    kind = schema["type"] if isinstance(schema, dict) else schema
    return kind if isinstance(kind, str) else "union"


def _logical(schema: Any) -> str | None:
    return schema.get("logicalType") if isinstance(schema, dict) else None


def _shown(schema: Any) -> str:
    if isinstance(schema, list):
        return " or ".join(map(_shown, schema))
    logical = _logical(schema)
    return _kind(schema) if logical is None else f"{_kind(schema)} ({logical})"
