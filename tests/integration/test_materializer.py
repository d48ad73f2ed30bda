"""The materializer with a real broker: the table contains each record of the log once, whatever fails meanwhile."""

from __future__ import annotations

import io
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fastavro
import psycopg
import pytest
import sqlalchemy
import uuid_utils
from confluent_kafka import KafkaError, TopicPartition

from jobledger.config import Settings
from jobledger.errors import (
    BrokerUnavailable,
    LeaseLost,
    SchemaError,
    StatusTimeout,
    StoreError,
    StoreUnavailable,
    UnknownFact,
)
from jobledger.job import State
from jobledger.kafka import clients, topics, topology
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process import identity
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent, Position
from jobledger.streams.status import log_feed
from jobledger.streams.status import rebuild as rebuilding
from jobledger.streams.status.log_feed import LogFeed, bounds
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import rebuild, verify
from jobledger.streams.status.store import Changes, StatusReader, Store, open_reader, open_store
from jobledger.streams.status.store.connecting import schema_beside, schema_of
from jobledger.streams.status.store.postgres import PostgresStore
from jobledger.streams.status.store.sqlite import SqliteStore, path_of
from tests.patience import PATIENCE, wait_until
from tests.postgres import Databases, Server

pytestmark = pytest.mark.kafka

PARTITIONS = 3
BAD = ev.ErrorInfo("builtins.ValueError", "no", "trace")
SPEC = ev.JobSpec(b"{}", {"tenant": "acme"})


class World:
    """A namespace with its topics, a writer, and the URL of a status table."""

    def __init__(self, bootstrap: str, namespace: str, url: str) -> None:
        self.settings, self.names = Settings(bootstrap=bootstrap, submit_timeout=10.0), Names(namespace)
        self.url = url
        self.admin = clients.admin(self.settings)
        self.make("mail")
        self.writer = LogWriter(self.settings, self.names)

    def make(self, *queues: str) -> None:
        """Create the topics of these queues, and all other topics."""
        specs = topology.desired(self.names, dict.fromkeys(queues, PARTITIONS), partitions=PARTITIONS, replication=1)
        topics.apply(self.admin, topics.plan(self.admin, specs))

    def event(self, job_id: str, fact: ev.Fact, release: int = 1, attempt: int = 1, queue: str = "mail") -> bytes:
        """Encode one event."""
        event_id = str(uuid_utils.uuid7())
        return codec.encode(
            JobEvent(
                event_id, job_id, 1, attempt, release, identity.now_us(), "send", queue, None, None, "t@h:1", None, fact
            )
        )

    def send(self, *records: tuple[str, str, bytes | None, int]) -> list[Position]:
        """Write (topic, key, value, partition) and wait for the acknowledgements."""
        return self.writer.send(Outgoing(topic, value, key, partition) for topic, key, value, partition in records)

    def write_facts(self, job_id: str, *facts: ev.Fact, partition: int = 0, queue: str = "mail") -> list[Position]:
        """Write facts of one job, each to its topic."""
        records = []
        for fact in facts:
            match fact:
                case ev.JobSubmitted(delay_ms=int()):
                    where, release = self.names.coordination, 0
                case ev.JobSubmitted() | ev.JobDue():
                    where, release = self.names.jobs(queue), 1
                case _:
                    where, release = self.names.lifecycle, 1
            records.append((where, job_id, self.event(job_id, fact, release, queue=queue), partition))
        return self.send(*records)

    def fill(self, jobs: int) -> list[str]:
        """Write jobs: every seventh is not started, of the others every fifth fails, and the rest succeed."""
        ids = [str(uuid_utils.uuid7()) for _ in range(jobs)]
        records = []
        for n, job_id in enumerate(ids):
            facts: list[ev.Fact] = [ev.JobSubmitted(SPEC)]
            if n % 7:
                facts += [ev.JobStarted("h:1", None, {}, self.names.jobs("mail"), n)]
                facts += [ev.JobFailedFact("exhausted", BAD) if n % 5 == 0 else ev.JobSucceeded(b"1", 5)]
            for fact in facts:
                topic = self.names.jobs("mail") if isinstance(fact, ev.JobSubmitted) else self.names.lifecycle
                records.append((topic, job_id, self.event(job_id, fact), n % PARTITIONS))
        self.send(*records)
        return ids

    def materializer(self, **options: Any) -> Materializer:
        """Create a materializer of the namespace."""
        return Materializer(self.names, self.settings, ["mail"], self.url, **options)

    def reader(self) -> StatusReader:
        """Open a reader of the status table."""
        return open_reader(self.url, self.names.namespace)

    def execute(self, *statements: str) -> None:
        """Change the table directly in the database."""
        if self.url.startswith("sqlite"):
            with closing(sqlite3.connect(path_of(self.url))) as file, file:
                for statement in statements:
                    file.execute(statement)
            return
        with psycopg.connect(self.url) as db:
            db.execute(f'SET search_path = "{schema_of(self.names.namespace)}"')
            for statement in statements:
                db.execute(statement)

    def trim(self, topic: str, partition: int, before: int) -> None:
        """Delete a partition's records below an offset."""
        asked = self.admin.delete_records([TopicPartition(topic, partition, before)])
        for future in asked.values():
            future.result(10)

    def close(self) -> None:
        self.writer.close()


