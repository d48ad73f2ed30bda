"""Projections on a real broker: folded exactly once, through kills and beside each other; verified and rebuilt."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Column, Integer, MetaData, String, Table, select

from jobledger import App, ConfigError, JobledgerError, Settings
from jobledger.errors import StoreError
from jobledger.kafka.topics import ensure
from jobledger.projection import Where
from jobledger.schemas.events import JobFailed, JobSucceeded, Recorded
from jobledger.streams.projection_store import ProjectionStore, database_of
from jobledger.streams.projections import Runner
from jobledger.writer import LogWriter, Outgoing
from tests.integration import projection_app
from tests.integration.projection_app import Happened
from tests.integration.worker_app import closings, until, working
from tests.postgres import Databases, Server

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def app(request: pytest.FixtureRequest, broker: str, namespace: str, tmp_path: Path) -> Iterator[App]:
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'status.db'}"
        if request.param == "postgresql":
            server: Databases = request.getfixturevalue("postgres")
            url = stack.enter_context(server.database())
        made = projection_app.build(namespace, Settings(bootstrap=broker, status_url=url))
        ensure(made, made.settings)
        stack.callback(made.close)
        yield made


def runner_of(app: App, name: str = "count_by_user") -> Runner:
    url = app.settings.resolve_status_url(app.names.namespace)
    return Runner(app.registry.projections[name], app.settings, app.names, list(app.lanes), url)


def store_of(app: App) -> ProjectionStore:
    return ProjectionStore(app.settings.resolve_status_url(app.names.namespace), app.names.namespace)


def folded(app: App, name: str = "count_by_user") -> Runner:
    """Run a projection to the log's end."""
    with closing(runner_of(app, name)) as runner:
        runner.run(threading.Event(), until_end=True)
    return runner


def rows(app: App, name: str = "count_by_user") -> dict[Any, dict[str, Any]]:
    table = app.registry.projections[name].table
    with closing(store_of(app)) as store, store.engine.begin() as db:
        return {row[0]: dict(row._mapping) for row in db.execute(select(table))}


def emit(app: App, count: int, first: int = 0) -> list[Happened]:
    events = [Happened(f"user-{n % 17}", n) for n in range(first, first + count)]
    app.emit_many(events)
    return events


def wanted(events: list[Happened]) -> dict[str, tuple[int, int]]:
    """What the fold comes to, by another way: how many, and their sum."""
    counts, sums = Counter(e.user for e in events), Counter[str]()
    for e in events:
        sums[e.user] += e.number
    return {user: (counts[user], sums[user]) for user in counts if user != "user-3"}


def said(found: dict[Any, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {user: (row["events"], row["total"]) for user, row in found.items()}


def test_a_table_is_what_its_fold_makes_of_the_log(app: App) -> None:
    """From the start, going on later; rows that the fold lets go are gone; garbage is passed and counted."""
    events = emit(app, 500)
    assert folded(app).folded == 500
    assert said(rows(app)) == wanted(events)
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.events["Happened"].topic, b"garbage", "k")])
    writer.close()
    events += emit(app, 300, 500)
    second = folded(app)
    assert (second.folded, second.unreadable) == (300, 1)
    assert said(rows(app)) == wanted(events)
    url = app.settings.resolve_status_url(app.names.namespace)
    beside = url.replace("status.db", "status-projections.db")
    assert database_of(url) == (beside if url.startswith("sqlite") else url)


def test_a_fold_that_fails_loses_nothing_and_goes_on_when_mended(app: App) -> None:
    """The batch is not written, and the error names the record; the next start begins with it."""
    events = emit(app, 50)
    folded(app)
    app.emit(Happened("user-1", -1))
    with pytest.raises(JobledgerError, match=r"Happened\[\d\]@\d+.*negative"):
        folded(app)
    assert said(rows(app)) == wanted(events)
    mended = app.registry.projections["count_by_user"]
    mended.fold = projection_app.count_all
    assert folded(app).folded == 1
    assert rows(app)["user-1"]["events"] == wanted(events)["user-1"][0] + 1


def test_verify_sees_a_changed_row_and_rebuild_mends_it(app: App) -> None:
    """By a fold of the whole log into a copy, which is gone afterwards."""
    events = emit(app, 400)
    folded(app)
    runner = runner_of(app)
    stop = threading.Event()
    fine = runner.verify(stop)
    assert (fine.equal, fine.rows, fine.records) == (True, 16, 400)
    table = app.registry.projections["count_by_user"].table
    store = store_of(app)
    engine = store.engine
    with engine.begin() as db:
        db.execute(table.update().where(table.c.user == "user-1").values(total=7))
        db.execute(table.delete().where(table.c.user == "user-2"))
    assert runner.verify(stop).equal is False
    more = emit(app, 100, 400)  # not folded into the live table yet
    made = runner.rebuild(stop)
    assert (made.rows, made.records) == (16, 500)
    assert said(rows(app)) == wanted([*events, *more])
    assert runner.verify(stop).equal is True
    assert {t for t in sqlalchemy.inspect(engine).get_table_names() if "count_by" in t} == set()
    assert folded(app).folded == 0
    store.close()
    runner.close()


def test_two_processes_of_one_projection_fold_nothing_twice(app: App) -> None:
    """Whoever finds the offsets moved writes nothing, and looks again."""
    stop = threading.Event()
    runners = [runner_of(app) for _ in range(2)]
    threads = [threading.Thread(target=r.run, args=(stop,)) for r in runners]
    for thread in threads:
        thread.start()
    events: list[Happened] = []
    for part in range(10):
        events += emit(app, 100, part * 100)
        time.sleep(0.1)
    until(
        lambda: rows(app) and sum(r["events"] for r in rows(app).values()) >= sum(c for c, _ in wanted(events).values())
    )
    stop.set()
    for thread, runner in zip(threads, runners, strict=True):
        thread.join(30)
        runner.close()
    assert said(rows(app)) == wanted(events)


