"""The app of `test_workers_topic`: a task that runs until a file exists."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from jobledger import App

FREE = Path(os.environ.get("FREE", "free"))
app = App(os.environ.get("NAMESPACE", "workers"), partitions=2, queues=["mail", "slow"])


@app.task(queue="mail")
async def hold() -> None:
    """Run until `FREE` exists."""
    while not FREE.exists():
        await asyncio.sleep(0.05)
