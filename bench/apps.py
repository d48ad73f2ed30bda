"""The app that the benchmarks' workers load. Its namespace comes from ``BENCH_NAMESPACE``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table

from jobledger import App

app = App(os.environ.get("BENCH_NAMESPACE", "bench"), partitions=int(os.environ.get("BENCH_PARTITIONS", "6")))


@app.task(queue="bench")
async def noop(number: int) -> None:
    """Do nothing, so that only the cost of a job itself is measured."""


@app.task(queue="bench")
async def nap(number: int, seconds: float = 0.05) -> None:
    """Wait, as a job does that calls another service."""
    await asyncio.sleep(seconds)


@app.task(queue="bench")
def noop_in_thread(number: int) -> None:
    """Do nothing, in a thread."""


@app.task(queue="bench", isolation="process")
def noop_in_process(number: int) -> None:
    """Do nothing, in a child process."""


@app.task(queue="bench", isolation="process")
def busy_in_process(number: int, seconds: float = 0.01) -> None:
    """Use ``seconds`` of CPU time, by the process's own clock."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@app.event
@dataclass(frozen=True)
class Emitted:
    """An event with the time when it was emitted, by this machine's clock (ns)."""

    at_ns: int
    text: str = "something that happened, in about as many words as such a thing takes"


@app.on(Emitted, queue="bench")
async def handle(event: Emitted) -> float:
    """Return the milliseconds since the event was emitted."""
    return (time.time_ns() - event.at_ns) / 1e6


per_bucket = Table("per_bucket", MetaData(), Column("bucket", Integer, primary_key=True), Column("events", Integer))


@app.projection(Emitted, table=per_bucket, key=lambda event: event.at_ns % 1_000)
def count(row: Mapping[str, Any] | None, event: Emitted) -> dict[str, int]:
    """Count the events of each of a thousand buckets."""
    return {"events": (row["events"] if row else 0) + 1}
