"""The input and its rules: the rows of the package ``airportsdata``, and the faults that make a row unfit to import.

This module owns no connection. The time zones of a country are those that the tz database lists for the country in
``zone.tab`` (of the package ``tzdata``). Links and old names that are not in that list do not count.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import msgspec

NO_CITY = "no city"
FOREIGN_ZONE = "time zone of another country"
FEET_IN_METRES = 0.3048


class Airport(msgspec.Struct, frozen=True):
    """One row. ``elevation`` in feet, ``lat`` and ``lon`` in degrees, ``country`` as ISO 3166-1 alpha-2."""

    icao: str
    iata: str
    name: str
    city: str
    subd: str
    country: str
    elevation: float
    lat: float
    lon: float
    tz: str


@dataclass(frozen=True, slots=True)
class Zone:
    """A time zone. ``lat`` and ``lon``: the city after which it is named, in degrees; ``country``: the only country
    that ``zone.tab`` lists for it."""

    name: str
    country: str
    lat: float
    lon: float


def airports() -> Iterator[Airport]:
    """Yield every row of the package's CSV, in file order."""
    text = (resources.files("airportsdata") / "airports.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        yield Airport(
            row["icao"],
            row["iata"],
            row["name"],
            row["city"],
            row["subd"],
            row["country"],
            float(row["elevation"]),
            float(row["lat"]),
            float(row["lon"]),
            row["tz"],
        )


@cache
def zones() -> Mapping[str, Zone]:
    """Return the time zones of ``zone.tab`` by name."""
    text = (resources.files("tzdata") / "zoneinfo" / "zone.tab").read_text(encoding="utf-8")
    lines = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: Zone(name, country, *coordinates(place)) for country, place, name, *_ in lines}


@cache
def zones_of_countries() -> Mapping[str, frozenset[str]]:
    """Return the names of each country's time zones."""
    found: dict[str, set[str]] = defaultdict(set)
    for zone in zones().values():
        found[zone.country].add(zone.name)
    return {country: frozenset(names) for country, names in found.items()}


def coordinates(text: str) -> tuple[float, float]:
    """Return latitude and longitude, in degrees, of ISO 6709 text: ``±DDMM±DDDMM`` or ``±DDMMSS±DDDMMSS``. Raises
    `ValueError` for other text."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)(\d\d)?([+-])(\d{3})(\d\d)(\d\d)?", text)
    if found is None:
        raise ValueError(f"{text!r} is no place in ISO 6709; one looks like +4723+00832")

    def degrees(sign: str, whole: str, minutes: str, seconds: str | None) -> float:
        value = int(whole) + int(minutes) / 60 + int(seconds or 0) / 3600
        return -value if sign == "-" else value

    parts = found.groups()
    return degrees(*parts[:4]), degrees(*parts[4:])


def faults(airport: Airport) -> tuple[str, ...]:
    """Return the reasons why this row must not be imported, each with its details; empty for a good row."""
    found = []
    if not airport.city.strip():
        found.append(NO_CITY)
    if airport.tz not in zones_of_countries().get(airport.country, frozenset()):
        found.append(f"{FOREIGN_ZONE}: {airport.tz} is none of {airport.country}'s")
    return tuple(found)


def kinds(reason: str) -> tuple[str, ...]:
    """Return the kinds of fault that a job's text of reasons names; empty if the text names none."""
    return tuple(kind for kind in (NO_CITY, FOREIGN_ZONE) if kind in reason)
