"""The app: one task, which checks an airport, asks the third party about it and saves it.

This file is all that a service would write. It is loaded by the worker and by the stream processor as
``examples.airports.app:app``; where the third party and the database are stands in ``AIRPORTS_API`` and
``AIRPORTS_DATABASE``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NamedTuple

import aiohttp

from examples.airports.database import Database, Row
from examples.airports.rows import FEET_IN_METRES, Airport, faults
from jobledger import App, Reject, Retry

#: Seconds that a call may take. The third party answers within 0.05 s or not at all.
CALL_TIMEOUT_S = 1.0

app = App(os.environ.get("AIRPORTS_NAMESPACE", "airports"))


class ThirdPartyBusy(Exception):
    """The third party answered 503: it may be asked again."""


@app.task(
    queue="import",
    retry=Retry(max_attempts=8, initial=0.2, cap=2.0, on=(ThirdPartyBusy, aiohttp.ClientConnectionError, TimeoutError)),
    timeout=10.0,
)
async def import_airport(airport: Airport) -> int:
    """Import one row; its distance in metres from the city its time zone is named after."""
    found = faults(airport)
    if found:
        raise Reject("; ".join(found))  # no retry could help
    shared = await services()
    query = {"lat": str(airport.lat), "lon": str(airport.lon), "tz": airport.tz}
    async with shared.http.get(f"{shared.api}/v1/distance", params=query) as answer:
        if answer.status == 503:
            raise ThirdPartyBusy("the third party is busy (503)")
        answer.raise_for_status()
        metres: int = (await answer.json())["metres"]
    await shared.database.save(
        Row(
            airport.icao,
            airport.name,
            airport.city,
            airport.country,
            airport.tz,
            airport.lat,
            airport.lon,
            round(airport.elevation * FEET_IN_METRES, 1),
            metres,
        )
    )
    return metres


class Services(NamedTuple):
    """What every job of this process shares."""

    http: aiohttp.ClientSession
    api: str
    database: Database


_opened: tuple[AsyncGenerator[Services, None], Services] | None = None


async def services() -> Services:
    """The connections of this process, opened by its first job."""
    global _opened
    if _opened is None:
        lifetime = _lifetime()
        _opened = lifetime, await anext(lifetime)
    return _opened[1]


async def _lifetime() -> AsyncGenerator[Services, None]:
    # A generator, because an event loop that ends runs the rest of those that are still open: so this is where what
    # lives as long as the worker is given back. Nothing is awaited before the yield, so one job alone opens it.
    api, path = _setting("AIRPORTS_API"), Path(_setting("AIRPORTS_DATABASE"))
    database = Database(path)
    http = aiohttp.ClientSession(
        # No limit here: how many calls run at once is the worker's --concurrency.
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S),
    )
    try:
        yield Services(http, api, database)
    finally:
        await http.close()
        database.close()


def _setting(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RuntimeError(f"{name} is not set: start everything together with `python -m examples.airports`")
    return value
