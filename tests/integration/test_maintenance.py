"""The watchdog, the commit check and trimming with a real log and a real status table."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing as closing_of
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, TopicPartition
from sqlalchemy import Column, Integer, MetaData, String, Table

from jobledger import App, Settings
from jobledger.kafka.clients import consumer_config
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.streams.maintenance import maintenance as maintenance_module
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.projections.projection_store import ProjectionStore, offsets_table
from jobledger.streams.projections.runner import ProjectionRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_reader
from jobledger.streams.status.store.protocol import Overdue
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

PARTITIONS = 2


class Bench:
    """A namespace with its topics, a materializer that writes its table, and maintenance whose steps the tests call
    themselves."""

    def __init__(self, broker: str, namespace: str, folder: Path) -> None:
        url = f"sqlite:///{folder / 'status.db'}"
        self.settings = Settings(bootstrap=broker, status_url=url)
        self.app = App(namespace, settings=self.settings, partitions=PARTITIONS)
        self.names = self.app.names

        @self.app.task(queue="mail")
        async def send_mail(to: str) -> None: ...

        self.task = send_mail
        ensure(self.app, self.settings)
        self._stop = threading.Event()
        made = Materializer(self.names, self.settings, ["mail"], url)
        self._thread = threading.Thread(target=made.run, args=(self._stop,))
        self._thread.start()
        self.table = made
        wait_until(lambda: made.active, 20, "the materializer becoming active")
        self.reader = open_reader(url, namespace)

    def maintenance(self, **cadence: Any) -> Maintenance:
        """Create the maintenance with the cadence of the test."""
        return Maintenance(self.names, self.settings, ["mail"], self.reader, cadence=Cadence(**cadence))

    def caught_up(self) -> None:
        """Wait until the table has everything in the log."""
        wait_until(self.table.caught_up, 20, "the table catching up")

    def commit(self, group: str, topic: str, offsets: dict[int, int], metadata: str = "") -> None:
        """Commit offsets for a group, as its members would."""
        consumer = Consumer(consumer_config(self.settings, group=group))
        places = [TopicPartition(topic, p, o, metadata) for p, o in offsets.items()]
        consumer.commit(offsets=places, asynchronous=False)
        consumer.close()

    def read(self, topic: str) -> list[ev.Recorded]:
        """Return every event of a topic."""
        decode = decoder(self.settings, self.names).decode
        with LogReader(self.settings) as log:
            return [recorded(m, decode) for p in range(PARTITIONS) for m in log.read(topic, p, 0)]

    def write(self, event: ev.JobEvent, topic: str, partition: int) -> ev.Position:
        """Append one event."""
        writer = LogWriter(self.settings, self.names)
        position = writer.send([Outgoing(topic, codec.encode(event), event.job_id, partition)])[0]
        writer.close()
        return position

    def stop_materializer(self) -> None:
        """Stop the materializer, so that the table does not change."""
        self._stop.set()
        self._thread.join(PATIENCE * 20)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Stop everything."""
        self.stop_materializer()
        self.reader.close()
        self.app.close()


@pytest.fixture
def bench(broker: str, namespace: str, tmp_path: Path) -> Iterator[Bench]:
    """Yield a namespace, and stop its parts after the test."""
    made = Bench(broker, namespace, tmp_path)
    yield made
    made.close()


def success_of(bench: Bench, job_id: str) -> ev.JobEvent:
    """Return the success of a job."""
    return ev.JobEvent("e", job_id, 1, 1, 1, now_us(), "send_mail", "mail", None, None, "test", None, ev.JobSucceeded())