class Running:
    """A materializer that runs in a thread during a block. ``error`` is the error that it raised."""

    def __init__(self, made: Materializer) -> None:
        self.made, self.error = made, None
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    error: Exception | None

    def _run(self) -> None:
        try:
            self.made.run(self.stop)
        except (StoreError, OSError) as exc:
            self.error = exc

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.join()

    def join(self) -> None:
        """Wait until the materializer has ended."""
        self._thread.join(PATIENCE * 30)
        assert not self._thread.is_alive()

    def catch_up(self) -> None:
        """Wait until the table has everything that is in the log now."""
        wait_until(lambda: self.error is not None or (self.made.active and self.made.caught_up()), 30, "catching up")
        if self.error is not None:
            raise self.error


#: Marks tests that run on both kinds of database. The others are about the log.
on_both = pytest.mark.parametrize("world", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, broker: str, namespace: str, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'status.db'}"
        if getattr(request, "param", "sqlite") == "postgresql":
            server: Databases = request.getfixturevalue("postgres")
            url = stack.enter_context(server.database())
        made = World(broker, namespace, url)
        stack.callback(made.close)
        yield made


def new_id() -> str:
    return str(uuid_utils.uuid7())


def sample(made: Materializer, name: str, **labels: str) -> float:
    """Return the value of a metric; 0 if it has no value yet."""
    return made.metrics.registry.get_sample_value("jobledger_materializer_" + name, labels) or 0.0


def test_a_row_shows_a_jobs_whole_life(world: World) -> None:
    """Facts from all topics become one row, with times of the broker, result, tags and the positions of all facts."""
    job_id = new_id()
    places = world.write_facts(
        job_id, ev.JobSubmitted(SPEC, 5), ev.JobDue(SPEC, 1_000), ev.JobStarted("h:1", None, {}, "t", 0)
    )
    with Running(world.materializer()) as running:
        running.catch_up()
        reader = world.reader()
        seen = reader.job(job_id)
        assert (seen.state, seen.task, seen.queue, seen.tags) == (State.RUNNING, "send", "mail", {"tenant": "acme"})
        places += world.write_facts(job_id, ev.JobProgressed(1, 3, 9, "third"), ev.JobSucceeded(b'["done"]', 7_000))
        wait_until(lambda: reader.reached(places[-1]), 10, "reading on")
        seen = reader.job(job_id)
    assert (seen.state, seen.result, seen.duration) == (State.SUCCEEDED, ["done"], 0.007)
    assert set(seen.positions) == set(places)
    assert seen.submitted_at is not None
    assert seen.started_at is not None
    assert seen.ended_at is not None
    assert seen.submitted_at <= seen.started_at <= seen.ended_at
    assert reader.counts_by_state()["succeeded"] == sum(reader.counts_by_state().values()) == 1
    reader.close()


