"""The demo's own rules: what is rejected, what the third party does, and what the database keeps."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.airports.database import Database, Row, open_database, saved_rows
from examples.airports.report import percentile, reference_distance_m
from examples.airports.rows import (
    FOREIGN_ZONE,
    NO_CITY,
    Airport,
    airports,
    coordinates,
    faults,
    kinds,
    zones,
    zones_of_countries,
)
from examples.airports.thirdparty import BUSY_SHARE, HANG_SHARE, LATENCY_MS, distance_m, fate

latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)
GOOD = Airport("LSZH", "ZRH", "Zurich Airport", "Zurich", "Zurich", "CH", 1417.0, 47.4583, 8.5481, "Europe/Zurich")


def test_the_input_has_the_faults_that_the_readme_names() -> None:
    """Of 28,298 rows 2,825 lack a city and 130 name a time zone of another country; 8 do both, so 2,947 are rejected."""
    found = [faults(airport) for airport in airports()]
    kinds_found = Counter(kind for each in found for kind in kinds("; ".join(each)))
    assert len(found) == 28_298
    assert kinds_found == {NO_CITY: 2_825, FOREIGN_ZONE: 130}
    assert sum(bool(each) for each in found) == 2_825 + 130 - 8


def test_rows_have_names_of_their_own() -> None:
    """No two rows share the code under which they are saved."""
    codes = [airport.icao for airport in airports()]
    assert len(set(codes)) == len(codes)


def test_a_good_row_has_no_fault_and_a_bad_one_says_what_is_wrong() -> None:
    """A reason names the time zone and the country that do not go together."""
    assert faults(GOOD) == ()
    bad = Airport("XXXX", "", "Nowhere", " ", "", "CH", 0.0, 0.0, 0.0, "Europe/Paris")
    assert faults(bad) == (NO_CITY, f"{FOREIGN_ZONE}: Europe/Paris is none of CH's")
    assert kinds("; ".join(faults(bad))) == (NO_CITY, FOREIGN_ZONE)


def test_places_are_read_from_iso_6709() -> None:
    """Minutes and seconds are parts of a degree, south and west are negative, and anything else is refused."""
    assert coordinates("+4723+00832") == pytest.approx((47 + 23 / 60, 8 + 32 / 60))
    assert coordinates("-690022-0393524") == pytest.approx((-(69 + 22 / 3600), -(39 + 35 / 60 + 24 / 3600)))
    with pytest.raises(ValueError, match="ISO 6709"):
        coordinates("47.38,8.54")


def test_zone_tab_gives_countries_several_zones() -> None:
    """The list is the one of the tz database: the United States have many zones, Switzerland has one."""
    assert zones_of_countries()["CH"] == {"Europe/Zurich"}
    assert {"America/New_York", "Pacific/Honolulu"} < zones_of_countries()["US"]
    assert zones()["Europe/Zurich"].country == "CH"


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_agree_with_another_formula(lat: float, lon: float, to_lat: float, to_lon: float) -> None:
    """The haversine of the third party and the vectors of the report give the same metres, anywhere on Earth."""
    here = distance_m(lat, lon, to_lat, to_lon)
    assert here == pytest.approx(reference_distance_m(lat, lon, to_lat, to_lon), abs=1.0)
    assert 0 <= here <= math.pi * 6_371_009


def test_a_known_distance() -> None:
    """From Zurich airport to the city of Zurich as zone.tab places it are 8.4 km."""
    zone = zones()["Europe/Zurich"]
    assert distance_m(GOOD.lat, GOOD.lon, zone.lat, zone.lon) == pytest.approx(8_400, abs=50)


def test_the_third_party_fails_as_often_as_it_says() -> None:
    """The n-th call for a query always meets the same fate; 5 % are busy, 1 % hang, all take 2 to 50 ms."""
    fates = [fate(7, f"lat={n}", 1) for n in range(20_000)]
    assert fates == [fate(7, f"lat={n}", 1) for n in range(20_000)]
    outcomes = Counter(each.outcome for each in fates)
    assert outcomes["busy"] / 20_000 == pytest.approx(BUSY_SHARE, abs=0.006)
    assert outcomes["hang"] / 20_000 == pytest.approx(HANG_SHARE, abs=0.003)
    assert all(LATENCY_MS[0] <= each.latency * 1000 <= LATENCY_MS[1] for each in fates)
    assert fates != [fate(7, f"lat={n}", 2) for n in range(20_000)]
    assert fates != [fate(8, f"lat={n}", 1) for n in range(20_000)]


def row(icao: str, metres: int) -> Row:
    return Row(icao, "Name", "City", "CH", "Europe/Zurich", 1.5, 2.5, 432.0, metres)


def test_saving_twice_leaves_one_row_the_later(tmp_path: Path) -> None:
    """A save is idempotent: a job that runs again overwrites what it wrote."""

    async def save() -> None:
        database = Database(tmp_path / "airports.db")
        await asyncio.gather(*(database.save(row(f"A{n:03}", n)) for n in range(700)))
        await database.save(row("A005", 99))
        database.close()

    asyncio.run(save())
    found = saved_rows(tmp_path / "airports.db")
    assert len(found) == 700
    assert {each.icao: each.zone_distance_m for each in found}["A005"] == 99


def test_a_row_is_committed_when_save_returns(tmp_path: Path) -> None:
    """Another connection sees the row as soon as the awaited save is done."""

    async def save() -> list[Row]:
        database = Database(tmp_path / "airports.db")
        await database.save(row("LSZH", 8_400))
        found = saved_rows(tmp_path / "airports.db")
        database.close()
        return found

    assert asyncio.run(save()) == [row("LSZH", 8_400)]


def test_what_sqlite_refuses_reaches_the_job(tmp_path: Path) -> None:
    """A write that fails raises in the job that asked for it, and the next write is tried again."""
    path = tmp_path / "away" / "airports.db"

    async def save() -> None:
        database = Database(path)
        with pytest.raises(sqlite3.OperationalError):
            await database.save(row("LSZH", 1))
        path.parent.mkdir()
        await database.save(row("LSZH", 2))
        database.close()

    asyncio.run(save())
    assert saved_rows(path) == [row("LSZH", 2)]


def test_no_database_means_no_rows(tmp_path: Path) -> None:
    """Asking before anything was saved answers that nothing was."""
    assert saved_rows(tmp_path / "airports.db") == []
    open_database(tmp_path / "airports.db").close()
    assert saved_rows(tmp_path / "airports.db") == []


def test_percentiles_are_values_that_occurred() -> None:
    """A percentile is the nearest rank's value: no interpolation invents one."""
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, q) for q in (0.5, 0.9, 0.99, 1.0)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0
