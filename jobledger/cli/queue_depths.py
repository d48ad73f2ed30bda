"""The columns of ``jobledger queues list`` that come from the status table: how many jobs wait and run, and for how
long the oldest has waited."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jobledger.cli import output
from jobledger.cli.output import Cell
from jobledger.errors import StoreError, text_of

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.streams.status.store.protocol import QueueSummary

#: The names of the columns.
DEPTHS = ("depth", "running", "oldest")


def depths_of(app: App) -> tuple[dict[str, QueueSummary], str | None]:
    """Return the numbers of each queue that the status table knows. If the table cannot be read, return none, and a note
    that says why."""
    try:
        return {each.queue: each for each in app.status_table().queues()}, None
    except StoreError as exc:
        return {}, f"depth, running and oldest_s are not known: {text_of(exc)}"


def is_open(depth: QueueSummary) -> bool:
    """Return whether the queue has jobs that have not ended."""
    return bool(depth.depth or depth.running or depth.scheduled or depth.retrying)


def depth_json(depth: QueueSummary | None, note: str | None) -> dict[str, Any]:
    """Return the numbers of a queue for JSON output. ``depth``: None: the table knows no job of this queue, or with a
    ``note`` the table cannot be read."""
    if depth is None:
        number = 0 if note is None else None
        return {"depth": number, "running": number, "oldest_s": None}
    oldest_s = None if depth.oldest_ms is None else round(max(0.0, time.time() - depth.oldest_ms / 1000), 3)
    return {"depth": depth.depth, "running": depth.running, "oldest_s": oldest_s}


def depth_cells(row: dict[str, Any]) -> list[Cell]:
    """Return the cells of a row with the fields of `depth_json`."""
    oldest = row["oldest_s"]
    return [
        "" if row["depth"] is None else f"{row['depth']:,}",
        "" if row["running"] is None else f"{row['running']:,}",
        "" if oldest is None else output.duration(oldest),
    ]
