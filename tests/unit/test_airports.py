"""The demo's own rules: what is rejected, what the third party does, and what the database keeps."""

from __future__ import annotations

import asyncio
import io
import math
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from examples.airports.database import Database, Row, open_database, saved_rows
from examples.airports.history import Life, fold
from examples.airports.place import DemoFailed, claimed
from examples.airports.report import account, latencies, percentile, reference_distance_m, rejects, spent
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
from examples.airports.screen import Bar, Progress, Rate, Screen
from examples.airports.thirdparty import BUSY_SHARE, HANG_SHARE, LATENCY_MS, distance_m, fate
from jobledger.schemas.events import (
    ErrorInfo,
    Fact,
    JobDue,
    JobEvent,
    JobFailed,
    JobRetried,
    JobSpec,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    Position,
    Recorded,
)

latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)
GOOD = Airport("LSZH", "ZRH", "Zurich Airport", "Zurich", "Zurich", "CH", 1417.0, 47.4583, 8.5481, "Europe/Zurich")


def test_the_input_has_the_faults_that_the_readme_names() -> None:
    """Of 28,298 rows 2,825 lack a city and 130 name a time zone of another country; 8
    do both, so 2,947 are rejected."""
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


def event(job: str, release: int, at: int, fact: Fact) -> Recorded:
    made = JobEvent("", job, 1, release, release, 0, "import_airport", "import", None, None, "test", None, fact)
    return Recorded(made, Position("t", 0, at), at)


ERROR = ErrorInfo("Busy", "503")
SPEC = JobSpec(b"{}")
RETRIED_ONCE = [
    event("a", 1, 1_000, JobSubmitted(SPEC)),
    event("a", 1, 1_010, JobStarted("w", "t", 0)),
    event("a", 1, 1_040, JobRetried(ERROR, 200, 25_000)),
    event("a", 2, 1_300, JobDue(SPEC, 0)),
    event("a", 2, 1_305, JobStarted("w", "t", 1)),
    event("a", 2, 1_330, JobSucceeded(b"1", 20_000)),
]


@given(st.permutations(RETRIED_ONCE * 2))
def test_a_life_is_read_from_the_log_in_any_order(events: list[Recorded]) -> None:
    """Waiting, running and backing off add up over the attempts, whatever came first or twice — except a second end."""
    seen_end = False
    kept = []
    for each in events:
        if isinstance(each.event.fact, JobSucceeded):
            if seen_end:
                continue
            seen_end = True
        kept.append(each)
    life = fold(kept)["a"]
    assert (life.to_start_ms, life.to_end_ms, life.retries) == (10, 330, 1)
    assert (life.waiting_ms, life.running_ms, life.backing_off_ms) == (15, 45.0, 260)
    assert life.succeeded
    assert spent([life]).total == 15 + 45 + 260


def test_a_second_end_is_not_overlooked() -> None:
    """A job whose log holds two ends counts neither as succeeded nor as failed."""
    life = fold([*RETRIED_ONCE, event("a", 2, 1_400, JobSucceeded(b"1", 20_000))])["a"]
    assert not life.succeeded
    assert life.failed is None


def lived(fact: JobSucceeded | JobFailed) -> Life:
    return fold(
        [event("a", 1, 0, JobSubmitted(SPEC)), event("a", 1, 1, JobStarted("w", "t", 0)), event("a", 1, 2, fact)]
    )["a"]


def balanced() -> tuple[list[Airport], dict[str, int], list[str], list[Row], dict[str, Life]]:
    bad = Airport("XXXX", "", "Nowhere", "", "", "CH", 0.0, 0.0, 0.0, "Europe/Zurich")
    zone = zones()[GOOD.tz]
    metres = round(distance_m(GOOD.lat, GOOD.lon, zone.lat, zone.lon))
    saved = Row(GOOD.icao, GOOD.name, GOOD.city, "CH", GOOD.tz, GOOD.lat, GOOD.lon, 431.9, metres)
    lives = {"a": lived(JobSucceeded(b"1", 1)), "b": lived(JobFailed("rejected", ErrorInfo("Reject", NO_CITY), 1))}
    return [GOOD, bad], {"succeeded": 1, "failed": 1}, [NO_CITY], [saved], lives