@on_both
def test_a_restarted_materializer_continues_at_the_offsets_of_the_table(world: World) -> None:
    """Records that were read before a stop are not counted again, and records that were written meanwhile are read."""
    world.fill(70)
    with Running(world.materializer()) as running:
        running.catch_up()
        assert running.made.position() == records_read(running.made)
    more = world.fill(35)
    with Running(world.materializer()) as running:
        running.catch_up()
        assert records_read(running.made) < 110
    reader = world.reader()
    assert reader.job(more[0]).state is State.QUEUED
    assert sum(reader.counts_by_state().values()) == 105
    reader.close()
    assert verify(world.names, world.settings, ["mail"], world.url).equal


def records_read(made: Materializer) -> float:
    """Return the number of records that were read, of all topics."""
    return sum(s.value for m in made.metrics.registry.collect() for s in m.samples if s.name.endswith("_events_total"))


KILLED = """
import sys, threading
from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from jobledger.streams.status.materializer import Materializer
bootstrap, namespace, url = sys.argv[1:]
Materializer(Names(namespace), Settings(bootstrap=bootstrap), ["mail"], url, batch=50).run(threading.Event())
"""


@on_both
def test_kill_9_at_any_time_loses_no_record_and_counts_none_twice(world: World) -> None:
    """Materializers are killed several times while they write. The table agrees with the log at the end."""
    world.fill(6_000)
    open_store(world.url, world.names.namespace).close()
    reader = world.reader()
    places = [(topic, p) for topic in (world.names.jobs("mail"), world.names.lifecycle) for p in range(PARTITIONS)]
    everything = sum(end for _, end in bounds(world.settings, places).values())
    read = -1

    def reads_on() -> bool:
        """Return whether this process has read further than the earlier ones, or everything had been read already."""
        return read < sum(reader.offsets().values()) or read == everything

    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(world.settings.bootstrap), world.names.namespace, world.url]
        )
        try:
            # Each process makes some progress, because the lease of a dead process does not delay the next one.
            wait_until(reads_on, 20, "reading on")
        finally:
            child.kill()
            child.wait()
        read = sum(reader.offsets().values())
    with Running(world.materializer()) as running:
        running.catch_up()
    assert sum(reader.counts_by_state().values()) == 6_000
    reader.close()
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert found.equal, found


@pytest.mark.extended
@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "crashed"])
def test_a_database_outage_of_ten_seconds_loses_nothing(
    broker: str, namespace: str, postgres_server: Server, crash: bool
) -> None:
    """PostgreSQL stops while the table is written, or crashes and loses its last transactions. Both cost only time.

    One materializer is killed before the outage, and another one runs through the outage. The table agrees with the log
    at the end.
    """
    with postgres_server.database() as url, closing(World(broker, namespace, url)) as world:
        world.fill(3_000)
        open_store(url, namespace).close()
        child = subprocess.Popen([sys.executable, "-c", KILLED, broker, namespace, url])
        try:
            reader = world.reader()
            wait_until(lambda: bool(reader.offsets()), 20, "the first rows")
        finally:
            child.kill()
            child.wait()
        with Running(world.materializer(batch=20, store_patience=PATIENCE * 30)) as running:
            begun = sum(reader.offsets().values())
            wait_until(lambda: running.made.position() > begun, 20, "reading on")
            postgres_server.stop(at_once=crash)
            world.fill(500)
            with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{postgres_server.port}"):
                reader.offsets()
            time.sleep(5.0)  # ten seconds, together with the reader's patience
            assert running.error is None
            postgres_server.start()
            running.catch_up()
            assert sample(running.made, "store_retries_total") > 0
        assert sum(reader.counts_by_state().values()) == 3_500
        reader.close()
        found = verify(world.names, world.settings, ["mail"], url)
        assert found.equal, found
        assert rebuild(world.names, world.settings, ["mail"], url).jobs == 3_500
        assert verify(world.names, world.settings, ["mail"], url).equal


