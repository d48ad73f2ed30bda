"""Projections on a real broker: folded exactly once, through kills and beside each other; verified and rebuilt."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from confluent_kafka import TopicPartition
from sqlalchemy import Column, DateTime, Integer, MetaData, PrimaryKeyConstraint, String, Table, select

from jobledger import App, ConfigError, IncompatibleEvent, JobledgerError, Settings
from jobledger.definitions.projection import Where
from jobledger.errors import BrokerUnavailable, StoreError
from jobledger.kafka.clients import admin, partitions_of, producer, producer_config
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas.events import CancelRequested, JobSucceeded, QueuePaused
from jobledger.streams.projections import runner as projection_runner
from jobledger.streams.projections.projection_store import ProjectionStore, database_of
from jobledger.streams.projections.runner import ProjectionRunner
from jobledger.streams.status.log_feed import identities
from tests.integration import projection_app
from tests.integration.projection_app import Happened
from tests.integration.worker_app import closings, until, working
from tests.patience import PATIENCE
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


def runner_of(app: App, name: str = "count_by_user") -> ProjectionRunner:
    url = app.settings.resolve_status_url(app.names.namespace)
    return ProjectionRunner(app.registry.projections[name], app.settings, app.names, list(app.lanes), url)


def store_of(app: App) -> ProjectionStore:
    return ProjectionStore(app.settings.resolve_status_url(app.names.namespace), app.names.namespace)


def folded(app: App, name: str = "count_by_user") -> ProjectionRunner:
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


def test_the_longest_name_can_be_verified_and_rebuilt(app: App) -> None:
    """The copies have names of their own, and so have their constraints, which must be different ones to every database."""
    long = Table(
        "long", MetaData(), Column("user", String), Column("numbers", Integer), PrimaryKeyConstraint("user", name="pk")
    )
    name = "n" * 45
    app.projection(Happened, table=long, key=lambda event: event.user, name=name)(projection_app.not_yet)
    emit(app, 20)
    folded(app, name)
    with closing(runner_of(app, name)) as runner:
        assert runner.verify(threading.Event()).equal is True
        assert runner.rebuild(threading.Event()).rows == 17


@dataclass(frozen=True)
class Renumbered:
    """`Happened`, with another type for a field."""

    user: str
    number: str


def test_a_runner_notices_a_rebuild_though_no_record_comes(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild to an earlier end puts rows and offsets back under a process that has folded more."""
    monkeypatch.setattr("jobledger.streams.projections.runner.LOOK_S", 0.5)
    events, stop = emit(app, 50), threading.Event()
    folded(app)
    earlier = dict(enumerate(ends_of(app, app.events["Happened"].topic)))
    events += emit(app, 50, 50)
    with closing(runner_of(app)) as live, closing(runner_of(app)) as other:
        thread = threading.Thread(target=live.run, args=(stop,))
        thread.start()
        try:
            until(lambda: said(rows(app)) == wanted(events))
            topic = app.events["Happened"].topic
            monkeypatch.setattr(other, "_ends", lambda places: {(topic, p): end for p, end in earlier.items()})
            assert other.rebuild(threading.Event()).records == 50
            until(lambda: said(rows(app)) == wanted(events))
        finally:
            stop.set()
            thread.join(PATIENCE * 30)


def test_of_two_rebuilds_at_once_one_is_refused(app: App) -> None:
    """They would fold into one copy; the table is whole, and the next rebuild may run."""
    events = emit(app, 50)
    folded(app)
    met: list[JobledgerError] = []

    def second(done: int, total: int) -> None:
        with closing(runner_of(app)) as other:
            assert other.verify(threading.Event()).equal is True  # has a copy of its own
            with pytest.raises(StoreError, match="rebuild of projection count_by_user is under way") as refused:
                other.rebuild(threading.Event())
            met.append(refused.value)

    with closing(runner_of(app)) as first:
        first.rebuild(threading.Event(), second)
        assert met
        first.rebuild(threading.Event())
    assert said(rows(app)) == wanted(events)


@pytest.mark.parametrize("later", [20, 200])
def test_a_topic_that_begins_anew_is_not_folded_twice(app: App, later: int) -> None:
    """Its offsets are below what was folded, or it has more records than that: the projection says so, and a rebuild mends it."""
    emit(app, 60)
    folded(app)
    topic, client = app.events["Happened"].topic, admin(app.settings)
    for future in client.delete_topics([topic], operation_timeout=20).values():
        future.result(timeout=20)
    until(lambda: topic not in client.list_topics(timeout=10).topics)
    with closing(App(app.names.namespace, settings=app.settings, partitions=3)) as again:
        again.event(key="user")(Happened)
        ensure(again, again.settings)
        again.emit_many(events := [Happened(f"user-{n % 17}", n) for n in range(later)])
    before = rows(app)
    with closing(runner_of(app)) as runner:
        for until_end in (True, False):
            with pytest.raises(
                JobledgerError, match=r"Happened\[\d\], which now (ends at \d|is a later topic).*projections rebuild"
            ):
                runner.run(threading.Event(), until_end=until_end)
        assert rows(app) == before
        runner.rebuild(threading.Event())
    assert said(rows(app)) == wanted(events)


