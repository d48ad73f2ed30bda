"""The report about a finished import: what must be true, and what was measured. Pure; `screen` shows the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.airports.database import Row
from examples.airports.history import Life
from examples.airports.rows import FEET_IN_METRES, FOREIGN_ZONE, Airport, faults, kinds, zones
from examples.airports.thirdparty import EARTH_RADIUS_M

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be true. ``shown``: the figures that were compared."""

    claim: str
    holds: bool
    shown: str


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds at `QUANTILES`."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """How the time of all jobs together was spent, in milliseconds."""

    waiting: float
    running: float
    backing_off: float

    @property
    def total(self) -> float:
        """The sum of the three times, or 1 if the sum is 0."""
        return self.waiting + self.running + self.backing_off or 1.0


def percentile(values: Sequence[float], quantile: float) -> float:
    """Return the value at the nearest rank. ``values`` are ascending and not empty."""
    return values[max(0, math.ceil(quantile * len(values)) - 1)]


def latencies(lives: Iterable[Life]) -> list[Latency]:
    """Return how long jobs took, according to the log."""
    found: dict[str, list[float]] = {"submit → start": [], "one attempt": [], "submit → end": []}
    for life in lives:
        if life.to_start_ms is not None:
            found["submit → start"].append(life.to_start_ms)
        found["one attempt"] += [us / 1000 for us in life.ran_us.values()]
        if life.to_end_ms is not None:
            found["submit → end"].append(life.to_end_ms)
    return [
        Latency(name, tuple(percentile(sorted(values), q) for q in QUANTILES))
        for name, values in found.items()
        if values
    ]


def spent(lives: Iterable[Life]) -> Spent:
    """Return how the time was spent."""
    waiting = running = backing_off = 0.0
    for life in lives:
        waiting += life.waiting_ms
        running += life.running_ms
        backing_off += life.backing_off_ms
    return Spent(waiting, running, backing_off)


def rejects(reasons: Iterable[str]) -> Counter[str]:
    """Return how many jobs failed for each kind of reason. A job with two faults is counted under both names joined."""
    return Counter(" + ".join(kinds(reason)) or f"other: {reason}" for reason in reasons)


def examples(rows: Iterable[Airport]) -> dict[str, str]:
    """Return one rejected row for each kind of reason, with a name that people know."""
    found: dict[str, str] = {}
    for row in rows:
        for kind in rejects(["; ".join(faults(row))] if faults(row) else []):
            what = f"{row.country}, {row.tz}" if FOREIGN_ZONE in kind else row.name
            found.setdefault(kind, f"{row.icao}: {what}")
    return found


def reference_distance_m(lat: float, lon: float, to_lat: float, to_lon: float) -> float:
    """Return the great-circle distance in metres, from the angle between two vectors. The third party uses another
    formula."""
    a, b = _vector(lat, lon), _vector(to_lat, to_lon)
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return EARTH_RADIUS_M * math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True)))


def _vector(lat: float, lon: float) -> tuple[float, float, float]:
    phi, theta = math.radians(lat), math.radians(lon)
    return math.cos(phi) * math.cos(theta), math.cos(phi) * math.sin(theta), math.sin(phi)


def account(
    rows: Sequence[Airport],
    counts: Mapping[str, int],
    reasons: Sequence[str],
    saved: Sequence[Row],
    lives: Mapping[str, Life],
) -> list[Check]:
    """Compare the input, the status table, the log and the import's own database with each other. Return the checks.

    ``counts``: number of jobs by state, and ``reasons``: reasons of the failed jobs, both from the status table.
    """
    succeeded, failed = counts.get("succeeded", 0), counts.get("failed", 0)
    unfinished = sum(counts.values()) - succeeded - failed
    good = {a.icao: a for a in rows if not faults(a)}
    expected = rejects("; ".join(faults(a)) for a in rows if faults(a))
    wrong = [row.icao for row in saved if row.icao not in good or not _is_right(row, good[row.icao])]
    logged = Counter("succeeded" if x.succeeded else "failed" if x.failed else "neither" for x in lives.values())
    return [
        Check(
            "every row ended: rows = succeeded + failed",
            len(rows) == succeeded + failed and unfinished == 0,
            f"{len(rows):,} = {succeeded:,} + {failed:,}" + (f", {unfinished:,} unfinished" if unfinished else ""),
        ),
        Check(
            "the rejects are the rows that are at fault, and no others",
            rejects(reasons) == expected,
            f"{len(reasons):,} of {expected.total():,}",
        ),
        Check(
            "rows in the import's own database = succeeded",
            len(saved) == succeeded and {row.icao for row in saved} == set(good),
            f"{len(saved):,} = {succeeded:,}",
        ),
        Check(
            "every saved row is right, its distance by a second formula",
            not wrong,
            f"{len(saved) - len(wrong):,} of {len(saved):,}",
        ),
        Check(
            "the log agrees with the status table: one end for each job",
            logged == Counter({"succeeded": succeeded, "failed": failed}),
            f"{logged['succeeded']:,} + {logged['failed']:,}"
            + (f", {logged['neither']:,} with none or several" if logged["neither"] else ""),
        ),
    ]


def _is_right(row: Row, airport: Airport) -> bool:
    zone = zones()[airport.tz]
    metres = reference_distance_m(airport.lat, airport.lon, zone.lat, zone.lon)
    return (
        row[1:7] == (airport.name, airport.city, airport.country, airport.tz, airport.lat, airport.lon)
        and abs(row.elevation_m - airport.elevation * FEET_IN_METRES) <= 0.051
        and abs(row.zone_distance_m - metres) <= 1.0
    )
