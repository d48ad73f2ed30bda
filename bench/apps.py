"""The app that benchmark workers load; its namespace comes from ``BENCH_NAMESPACE``."""

from __future__ import annotations

import asyncio
import os

from jobledger import App

app = App(os.environ.get("BENCH_NAMESPACE", "bench"), partitions=int(os.environ.get("BENCH_PARTITIONS", "6")))


@app.task(queue="bench")
async def noop(number: int) -> None:
    """Nothing: what a job costs by itself."""


@app.task(queue="bench")
async def nap(number: int, seconds: float = 0.05) -> None:
    """Waits, as a job that calls somebody does."""
    await asyncio.sleep(seconds)


@app.task(queue="bench")
def noop_in_thread(number: int) -> None:
    """Nothing, in a thread."""