@pytest.mark.extended
@pytest.mark.parametrize("world", ["postgresql"], indirect=True)
def test_batches_get_smaller_under_a_statement_timeout(world: World) -> None:
    """If a batch exceeds the database's `statement_timeout`, the materializer writes the batch in parts. A rebuild does
    the same. No record is missing or counted twice."""
    world.fill(1_000)
    open_store(world.url, world.names.namespace).close()
    schema = schema_of(world.names.namespace)
    database = sqlalchemy.make_url(world.url).database
    world.execute(f'ALTER DATABASE "{database}" SET statement_timeout = 800', *slow(schema))
    with Running(world.materializer()) as running:
        running.catch_up()
        assert sample(running.made, "store_retries_total") == 0
        assert running.made._size.now < 500
    reader = world.reader()
    assert sum(reader.counts_by_state().values()) == 1_000
    reader.close()
    assert verify(world.names, world.settings, ["mail"], world.url).equal

    class Slow(PostgresStore):
        @contextmanager
        def beside(self) -> Iterator[Self]:
            with super().beside() as new:
                world.execute(*slow(schema_beside(schema)))
                yield new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "open_store", Slow)
        assert rebuild(world.names, world.settings, ["mail"], world.url).jobs == 1_000
    assert verify(world.names, world.settings, ["mail"], world.url).equal


def slow(schema: str) -> list[str]:
    """Return statements that make each new row of a status table take one or two milliseconds."""
    body = "BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END"
    return [
        f"CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        f'CREATE TRIGGER slow BEFORE INSERT ON "{schema}".jobs FOR EACH ROW EXECUTE FUNCTION slow()',
    ]


def test_a_materializer_waits_for_its_database_at_the_start(
    broker: str, namespace: str, postgres_server: Server
) -> None:
    """A materializer that starts before its database begins as soon as the database answers. If the database refuses
    the login, the materializer ends at once."""
    with postgres_server.database() as url, closing(World(broker, namespace, url)) as world:
        world.fill(10)
        postgres_server.stop()
        with Running(world.materializer(store_patience=PATIENCE * 30)) as running:
            wait_until(lambda: sample(running.made, "store_retries_total") > 0, 20, "a try in vain")
            postgres_server.start()
            running.catch_up()
        with postgres_server.role("right") as role:
            world.url = sqlalchemy.make_url(url).set(username=role, password="wrong").render_as_string(False)
            with Running(world.materializer()) as running:
                wait_until(lambda: running.error is not None, 20, "giving up")
    assert "the user or the password" in str(running.error)
    assert sample(running.made, "store_retries_total") == 0


def recreate(world: World, topic: str) -> None:
    """Delete a topic, and make it again."""
    world.admin.delete_topics([topic], operation_timeout=20)[topic].result(timeout=30)
    wait_until(lambda: topic not in world.admin.list_topics(timeout=10).topics, 30, "the topic's end")
    world.make("mail")
    # Another producer: the one that wrote to the old topic may report the first records of a partition as written although
    # the new topic does not have them. Its sequence numbers go on, and the broker takes records that it retries for
    # duplicates. It also refuses records until it asks for the topic again.
    world.writer.close()
    world.writer = LogWriter(world.settings, world.names)


class NotThere:
    """What the client returns instead of a record, if the log does not have the next one of a partition."""

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def topic(self) -> str:
        return self._topic

    def partition(self) -> int:
        return 0

    def error(self) -> KafkaError:
        return KafkaError(KafkaError._AUTO_OFFSET_RESET, "no record")


