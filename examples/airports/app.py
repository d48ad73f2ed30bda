"""The app: one task, which checks an airport, asks the third party about it and saves it.

A service would have to write only this file. The worker and the stream processor load the app as
``examples.airports.app:app``. ``AIRPORTS_API`` has the address of the third party, and ``AIRPORTS_DATABASE`` the path
of the database.
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
    """The third party answered 503: the call may be repeated."""


@app.task(
    queue="import",
    retry=Retry(max_attempts=8, initial=0.2, cap=2.0, on=(ThirdPartyBusy, aiohttp.ClientConnectionError, TimeoutError)),
    timeout=10.0,
)
async def import_airport(airport: Airport) -> int:
    """Import one row. Return its distance in metres from the city after which its time zone is named."""
    found = faults(airport)
    if found:
        raise Reject("; ".join(found))  # a retry could not help
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
    """The connections that all jobs of this process share."""

    http: aiohttp.ClientSession
    api: str
    database: Database


_opened: tuple[AsyncGenerator[Services, None], Services] | None = None


async def services() -> Services:
    """Return the connections of this process. The first job opens them."""
    global _opened
    if _opened is None:
        lifetime = _lifetime()
        _opened = lifetime, await anext(lifetime)
    return _opened[1]


async def _lifetime() -> AsyncGenerator[Services, None]:
    # A generator, because asyncio closes the generators that are still open when the event loop ends, which runs their
    # `finally` blocks. So the connections are open as long as the worker runs, and are closed here. Nothing is awaited
    # before the `yield`, so only one job opens the connections.
    api, path = _setting("AIRPORTS_API"), Path(_setting("AIRPORTS_DATABASE"))
    database = Database(path)
    http = aiohttp.ClientSession(
        # No limit here, because the worker's --concurrency limits how many calls run at once.
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
