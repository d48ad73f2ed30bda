"""Domain events for the router's fault tests. Each of two handlers writes to a side log for which event it ran."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jobledger import App, current_job

app = App(os.environ.get("CHAOS_NAMESPACE", "events"), partitions=4)
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)


@app.event(key="user")
@dataclass(frozen=True)
class Happened:
    """An event about a user."""

    number: int
    user: str


def note(what: str) -> None:
    """Write one line at once, so that it is in the file even if the process dies directly afterwards."""
    file = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{current_job().job_id} {what}\n".encode())
    finally:
        os.close(file)


@app.on(Happened, queue="crm")
async def sync(event: Happened) -> None:
    """Run on the event loop."""
    note(f"sync-{event.number}")


@app.on(Happened, queue="mail")
def write(event: Happened) -> None:
    """Run in a thread."""
    note(f"write-{event.number}")