def test_a_topic_that_is_deleted_while_its_first_offset_is_asked_for_is_no_longer_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For such a topic the client finds no leader, as for a broker that does not answer. The other topics are read
    further."""
    topic, asked = world.names.jobs("mail"), bounds
    monkeypatch.setattr(log_feed, "bounds", lambda settings, partitions: asked(settings, partitions, timeout=2.0))
    partitions = [(topic, partition) for partition in range(PARTITIONS)]
    with LogFeed(world.settings, world.names) as feed:
        feed.add(dict.fromkeys([*partitions, (world.names.lifecycle, 0)]))
        client = clients.admin(world.settings)
        clients.answer_of(client.delete_topics([topic], request_timeout=10.0)[topic], 10.0)
        wait_until(lambda: (topic, 0) not in feed.present(), 20, "the end of the topic")
        assert feed._is_error(NotThere(topic))  # type: ignore[arg-type]  # a message without a value
        assert (topic, 0) not in feed.assigned
        assert (world.names.lifecycle, 0) in feed.assigned
        assert feed.resets == {}


@on_both
@pytest.mark.parametrize("running_meanwhile", [True, False], ids=["running", "stopped"])
def test_a_recreated_topic_is_read_from_its_start(world: World, running_meanwhile: bool) -> None:
    """Offsets of a deleted work topic are not used for the new topic of the same name. All records of the new topic are
    read, `verify` finds no difference, and a rebuild keeps the table's rows of the old jobs."""
    topic, tagged = world.names.jobs("mail"), ("tenant", "acme")
    old = world.fill(60)
    with ExitStack() as stack:
        running = stack.enter_context(Running(world.materializer()))
        running.catch_up()
        reader = world.reader()
        stack.callback(reader.close)
        before = {job_id: reader.job(job_id) for job_id in old}
        if not running_meanwhile:
            stack.close()
        recreate(world, topic)
        new = world.fill(100)
        if running_meanwhile:
            running.catch_up()
            try:
                wait_until(lambda: sum(reader.counts_by_state().values()) == 160, 30, "the new topic's jobs")
            except StatusTimeout:
                ends = bounds(world.settings, [(topic, partition) for partition in range(PARTITIONS)])
                pytest.fail(f"{reader.counts_by_state()}, read up to {reader.offsets()}; the topic has {ends}")
            # Reads from an offset that the new topic does not have begin at its start, also before its id is known.
            wait_until(
                lambda: verify(world.names, world.settings, ["mail"], world.url).left_out == 60,
                60,
                "the new topic's id",
            )
    if not running_meanwhile:
        assert not (found := verify(world.names, world.settings, ["mail"], world.url)).differing, found
        with Running(world.materializer()) as running:
            running.catch_up()
    reader = world.reader()
    assert sum(reader.counts_by_state().values()) == 160
    assert {job_id: reader.job(job_id) for job_id in old} == before
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert found.equal, found
    assert (found.jobs, found.left_out) == (100, 60)
    assert rebuild(world.names, world.settings, ["mail"], world.url).carried == 60
    assert {job_id: reader.job(job_id) for job_id in old} == before
    assert {each.job_id for each in reader.jobs(tag=tagged, limit=1_000)} == {*old, *new}
    assert verify(world.names, world.settings, ["mail"], world.url).equal
    reader.close()