def test_a_class_that_cannot_read_what_was_written_folds_nothing(app: App) -> None:
    """Its events would be passed over as garbage, by every fold alike; so it neither runs, nor verifies, nor rebuilds."""
    events = emit(app, 30)
    other = App(app.names.namespace, settings=app.settings, partitions=3)
    other.event(name="Happened", key="user")(Renumbered)
    other.projection(Renumbered, table=app.registry.projections["count_by_user"].table, key=lambda e: e.user)(
        projection_app.count_by_user
    )
    with closing(runner_of(other)) as runner:
        for act in (
            lambda: runner.run(threading.Event(), until_end=True),
            lambda: runner.verify(threading.Event()),
            lambda: runner.rebuild(threading.Event()),
        ):
            with pytest.raises(IncompatibleEvent, match="Happened"):
                act()
    assert folded(app).folded == 30
    assert said(rows(app)) == wanted(events)
    other.close()


def trim(app: App, topic: str, left: int) -> list[str]:
    """Delete all but the last ``left`` records of each partition; where they begin now."""
    client, places = admin(app.settings), range(partitions_of(app.settings, topic))
    with LogReader(app.settings) as log:
        ends = {p: log.watermarks(topic, p)[1] for p in places}
    wanted = [TopicPartition(topic, p, max(0, end - left)) for p, end in ends.items()]
    for future in client.delete_records(wanted).values():
        future.result(timeout=20)
    return [f"{topic}[{each.partition}] begins at {each.offset}" for each in wanted if each.offset]


def ends_of(app: App, topic: str) -> list[int]:
    with LogReader(app.settings) as log:
        return [log.watermarks(topic, p)[1] for p in range(partitions_of(app.settings, topic))]


