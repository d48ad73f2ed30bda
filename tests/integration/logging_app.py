"""An app that configures logging itself, as many apps do."""

from __future__ import annotations

import logging
import os

from jobledger import App, Retry

if os.environ.get("LOGGING_SET_UP"):  # only in the worker's process
    logging.basicConfig(format="APP %(levelname)s %(name)s: %(message)s", level=logging.INFO)
app = App(os.environ.get("LOGGING_NAMESPACE", "logging"), partitions=1)


@app.task(retry=Retry(max_attempts=2, initial=0.1, jitter=False), key="key", timeout=30)
async def fails(key: str) -> None:
    """Fail in both attempts."""
    raise ValueError("no such city")