def test_no_topic_is_read_before_its_id_is_known(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The offsets of a topic whose id is not stored would be used for a later topic of the same name. So a topic is
    read only when the broker has returned its id, and a rebuild without the ids changes nothing."""
    identities, unanswered, told = LogFeed.identities, [], threading.Event()

    def answer(feed: LogFeed, *args: Any) -> dict[str, str]:
        if told.is_set():
            return identities(feed, *args)
        unanswered.append(args)
        return {}

    monkeypatch.setattr(LogFeed, "identities", answer)
    old = world.fill(60)
    with Running(world.materializer()) as running:
        wait_until(lambda: len(unanswered) > 3, 30, "some searches for topics")
        assert (running.made.offsets(), running.made.caught_up()) == ({}, False)
        assert "did not return the ids of " in caplog.text
        told.set()
        running.catch_up()
        recreate(world, world.names.jobs("mail"))
        world.fill(100)
        reader = world.reader()
        wait_until(lambda: sum(reader.counts_by_state().values()) == 160, 30, "the new topic's jobs")
        reader.close()
    told.clear()
    with pytest.raises(BrokerUnavailable, match=r"did not return the ids of .* nothing has changed"):
        rebuild(world.names, world.settings, ["mail"], world.url)
    told.set()
    assert rebuild(world.names, world.settings, ["mail"], world.url).carried == len(old)


def test_verify_compares_all_jobs_if_the_broker_returns_no_topic_ids(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the broker does not return the ids of topics in time, no job is left out. Otherwise a table without the log's
    jobs would be accepted."""
    world.fill(20)
    with Running(world.materializer()) as running:
        running.catch_up()
    monkeypatch.setattr(LogFeed, "identities", lambda *args: {})
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert (found.equal, found.jobs, found.left_out) == (True, 20, 0)


def test_garbage_is_counted_and_skipped(world: World) -> None:
    """Bytes that are no event stop nothing on any topic. Those on the lifecycle topic are copied to the dead letters,
    each always with the same id."""
    job_id, names = new_id(), world.names
    bad = [names.jobs("mail"), names.lifecycle, names.coordination, names.dead_letter]
    framed = codec.MAGIC + codec.FINGERPRINT + b"\xff" * 40
    places = world.send(*[(topic, "k", raw, 1) for topic in bad for raw in (b"garbage", None, framed)])
    world.write_facts(job_id, ev.JobSubmitted(SPEC), partition=1)
    with Running(world.materializer()) as running:
        running.catch_up()
        for topic in bad:
            assert sample(running.made, "rejected_records_total", topic=topic, reason="NotAnEvent") == 3
    reader = world.reader()
    assert reader.job(job_id).state is State.QUEUED
    reader.close()
    letters = dead_letters(world)
    expected = [place for place in places if place.topic == names.lifecycle]
    facts = [each.fact for each in letters]
    assert (
        sorted(Position(f.topic, f.partition, f.offset) for f in facts if isinstance(f, ev.RecordRejected)) == expected
    )
    assert [f.raw_value for f in facts if isinstance(f, ev.RecordRejected)] == [b"garbage", None, framed]
    # The table is built again: the same records are rejected, with the same ids.
    path_of(world.url).unlink()
    with Running(world.materializer()) as running:
        running.catch_up()
    again = dead_letters(world)
    assert len(again) == 6
    assert {each.event_id for each in again} == {each.event_id for each in letters}


def dead_letters(world: World) -> list[JobEvent]:
    """Return the events on the dead-letter topic."""
    found = []
    with LogReader(world.settings) as reader:
        for partition in range(PARTITIONS):
            for message in reader.read(world.names.dead_letter, partition, 0):
                if (value := message.value()) is not None and b"rejected" not in (message.key() or b""):
                    try:
                        found.append(codec.decode(value))
                    except SchemaError:
                        continue
    return sorted(found, key=lambda e: (e.fact.partition, e.fact.offset))  # type: ignore[union-attr]


def in_future(names: Names, job_id: str, fact: tuple[str, dict[str, Any]]) -> tuple[str, bytes]:
    """Return the schema of a later version, and an event written with it."""
    schema = json.loads(codec.SCHEMA_TEXT)
    schema["fields"].insert(2, {"name": "tenant", "type": "string", "default": ""})
    union = next(f for f in schema["fields"] if f["name"] == "fact")["type"]
    union.append({"type": "record", "name": "JobTeleported", "fields": [{"name": "to", "type": "string"}]})
    text = json.dumps(schema)
    datum = {
        "event_id": new_id(), "job_id": job_id, "tenant": "acme", "run": 1, "attempt": 1, "release": 1,
        "occurred_at": 1, "task": "send", "queue": "mail", "source": "t@h:1", "fact": fact,
    }  # fmt: skip
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), datum)
    return text, codec.MAGIC + codec.fingerprint(text) + out.getvalue()


def test_a_later_schema_is_read_and_an_unknown_fact_is_skipped(world: World) -> None:
    """The known fields of events of a later version are folded. A fact that this version does not know is counted and
    skipped."""
    job_id, names = new_id(), world.names
    with Running(world.materializer()) as running:
        running.catch_up()
        text, submitted = in_future(names, job_id, ("jobledger.JobSubmitted", {"spec": {"args": b"{}"}}))
        _, teleported = in_future(names, job_id, ("jobledger.JobTeleported", {"to": "Mars"}))
        world.writer.send([Outgoing(names.schemas, text.encode(), codec.fingerprint(text).hex())])
        world.send((names.jobs("mail"), job_id, submitted, 0), (names.lifecycle, job_id, teleported, 0))
        running.catch_up()
        assert sample(running.made, "rejected_records_total", topic=names.lifecycle, reason=UnknownFact.__name__) == 1
    reader = world.reader()
    assert reader.job(job_id).state is State.QUEUED
    reader.close()
    assert dead_letters(world) == []


def test_a_schema_published_just_before_its_first_use_is_found(world: World) -> None:
    """If a schema was published after the last read of the schema topic, its events are folded nevertheless."""
    job_id, names = new_id(), world.names
    with Running(world.materializer()) as running:
        world.send((names.lifecycle, "k", codec.MAGIC + b"nowhere!" + b"x" * 20, 0))
        running.catch_up()
        text, submitted = in_future(names, job_id, ("jobledger.JobSubmitted", {"spec": {"args": b"{}"}}))
        world.writer.send([Outgoing(names.schemas, text.encode(), codec.fingerprint(text).hex())])
        world.send((names.jobs("mail"), job_id, submitted, 0))
        running.catch_up()
        assert sample(running.made, "rejected_records_total", topic=names.lifecycle, reason="UnknownSchema") == 1
        assert sample(running.made, "rejected_records_total", topic=names.jobs("mail"), reason="UnknownSchema") == 0


