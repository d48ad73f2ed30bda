"""Checks whether a value would be read unchanged after it was written as JSON or Avro. Pure.

JSON has no NaN, no sets and only text as keys, and a time's zone in it has whole minutes. A writer would change such
values silently, so they are detected before they are sent. Each check returns a message with the path of the value, or
None. A tuple that is read as a list is accepted, and so is a subclass of ``str``, ``int`` or ``float`` that is read as
the plain type.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec

#: Maximum number of characters of a value that a message shows.
_SHOWN = 80
_GONE: Any = object()
#: Types whose values JSON always represents exactly; types whose values are the same if they are equal.
_KEPT = frozenset({str, bool, type(None), msgspec.Raw})
_NUMBERS = frozenset({int, float})
_PLAIN = frozenset({str, bool, type(None), int, float})
_ROWS = frozenset({list, tuple})
#: Types whose values JSON represents exactly, if they were encoded without an error.
_WRITABLE = frozenset({*_KEPT, int, dt.date, uuid.UUID})
#: Suggestions for messages: what to send instead of a value of these types.
_INSTEAD: tuple[tuple[Any, str], ...] = (
    ((dt.datetime, dt.date, dt.time), "its isoformat()"),
    (dt.timedelta, "its total_seconds()"),
    ((decimal.Decimal, uuid.UUID), "its str()"),
    ((bytes, bytearray, memoryview), "base64 text"),
    (enum.Enum, "its value"),
    ((set, frozenset), "a list"),
)


def changed(given: Any, back: Any, path: str) -> str | None:
    """Return a message about the part of ``given`` that differs in ``back``, the value that a reader gets according to
    its annotations; None if nothing differs.

    A value that JSON represents exactly may have another type in ``back``, if the reader's annotation says so: text may
    be read as a datetime, a dict as a dataclass.
    """
    kind = type(given)
    if given is None or kind in _KEPT:
        return None
    if kind is list or kind is tuple:
        return _changed_items(given, back, path)
    if isinstance(given, enum.Enum):
        return None if back == given else _other(given, back, path)
    if isinstance(given, float) and not math.isfinite(given):
        return _no_number(given, path)
    if isinstance(given, int | float):
        return None if not isinstance(back, float) or back == given else _other(given, back, path)
    if isinstance(given, str):
        return None
    if isinstance(given, list | tuple):
        if hasattr(given, "_fields") and type(back) is not kind:
            return _other(given, back, path)
        return _changed_items(given, back, path)
    if isinstance(given, set | frozenset):
        return None if isinstance(back, set | frozenset) and back == given else _other(given, back, path)
    if isinstance(given, Mapping):
        return _changed_dict(given, back, path)
    names = _names(given)
    if names is not None:
        return _changed_record(given, back, path, names)
    return None if _equal(given, back) else _other(given, back, path)


def unwritable(value: Any, path: str) -> str | None:
    """Return a message about the part of ``value`` that JSON does not represent exactly for a reader without
    annotations, or None. A set as an array, a datetime as text and a record as an object are accepted."""
    if isinstance(value, float) and not math.isfinite(value):
        return _no_number(value, path)
    if isinstance(value, str):
        return _no_text(value, path)
    if value is None or isinstance(value, int | float | enum.Enum | msgspec.Raw):
        return None
    inner: Iterator[tuple[Any, str]]
    if isinstance(value, list | tuple | set | frozenset):
        inner = ((each, f"{path}[{n}]") for n, each in enumerate(value))
    elif isinstance(value, Mapping):
        if (why := _first(_no_text, ((key, f"a key of {path}") for key in value if isinstance(key, str)))) is not None:
            return why
        if not all(isinstance(key, str) for key in value) and len(as_json(dict.fromkeys(value))) < len(value):
            return (
                f"{path} has keys that become equal in JSON, where every key is text: {_shown(list(value))}. "
                "Use keys that differ as text"
            )
        inner = ((each, f"{path}[{key!r}]") for key, each in value.items())
    elif (names := _names(value)) is not None:
        inner = ((getattr(value, name, None), f"{path}.{name}") for name in names)
    else:
        kind = type(value)
        try:
            back = msgspec.json.decode(msgspec.json.encode(value), type=kind)
        except (TypeError, msgspec.MsgspecError):
            return None  # a type that only its own serialiser can write
        return None if _equal(value, back) else _other(value, back, path)
    return _first(unwritable, inner)


def surely_writable(value: Any) -> bool:
    """Return True if ``value``, which was already encoded as JSON, certainly has no part that `unwritable` would
    report. If False, call `unwritable`. Fast, as it is called for every job's result."""
    kind = type(value)
    if kind is list or kind is tuple:
        kinds = set(map(type, value))
        if kinds <= _WRITABLE:
            return True
        if kinds <= _ROWS:
            return surely_writable(list(chain.from_iterable(value)))
        return all(map(surely_writable, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(surely_writable, value.values()))
    if kind in _WRITABLE:
        return True
    if kind is float:
        return math.isfinite(value)
    if kind is dt.datetime:
        return value.tzinfo is None or value.tzinfo is dt.UTC
    names = _names_of(kind)  # type: ignore[arg-type]  # classes are hashable
    return names is not None and all(surely_writable(getattr(value, name, None)) for name in names)


def unsound(value: Any, path: str) -> str | None:
    """Return a message about the part of an event's plain values that is not the same for every reader, or None. Such
    parts are NaN and infinity, which no handler can get; a datetime without a zone, which means another moment on
    another machine; and text that UTF-8 cannot encode."""
    if isinstance(value, str):
        return _no_text(value, path)
    if isinstance(value, float):
        return None if math.isfinite(value) else _no_number(value, path)
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            return None
        zoned = value.replace(tzinfo=dt.UTC).isoformat()
        return f"{path} is {value.isoformat()}, without a time zone: add one, for example {zoned}"
    if isinstance(value, dict):
        message = _first(unsound, ((each, f"{path}.{name}") for name, each in value.items()))
        return message or _first(_no_text, ((name, f"a key of {path}") for name in value))
    if isinstance(value, list | tuple):
        return _first(unsound, ((each, f"{path}[{n}]") for n, each in enumerate(value)))
    return None


def plain_json(value: Any) -> Any:
    """Convert a value of a type that msgspec does not write itself; an ``enc_hook`` for msgspec. Raises `TypeError`."""
    if hasattr(value, "model_dump"):  # pydantic, where users have it
        return value.model_dump(mode="json")
    # Subclasses are converted with the base class's method, whether or not they override it.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TypeError(f"{type(value).__qualname__} is not a JSON type, dataclass, msgspec Struct or pydantic model")


def as_json(value: Any) -> Any:
    """Return a value as it is read from JSON without an annotation."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=plain_json))


def _first(check: Callable[[Any, str], str | None], values: Iterator[tuple[Any, str]]) -> str | None:
    return next(filter(None, (check(value, path) for value, path in values)), None)


def _changed_items(given: Any, back: Any, path: str) -> str | None:
    if isinstance(back, set | frozenset):  # the annotation is a set
        return _first(_uncarried, ((each, f"{path}[{n}]") for n, each in enumerate(given)))
    if not isinstance(back, list | tuple):
        back = as_json(given)
    if len(back) != len(given):
        return _other(given, back, path)
    n = 0
    for one, two in zip(given, back, strict=True):
        # Most items are numbers and texts, and there may be many. No path is created for these.
        kind = type(one)
        if not (kind in _KEPT or (kind in _NUMBERS and kind is type(two) and one == two) or _same_row(one, two)):
            message = changed(one, two, f"{path}[{n}]")
            if message is not None:
                return message
        n += 1  # noqa: SIM113  # cheaper than enumerate, which creates another tuple for each pair
    return None


def _same_row(one: Any, two: Any) -> bool:
    """Return whether ``two`` is the tuple ``one`` of numbers and texts, or a list of the same items."""
    if type(one) is not tuple or type(two) not in _ROWS:
        return False
    return _PLAIN.issuperset(map(type, one)) and one == tuple(two)


def _uncarried(value: Any, path: str) -> str | None:
    """Return a message about the part of a value that JSON does not represent without an annotation, or None."""
    return changed(value, as_json(value), path)


def _changed_dict(given: Mapping[Any, Any], back: Any, path: str) -> str | None:
    if not isinstance(back, dict):
        return _changed_fields(given, back, path)
    if all(isinstance(key, str) for key in given):
        unknown = next((key for key in given if key not in back), None)
        if unknown is not None and len(back) < len(given):
            return f"{path}: {unknown!r} is not one of its fields"
        # All keys exist, or the annotation converts the keys to another type; then their order is the same.
        values_read = back if unknown is None else dict(zip(given, back.values(), strict=False))
    else:
        lost = next((key for key in given if key not in back), _GONE)
        if lost is not _GONE or len(back) < len(given):
            key = lost if lost is not _GONE else next(key for key in given if not isinstance(key, str))
            return (
                f"{path} has the key {_shown(key)}, but the keys of a JSON object are text: they would arrive as "
                f"{_shown(list(back))}. Make them text, or give their type in the annotation: dict[{type(key).__name__}, …]"
            )
        values_read = back
    return next(filter(None, (changed(v, values_read[k], f"{path}[{k!r}]") for k, v in given.items())), None)


def _changed_fields(given: Mapping[Any, Any], back: Any, path: str) -> str | None:
    """Compare ``given``, a dict, with ``back``, the record that was read because of the annotation."""
    fields = _encoded(back)
    if fields is None:  # a pydantic model has its own rules for names, and those of another type are not known
        values = (
            (v, getattr(back, k, _GONE) if isinstance(k, str) else _GONE, f"{path}[{k!r}]") for k, v in given.items()
        )
        return next(filter(None, (_uncarried(v, p) if b is _GONE else changed(v, b, p) for v, b, p in values)), None)
    for key, value in given.items():
        if key not in fields:
            return f"{path}: {key!r} is not a field of {type(back).__qualname__}, which has {', '.join(fields)}"
        name = fields[key]
        if name and (message := changed(value, getattr(back, name), f"{path}[{key!r}]")):
            return message
    return None


def _changed_record(given: Any, back: Any, path: str, names: tuple[str, ...]) -> str | None:
    if type(back) is not type(given):
        return _other(given, back, path)
    for name in names:
        one, two = getattr(given, name, _GONE), getattr(back, name, _GONE)
        if one is not two and (message := changed(one, two, f"{path}.{name}")):
            return message
    return changed(getattr(given, "__pydantic_extra__", None), getattr(back, "__pydantic_extra__", None), path)


def _names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a record's fields (dataclass, Struct, pydantic model, class of attrs); None for other
    types."""
    return _names_of(type(value))  # type: ignore[arg-type]  # classes are hashable


@lru_cache(maxsize=256)
def _names_of(kind: type[Any]) -> tuple[str, ...] | None:
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if hasattr(kind, "model_fields") and hasattr(kind, "model_dump"):
        return tuple(kind.model_fields)
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(each.name for each in kind.__attrs_attrs__)
    return None


def _encoded(value: Any) -> dict[str, str] | None:
    """Return the names of a record's fields by their names in JSON; a Struct's tag has an empty name. None for a
    pydantic model, whose configuration decides which names it accepts, and for a value that is not a record."""
    kind = type(value)
    if issubclass(kind, msgspec.Struct):
        fields = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
        tag = kind.__struct_config__.tag_field
        return fields if tag is None else {tag: "", **fields}
    names = None if hasattr(kind, "model_fields") else _names(value)
    return None if names is None else dict(zip(names, names, strict=True))


def _equal(given: Any, back: Any) -> bool:
    if isinstance(given, dt.datetime) and isinstance(back, dt.datetime):
        if (given.utcoffset() is None) != (back.utcoffset() is None):
            return False
        # For Python a time in the hour that a clock repeats is never equal to a time of another zone.
        return given == back or (given.tzinfo is not None and given.astimezone(dt.UTC) == back.astimezone(dt.UTC))
    if isinstance(given, dt.time) and isinstance(back, dt.time) and (given.tzinfo is None) != (back.tzinfo is None):
        return False
    if isinstance(given, decimal.Decimal):  # compared as text, because a Decimal NaN equals nothing
        return isinstance(back, decimal.Decimal) and str(given) == str(back)
    compared: Any = type(given).__eq__
    if compared is object.__eq__:  # the type defines no equality
        return type(back) is type(given)
    return bool(given == back)


def _no_number(value: float, path: str) -> str:
    return f"{path} is {value!r}, but JSON has no such number: send None, or text"


def _no_text(value: str, path: str) -> str | None:
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return (
            f"{path} is {_shown(value)}, which has a lone surrogate, which UTF-8 cannot encode: replace it, for example with "
            "text.encode(errors='replace').decode()"
        )
    return None


def _other(given: Any, back: Any, path: str) -> str:
    kind = type(given)
    known = isinstance(back, kind)
    instead = next((text for kinds, text in _INSTEAD if isinstance(given, kinds)), "")
    if known:
        remedy = f"send {instead or 'text'}"
    else:
        remedy = f"use {kind.__qualname__} in the annotation" + (f", or send {instead}" if instead else "")
    return f"{path} is {_shown(given)} and would arrive as {_shown(back)}: {remedy}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a user's __repr__ may raise anything
        text = f"a {type(value).__qualname__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]} …"