def test_the_watchdog_asks_about_a_job_that_was_not_released(bench: Bench) -> None:
    """No coordinator released a delayed job. The watchdog asks about it once, with its spec and the release for which
    it waits."""
    handle = bench.task.using(delay=0.05, tags={"a": "b"}).submit("x")
    bench.caught_up()
    maintenance = bench.maintenance(overdue_after=0.1)
    wait_until(lambda: maintenance.watch() == 1, 20, "the watchdog asking")
    asked = [r.event for r in bench.read(bench.names.coordination) if isinstance(r.event.fact, ev.ReleaseOverdue)]
    assert [(e.job_id, e.run, e.release, e.attempt, e.home) for e in asked] == [(handle.job_id, 1, 1, 1, handle.job_id)]
    assert isinstance(asked[0].fact, ev.ReleaseOverdue)
    assert asked[0].fact.spec == ev.JobSpec(b'{"to":"x"}', {"a": "b"})
    assert maintenance.watch() == 0, "it asks again only after a while"
    maintenance.close()


def test_the_watchdog_does_not_ask_about_a_job_that_ends_while_it_reads_the_log(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two overdue jobs, one ends after the watchdog found it overdue. The watchdog asks about the other one only."""
    jobs = [bench.task.using(delay=0.05).submit(to).job_id for to in ("x", "y")]
    bench.caught_up()
    maintenance = bench.maintenance(overdue_after=0.1)
    ask = maintenance._ask

    def ends_meanwhile(log: LogReader, overdue: Overdue) -> Outgoing | None:
        if overdue.job_id == jobs[0]:
            bench.write(success_of(bench, jobs[0]), bench.names.lifecycle, 0)
            bench.caught_up()
        return ask(log, overdue)

    monkeypatch.setattr(maintenance, "_ask", ends_meanwhile)
    wait_until(lambda: len(bench.reader.overdue(time.time_ns() // 1_000_000, 100)) == 2, 20, "both being overdue")
    assert maintenance.watch() == 1
    asked = [
        r.event.job_id for r in bench.read(bench.names.coordination) if isinstance(r.event.fact, ev.ReleaseOverdue)
    ]
    assert asked == jobs[1:]
    maintenance.close()


def test_a_backlog_is_not_overdue(bench: Bench) -> None:
    """Jobs that wait for a worker are not overdue, and neither are jobs that are not due yet."""
    bench.task.submit("x")
    bench.task.using(delay=3600).submit("y")
    bench.caught_up()
    assert bench.maintenance(overdue_after=0.0).watch() == 0


def test_the_watchdog_asks_nothing_while_the_table_is_behind(bench: Bench) -> None:
    """The release may be in the part of the log that the table does not have yet."""
    bench.task.using(delay=0.01).submit("x")
    bench.caught_up()
    bench.stop_materializer()
    bench.task.using(delay=3600).submit("y")
    maintenance = bench.maintenance(overdue_after=0.0, patience=0.3)
    wait_until(lambda: bool(bench.reader.overdue(time.time_ns() // 1_000_000, 0)), 20, "the job being overdue")
    assert maintenance.watch() == 0
    maintenance.close()


def test_jobs_that_cannot_be_released_hide_no_others_from_the_watchdog(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs whose submission is no longer in the log are overdue for longer than a job about which the watchdog can ask.
    The watchdog passes them in a few rounds, and looks at all of them again and again."""
    monkeypatch.setattr(maintenance_module, "OVERDUE_PAGE", 2)
    for _ in range(5):
        job = str(uuid.uuid4())
        retried = ev.JobRetried(ev.ErrorInfo("E", "m"), 0)
        bench.write(msgspec.structs.replace(success_of(bench, job), fact=retried), bench.names.lifecycle, 0)
    bench.caught_up()
    began = time.time()
    wait_until(lambda: time.time() - began > 0.2, 5, "time passing")
    bench.task.using(delay=0.05).submit("x")
    bench.caught_up()
    maintenance = bench.maintenance(overdue_after=0.1)
    wait_until(lambda: len(bench.reader.overdue(time.time_ns() // 1_000_000, 100)) == 6, 20, "all being overdue")
    assert [maintenance.watch() for _ in range(7)] == [0, 0, 1, 0, 0, 0, 0], "and none twice within a minute"
    maintenance._asked_at.clear()
    assert sum(maintenance.watch() for _ in range(3)) == 1
    maintenance.close()


def test_the_commit_check_counts_a_committed_record_without_a_closing_fact(bench: Bench) -> None:
    """A work record below the committed offset without a closing fact is counted, until the fact is in the log."""
    handle = bench.task.submit("x")
    place = handle.position
    bench.caught_up()
    maintenance = bench.maintenance()
    assert maintenance.check_commits() == 0, "nothing is committed, so nothing was passed"
    bench.commit(bench.names.worker_group("mail"), place.topic, {place.partition: place.offset + 1})
    assert maintenance.check_commits() == 1
    bench.write(success_of(bench, handle.job_id), bench.names.lifecycle, place.partition)
    assert maintenance.check_commits() == 0


def submit_to(bench: Bench, partition: int) -> str:
    """Write the submission of a job to this partition of the work topic, and return the job's id."""
    job_id = str(uuid.uuid4())
    event = msgspec.structs.replace(success_of(bench, job_id), fact=ev.JobSubmitted(ev.JobSpec(b'{"to":"x"}')))
    bench.write(event, bench.names.jobs("mail"), partition)
    return job_id


def starts(bench: Bench, topic: str) -> dict[int, int]:
    """Return where each partition of a topic begins."""
    with LogReader(bench.settings) as log:
        return {p: log.bounds(topic, p)[0] for p in range(PARTITIONS)}


def let_records_age(make: Callable[[], object]) -> float:
    """Call ``make`` and let a second pass. Return a retention in seconds that makes earlier records old, but not later
    ones."""
    make()
    began = time.time()
    wait_until(lambda: time.time() - began > 1.2, 5, "a second passing")
    return 0.6


def test_nothing_is_trimmed_while_the_table_is_behind(bench: Bench) -> None:
    """A job that waits according to the table may have run and ended. If its submission was sent again, the job would
    run again."""
    names, work = bench.names, bench.names.jobs("mail")
    handle = bench.task.using(delay=0.2).submit("x")
    bench.caught_up()
    bench.stop_materializer()
    submission = success_of(bench, handle.job_id)
    due = bench.write(msgspec.structs.replace(submission, fact=ev.JobDue(ev.JobSpec(b"{}"), 1)), work, 0)
    retention = let_records_age(lambda: bench.write(submission, names.lifecycle, due.partition))
    with LogReader(bench.settings) as log:
        ends = {
            t: {p: log.bounds(t, p)[1] for p in range(PARTITIONS)} for t in (work, names.coordination, names.lifecycle)
        }
    bench.commit(names.worker_group("mail"), work, ends[work], f"1c.{max(ends[names.lifecycle].values()):x}.00000000.r")
    bench.commit(names.coordinator_group, names.coordination, ends[names.coordination])
    maintenance = bench.maintenance(retention=retention, patience=0.3)
    assert maintenance.trim() == {}
    assert len(bench.read(names.coordination)) == 1, "nothing was sent again"
    maintenance.close()


def test_trimming_keeps_records_that_are_still_needed(bench: Bench) -> None:
    """Old records are deleted after workers, coordinator and table have read them. The submission of a delayed job is
    sent again first."""
    names, work = bench.names, bench.names.jobs("mail")
    ended, open_job = submit_to(bench, 0), submit_to(bench, 0)
    waiting = bench.task.using(delay=3600).submit("waiting")
    retention = let_records_age(lambda: bench.write(success_of(bench, ended), names.lifecycle, 0))
    bench.caught_up()
    maintenance = bench.maintenance(retention=retention)
    assert maintenance.trim() == {}, "no worker and no coordinator has said how far it is"

    with LogReader(bench.settings) as log:
        ends = {t: {p: log.bounds(t, p)[1] for p in range(PARTITIONS)} for t in (work, names.coordination)}
    floor = "1c.0.00000000.r"
    bench.commit(names.worker_group("mail"), work, ends[work], floor)
    bench.commit(names.coordinator_group, names.coordination, ends[names.coordination])
    maintenance.trim()

    assert [r.event.job_id for r in bench.read(work)] == [open_job], "what has ended is gone"
    assert starts(bench, names.lifecycle) == dict.fromkeys(range(PARTITIONS), 0), "the takeover floor is 0"
    assert starts(bench, names.coordination)[waiting.position.partition] == waiting.position.offset + 1
    again = [r.event for r in bench.read(names.coordination)]
    assert [e.job_id for e in again] == [waiting.job_id]
    assert isinstance(again[0].fact, ev.JobSubmitted)
    assert again[0].fact.delay_ms is None
    bench.caught_up()
    due_at = bench.reader.job(waiting.job_id).due_at
    assert due_at is not None
    assert again[0].fact.due_at == round(due_at.timestamp() * 1000) * 1000
    maintenance.close()


def test_trimming_waits_for_projections_and_for_readers_of_the_lifecycle(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A fact is kept until the projection in the same database and every group has read it, and the log names each
    reader for which trimming waits. A reader that has read nothing of a topic, or no longer exists, keeps nothing of
    that topic."""
    names, work = bench.names, bench.names.jobs("mail")
    table = Table("ends", MetaData(), Column("task", String, primary_key=True), Column("count", Integer))

    def ends(row: Any, found: Any) -> Any:
        return {"count": (row["count"] if row else 0) + 1}

    bench.app.projection(facts=(ev.JobSucceeded,), table=table, key=lambda found: found.event.task)(ends)
    url = bench.settings.resolve_status_url(names.namespace)

    def fold() -> None:
        with closing_of(
            ProjectionRunner(bench.app.registry.projections["ends"], bench.settings, names, ["mail"], url)
        ) as runner:
            runner.run(threading.Event(), until_end=True)

    def read() -> None:
        with LogReader(bench.settings) as log:
            left = {
                ev.Position(topic, partition, log.bounds(topic, partition)[1] - 1)
                for topic in (work, names.lifecycle)
                for partition in range(PARTITIONS)
            }
        with bench.app.lifecycle("billing", timeout=PATIENCE * 30) as stream:
            for found in stream:
                left.discard(found.position)
                if not left:
                    break
        assert not left

    def end(partition: int) -> None:
        bench.write(success_of(bench, submit_to(bench, partition)), names.lifecycle, partition)

    def trimmed() -> tuple[int, int]:
        bench.caught_up()
        with LogReader(bench.settings) as log:
            to = {t: {p: log.bounds(t, p)[1] for p in range(PARTITIONS)} for t in (work, names.lifecycle)}
        floor = f"1c.{min(to[names.lifecycle].values()):x}.00000000.r"
        bench.commit(names.worker_group("mail"), work, to[work], floor)
        caplog.clear()
        maintenance.trim()
        maintenance.close()
        return starts(bench, work)[0], starts(bench, names.lifecycle)[0]

    def named() -> set[str]:
        lines = [r.getMessage() for r in caplog.records if "trimming waits for" in r.getMessage()]
        return {line.split(":")[0].removeprefix("trimming waits for ") for line in lines}

    for partition in range(PARTITIONS):
        end(partition)
    fold()
    read()
    # This group reads only the coordination topic, which has no old records. So it keeps nothing.
    bench.commit(names.lifecycle_group("other"), names.coordination, {0: 0})
    for partition in range(PARTITIONS):
        end(partition)
    maintenance = bench.maintenance(retention=let_records_age(lambda: None))
    assert trimmed() == (1, 1)
    assert named() == {"projection ends", f"group {names.namespace}.lifecycle.billing"}
    fold()
    assert trimmed() == (1, 1)
    assert named() == {f"group {names.namespace}.lifecycle.billing"}
    read()
    assert trimmed() == (2, 2)
    assert named() == set()
    for partition in range(PARTITIONS):
        end(partition)
    read()
    let_records_age(lambda: None)
    assert trimmed() == (2, 2), "the projection makes no progress"
    with closing_of(ProjectionStore(url, names.namespace)) as store, store.engine.begin() as db:
        db.execute(offsets_table.delete().where(offsets_table.c.projection == "ends"))
    assert trimmed() == (3, 3)
