"""Writes and reads the Confluent frame of an Avro datum: ``00``, the schema's id in a registry as four bytes in big
endian, the datum.

This module handles only bytes: a registry knows which schema belongs to an id.
"""

from __future__ import annotations

MARK = b"\0"
#: Number of bytes before the datum.
HEAD = 5

#: Largest number of bytes of an id in an event that is checked without its schema. Jobledger's own ids have 36.
_ID_MOST = 1_000
_LONG_MOST = 10


def head(schema_id: int) -> bytes:
    """Return the bytes before a datum of this schema. Raises `ValueError` for an id that does not fit into four
    bytes."""
    if not 0 <= schema_id < 1 << 32:
        raise ValueError(f"{schema_id} is not a schema id")
    return MARK + schema_id.to_bytes(4, "big")


def id_of(value: bytes) -> int:
    """Return the schema id in a framed value's head."""
    return int.from_bytes(value[1:HEAD], "big")


def is_framed(value: bytes) -> bool:
    """Return whether a value has a head and more bytes after it. Other data may also begin with a zero byte."""
    return value[:1] == MARK and len(value) > HEAD


def looks_like_an_event(value: bytes) -> bool:
    """Return whether the datum begins as every event does, in any version of the schema: two ids that are text, and
    three numbers.

    For a frame whose schema is not available. If the datum looks like an event, the value may be a valid record; if
    not, the value is not an event. It is very unlikely that other data has two lengths that match two printable texts.
    """
    try:
        at = _after_text(value, _after_text(value, HEAD, 1), 0)  # the job id of `RecordRejected` is empty
        for _ in range(3):
            at = _after_long(value, at)[1]
    except (ValueError, IndexError):
        return False
    return True


def _after_text(value: bytes, at: int, least: int) -> int:
    length, begin = _after_long(value, at)
    end = begin + length
    if not least <= length <= _ID_MOST or end > len(value) or not value[begin:end].decode().isprintable():
        raise ValueError("no id")
    return end


def _after_long(value: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    for end in range(at, at + _LONG_MOST):
        group = value[end]
        number |= (group & 0x7F) << shift
        if group < 0x80:
            return number >> 1 ^ -(number & 1), end + 1
        shift += 7
    raise ValueError("no number")
