"""The demo's own rules: rejected rows, the third party's answers, and the rows of the database."""

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
    JobFailedFact,
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
    """Of 28,298 rows, 2,825 lack a city and 130 name a time zone of another country. 8 rows have both faults, so 2,947
    rows are rejected."""
    faults_of_rows = [faults(airport) for airport in airports()]
    kinds_found = Counter(kind for each in faults_of_rows for kind in kinds("; ".join(each)))
    assert len(faults_of_rows) == 28_298
    assert kinds_found == {NO_CITY: 2_825, FOREIGN_ZONE: 130}
    assert sum(bool(each) for each in faults_of_rows) == 2_825 + 130 - 8


def test_each_row_has_its_own_code() -> None:
    """No two rows have the same ICAO code, under which they are saved."""
    codes = [airport.icao for airport in airports()]
    assert len(set(codes)) == len(codes)


def test_a_good_row_has_no_fault_and_each_fault_of_a_bad_row_is_named() -> None:
    """A reason names the time zone and the country that do not go together."""
    assert faults(GOOD) == ()
    bad = Airport("XXXX", "", "Nowhere", " ", "", "CH", 0.0, 0.0, 0.0, "Europe/Paris")
    assert faults(bad) == (NO_CITY, f"{FOREIGN_ZONE}: Europe/Paris is none of CH's")
    assert kinds("; ".join(faults(bad))) == (NO_CITY, FOREIGN_ZONE)


def test_coordinates_are_read_from_iso_6709() -> None:
    """Minutes and seconds are parts of a degree, south and west are negative, and anything else is refused."""
    assert coordinates("+4723+00832") == pytest.approx((47 + 23 / 60, 8 + 32 / 60))
    assert coordinates("-690022-0393524") == pytest.approx((-(69 + 22 / 3600), -(39 + 35 / 60 + 24 / 3600)))
    with pytest.raises(ValueError, match="ISO 6709"):
        coordinates("47.38,8.54")


def test_a_country_may_have_several_time_zones() -> None:
    """In the list of the tz database, the United States have many zones and Switzerland has one."""
    assert zones_of_countries()["CH"] == {"Europe/Zurich"}
    assert {"America/New_York", "Pacific/Honolulu"} < zones_of_countries()["US"]
    assert zones()["Europe/Zurich"].country == "CH"


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_agree_with_another_formula(lat: float, lon: float, to_lat: float, to_lon: float) -> None:
    """The haversine of the third party and the vectors of the report give the same metres, anywhere on Earth."""
    here = distance_m(lat, lon, to_lat, to_lon)
    assert here == pytest.approx(reference_distance_m(lat, lon, to_lat, to_lon), abs=1.0)
    assert 0 <= here <= math.pi * 6_371_009


def test_the_distance_of_zurich_airport_from_its_city_is_known() -> None:
    """Zurich airport is 8.4 km from the coordinates that zone.tab gives for Zurich."""
    zone = zones()["Europe/Zurich"]
    assert distance_m(GOOD.lat, GOOD.lon, zone.lat, zone.lon) == pytest.approx(8_400, abs=50)


def test_the_third_party_fails_at_its_declared_rates() -> None:
    """The n-th call for a query always has the same result. 5 % of the calls are refused as busy, 1 % hang, and all
    calls take 2 to 50 ms."""
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


def test_a_second_save_replaces_the_row(tmp_path: Path) -> None:
    """A save is idempotent: a job that runs again overwrites its own row."""

    async def save() -> None:
        database = Database(tmp_path / "airports.db")
        await asyncio.gather(*(database.save(row(f"A{n:03}", n)) for n in range(700)))
        await database.save(row("A005", 99))
        database.close()

    asyncio.run(save())
    saved = saved_rows(tmp_path / "airports.db")
    assert len(saved) == 700
    assert {each.icao: each.zone_distance_m for each in saved}["A005"] == 99


def test_a_row_is_committed_when_save_returns(tmp_path: Path) -> None:
    """Another connection sees the row as soon as the awaited save is done."""

    async def save() -> list[Row]:
        database = Database(tmp_path / "airports.db")
        await database.save(row("LSZH", 8_400))
        saved = saved_rows(tmp_path / "airports.db")
        database.close()
        return saved

    assert asyncio.run(save()) == [row("LSZH", 8_400)]


def test_an_error_of_sqlite_is_raised_in_the_job(tmp_path: Path) -> None:
    """A failed write raises in the job that asked for it, and the next write opens the database again."""
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
    """Without a database file, and with an empty one, the list of saved rows is empty."""
    assert saved_rows(tmp_path / "airports.db") == []
    open_database(tmp_path / "airports.db").close()
    assert saved_rows(tmp_path / "airports.db") == []


def test_percentiles_are_values_that_occurred() -> None:
    """A percentile is the value at the nearest rank, without interpolation."""
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
    event("a", 1, 1_010, JobStarted("w", None, {}, "t", 0)),
    event("a", 1, 1_040, JobRetried(ERROR, 200, 25_000)),
    event("a", 2, 1_300, JobDue(SPEC, 0)),
    event("a", 2, 1_305, JobStarted("w", None, {}, "t", 1)),
    event("a", 2, 1_330, JobSucceeded(b"1", 20_000)),
]


