"""Converts a job's fold state into its row, and back. Pure."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from jobledger.job import Life, Visible

#: The columns of a row, in the order of `row`. ``carried`` is written separately.
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

#: Largest number of characters of an error message in its column, which is for SQL and lists. The column ``slots`` has
#: the whole message.
MESSAGE_MOST = 500

#: Largest number of characters of a text in a key: three such texts, with four bytes a character, must fit into an
#: index entry of PostgreSQL.
KEY_MOST = 200

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Life).decode
_replace = msgspec.structs.replace


#: A job's row, in the order of `COLUMNS`.
Row = tuple[Any, ...]


def plain(text: str) -> str:
    """Return ``text`` with U+FFFD for NUL, the only character that PostgreSQL's text type cannot store."""
    return text.replace("\0", "\ufffd") if "\0" in text else text


def key_text(text: str) -> str:
    """Return ``text`` as it is stored and searched in keys. A text that is too long is cut and ends with a digest of
    the whole text."""
    if len(text) > KEY_MOST:
        text = f"{text[: KEY_MOST - 33]}…{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"
    return plain(text)


def is_changed(text: str) -> bool:
    """Return whether a key of the table is not the text that it stands for, because `key_text` had to change it."""
    return "\ufffd" in text or (len(text) == KEY_MOST and text[KEY_MOST - 33] == "…")


def row(job_id: str, life: Life, seen: Visible) -> Row:
    """Return the row of a job. ``seen``: the projection of ``life``."""
    end, error = life.end, seen.error
    result = None
    if end is not None and end.result is not None:
        # A result can be large, so it is stored only once, in its own column.
        result = end.result
        life = _replace(life, end=_replace(end, result=None))
    return (
        job_id,
        seen.state._value_,  # a plain str: the driver is slow with subclasses
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
    """Return the fold state of a row's columns ``slots`` and ``result``."""
    life = _decode(slots)
    if result is not None and life.end is not None:
        life = _replace(life, end=_replace(life.end, result=result))
    return life


def life_of_row(row: Row) -> Life:
    """Return the fold state of a row with all columns."""
    return life_of(row[-1], row[-2])
