"""Converts the defaults of users' fields to the JSON form that Avro requires, and back to the values that a reader of
the log gets. Pure.

In Avro a union's default has the type of the first branch, and a logical type's default has the form of the underlying
type: days, microseconds.
"""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Mapping
from typing import Any

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EPOCH_DAY = _EPOCH.date().toordinal()
_MICROSECOND = dt.timedelta(microseconds=1)
_LONG = 2**63

#: Records that are already defined, by their full name.
Records = Mapping[str, Mapping[str, Any]]


def avro_default(schema: Any, value: Any, records: Records) -> tuple[Any, Any]:
    """Return a field's schema, with the default's branch first if it is a union, and the default in Avro's form.

    ``value``: the default as plain values, with datetimes, dates and bytes unchanged. Raises `ValueError` with the
    reason if Avro cannot represent it.
    """
    if not isinstance(schema, list):
        return schema, _json(schema, value, records)
    why = ""
    # "double" last, so that a whole number is a long if the union has one.
    for branch in sorted(schema, key=lambda each: each == "double"):
        try:
            default = _json(branch, value, records)
        except ValueError as exc:
            why = why if branch == "null" else str(exc)
            continue
        rest = [each for each in schema if each != branch and each != "null"]
        null = ["null"] if "null" in schema and branch != "null" else []
        return [branch, *rest, *null], default
    raise ValueError(why)


def _json(schema: Any, value: Any, records: Records) -> Any:
    if isinstance(schema, list):
        # An inner union keeps the order of its branches: only the order in the field with the default can be changed.
        return _json(schema[0], value, records)
    kind, logical = (schema["type"], schema.get("logicalType")) if isinstance(schema, dict) else (schema, None)
    match kind, value:
        case ("null", None):
            return None
        case ("boolean", bool()):
            return value
        case (("long" | "double"), bool()):
            pass
        case ("long", dt.datetime()) if logical == "timestamp-micros":
            if value.tzinfo is None:
                raise ValueError("it has no time zone, so its meaning depends on the machine; give it a tzinfo")
            return (value - _EPOCH) // _MICROSECOND
        case ("long", int()) if logical is None and -_LONG <= value < _LONG:
            return value
        case ("double", float() | int()) if math.isfinite(value):
            return float(value)
        case ("string", str()):
            return value
        case ("bytes", bytes()):
            return value.decode("latin-1")
        case ("int", dt.date()) if not isinstance(value, dt.datetime):
            return value.toordinal() - _EPOCH_DAY
        case ("array", list() | tuple()):
            return [_json(schema["items"], each, records) for each in value]
        case ("map", dict()):
            return {name: _json(schema["values"], each, records) for name, each in value.items()}
        case (_, dict()) if (record := _record(schema, records)) is not None:
            return {field["name"]: _of_field(field, value, records) for field in record["fields"]}
    raise ValueError(f"{value!r} is not of type {logical or kind}, or not of the first of several types")


def _record(schema: Any, records: Records) -> Mapping[str, Any] | None:
    if isinstance(schema, dict):
        return schema if schema["type"] == "record" else None
    return records.get(schema)


def _of_field(field: Mapping[str, Any], value: Mapping[str, Any], records: Records) -> Any:
    if field["name"] not in value and "default" in field:  # some classes leave out fields whose value is their default
        return field["default"]
    return _json(field["type"], value.get(field["name"]), records)


def understood(parsed: Any) -> Any:
    """Convert each default in ``parsed``, fastavro's form of a schema, to the value that a reader gets; return
    ``parsed``.

    fastavro returns defaults as they are in the schema: a number instead of a date, for example.
    """
    _understand(parsed, {})
    return parsed


def _understand(node: Any, records: dict[str, Mapping[str, Any]]) -> None:
    if isinstance(node, list):
        for each in node:
            _understand(each, records)
    if not isinstance(node, dict):
        return
    for field in node.get("fields", ()):
        _understand(field["type"], records)
        if "default" in field:
            field["default"] = _value(field["type"], field["default"], records)
    for inner in ("items", "values"):
        _understand(node.get(inner), records)
    if node.get("type") == "record":
        records[node["name"]] = node


def _value(schema: Any, default: Any, records: Records) -> Any:
    if isinstance(schema, list):
        schema = schema[0]
    kind, logical = (schema["type"], schema.get("logicalType")) if isinstance(schema, dict) else (schema, None)
    if logical == "date":
        return dt.date.fromordinal(default + _EPOCH_DAY)
    if logical == "timestamp-micros":
        return _EPOCH + default * _MICROSECOND
    if logical == "uuid":
        return uuid.UUID(default)
    if kind == "bytes":
        return default.encode("latin-1")
    if kind == "array":
        return [_value(schema["items"], each, records) for each in default]
    if kind == "map":
        return {name: _value(schema["values"], each, records) for name, each in default.items()}
    record = _record(schema, records)
    if record is not None:
        return {field["name"]: _value(field["type"], default[field["name"]], records) for field in record["fields"]}
    return default
