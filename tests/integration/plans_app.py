"""The app of `test_plans`: a task that fails until a file exists, and notes each run."""

from __future__ import annotations

import os
from pathlib import Path

from jobledger import App

MENDED = Path(os.environ.get("MENDED", "mended"))
app = App(os.environ.get("NAMESPACE", "plans"), partitions=2, queues=["mail", "slow"])


@app.task(queue="mail", retry=1)
def fragile(n: int) -> int:
    """Fail until `MENDED` exists."""
    with (MENDED.parent / "ran").open("a") as file:
        file.write(f"{n}\n")
    if not MENDED.exists():
        raise ValueError(f"{n} is not mended")
    return n
