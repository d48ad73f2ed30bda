"""The naive fold: every fact of a job in a list, sorted, looked at. And the status table, read with nothing but SQL.

Imports nothing of Jobledger. Part of `independent`.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.acceptance.rawlog import Record

TERMINAL_RANK = {"JobSucceeded": 0, "JobFailed": 1, "JobCancelled": 2, "JobExpired": 3}
TERMINAL_STATE = {
    "JobSucceeded": "succeeded",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
    "JobExpired": "expired",
}
ENDED = set(TERMINAL_STATE.values())


class Final(NamedTuple):
    """What became of a job. ``result``: JSON text. ``error``: the type of the error of a failed job."""

    state: str
    task: str
    queue: str
    run: int
    attempt: int
    release: int
    result: str | None = None
    error: str | None = None


_PHASE = {"JobSubmitted": 0, "JobDue": 1, "JobStarted": 2, "JobProgressed": 2, "JobRetried": 3, "JobSnoozed": 3}
_STATE = {"JobDue": "queued", "JobStarted": "running", "JobProgressed": "running", "JobRetried": "retrying"}


def fold(records: Iterable[Record]) -> dict[str, Final]:
    """Every job's last state: of its latest run the end, if it has one, else what came last in its life."""
    lives: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.fact in _PHASE or record.fact in TERMINAL_RANK:
            lives[record.head["job_id"]].append(record)
    return {job: _final(life) for job, life in lives.items()}


def _final(life: list[Record]) -> Final:
    run = max(r.head["run"] for r in life)
    life = [r for r in life if r.head["run"] == run]
    ends = sorted((TERMINAL_RANK[r.fact], *r.place, r) for r in life if r.fact in TERMINAL_RANK)
    if ends:
        last: Record = ends[0][-1]
        state = TERMINAL_STATE[str(last.fact)]
    else:
        last = max(life, key=lambda r: (r.head["release"], r.head["attempt"], _PHASE[str(r.fact)]))
        state = _STATE.get(str(last.fact), "scheduled")
        if last.fact == "JobSubmitted" and last.body["delay_ms"] is None and last.body["due_at"] is None:
            state = "queued"
    head, body = last.head, last.body
    result = error = None
    if last.fact == "JobSucceeded" and body["result"] is not None:
        result = json.dumps(json.loads(body["result"]), sort_keys=True)
    elif last.fact in ("JobFailed", "JobRetried"):
        error = body["error"]["type"]
    return Final(state, head["task"], head["queue"], head["run"], head["attempt"], head["release"], result, error)


# -- the table ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A job the log and the table tell apart; None: it is not there."""

    job_id: str
    field: str
    log: Any
    table: Any


def table(path: str | Path) -> dict[str, Final]:
    """The status table as the same tuples, read with nothing but SQL."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        connection.row_factory = sqlite3.Row
        found = {}
        for row in connection.execute("SELECT * FROM jobs"):
            result, error = row["result"], row["error_type"]
            text = None if result is None else json.dumps(json.loads(result), sort_keys=True)
            state = str(row["state"])
            found[str(row["job_id"])] = Final(
                state, row["task"], row["queue"], row["run"], row["attempt"], row["release"], text, error
            )
        return found
    finally:
        connection.close()


def compare(folded: Mapping[str, Final], kept: Mapping[str, Final]) -> list[Difference]:
    """Where the two do not say the same."""
    out: list[Difference] = []
    for job in sorted({*folded, *kept}):
        ours, theirs = folded.get(job), kept.get(job)
        if ours is None or theirs is None:
            out.append(Difference(job, "job", ours and ours.state, theirs and theirs.state))
            continue
        for name, a, b in zip(Final._fields, ours, theirs, strict=True):
            if a != b:
                out.append(Difference(job, name, a, b))
    return out
