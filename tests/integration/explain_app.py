"""The app of `test_explain`: tasks that wait for a file, fail or have a key or a limit."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from jobledger import App, Queue, Retry

OPEN = Path(os.environ.get("OPEN", "open"))


def build(namespace: str) -> App:
    """Create the app. Jobs that wait end when the file `OPEN` exists."""
    queues = [Queue(name, partitions=1) for name in ("work", "paused", "idle")]
    app = App(namespace, partitions=1, queues=[*queues, Queue("limited", partitions=1, concurrency=1)])

    @app.task(queue="work", retry=1)
    async def add(a: int, b: int = 1) -> int:
        if b < 0:
            raise ValueError("b is negative")
        return a + b

    @app.task(queue="work", retry=Retry(max_attempts=3, initial=3600.0, jitter=False))
    async def later() -> None:
        raise ConnectionError("the relay does not answer")

    @app.task(queue="work", key="account", timeout=60)
    async def book(account: str) -> None:
        await _opened()

    @app.task(queue="work", long=True, lease=30)
    async def render() -> None:
        await _opened()

    @app.task(queue="limited")
    async def one_at_a_time() -> None:
        await _opened()

    return app


async def _opened() -> None:
    while not OPEN.exists():
        await asyncio.sleep(0.05)


app = build(os.environ.get("NAMESPACE", "explain"))
