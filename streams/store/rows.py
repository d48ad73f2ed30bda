"""A job's row and its fold state, there and back. Pure."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from jobledger.job import Life, Visible

#: The columns a row is written with, in the order of `row`; ``carried`` is set apart.
COLUMNS = (
    "job_id",
    "state",
    "task",
    "queue",
    "run",
    "attempt",
    "release",
    "submitted_ms",
    "due_ms",
    "started_ms",
    "ended_ms",
    "error_type",
    "error_message",
    "result",
    "slots",
)

#: Text columns are cut here: they are for SQL and lists, the slots have the whole.
MESSAGE_MOST = 500

#: Characters of a text that is a key, at most: three of them, four bytes each, must fit an index entry of PostgreSQL.
KEY_MOST = 200

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Life).decode
_replace = msgspec.structs.replace


#: A job's row, in the order of `COLUMNS`.
Row = tuple[Any, ...]


def plain(text: str) -> str:
    """``text`` without the one character that PostgreSQL's text cannot hold."""
    return text.replace("\0", "\ufffd") if "\0" in text else text


def key_text(text: str) -> str:
    """``text`` as it stands in keys and is asked for: itself, or if it is too long its
    beginning and a digest of it all."""
    if len(text) > KEY_MOST:
        text = f"{text[: KEY_MOST - 33]}…{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"
    return plain(text)


def row(job_id: str, life: Life, seen: Visible) -> Row:
    """The row of a job; ``seen`` is the life's projection."""
    end, error = life.end, seen.error
    result = None
    if end is not None and end.result is not None:
        # A result can be large: it is kept once, in its own column.
        result = end.result
        life = _replace(life, end=_replace(end, result=None))
    return (
        job_id,
        seen.state._value_,  # a plain str: the driver adapts subclasses, slowly
        key_text(seen.task),
        key_text(seen.queue),
        seen.run,
        seen.attempt,
        seen.release,
        seen.since_ms,
        seen.due_ms,
        seen.started_ms,
        seen.ended_ms,
        None if error is None else plain(error.type),
        None if error is None else plain(error.message[:MESSAGE_MOST]),
        result,
        _encode(life),
    )


def life_of(slots: bytes, result: bytes | None) -> Life:
    """The fold state of a row."""
    life = _decode(slots)
    if result is not None and life.end is not None:
        life = _replace(life, end=_replace(life.end, result=result))
    return life


def life_of_row(row: Row) -> Life:
    """The fold state of a whole row."""
    return life_of(row[-1], row[-2])
