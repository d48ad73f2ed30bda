"""A job's row and its fold state, there and back. Pure."""

from __future__ import annotations

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

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Life).decode
_replace = msgspec.structs.replace


#: A job's row, in the order of `COLUMNS`.
Row = tuple[Any, ...]


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
        seen.task,
        seen.queue,
        seen.run,
        seen.attempt,
        seen.release,
        seen.since_ms,
        seen.due_ms,
        seen.started_ms,
        seen.ended_ms,
        None if error is None else error.type,
        None if error is None else error.message[:MESSAGE_MOST],
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
