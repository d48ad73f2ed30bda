"""Projections with a real broker: each event is folded exactly once, also with kills and with two processes.
Projections are verified and rebuilt."""

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
from jobledger.schemas.events import CancelRequested, JobSucceeded, QueuePaused, fact_name
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


def fold_to_end(app: App, name: str = "count_by_user") -> ProjectionRunner:
    """Run a projection to the end of the log."""
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


def expected_rows(events: list[Happened]) -> dict[str, tuple[int, int]]:
    """Compute the expected rows in another way: the number of events and the sum of their numbers, by user."""
    counts, sums = Counter(e.user for e in events), Counter[str]()
    for e in events:
        sums[e.user] += e.number
    return {user: (counts[user], sums[user]) for user in counts if user != "user-3"}


def counts_and_sums(found: dict[Any, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {user: (row["events"], row["total"]) for user, row in found.items()}


def test_a_table_is_the_fold_of_the_log(app: App) -> None:
    """The log is folded from its start, and later from where the projection stopped. Rows for which the fold returns
    None are deleted. Garbage is skipped and counted."""
    events = emit(app, 500)
    assert fold_to_end(app).folded == 500
    assert counts_and_sums(rows(app)) == expected_rows(events)
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.events["Happened"].topic, b"garbage", "k")])
    writer.close()
    events += emit(app, 300, 500)
    second = fold_to_end(app)
    assert (second.folded, second.unreadable) == (300, 1)
    assert counts_and_sums(rows(app)) == expected_rows(events)
    url = app.settings.resolve_status_url(app.names.namespace)
    beside = url.replace("status.db", "status-projections.db")
    assert database_of(url) == (beside if url.startswith("sqlite") else url)


def test_a_failed_fold_loses_nothing_and_continues_when_corrected(app: App) -> None:
    """The batch is not written, and the error names the record. The next run begins with this record."""
    events = emit(app, 50)
    fold_to_end(app)
    app.emit(Happened("user-1", -1))
    with pytest.raises(JobledgerError, match=r"Happened\[\d\]@\d+.*negative"):
        fold_to_end(app)
    assert counts_and_sums(rows(app)) == expected_rows(events)
    mended = app.registry.projections["count_by_user"]
    mended.fold = projection_app.count_all
    assert fold_to_end(app).folded == 1
    assert rows(app)["user-1"]["events"] == expected_rows(events)["user-1"][0] + 1


def test_verify_finds_a_changed_row_and_rebuild_repairs_it(app: App) -> None:
    """Both commands fold the whole log into a copy of the table, which is removed afterwards."""
    events = emit(app, 400)
    fold_to_end(app)
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
    more = emit(app, 100, 400)  # not yet folded into the table
    made = runner.rebuild(stop)
    assert (made.rows, made.records) == (16, 500)
    assert counts_and_sums(rows(app)) == expected_rows([*events, *more])
    assert runner.verify(stop).equal is True
    assert {t for t in sqlalchemy.inspect(engine).get_table_names() if "count_by" in t} == set()
    assert fold_to_end(app).folded == 0
    store.close()
    runner.close()


def test_a_projection_with_the_longest_name_can_be_verified_and_rebuilt(app: App) -> None:
    """The copies and their constraints have names that are valid and different in every database."""
    long = Table(
        "long", MetaData(), Column("user", String), Column("numbers", Integer), PrimaryKeyConstraint("user", name="pk")
    )
    name = "n" * 45
    app.projection(Happened, table=long, key=lambda event: event.user, name=name)(projection_app.not_yet)
    emit(app, 20)
    fold_to_end(app, name)
    with closing(runner_of(app, name)) as runner:
        assert runner.verify(threading.Event()).equal is True
        assert runner.rebuild(threading.Event()).rows == 17


@dataclass(frozen=True)
class Renumbered:
    """`Happened` with another type of one field."""

    user: str
    number: str