@on_both
def test_a_second_materializer_stands_by_and_takes_over(world: World) -> None:
    """Of two materializers of one table, one writes. When it stops, the other one continues at once where the first one
    ended."""
    first, second = Running(world.materializer()), Running(world.materializer())
    with second, first:
        ids = world.fill(10)
        wait_until(lambda: first.made.active or second.made.active, 20, "either writing")
        active, waiting = (first, second) if first.made.active else (second, first)
        active.catch_up()
        assert not waiting.made.active
        active.stop.set()
        active.join()
        ids += world.fill(10)
        waiting.catch_up()
    reader = world.reader()
    assert sum(reader.counts_by_state().values()) == len(ids)
    reader.close()


@on_both
def test_a_materializer_that_lost_its_lease_stops(world: World) -> None:
    """When another writer holds the lease, the materializer writes nothing more, and its error names the new holder."""
    with Running(world.materializer()) as running:
        running.catch_up()
        kind = SqliteStore if world.url.startswith("sqlite") else PostgresStore
        with kind(world.url, world.names.namespace, holder="other:1", clock=lambda: 4e9) as other:
            assert other.acquire()
            before = other.offsets()
            world.fill(10)
            running.join()
            assert other.offsets() == before
    assert isinstance(running.error, LeaseLost)
    assert "other:1" in str(running.error)


def test_a_new_queue_is_read_without_a_restart(world: World) -> None:
    """The work topic of a queue that is added later is found and read."""
    with Running(world.materializer()) as running:
        running.catch_up()
        world.make("mail", "sms")
        job_id = new_id()
        places = world.write_facts(job_id, ev.JobSubmitted(SPEC), queue="sms")
        reader = world.reader()
        wait_until(lambda: reader.reached(places[0]), 20, "reading the new topic")
        assert reader.job(job_id).queue == "sms"
        reader.close()


def test_a_trimmed_log_is_read_from_its_start(world: World) -> None:
    """If the log no longer has the next record, the materializer continues at the start of the log, and counts the
    reset."""
    world.fill(30)
    with Running(world.materializer()) as running:
        running.catch_up()
    ids = world.fill(30)
    topic = world.names.jobs("mail")
    reader = world.reader()
    world.trim(topic, 0, reader.offsets()[(topic, 0)] + 5)
    with Running(world.materializer()) as running:
        running.catch_up()
        assert sample(running.made, "offset_resets_total", topic=topic) == 1
    assert reader.job(ids[-1]).state in (State.QUEUED, State.SUCCEEDED, State.FAILED)
    reader.close()


class Flaky:
    """A store whose next ``failures`` writes fail."""

    def __init__(self, store: Store, failures: int) -> None:
        self._store, self.failures = store, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, changes: Changes) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is full")
        self._store.write(changes)


def flaky(failures: int) -> Callable[[str, str], Store]:
    """Return an `open_store` whose store fails at its first writes."""
    return lambda url, namespace: Flaky(open_store(url, namespace), failures)


def test_a_failed_write_to_the_database_is_repeated(world: World) -> None:
    """A batch that could not be written is written later, and the table agrees with the log."""
    world.fill(40)
    with Running(world.materializer(open_store=flaky(3))) as running:
        running.catch_up()
        assert sample(running.made, "store_retries_total") == 3
    assert verify(world.names, world.settings, ["mail"], world.url).equal


def test_a_database_that_stays_unavailable_is_an_error(world: World) -> None:
    """After its patience, the materializer ends with the error of the database."""
    world.fill(3)
    with Running(world.materializer(open_store=flaky(10**6), store_patience=0.5)) as running:
        wait_until(lambda: running.error is not None, 20, "giving up")
    assert "the disk is full" in str(running.error)