def test_job_facts_are_folded_too_and_a_start_time_is_kept_to(app: App) -> None:
    """How often each task ended how, as `Recorded`; with a start in the future nothing is folded."""
    app.submit_many(app.tasks["work"].job(n) for n in range(30))
    with working(app):
        until(lambda: len(closings(app)) == 30)
    folded(app, "ends")
    found = rows(app, "ends")
    assert {k: r["jobs"] for k, r in found.items()} == {"JobSucceeded": 20, "JobFailed": 10}
    assert all(row["last_ms"] > 1_700_000_000_000 for row in found.values())
    assert folded(app, "not_yet").folded == 0


def test_killed_at_random_it_equals_a_fold_in_one_go(app: App, say: Callable[[str], None]) -> None:
    """``jobledger projections run``, killed ten times while events come in."""
    dice = random.Random(3)
    env = {
        **os.environ,
        "JOBLEDGER_BOOTSTRAP": app.settings.resolve_bootstrap(),
        "JOBLEDGER_STATUS_URL": str(app.settings.status_url),
        "PROJECTION_NAMESPACE": app.names.namespace,
    }
    argv = [
        sys.executable,
        "-m",
        "jobledger",
        "projections",
        "run",
        "tests.integration.projection_app:app",
        "count_by_user",
    ]
    events: list[Happened] = []
    done = threading.Event()

    def feed() -> None:
        while not done.is_set():
            events.extend(emit(app, 2_000, len(events)))
            done.wait(0.1)

    feeding = threading.Thread(target=feed)
    feeding.start()
    kills = 0
    try:
        while kills < 10:
            process = subprocess.Popen(argv, env=env, cwd=ROOT)
            time.sleep(dice.uniform(0.9, 2.2))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    finally:
        done.set()
        feeding.join()
    assert folded(app).folded < len(events)  # those that were killed have done some of it
    assert said(rows(app)) == wanted(events)
    runner = runner_of(app)
    assert runner.verify(threading.Event()).equal is True
    runner.close()
    say(f"projection: {len(events):,} events, killed {kills}x, equal")


def test_what_cannot_be_a_projection_is_refused_when_it_is_declared(app: App) -> None:
    keyless = Table("keyless", MetaData(), Column("a", Integer))
    good = Table("good", MetaData(), Column("a", String, primary_key=True))
    own = Table("jobledger_mine", MetaData(), Column("a", String, primary_key=True))

    def fold(row: Any, event: Any) -> Any: ...

    def one(row: Any) -> Any: ...

    cases: list[tuple[Any, dict[str, Any], str]] = [
        (fold, {"table": keyless}, "primary key"),
        (fold, {"table": own}, "Jobledger's own"),
        (fold, {"table": good, "facts": (JobSucceeded,)}, "not both"),
        (fold, {"table": good, "name": "No"}, "small letters"),
        (fold, {"table": good, "start": dt.datetime(2026, 1, 1)}, "time zone"),  # the point
        (one, {"table": good}, "parameters"),
        (fold, {"table": app.registry.projections["ends"].table}, "registered already"),
    ]
    for function, options, why in cases:
        with pytest.raises(ConfigError, match=why):
            app.projection(Happened, key=lambda event: "k", **options)(function)
    with pytest.raises(ConfigError, match="no facts"):
        app.projection(table=good, key=lambda event: "k", facts=(int,))(fold)
    assert JobFailed is not None
    assert Recorded is not None
    assert Where._fields == ("event_id", "position", "appended_ms")


def test_a_database_that_is_away_for_a_while_loses_nothing(
    broker: str, namespace: str, postgres_server: Server
) -> None:
    """PostgreSQL, stopped as in a crash in the middle of the stream and started again: the fold is exact, by itself."""
    app = projection_app.build(namespace, Settings(bootstrap=broker, status_url=postgres_server.url))
    ensure(app, app.settings)
    stop, runner = threading.Event(), runner_of(app)
    thread = threading.Thread(target=runner.run, args=(stop,))
    events = emit(app, 2_000)
    thread.start()
    try:
        until(lambda: runner.folded > 0)
        for _ in range(2):
            postgres_server.stop(at_once=True)
            events.extend(emit(app, 1_000, len(events)))
            time.sleep(2)
            postgres_server.start()
            until(lambda: said(rows(app)) == wanted(events))
    finally:
        stop.set()
        thread.join(30)
        runner.close()
        app.close()


def test_a_table_that_does_not_fit_is_said_at_once(app: App) -> None:
    """Another table of that name, without our column: an error with its words, not half a minute of tries."""
    emit(app, 5)
    with closing(store_of(app)) as store, store.engine.begin() as db:
        db.exec_driver_sql('CREATE TABLE people ("user" VARCHAR(40) PRIMARY KEY)')
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"projection count_by_user.*events"):
        folded(app)
    assert time.monotonic() - began < 10


def test_a_user_who_may_not_make_tables_is_told(broker: str, namespace: str, postgres: Databases) -> None:
    """By name, with the way out, and without the password."""
    with postgres.role("geheim") as name, postgres.database() as url:
        postgres.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", url)
        mine = sqlalchemy.make_url(url).set(username=name, password="geheim").render_as_string(hide_password=False)
        app = projection_app.build(namespace, Settings(bootstrap=broker, status_url=mine))
        with pytest.raises(StoreError, match=rf"{name}.*GRANT CREATE ON SCHEMA") as told:
            folded(app)
        assert "geheim" not in str(told.value)
        app.close()
