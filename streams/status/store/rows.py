"""Converts a job's fold state into its row, and back. Pure."""

from __future__ import annotations

import datetime as dt
import hashlib
from typing import Any

import msgspec

from jobledger.fingerprint import fingerprint
from jobledger.job import Life, Visible, actor
from jobledger.plan import PlanStatus
from jobledger.worker_status import WorkerStatus

#: The columns of a row, in the order of `row`. ``carried`` is written separately. The columns from number `RARE` on are
#: null for most jobs.
COLUMNS = (
    "job_id",
    "state",
    "task",
    "queue",
    "run",
    "attempt",
    "release",
    "submitted_ms",
    "started_ms",
    "ended_ms",
    "version",
    "slots",
    "due_ms",
    "error_type",
    "error_message",
    "fingerprint",
    "key",
    "actor",
    "result",
)
RARE = COLUMNS.index("due_ms")
_SLOTS, _RESULT = COLUMNS.index("slots"), COLUMNS.index("result")

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
    head, start, end, error = life.head, life.start, life.end, seen.error
    result = who = None
    if end is not None:
        who = end.by
        if end.result is not None:
            # A result can be large, so it is stored only once, in its own column.
            result = end.result
            life = _replace(life, end=_replace(end, result=None))
    if who is None and (head.redrive is not None or head.copy is not None):
        who = actor(life)
    return (
        job_id,
        seen.state._value_,  # a plain str: the driver is slow with subclasses
        key_text(seen.task),
        key_text(seen.queue),
        seen.run,
        seen.attempt,
        seen.release,
        seen.since_ms,
        seen.started_ms,
        seen.ended_ms,
        None if start is None or start.version is None else key_text(start.version),
        _encode(life),
        seen.due_ms,
        None if error is None else plain(error.type),
        None if error is None else plain(error.message[:MESSAGE_MOST]),
        None if error is None else fingerprint(error),
        None if head.key is None else key_text(head.key),
        None if who is None else plain(who),
        result,
    )


#: The columns of a plan's row, in the order of `plan_row`.
PLAN_COLUMNS = (
    "plan",
    "action",
    "state",
    "actor",
    "reason",
    "opened_ms",
    "ended_ms",
    "matched",
    "done",
    "skipped",
    "failed",
    "slots",
)

_decode_plan = msgspec.msgpack.Decoder(PlanStatus).decode


def plan_row(plan: PlanStatus) -> Row:
    """Return the row of a plan."""
    return (
        key_text(plan.plan),
        plain(plan.action),
        plan.state.value,
        plain(plan.by),
        None if plan.reason is None else plain(plan.reason),
        plan.opened_ms,
        plan.ended_ms,
        plan.matched,
        plan.done,
        plan.skipped,
        plan.failed,
        _encode(plan),
    )


def plan_of(slots: bytes) -> PlanStatus:
    """Return the plan of a row's column ``slots``."""
    return _decode_plan(slots)


#: The columns of a worker's row, in the order of `worker_row`.
WORKER_COLUMNS = (
    "worker",
    "host",
    "pid",
    "version",
    "reported_ms",
    "started_ms",
    "slots_count",
    "running",
    "slots",
)

_decode_worker = msgspec.msgpack.Decoder(WorkerStatus).decode


def worker_row(status: WorkerStatus) -> Row:
    """Return the row of a worker."""
    return (
        key_text(status.worker),
        plain(status.host),
        status.pid,
        None if status.version is None else plain(status.version),
        _ms(status.reported_at),
        _ms(status.started_at),
        status.slots,
        status.running,
        _encode(status),
    )


def worker_of(slots: bytes) -> WorkerStatus:
    """Return the worker of a row's column ``slots``."""
    return _decode_worker(slots)


def _ms(moment: dt.datetime) -> int:
    return (moment - _EPOCH) // dt.timedelta(milliseconds=1)


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def life_of(slots: bytes, result: bytes | None) -> Life:
    """Return the fold state of a row's columns ``slots`` and ``result``."""
    life = _decode(slots)
    if result is not None and life.end is not None:
        life = _replace(life, end=_replace(life.end, result=result))
    return life


def slots_of(row: Row) -> bytes:
    """Return the column ``slots`` of a row with all columns."""
    slots: bytes = row[_SLOTS]
    return slots


def life_of_row(row: Row) -> Life:
    """Return the fold state of a row with all columns."""
    return life_of(row[_SLOTS], row[_RESULT])
