"""The app for the tests of projections."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table

from jobledger import App, Settings
from jobledger.definitions.projection import Where
from jobledger.schemas.events import JobFailedFact, JobSucceeded, Recorded, fact_name

Row = Mapping[str, Any] | None


@dataclass(frozen=True)
class Happened:
    user: str
    number: int


def count_all(row: Row, event: Happened) -> Row:
    """Count the events of a user, and add up their numbers. The row of ``user-3`` is always deleted."""
    if event.user == "user-3":
        return None
    before = row or {"events": 0, "total": 0}
    return {"events": before["events"] + 1, "total": before["total"] + event.number}


def count_by_user(row: Row, event: Happened) -> Row:
    """Do the same, but fail at negative numbers."""
    if event.user == "leaves":
        raise SystemExit(0)
    if event.number < 0:
        raise ValueError("negative")
    return count_all(row, event)


def ends(row: Row, recorded: Recorded, where: Where) -> Row:
    """Count the jobs with this outcome, and keep the time of the last one."""
    before = row or {"jobs": 0, "last_ms": 0}
    return {"jobs": before["jobs"] + 1, "last_ms": max(before["last_ms"], where.appended_ms)}


def not_yet(row: Row, event: Happened) -> Row:
    """Store the number. This projection starts only in the year 2100."""
    return {"numbers": event.number}


def build(namespace: str, settings: Settings) -> App:
    """Create the app, with its own tables."""
    app = App(namespace, settings=settings, partitions=3)
    app.event(key="user")(Happened)

    @app.task(retry=1)
    async def work(number: int) -> int:
        if not number % 3:
            raise ValueError(number)
        return number

    people = Table(
        "people", MetaData(), Column("user", String, primary_key=True), Column("events", Integer, nullable=False),
        Column("total", BigInteger, nullable=False, index=True),
    )  # fmt: skip
    kinds = Table(
        "kinds",
        MetaData(),
        Column("kind", String, primary_key=True),
        Column("jobs", Integer),
        Column("last_ms", BigInteger),
    )
    later = Table("later", MetaData(), Column("user", String, primary_key=True), Column("numbers", Integer))
    app.projection(Happened, table=people, key=lambda event: event.user)(count_by_user)
    app.projection(
        facts=(JobSucceeded, JobFailedFact), table=kinds, key=lambda recorded: fact_name(recorded.event.fact)
    )(ends)
    app.projection(Happened, table=later, key=lambda event: event.user, start=dt.datetime(2100, 1, 1, tzinfo=dt.UTC))(
        not_yet
    )
    return app


app = build(os.environ.get("PROJECTION_NAMESPACE", "projections"), Settings.from_env())
