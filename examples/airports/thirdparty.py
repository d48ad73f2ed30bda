"""A stand-in for somebody else's HTTP service: slow, now and then busy, and sometimes it never answers.

``GET /v1/distance?lat=…&lon=…&tz=…`` gives the great-circle distance in metres from a place to the city that a time
zone is named after. Every call takes 2 to 50 ms; 5 % get a 503, 1 % get nothing until the caller hangs up. What becomes
of the n-th call for a query depends on the seed alone, so runs are comparable. ``GET /stats`` counts.

Runs as a process of its own (``python -m examples.airports.thirdparty``), writes its address as one JSON line and
knows nothing of Jobledger.
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
    """What becomes of one call. ``outcome``: ``answer``, ``busy`` or ``hang``; ``latency`` in seconds."""

    outcome: str
    latency: float


def fate(seed: int, query: str, nth: int) -> Fate:
    """The fate of the ``nth`` call (1, 2, …) for ``query``."""
    digest = hashlib.blake2b(f"{seed}/{nth}/{query}".encode(), digest_size=8).digest()
    chance = int.from_bytes(digest[:4], "big") / 2**32
    low, high = LATENCY_MS
    latency = (low + (high - low) * int.from_bytes(digest[4:], "big") / 2**32) / 1000
    if chance < HANG_SHARE:
        return Fate("hang", latency)
    return Fate("busy" if chance < HANG_SHARE + BUSY_SHARE else "answer", latency)


def distance_m(lat: float, lon: float, to_lat: float, to_lon: float) -> float:
    """Great-circle distance in metres between two places in degrees, by the haversine formula (Sinnott, 1984)."""
    a, b = math.radians(lat), math.radians(to_lat)
    half = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(math.radians(to_lon - lon) / 2) ** 2
    return 2 * EARTH_RADIUS_M * math.asin(min(1.0, math.sqrt(half)))


class Service:
    """The service's handlers and what they count."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    async def distance(self, request: web.Request) -> web.Response:
        """Answer one call, if that is its fate; a call that is wrong gets its 400 at once."""
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
            await asyncio.get_running_loop().create_future()  # ends when the caller hangs up
        if outcome == "busy":
            return web.json_response({"error": "busy, try again"}, status=503)
        return web.json_response({"tz": zone.name, "metres": round(metres)})

    async def stats(self, request: web.Request) -> web.Response:
        """How many calls came and what became of them."""
        return web.json_response({"calls": self.outcomes.total(), **self.outcomes})


async def serve(seed: int, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; ``port`` 0 takes a free one."""
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