@on_both
def test_verify_names_differing_jobs_and_rebuild_repairs_them(world: World) -> None:
    """`verify` names each row that was changed or deleted, and a rebuild restores what the log says."""
    ids = world.fill(60)
    with Running(world.materializer()) as running:
        running.catch_up()
    told: list[tuple[int, int]] = []
    found = verify(world.names, world.settings, ["mail"], world.url, lambda *n: told.append(n))
    assert found.equal, found
    assert (found.jobs, found.left_out, found.differing) == (60, 0, 0)
    assert found.table_digest == found.log_digest
    assert told[-1] == (found.records, found.records)
    world.execute(
        f"UPDATE jobs SET state = 'failed' WHERE job_id = '{ids[0]}'", f"DELETE FROM jobs WHERE job_id = '{ids[3]}'"
    )
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert not found.equal
    assert found.first_differing == (ids[0], ids[3])
    assert not found.counters_equal
    assert found.table_digest != found.log_digest
    reader = world.reader()
    made = rebuild(world.names, world.settings, ["mail"], world.url)
    assert (made.jobs, made.carried, made.records) == (60, 0, found.records)
    assert reader.job(ids[0]).state is State.QUEUED
    assert reader.job(ids[3]).state is State.SUCCEEDED
    reader.close()
    assert verify(world.names, world.settings, ["mail"], world.url).equal
    more = world.fill(5)
    with Running(world.materializer()) as running:
        running.catch_up()
        assert records_read(running.made) < 20
    assert verify(world.names, world.settings, ["mail"], world.url).jobs == 60 + len(more)


def test_the_digest_of_verify_is_what_the_program_in_the_reference_prints(world: World, tmp_path: Path) -> None:
    """Another program can compute the digest from the table's file."""
    world.fill(20)
    with Running(world.materializer()) as running:
        running.catch_up()
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text("utf-8")
    program = page.partition("### How verify makes its digests")[2].partition("```python\n")[2].partition("```")[0]
    assert "file:shop.db?" in program
    program = program.replace("file:shop.db?", f"file:{tmp_path / 'status.db'}?")
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == verify(world.names, world.settings, ["mail"], world.url).table_digest


@on_both
def test_a_rebuild_keeps_jobs_that_the_log_no_longer_has(world: World) -> None:
    """Jobs that began before the log's start keep their rows, joined with the facts that are still in the log."""
    old, running_job = new_id(), new_id()
    world.write_facts(old, ev.JobSubmitted(SPEC), ev.JobStarted("h:1", None, {}, "t", 0), ev.JobSucceeded(b"1"))
    world.write_facts(running_job, ev.JobSubmitted(SPEC), ev.JobStarted("h:1", None, {}, "t", 0))
    with Running(world.materializer()) as running:
        running.catch_up()
    world.trim(world.names.jobs("mail"), 0, 2)
    world.trim(world.names.lifecycle, 0, 2)
    world.write_facts(running_job, ev.JobSucceeded(b"2"))
    new = world.fill(9)
    made = rebuild(world.names, world.settings, ["mail"], world.url)
    assert (made.jobs, made.carried) == (2 + len(new), 2)
    reader = world.reader()
    assert reader.job(old).result == 1
    seen = reader.job(running_job)
    assert (seen.state, seen.result, seen.tags, seen.partial) == (State.SUCCEEDED, 2, {"tenant": "acme"}, False)
    assert len(reader.jobs(tag=("tenant", "acme"))) == made.jobs
    assert sum(reader.counts_by_state().values()) == made.jobs
    reader.close()
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert found.equal, found
    assert (found.jobs, found.left_out) == (len(new), 2)


@on_both
def test_a_rebuild_beside_a_running_materializer_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a materializer writes, a rebuild fails, says what to stop, and changes nothing."""
    monkeypatch.setattr(rebuilding, "LEASE_PATIENCE_S", 0.5)
    ids = world.fill(5)
    with Running(world.materializer()) as running:
        running.catch_up()
        with pytest.raises(StoreError, match="stop `jobledger streams`"):
            rebuild(world.names, world.settings, ["mail"], world.url)
        ids += world.fill(5)
        running.catch_up()
        found = verify(world.names, world.settings, ["mail"], world.url)
    assert found.equal
    assert found.jobs == len(ids)
