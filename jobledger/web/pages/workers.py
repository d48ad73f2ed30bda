"""The workers as the pages show them, from their last reports."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobledger.worker_status import WorkerState, WorkerStatus

#: Number of running jobs that are shown of a worker.
JOBS_MOST = 5


@dataclass(frozen=True)
class WorkerRow:
    """A worker. ``memory``: bytes; None: not known. ``silent``: its last report is older than 15 s."""

    worker: str
    version: str | None
    state: str
    silent: bool
    lanes: Sequence[str]
    slots: int
    running: int
    jobs: Sequence[str]
    memory: int | None
    started_at: dt.datetime | None
    reported_at: dt.datetime | None


def worker_rows(workers: Iterable[WorkerStatus], now: dt.datetime | None = None) -> list[WorkerRow]:
    """Return a row for each worker, the silent ones first."""
    moment = now or dt.datetime.now(dt.UTC)
    rows = []
    for each in workers:
        state = each.state(moment)
        rows.append(
            WorkerRow(
                each.worker,
                each.version,
                state.value,
                state is WorkerState.SILENT,
                list(each.lanes),
                each.slots,
                each.running,
                list(each.jobs)[:JOBS_MOST],
                each.memory_bytes,
                each.started_at,
                each.reported_at,
            )
        )
    return sorted(rows, key=lambda row: (not row.silent, row.worker))
