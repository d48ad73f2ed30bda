"""Simulates the HTTP service of a third party, which is slow, sometimes busy, and sometimes never answers.

``GET /v1/distance?lat=…&lon=…&tz=…`` returns the great-circle distance in metres from a place to the city after which a
time zone is named. Every call takes 2 to 50 ms; 5 % of the calls get a 503, 1 % get no answer until the caller closes
the connection. The outcome of the n-th call for a query depends only on the seed, so runs are comparable.
``GET /stats`` returns counts.

The service runs as a process of its own (``python -m examples.airports.thirdparty``), prints its address as one JSON
line and knows nothing of Jobledger.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import signal
from collections import Counter
from typing import NamedTuple

import uvloop
from aiohttp import web

from examples.airports.rows import zones

#: Mean radius of the Earth in metres (IUGG).
EARTH_RADIUS_M = 6_371_008.8
LATENCY_MS = (2.0, 50.0)
BUSY_SHARE, HANG_SHARE = 0.05, 0.01


class Fate(NamedTuple):
    """What happens to one call. ``outcome``: ``answer``, ``busy`` or ``hang``; ``latency`` in seconds."""

    outcome: str
    latency: float


def fate(seed: int, query: str, nth: int) -> Fate:
    """Return the fate of the ``nth`` call (1, 2, …) for ``query``."""
    digest = hashlib.blake2b(f"{seed}/{nth}/{query}".encode(), digest_size=8).digest()
    chance = int.from_bytes(digest[:4], "big") / 2**32
    low, high = LATENCY_MS
    latency = (low + (high - low) * int.from_bytes(digest[4:], "big") / 2**32) / 1000
    if chance < HANG_SHARE:
        return Fate("hang", latency)
    return Fate("busy" if chance < HANG_SHARE + BUSY_SHARE else "answer", latency)


def distance_m(lat: float, lon: float, to_lat: float, to_lon: float) -> float:
    """Return the great-circle distance in metres between two places in degrees, by the haversine formula (Sinnott,
    1984)."""
    a, b = math.radians(lat), math.radians(to_lat)
    half = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(math.radians(to_lon - lon) / 2) ** 2
    return 2 * EARTH_RADIUS_M * math.asin(min(1.0, math.sqrt(half)))


class Service:
    """The service's handlers and their counts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    async def distance(self, request: web.Request) -> web.Response:
        """Answer one call, if that is the call's fate. An invalid call gets a 400 at once."""
        query = request.query_string
        self._calls[query] += 1
        try:
            zone = zones()[request.query["tz"]]
            metres = distance_m(float(request.query["lat"]), float(request.query["lon"]), zone.lat, zone.lon)
        except (KeyError, ValueError) as error:
            self.outcomes["refused"] += 1
            return web.json_response({"error": f"{error} is missing, no number or no zone of zone.tab"}, status=400)
        outcome, latency = fate(self.seed, query, self._calls[query])
        self.outcomes[outcome] += 1
        await asyncio.sleep(latency)
        if outcome == "hang":
            await asyncio.get_running_loop().create_future()  # until the caller closes the connection
        if outcome == "busy":
            return web.json_response({"error": "busy, try again"}, status=503)
        return web.json_response({"tz": zone.name, "metres": round(metres)})

    async def stats(self, request: web.Request) -> web.Response:
        """Return the number of calls, and the number of each outcome."""
        return web.json_response({"calls": self.outcomes.total(), **self.outcomes})


async def serve(seed: int, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT. ``port`` 0: a free port."""
    service = Service(seed)
    site = web.Application()
    site.add_routes([web.get("/v1/distance", service.distance), web.get("/stats", service.stats)])
    runner = web.AppRunner(site, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        stop = asyncio.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, stop.set)
        host, taken = runner.addresses[0][:2]
        print(json.dumps({"url": f"http://{host}:{taken}"}), flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Run the service from a command line."""
    parser = argparse.ArgumentParser(description="A slow and failing HTTP service to try an import against.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    options = parser.parse_args()
    uvloop.run(serve(options.seed, options.port))


if __name__ == "__main__":
    main()
