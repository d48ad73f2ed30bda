"""A small shop: the app that `docker compose up` runs, and an example to begin with.

The settings come from the environment. The app sends no mail: the results of the jobs say what it would have done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Integer, MetaData, String, Table

from jobledger import App, Reject, Retry, current_job

app = App("shop")


@app.event(key="user_id")
@dataclass(frozen=True)
class UserRegistered:
    """Somebody has signed up."""

    user_id: str
    plan: str = "free"


@app.task(queue="mail", retry=Retry(max_attempts=4, initial=0.5))
async def send_mail(to: str, template: str = "welcome") -> str:
    """Pretend to send a mail of three pages, which take a tenth of a second each. The first attempt fails if the
    address begins with "slow"."""
    if "@" not in to:
        raise Reject(f"{to!r} is no address")
    job = current_job()
    if job.attempt == 1 and to.startswith("slow"):
        raise ConnectionError("the mail server hung up")
    for page in range(3):
        job.progress(done=page + 1, total=3)
        await asyncio.sleep(0.1)
    return f"sent {template} to {to}"


@app.on(UserRegistered, queue="crm", retry=5)
async def sync_crm(event: UserRegistered) -> str:
    """Pretend to write the user to the customer database."""
    return f"{event.user_id} is in the customer database"


@app.on(UserRegistered, queue="mail")
async def welcome(event: UserRegistered) -> str:
    """Pretend to send a welcome mail."""
    return f"wrote to {event.user_id}"


signups = Table(
    "signups", MetaData(), Column("plan", String, primary_key=True), Column("people", Integer, nullable=False)
)


@app.projection(UserRegistered, table=signups, key=lambda event: event.plan)
def count_signups(row: Mapping[str, Any] | None, event: UserRegistered) -> dict[str, int]:
    """Count people by plan."""
    return {"people": (row["people"] if row else 0) + 1}
