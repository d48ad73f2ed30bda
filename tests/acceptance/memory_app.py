"""Jobs that do nothing, and jobs of one key, to measure a worker's memory with a backlog. ``CHAOS_NAMESPACE`` is the
namespace."""

from __future__ import annotations

import os

from jobledger import App

app = App(os.environ.get("CHAOS_NAMESPACE", "memory"), partitions=4)


@app.task
async def noop(number: int) -> None:
    """Most jobs."""


@app.task(key="account", timeout=10)
async def keyed(account: str, number: int) -> None:
    """Jobs that wait for each other."""