def cli(app: App, *words: str) -> subprocess.CompletedProcess[str]:
    """``jobledger projections WORDS`` on this app."""
    env = {
        **os.environ,
        "JOBLEDGER_BOOTSTRAP": app.settings.resolve_bootstrap(),
        "JOBLEDGER_STATUS_URL": str(app.settings.status_url),
        "PROJECTION_NAMESPACE": app.names.namespace,
    }
    argv = [sys.executable, "-m", "jobledger", "projections", words[0], "tests.integration.projection_app:app"]
    return subprocess.run(
        [*argv, *words[1:]], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_trimmed_log_is_not_taken_for_the_whole(app: App) -> None:
    """`verify` says that it cannot tell, `rebuild` changes nothing unless it is told to lose what is gone."""
    events = emit(app, 200)
    folded(app)
    before = rows(app)
    gone = trim(app, app.events["Happened"].topic, 10)
    assert len(gone) == 3
    with closing(runner_of(app)) as runner:
        found = runner.verify(threading.Event())
        assert (found.equal, found.trimmed) == (None, gone)
        with pytest.raises(JobledgerError, match=r"Happened\[0\] begins at \d+.*--from-what-is-left"):
            runner.rebuild(threading.Event())
        assert rows(app) == before
        assert said(before) == wanted(events)
    verified = cli(app, "verify", "count_by_user", "--json")
    told = json.loads(verified.stdout)
    assert (verified.returncode, told["equal"], told["trimmed"]) == (1, None, gone)
    assert "not comparable: the log was trimmed" in verified.stderr
    assert "equal                not comparable: the log was trimmed" in cli(app, "verify", "count_by_user").stdout
    refused = cli(app, "rebuild", "count_by_user", "--yes")
    assert refused.returncode == 1
    assert "--from-what-is-left" in refused.stderr
    assert rows(app) == before
    made = cli(app, "rebuild", "count_by_user", "--yes", "--from-what-is-left", "--json")
    assert (made.returncode, json.loads(made.stdout)["records"]) == (0, 30)
    assert sum(row["events"] for row in rows(app).values()) <= 30
    # A table that equals what is left is right, whatever is gone.
    with closing(runner_of(app)) as runner:
        assert (runner.verify(threading.Event()).equal, folded(app).folded) == (True, 0)


def test_records_that_were_trimmed_before_they_were_folded_are_said(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """A projection that stood still for too long goes on, and does not do so in silence."""
    emit(app, 60)
    folded(app)
    emit(app, 60, 60)
    trim(app, app.events["Happened"].topic, 5)
    assert folded(app).folded == 15
    lost = [r.getMessage() for r in caplog.records if "they are lost" in r.getMessage()]
    assert sum(int(re.findall(r"before (\d+) records", line)[0]) for line in lost) == 45


def test_nothing_is_folded_before_the_ids_of_its_topics_are_known(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of a topic whose id is not stored would be taken for those of a later topic of its name."""
    events = emit(app, 30)
    monkeypatch.setattr(projection_runner, "IDENTIFY_S", 0.3)
    monkeypatch.setattr(projection_runner, "identities", lambda *args: {})
    with closing(runner_of(app)) as runner:
        for act in (lambda: runner.run(threading.Event(), until_end=True), lambda: runner.rebuild(threading.Event())):
            with pytest.raises(BrokerUnavailable, match=r"did not return the ids of \S+\.Happened within 0.3 s"):
                act()
    assert rows(app) == {}
    answers: Iterator[dict[str, str]] = iter([{}, {}])  # a topic that has just been created
    monkeypatch.setattr(projection_runner, "identities", lambda *args: next(answers, None) or identities(*args))
    monkeypatch.setattr(projection_runner, "IDENTIFY_S", 30.0)
    assert folded(app).folded == 30
    assert said(rows(app)) == wanted(events)


def test_orders_are_folded_too(app: App) -> None:
    """Pauses and cancels, each once, though a cancel stands on two topics; what is taken back is no garbage. As the
    control topic is compacted, a fold of it may have less than the table: that is said."""
    orders = Table("orders", MetaData(), Column("what", String, primary_key=True), Column("count", Integer))

    def given(row: Any, found: Any) -> Any:
        return {"count": (row["count"] if row else 0) + 1}

    app.projection(
        facts=(QueuePaused, CancelRequested), table=orders, key=lambda found: type(found.event.fact).__name__
    )(given)
    app.pause(queue="default")
    app.resume(queue="default")
    app.cancel("0192e4a0-0000-7000-8000-000000000001")
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.names.control, None, "cancel:0192e4a0-0000-7000-8000-000000000001:1")])
    writer.close()
    assert folded(app, "given").unreadable == 0
    assert {what: row["count"] for what, row in rows(app, "given").items()} == {"QueuePaused": 1, "CancelRequested": 1}
    with closing(runner_of(app, "given")) as runner, closing(store_of(app)) as store:
        assert runner.verify(threading.Event()).equal is True
        # A transaction's mark takes an offset that no record has, as compaction leaves many.
        sender = producer(
            {**producer_config(app.settings, timeout=20.0), "transactional.id": app.names.namespace, "linger.ms": 5}
        )
        sender.init_transactions(PATIENCE * 20)  # the first one of a broker: it makes a topic for them
        sender.begin_transaction()
        sender.produce(app.names.control, b"garbage", "k")
        sender.commit_transaction(PATIENCE * 20)
        app.pause(queue="default")
        with pytest.raises(JobledgerError, match=r"control is compacted: 1 of its records are gone"):
            runner.rebuild(threading.Event())
        assert "jobledger_given_rebuild" not in sqlalchemy.inspect(store.engine).get_table_names()


def test_what_a_projections_own_code_does_wrong_is_said_with_its_record(app: App) -> None:
    """Its fold leaves, its key= fails or makes none, a value or a key is of the wrong type: nothing of the batch is
    written, and the error has the record, and the column where there is one."""
    emit(app, 3)
    table = Table("timed", MetaData(), Column("user", String, primary_key=True), Column("at", DateTime))
    moments = Table("moments", MetaData(), Column("at", DateTime, primary_key=True))

    def leaves(row: Any, event: Any) -> Any:
        raise SystemExit(0)

    def broken(event: Any) -> Any:
        raise KeyError("who")

    def of_user(event: Any) -> Any:
        return event.user

    def timed(row: Any, event: Any) -> Any:
        return {"at": "yesterday"}  # the point: of every event, because each may be a batch of its own

    def kept(row: Any, event: Any) -> Any:
        return {}

    cases: list[tuple[Any, Any, Table, str]] = [
        (leaves, of_user, table, r"its fold failed at \S+Happened\[\d\]@\d+ \(SystemExit: 0"),
        (timed, broken, table, r"its key= failed at \S+Happened\[\d\]@\d+ \(KeyError: 'who'"),
        (timed, lambda event: (event.user, 1), table, r"its key= failed at \S+@\d+ .* is not a key of user"),
        (timed, lambda event: [event.user], table, r"its key= failed at \S+@\d+ .*unhashable"),
    ]
    if str(app.settings.status_url).startswith("sqlite"):  # the driver of PostgreSQL takes text for any type
        cases += [
            (timed, of_user, table, r"its value 'yesterday' for column timed.at \(DateTime.*failed at \S+Happened"),
            (kept, of_user, moments, r"its value 'user-\d' for column moments.at \(DateTime.*failed at \S+Happened"),
        ]
    for fold, key, into, why in cases:
        app.registry.projections.pop("wrong", None)
        app.projection(Happened, table=into, key=key, name="wrong")(fold)
        with pytest.raises(JobledgerError, match=f"projection wrong: {why}"):
            folded(app, "wrong")
        assert rows(app, "wrong") == {}


def test_a_projection_that_breaks_ends_all_of_them(app: App) -> None:
    """``jobledger projections run`` of several, one of which cannot go on, whatever it raised: not 0, and with the
    record's place."""
    app.emit(Happened("leaves", 1))
    ended = cli(app, "run")
    assert ended.returncode == 1
    assert re.search(r"error: projection count_by_user: its fold failed at \S+@0 \(SystemExit", ended.stderr)


def test_what_is_no_error_of_ours_ends_them_too(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that dies of a mistake, even in silence, takes the process with it."""
    from jobledger.cli import projections as command

    class Broken(ProjectionRunner):
        def run(self, stop: threading.Event, *, until_end: bool = False) -> None:
            if self.projection.name == "ends":
                raise SystemExit(0)
            stop.wait(60)

    url = app.settings.resolve_status_url(app.names.namespace)
    monkeypatch.setattr(command, "load_app", lambda *words, **options: app)
    monkeypatch.setattr(
        command,
        "_runner",
        lambda loaded, name: Broken(loaded.registry.projections[name], app.settings, app.names, ["default"], url),
    )
    with pytest.raises(JobledgerError, match="projection ends failed: SystemExit: 0"):
        command.run("any:app")


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
    with closing(store_of(app)) as store:
        until(lambda: sqlalchemy.inspect(store.engine).has_table("people"), what="the table being made")
    until(
        lambda: rows(app) and sum(r["events"] for r in rows(app).values()) >= sum(c for c, _ in wanted(events).values())
    )
    stop.set()
    for thread, runner in zip(threads, runners, strict=True):
        thread.join(PATIENCE * 30)
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

    def seen() -> int:
        return sum(row["events"] for row in rows(app).values())

    folded(app)  # makes the table
    feeding = threading.Thread(target=feed)
    feeding.start()
    kills = 0
    try:
        while kills < 10:
            before = seen()
            process = subprocess.Popen(argv, env=env, cwd=ROOT)
            if kills % 2:  # while it folds; else wherever it is, on a busy machine at its start
                until(lambda before=before: seen() > before)  # type: ignore[misc]  # bound now
                time.sleep(dice.uniform(0.0, 0.5))
            else:
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
        (fold, {"table": good, "facts": (JobSucceeded,)}, "give either event classes"),
        (fold, {"table": good, "name": "No"}, "lowercase letters"),
        (fold, {"table": good, "start": dt.datetime(2026, 1, 1)}, "time zone"),  # the point
        (one, {"table": good}, "parameters"),
        (fold, {"table": app.registry.projections["ends"].table}, "already registered"),
    ]
    for function, options, why in cases:
        with pytest.raises(ConfigError, match=why):
            app.projection(Happened, key=lambda event: "k", **options)(function)
    with pytest.raises(ConfigError, match="not facts"):
        app.projection(table=good, key=lambda event: "k", facts=(int,))(fold)
    long = "x" * 46
    with pytest.raises(ConfigError, match=rf"projection '{long}': .* at most 45"):
        app.projection(Happened, table=good, key=lambda event: "k", name=long)(fold)
    assert Where._fields == ("event_id", "position", "appended_ms")


def test_a_database_that_is_away_for_a_while_loses_nothing(
    broker: str, namespace: str, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL, stopped as in a crash in the middle of the stream and started again: the fold is exact, by itself."""
    monkeypatch.setattr(projection_runner, "AWAY_TRIES", 300)  # a busy machine takes its time to start the server
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
        thread.join(PATIENCE * 30)
        runner.close()
        app.close()


def test_a_table_that_does_not_fit_is_said_at_once(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """Another table of that name, without our column: an error with its words, not half a minute of tries."""
    emit(app, 5)
    with closing(store_of(app)) as store, store.engine.begin() as db:
        db.exec_driver_sql('CREATE TABLE people ("user" VARCHAR(40) PRIMARY KEY)')
    with pytest.raises(StoreError, match=r"projection count_by_user.*events"):
        folded(app)
    assert "trying again" not in caplog.text


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
