"""Computes the expected status of a job from its records, and reads the status table's rows with plain SQL.

The rule is that of docs/reference.md: the status is the outcome of the latest run if there is an outcome, else the
job's last state. This module must not use the fold of the status table.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jobledger.audit.records import Record

TERMINAL_RANK = {"JobSucceeded": 0, "JobFailed": 1, "JobCancelled": 2, "JobExpired": 3}
TERMINAL_STATE = {
    "JobSucceeded": "succeeded",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
    "JobExpired": "expired",
}
ENDED = set(TERMINAL_STATE.values())

_PHASE = {"JobSubmitted": 0, "JobDue": 1, "JobStarted": 2, "JobProgressed": 2, "JobRetried": 3, "JobSnoozed": 3}
_CLOSED = 3
_STATE = {"JobDue": "queued", "JobStarted": "running", "JobProgressed": "running", "JobRetried": "retrying"}
#: Facts that count only on the lifecycle topic. The worker of a leased job sends them as reports to the coordinator,
#: which drops a report if the lease is over.
_ON_LIFECYCLE = {*TERMINAL_RANK, "JobRetried", "JobSnoozed"}

#: Results with at most this many bytes are compared as text, longer results by their digest.
RESULT_MOST = 200
#: Maximum number of characters of an id or name in the table. Of a longer id or name, the table has the beginning and a
#: digest, with these numbers of characters.
KEY_MOST, KEY_HEAD, KEY_DIGEST = 200, 167, 32


class Final(NamedTuple):
    """A job's last state. ``result``: JSON text, or a digest. ``error``: the error's type, for a failed job."""

    state: str
    task: str
    queue: str
    run: int
    attempt: int
    release: int
    result: str | None = None
    error: str | None = None


#: Prefix of the keys in `meta` with the times up to which rows of ended jobs were removed, by state.
_REMOVED = "removed:"


def feeds(record: Record) -> bool:
    """Return whether a record affects its job's state."""
    if record.fact in _ON_LIFECYCLE:
        return record.topic.partition(".")[2] == "lifecycle"  # not "shop.jobs.lifecycle"
    return record.fact in _PHASE


def final(records: Iterable[Record]) -> Final | None:
    """Return a job's last state according to all of its records; None if none of them affects the state."""
    life = sorted(filter(feeds, records), key=lambda r: r.place)
    if not life:
        return None
    run = max(r.head["run"] for r in life)
    life = [r for r in life if r.head["run"] == run]
    ends = sorted((TERMINAL_RANK[r.fact], *r.place, r) for r in life if r.fact in TERMINAL_RANK)
    if ends:
        last: Record = ends[0][-1]
        state = TERMINAL_STATE[str(last.fact)]
    else:
        last = _last(life)
        state = _STATE.get(str(last.fact), "scheduled")
        if last.fact == "JobSubmitted" and last.body["delay_ms"] is None and last.body["due_at"] is None:
            state = "queued"
    head, body = last.head, last.body
    result = result_text(body["result"]) if last.fact == "JobSucceeded" else None
    error = body["error"]["type"].replace("\0", "\ufffd") if last.fact in ("JobFailed", "JobRetried") else None
    task, queue = stored(head["task"]), stored(head["queue"])
    return Final(state, task, queue, head["run"], head["attempt"], head["release"], result, error)


def past(records: Iterable[Record], limits: Mapping[str, int]) -> bool:
    """Return whether the status table may have removed a job's row: the outcome that it shows was appended before the
    time up to which rows of its state were removed. ``limits``: these times in ms, by state."""
    life = list(filter(feeds, records))
    run = max((r.head["run"] for r in life), default=0)
    ends = sorted(
        (TERMINAL_RANK[r.fact], *r.place, r.at) for r in life if r.head["run"] == run and r.fact in TERMINAL_RANK
    )
    if not ends:
        return False
    rank, *_, at = ends[0]
    return any(rank == TERMINAL_RANK[fact] and at < limits.get(state, 0) for fact, state in TERMINAL_STATE.items())


def _last(life: list[Record]) -> Record:
    """Return the fact that determines the state of a job without an outcome.

    ``life``: the job's facts that affect its state, in the order of their positions.
    """
    top = max((r.head["release"], r.head["attempt"]) for r in life)
    life = [r for r in life if (r.head["release"], r.head["attempt"]) == top]
    closing = [r for r in life if _PHASE[str(r.fact)] == _CLOSED]
    if closing and all(r.body.get("in_place") for r in closing):
        # The release continues: after a snooze with the same attempt, after a retry with the next one. So the last
        # start, retry or snooze of this attempt counts.
        return [r for r in life if r in closing or r.fact == "JobStarted"][-1]
    closing = [r for r in closing if not r.body.get("in_place")]
    return closing[0] if closing else max(life, key=lambda r: _PHASE[str(r.fact)])


def result_text(raw: bytes | None) -> str | None:
    """Return a result in the form in which results are compared. A result in this form is returned unchanged."""
    if raw is None:
        return None
    if len(raw) > RESULT_MOST:
        return "sha256:" + hashlib.sha256(raw).hexdigest()
    return raw.decode("utf-8", "backslashreplace")


def stored(text: str) -> str:
    """Return an id or name in the form in which the table stores it: see docs/reference.md, "Status table"."""
    if len(text) > KEY_MOST:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:KEY_DIGEST]
        text = f"{text[:KEY_HEAD]}…{digest}"
    return text.replace("\0", "\ufffd")


class Row(NamedTuple):
    """A job's row. ``carried``: a rebuild copied the row, because the log no longer had the job's beginning."""

    job_id: str
    final: Final
    submitted_ms: int
    carried: bool


class StatusFile:
    """A status table, or a copy of one, in a SQLite file. Close it after use."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        self._connection.row_factory = sqlite3.Row

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def offsets(self) -> dict[tuple[str, int], int]:
        """Return for each partition the next offset that the table will read."""
        rows: list[Any] = self._connection.execute("SELECT topic, partition, next_offset FROM offsets").fetchall()
        return {(topic, partition): offset for topic, partition, offset in rows}

    def removed(self) -> dict[str, int]:
        """Return for each state the time in ms up to which rows of ended jobs were removed."""
        rows: list[Any] = self._connection.execute(
            "SELECT key, value FROM meta WHERE key LIKE ?", (f"{_REMOVED}%",)
        ).fetchall()
        return {key.removeprefix(_REMOVED): int(value) for key, value in rows}

    def rows(self) -> Iterator[Row]:
        """Yield every row. The rows are sorted by the bytes of their job ids."""
        for row in self._connection.execute("SELECT * FROM jobs ORDER BY job_id"):
            final_state = Final(
                str(row["state"]),
                row["task"],
                row["queue"],
                row["run"],
                row["attempt"],
                row["release"],
                result_text(row["result"]),
                row["error_type"],
            )
            yield Row(str(row["job_id"]), final_state, row["submitted_ms"], bool(row["carried"]))


class Difference(NamedTuple):
    """A field whose values differ between the log and the table; None: the log or the table has no such job."""

    job_id: str
    field: str
    log: Any
    table: Any


def differences(job_id: str, log: Final | None, kept: Final | None) -> list[Difference]:
    """Return the fields in which the two states differ."""
    if log is None or kept is None:
        return [] if log is kept else [Difference(job_id, "job", log and log.state, kept and kept.state)]
    pairs = zip(Final._fields, log, kept, strict=True)
    return [Difference(job_id, name, a, b) for name, a, b in pairs if a != b]