def test_a_runner_notices_a_rebuild_without_new_records(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process runs that has folded more, a rebuild up to an earlier end resets rows and offsets. The process
    then folds the missing events."""
    monkeypatch.setattr("jobledger.streams.projections.runner.LOOK_S", 0.5)
    events, stop = emit(app, 50), threading.Event()
    fold_to_end(app)
    earlier = dict(enumerate(ends_of(app, app.events["Happened"].topic)))
    events += emit(app, 50, 50)
    with closing(runner_of(app)) as live, closing(runner_of(app)) as other:
        thread = threading.Thread(target=live.run, args=(stop,))
        thread.start()
        try:
            until(lambda: counts_and_sums(rows(app)) == expected_rows(events))
            topic = app.events["Happened"].topic
            monkeypatch.setattr(other, "_ends", lambda places: {(topic, p): end for p, end in earlier.items()})
            assert other.rebuild(threading.Event()).records == 50
            until(lambda: counts_and_sums(rows(app)) == expected_rows(events))
        finally:
            stop.set()
            thread.join(PATIENCE * 30)


def test_of_two_rebuilds_at_once_one_is_refused(app: App) -> None:
    """Two rebuilds would fold into one copy. The table stays complete, and a later rebuild can run."""
    events = emit(app, 50)
    fold_to_end(app)
    met: list[JobledgerError] = []

    def second(done: int, total: int) -> None:
        with closing(runner_of(app)) as other:
            assert other.verify(threading.Event()).equal is True  # `verify` uses another copy
            with pytest.raises(
                StoreError, match="another process has begun a rebuild of projection count_by_user"
            ) as refused:
                other.rebuild(threading.Event())
            met.append(refused.value)

    with closing(runner_of(app)) as first:
        first.rebuild(threading.Event(), second)
        assert met
        first.rebuild(threading.Event())
    assert counts_and_sums(rows(app)) == expected_rows(events)


@pytest.mark.parametrize("later", [20, 200])
def test_a_recreated_topic_is_not_folded_into_the_old_rows(app: App, later: int) -> None:
    """The recreated topic has fewer records than the projection has folded, or more. In both cases the projection
    reports it, and a rebuild repairs the table."""
    emit(app, 60)
    fold_to_end(app)
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
    assert counts_and_sums(rows(app)) == expected_rows(events)


def test_an_event_class_that_cannot_read_the_log_folds_nothing(app: App) -> None:
    """Every fold would skip the events of such a class as garbage. So the projection refuses to run, to verify and to
    rebuild."""
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
    assert fold_to_end(app).folded == 30
    assert counts_and_sums(rows(app)) == expected_rows(events)
    other.close()


def trim(app: App, topic: str, left: int) -> list[str]:
    """Delete all but the last ``left`` records of each partition. Return where the partitions begin now."""
    client, places = admin(app.settings), range(partitions_of(app.settings, topic))
    with LogReader(app.settings) as log:
        ends = {p: log.bounds(topic, p)[1] for p in places}
    wanted = [TopicPartition(topic, p, max(0, end - left)) for p, end in ends.items()]
    for future in client.delete_records(wanted).values():
        future.result(timeout=20)
    return [f"{topic}[{each.partition}] begins at {each.offset}" for each in wanted if each.offset]


def ends_of(app: App, topic: str) -> list[int]:
    with LogReader(app.settings) as log:
        return [log.bounds(topic, p)[1] for p in range(partitions_of(app.settings, topic))]


def cli(app: App, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``jobledger projections WORDS`` with this app."""
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


def test_a_trimmed_log_is_not_treated_as_complete(app: App) -> None:
    """`verify` reports that the table is not comparable. `rebuild` changes nothing without the option that accepts the
    loss of the trimmed events."""
    events = emit(app, 200)
    fold_to_end(app)
    before = rows(app)
    gone = trim(app, app.events["Happened"].topic, 10)
    assert len(gone) == 3
    with closing(runner_of(app)) as runner:
        found = runner.verify(threading.Event())
        assert (found.equal, found.trimmed) == (None, gone)
        with pytest.raises(JobledgerError, match=r"Happened\[0\] begins at \d+.*--from-what-is-left"):
            runner.rebuild(threading.Event())
        assert rows(app) == before
        assert counts_and_sums(before) == expected_rows(events)
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
    # A table that equals the fold of the remaining log is correct, whatever was trimmed.
    with closing(runner_of(app)) as runner:
        assert (runner.verify(threading.Event()).equal, fold_to_end(app).folded) == (True, 0)


def test_records_that_were_trimmed_before_they_were_folded_are_reported(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """A projection that did not run for too long continues, and logs how many records it has lost."""
    emit(app, 60)
    fold_to_end(app)
    emit(app, 60, 60)
    trim(app, app.events["Happened"].topic, 5)
    assert fold_to_end(app).folded == 15
    lost = [r.getMessage() for r in caplog.records if "had not been folded" in r.getMessage()]
    assert sum(int(re.findall(r"and (\d+) records? of it", line)[0]) for line in lost) == 45


def test_nothing_is_folded_before_the_ids_of_the_topics_are_known(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offsets of a topic whose id is not stored would be used for a later topic of the same name."""
    events = emit(app, 30)
    monkeypatch.setattr(projection_runner, "IDENTIFY_S", 0.3)
    monkeypatch.setattr(projection_runner, "identities", lambda *args: {})
    with closing(runner_of(app)) as runner:
        for act in (lambda: runner.run(threading.Event(), until_end=True), lambda: runner.rebuild(threading.Event())):
            with pytest.raises(BrokerUnavailable, match=r"did not return the ids of \S+\.Happened within 0.3 s"):
                act()
    assert rows(app) == {}
    answers: Iterator[dict[str, str]] = iter([{}, {}])  # as for a topic that was just created
    monkeypatch.setattr(projection_runner, "identities", lambda *args: next(answers, None) or identities(*args))
    monkeypatch.setattr(projection_runner, "IDENTIFY_S", 30.0)
    assert fold_to_end(app).folded == 30
    assert counts_and_sums(rows(app)) == expected_rows(events)


def test_control_commands_are_folded_too(app: App) -> None:
    """Pauses and cancels are folded once each, although a cancel is on two topics. A tombstone of a command is no
    garbage. The control topic is compacted, so a new fold may have fewer records than the table: a rebuild then fails
    with an error."""
    orders = Table("orders", MetaData(), Column("what", String, primary_key=True), Column("count", Integer))

    def given(row: Any, found: Any) -> Any:
        return {"count": (row["count"] if row else 0) + 1}

    app.projection(facts=(QueuePaused, CancelRequested), table=orders, key=lambda found: fact_name(found.event.fact))(
        given
    )
    app.pause(queue="default")
    app.resume(queue="default")
    app.cancel("0192e4a0-0000-7000-8000-000000000001")
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.names.control, None, "cancel:0192e4a0-0000-7000-8000-000000000001:1")])
    writer.close()
    assert fold_to_end(app, "given").unreadable == 0
    assert {what: row["count"] for what, row in rows(app, "given").items()} == {"QueuePaused": 1, "CancelRequested": 1}
    with closing(runner_of(app, "given")) as runner, closing(store_of(app)) as store:
        assert runner.verify(threading.Event()).equal is True
        # The mark of a transaction has an offset without a record. Compaction leaves many such offsets.
        sender = producer(
            {**producer_config(app.settings, timeout=20.0), "transactional.id": app.names.namespace, "linger.ms": 5}
        )
        sender.init_transactions(PATIENCE * 20)  # the first transaction of a broker creates a topic
        sender.begin_transaction()
        sender.produce(app.names.control, b"garbage", "k")
        sender.commit_transaction(PATIENCE * 20)
        app.pause(queue="default")
        with pytest.raises(JobledgerError, match=r"control is compacted: 1 of its records are gone"):
            runner.rebuild(threading.Event())
        assert "jobledger_given_rebuild" not in sqlalchemy.inspect(store.engine).get_table_names()


def test_an_error_in_a_projections_code_names_the_record(app: App) -> None:
    """The fold exits, the key function fails or returns no key, or a value or key has the wrong type. Nothing of the
    batch is written, and the error names the record and, if there is one, the column."""
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
        return {"at": "yesterday"}  # intended, for every event, because each may be a batch of its own

    def kept(row: Any, event: Any) -> Any:
        return {}

    cases: list[tuple[Any, Any, Table, str]] = [
        (leaves, of_user, table, r"its fold failed at \S+Happened\[\d\]@\d+ \(SystemExit: 0"),
        (timed, broken, table, r"its key= failed at \S+Happened\[\d\]@\d+ \(KeyError: 'who'"),
        (
            timed,
            lambda event: (event.user, 1),
            table,
            r"its key= failed at \S+@\d+ .* does not have one value for each of user",
        ),
        (timed, lambda event: [event.user], table, r"its key= failed at \S+@\d+ .*unhashable"),
    ]
    if str(app.settings.status_url).startswith("sqlite"):  # the driver of PostgreSQL accepts text for any type
        cases += [
            (timed, of_user, table, r"its value 'yesterday' for column timed.at \(DateTime.*failed at \S+Happened"),
            (kept, of_user, moments, r"its value 'user-\d' for column moments.at \(DateTime.*failed at \S+Happened"),
        ]
    for fold, key, into, why in cases:
        app.registry.projections.pop("wrong", None)
        app.projection(Happened, table=into, key=key, name="wrong")(fold)
        with pytest.raises(JobledgerError, match=f"projection wrong: {why}"):
            fold_to_end(app, "wrong")
        assert rows(app, "wrong") == {}


def test_a_failed_projection_ends_the_command(app: App) -> None:
    """If one of several projections in ``jobledger projections run`` fails, whatever error it raised, the command exits
    with 1 and names the record's position."""
    app.emit(Happened("leaves", 1))
    ended = cli(app, "run")
    assert ended.returncode == 1
    assert re.search(r"error: projection count_by_user: its fold failed at \S+@0 \(SystemExit", ended.stderr)


def test_an_unexpected_error_of_a_projection_ends_the_command(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ends with an unexpected exception, even `SystemExit` with code 0, ends the process with an error."""
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
    """A process that finds other offsets than its own writes nothing, and reads the offsets again."""
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
        lambda: (
            rows(app)
            and sum(r["events"] for r in rows(app).values()) >= sum(c for c, _ in expected_rows(events).values())
        )
    )
    stop.set()
    for thread, runner in zip(threads, runners, strict=True):
        thread.join(PATIENCE * 30)
        runner.close()
    assert counts_and_sums(rows(app)) == expected_rows(events)


def test_job_facts_are_folded_and_a_start_time_is_respected(app: App) -> None:
    """A projection counts the outcomes by kind, from `Recorded` facts. A projection with a start in the future folds
    nothing."""
    app.submit_many(app.tasks["work"].job(n) for n in range(30))
    with working(app):
        until(lambda: len(closings(app)) == 30)
    fold_to_end(app, "ends")
    found = rows(app, "ends")
    assert {k: r["jobs"] for k, r in found.items()} == {"JobSucceeded": 20, "JobFailed": 10}
    assert all(row["last_ms"] > 1_700_000_000_000 for row in found.values())
    assert fold_to_end(app, "not_yet").folded == 0


@pytest.mark.parametrize("wanted", [4, pytest.param(10, marks=pytest.mark.extended)])
def test_a_projection_killed_at_random_equals_one_fold_of_the_log(
    app: App, say: Callable[[str], None], wanted: int
) -> None:
    """``jobledger projections run`` is killed several times while events are emitted."""
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
            events.extend(emit(app, 1_000, len(events)))
            done.wait(0.2)

    def seen() -> int:
        return sum(row["events"] for row in rows(app).values())

    fold_to_end(app)  # creates the table
    feeding = threading.Thread(target=feed)
    feeding.start()
    kills = 0
    try:
        while kills < wanted:
            before = seen()
            process = subprocess.Popen(argv, env=env, cwd=ROOT)
            if kills % 2:  # killed while it folds; else anywhere, on a busy machine during its start
                until(lambda before=before: seen() > before)  # type: ignore[misc]  # bound in this iteration
                time.sleep(dice.uniform(0.0, 0.5))
            else:
                time.sleep(dice.uniform(0.9, 2.2))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    finally:
        done.set()
        feeding.join()
    assert fold_to_end(app).folded < len(events)  # the killed processes have folded some events
    assert counts_and_sums(rows(app)) == expected_rows(events)
    runner = runner_of(app)
    assert runner.verify(threading.Event()).equal is True
    runner.close()
    say(f"projection: {len(events):,} events, killed {kills}x, equal")


def test_an_invalid_projection_is_refused_at_its_declaration(app: App) -> None:
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
        (fold, {"table": good, "start": dt.datetime(2026, 1, 1)}, "time zone"),  # intended
        (one, {"table": good}, "parameters"),
        (fold, {"table": app.registry.projections["ends"].table}, "already used"),
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


def test_a_database_outage_loses_nothing(
    broker: str, namespace: str, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL crashes twice while events are emitted, and is started again. The projection continues by itself, and
    its table is exact."""
    monkeypatch.setattr(projection_runner, "AWAY_PATIENCE_S", 300.0)  # a busy machine may start the server slowly
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
            until(lambda: counts_and_sums(rows(app)) == expected_rows(events))
    finally:
        stop.set()
        thread.join(PATIENCE * 30)
        runner.close()
        app.close()


def test_an_existing_table_that_does_not_fit_is_an_error_at_once(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """The database has a table of this name without the projection's columns. The error comes at once, without repeated
    attempts."""
    emit(app, 5)
    with closing(store_of(app)) as store, store.engine.begin() as db:
        db.exec_driver_sql('CREATE TABLE people ("user" VARCHAR(40) PRIMARY KEY)')
    with pytest.raises(StoreError, match=r"projection count_by_user.*events"):
        fold_to_end(app)
    assert "trying again" not in caplog.text


def test_the_error_about_the_right_to_create_tables_names_the_user(
    broker: str, namespace: str, postgres: Databases
) -> None:
    """The error names the user and says what to do, without the password."""
    with postgres.role("geheim") as name, postgres.database() as url:
        postgres.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", url)
        mine = sqlalchemy.make_url(url).set(username=name, password="geheim").render_as_string(hide_password=False)
        app = projection_app.build(namespace, Settings(bootstrap=broker, status_url=mine))
        with pytest.raises(StoreError, match=rf"{name}.*GRANT CREATE ON SCHEMA") as told:
            fold_to_end(app)
        assert "geheim" not in str(told.value)
        app.close()