@given(st.permutations(RETRIED_ONCE * 2))
def test_times_of_a_job_are_computed_from_its_facts_in_any_order(events: list[Recorded]) -> None:
    """The times of waiting, running and backing off are added over the attempts. Neither the order of the facts nor
    copies change them, except a second outcome."""
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


def test_a_job_with_two_outcomes_counts_as_neither_succeeded_nor_failed() -> None:
    """The log has two outcomes of the job, so the demo must not count it as correct."""
    life = fold([*RETRIED_ONCE, event("a", 2, 1_400, JobSucceeded(b"1", 20_000))])["a"]
    assert not life.succeeded
    assert life.failed is None


def lived(fact: JobSucceeded | JobFailedFact) -> Life:
    return fold(
        [
            event("a", 1, 0, JobSubmitted(SPEC)),
            event("a", 1, 1, JobStarted("w", None, {}, "t", 0)),
            event("a", 1, 2, fact),
        ]
    )["a"]


def balanced() -> tuple[list[Airport], dict[str, int], list[str], list[Row], dict[str, Life]]:
    bad = Airport("XXXX", "", "Nowhere", "", "", "CH", 0.0, 0.0, 0.0, "Europe/Zurich")
    zone = zones()[GOOD.tz]
    metres = round(distance_m(GOOD.lat, GOOD.lon, zone.lat, zone.lon))
    saved = Row(GOOD.icao, GOOD.name, GOOD.city, "CH", GOOD.tz, GOOD.lat, GOOD.lon, 431.9, metres)
    lives = {"a": lived(JobSucceeded(b"1", 1)), "b": lived(JobFailedFact("rejected", ErrorInfo("Reject", NO_CITY), 1))}
    return [GOOD, bad], {"succeeded": 1, "failed": 1}, [NO_CITY], [saved], lives


def test_every_check_of_a_correct_run_holds() -> None:
    """Every row has an outcome, and the table and the log agree."""
    assert all(check.holds for check in account(*balanced()))


def test_every_check_can_fail() -> None:
    """For each check there is a run that breaks it: a job without an outcome, a wrong rejection, a missing row, a wrong
    row, a job without its facts."""
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
    """A row with two faults is counted once, under both kinds. A reason of an unknown kind is counted under its own
    text."""
    both = f"{NO_CITY}; {FOREIGN_ZONE}: Europe/Paris is none of CH's"
    assert rejects([NO_CITY, both, NO_CITY, "oops"]) == {NO_CITY: 2, f"{NO_CITY} + {FOREIGN_ZONE}": 1, "other: oops": 1}


def test_latencies_are_those_of_the_log() -> None:
    """The broker's times give submit → start and submit → end; the worker's time gives the length of an attempt."""
    by_name = {each.name: each.values for each in latencies(fold(RETRIED_ONCE).values())}
    assert by_name["submit → start"] == (10.0,) * 4
    assert by_name["one attempt"] == (20.0, 25.0, 25.0, 25.0)
    assert by_name["submit → end"] == (330.0,) * 4


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=5), st.just(0) | st.integers(0, 30_000))
@example([1, 1, 1], 0)
@example([1, 69, 67], 1627)
def test_a_bar_has_a_cell_for_each_part_that_is_not_empty(values: list[int], rest: int) -> None:
    """An empty part has no cell, and the bar is never longer than its width."""
    cells = Bar([(value, "green") for value in values], sum(values) + rest, 40).cells()
    assert [bool(cell) for cell in cells] == [bool(value) for value in values]
    assert sum(cells) <= 40
    assert rest or not any(values) or sum(cells) == 40


def test_a_bar_fills_its_width() -> None:
    """The drawn bar has exactly its width, including the part for jobs without an outcome."""
    console = Console(width=80, color_system=None)
    with console.capture() as got:
        console.print(Bar([(20_000, "green"), (1, "red"), (0, "cyan"), (2, "yellow")], 28_298, 40), end="")
    assert len(got.get().strip()) == 40


def test_a_rate_counts_only_the_last_seconds() -> None:
    """Rows that were done earlier do not change the rate."""
    rate = Rate()
    for second in range(20):
        rate.update(float(second), 1_000 * second if second < 10 else 9_000 + 100 * (second - 9))
    assert rate.value == pytest.approx(100)


def test_the_demo_does_not_use_a_foreign_folder(tmp_path: Path) -> None:
    """The demo empties only its own folders, and only one run at a time uses a folder."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kafka").mkdir()
    with pytest.raises(DemoFailed, match="not this demo's"), claimed(tmp_path / "theirs", "airports"):
        pass
    assert (tmp_path / "theirs" / "kafka").is_dir()
    with claimed(tmp_path / "ours", "airports") as folder:
        folder.database.write_text("old")
        with pytest.raises(DemoFailed, match="another demo"), claimed(tmp_path / "ours", "airports"):
            pass
    with claimed(tmp_path / "ours", "airports") as folder:
        assert not folder.database.exists()


def test_a_progress_bar_that_is_interrupted_before_its_first_update_ends() -> None:
    """Ctrl-C may come right after the last submission. The last update of the bar must not hide the
    KeyboardInterrupt."""
    for terminal in (True, False):
        screen = Screen(picture=False)
        screen.console = Console(force_terminal=terminal, file=io.StringIO(), width=100)
        with pytest.raises(KeyboardInterrupt), Progress(screen, 3):
            raise KeyboardInterrupt
