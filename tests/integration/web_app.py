"""The app of `test_web`: a task that doubles a number, and one that fails until a file exists."""

from __future__ import annotations

import os
from pathlib import Path

from jobledger import App

MENDED = Path(os.environ.get("MENDED", "mended"))
app = App(os.environ.get("NAMESPACE", "web"), partitions=2, queues=["mail"])


@app.task(queue="mail")
def double(n: int) -> int:
    """Return twice the number."""
    return 2 * n


@app.task(queue="mail", retry=1)
def fragile(n: int) -> int:
    """Fail until `MENDED` exists."""
    if not MENDED.exists():
        raise ValueError(f"{n} is not mended")
    return n
