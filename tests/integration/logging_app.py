"""An app that sets logging up in its own way, as many do."""

from __future__ import annotations

import logging
import os

from jobledger import App, Retry

if os.environ.get("LOGGING_SET_UP"):  # not in the tests' own process
    logging.basicConfig(format="APP %(levelname)s %(name)s: %(message)s", level=logging.INFO)
app = App(os.environ.get("LOGGING_NAMESPACE", "logging"), partitions=1)


@app.task(retry=Retry(max_attempts=2, initial=0.1, jitter=False), key="key", timeout=30)
async def fails(key: str) -> None:
    """Fails twice."""
    raise ValueError("no such city")
