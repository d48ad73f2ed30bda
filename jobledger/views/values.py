"""Values as JSON builtins. The values may come from a log that anybody can write to, so every value has a JSON form.

This module imports only what every command needs anyway, so that `jobledger --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobledger.errors import text_of

#: Maximum depth at which values are shown; deeper nesting makes JSON writers and readers fail.
NESTED_MOST = 100


def jsonable(value: Any) -> Any:
    """Convert ``value`` to JSON builtins: structs to objects, bytes to the JSON they contain, enums to their value.

    Bytes that are not JSON become text, and values nested more than `NESTED_MOST` deep become ``"…"``.
    """
    import msgspec

    def unknown(other: Any) -> Any:
        return text_of(other)

    return msgspec.to_builtins(_opened(value), enc_hook=unknown, str_keys=True)


def _opened(value: Any, depth: int = 0) -> Any:
    """Replace bytes that are JSON (arguments, results) with the JSON value, since base64 would not be readable."""
    import msgspec

    if isinstance(value, bytes):
        try:
            held = msgspec.json.decode(value)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return value.decode("utf-8", "backslashreplace")
        deep = value.count(b"[") + value.count(b"{") > NESTED_MOST
        return _opened(held, depth) if deep else held
    if isinstance(value, msgspec.Struct):
        return {name: _opened(getattr(value, name), depth + 1) for name in value.__struct_fields__}
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return value
    if depth > NESTED_MOST:
        return "…"
    if isinstance(value, Mapping):
        return {key: _opened(each, depth + 1) for key, each in value.items()}
    return [_opened(each, depth + 1) for each in value]


def iso(micros: int) -> str | int:
    """Format microseconds since the epoch as ISO 8601 in UTC. Return the number itself if it is outside the
    calendar."""
    import datetime as dt

    try:
        return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=micros)).isoformat()
    except OverflowError:
        return micros