def test_an_account_that_balances_holds() -> None:
    """With every row ended and everything where it should be, every check holds."""
    assert all(check.holds for check in account(*balanced()))


def test_every_check_can_fail() -> None:
    """For each check there is a run that breaks it: lost, wrongly rejected, unsaved, wrongly saved, ended twice."""
    rows, counts, reasons, saved, lives = balanced()
    broken = [
        account(rows, {"succeeded": 1, "running": 1}, reasons, saved, lives)[0],
        account(rows, counts, ["other"], saved, lives)[1],
        account(rows, counts, reasons, [], lives)[2],
        account(rows, counts, reasons, [saved[0]._replace(zone_distance_m=1)], lives)[3],
        account(rows, counts, reasons, saved, {"a": lives["a"]})[4],
    ]
    assert [check.holds for check in broken] == [False] * len(account(*balanced()))


def test_reasons_are_counted_by_kind() -> None:
    """A row with two faults is counted once, under both; a reason of no known kind keeps its own words."""
    both = f"{NO_CITY}; {FOREIGN_ZONE}: Europe/Paris is none of CH's"
    assert rejects([NO_CITY, both, NO_CITY, "oops"]) == {NO_CITY: 2, f"{NO_CITY} + {FOREIGN_ZONE}": 1, "other: oops": 1}


def test_latencies_are_those_of_the_log() -> None:
    """Submit → start and submit → end are the broker's times, an attempt's is the worker's."""
    found = {each.name: each.values for each in latencies(fold(RETRIED_ONCE).values())}
    assert found["submit → start"] == (10.0,) * 4
    assert found["one attempt"] == (20.0, 25.0, 25.0, 25.0)
    assert found["submit → end"] == (330.0,) * 4


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=5), st.just(0) | st.integers(0, 30_000))
@example([1, 1, 1], 0)
@example([1, 69, 67], 1627)
def test_a_bar_shows_what_is_there(values: list[int], rest: int) -> None:
    """Every part that is not empty has a cell, no empty one has, and the bar is never longer than its width."""
    cells = Bar([(value, "green") for value in values], sum(values) + rest, 40).cells()
    assert [bool(cell) for cell in cells] == [bool(value) for value in values]
    assert sum(cells) <= 40
    assert rest or not any(values) or sum(cells) == 40


def test_a_bar_is_as_wide_as_it_is_told() -> None:
    """What is drawn fills the width, the part that is still to come included."""
    console = Console(width=80, color_system=None)
    with console.capture() as got:
        console.print(Bar([(20_000, "green"), (1, "red"), (0, "cyan"), (2, "yellow")], 28_298, 40), end="")
    assert len(got.get().strip()) == 40


def test_a_rate_forgets() -> None:
    """The rate is that of the last seconds: what was done earlier does not count."""
    rate = Rate()
    for second in range(20):
        rate.update(float(second), 1_000 * second if second < 10 else 9_000 + 100 * (second - 9))
    assert rate.value == pytest.approx(100)


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """The demo empties only folders of its own, and one run at a time has one."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kafka").mkdir()
    with pytest.raises(DemoFailed, match="not this demo's"), claimed(tmp_path / "theirs", "airports"):
        pass
    assert (tmp_path / "theirs" / "kafka").is_dir()
    with claimed(tmp_path / "ours", "airports") as place:
        place.database.write_text("old")
        with pytest.raises(DemoFailed, match="another demo"), claimed(tmp_path / "ours", "airports"):
            pass
    with claimed(tmp_path / "ours", "airports") as place:
        assert not place.database.exists()


def test_progress_that_is_interrupted_before_it_showed_anything_ends_all_the_same() -> None:
    """Ctrl-C may come right after the last submission; what the bar shows at its end must not hide it."""
    for terminal in (True, False):
        screen = Screen(picture=False)
        screen.console = Console(force_terminal=terminal, file=io.StringIO(), width=100)
        with pytest.raises(KeyboardInterrupt), Progress(screen, 3):
            raise KeyboardInterrupt
