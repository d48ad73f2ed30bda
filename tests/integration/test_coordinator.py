"""The coordinator with a real broker, in a thread of the test: which jobs it releases, keeps, rejects, refuses and
restores."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
import uuid_utils
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, SchemaError, TopicMissing, UnknownFact
from jobledger.kafka import clients, topic_watch, topics, topology
from jobledger.kafka.clients import producer_config
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas import codec
from jobledger.schemas.events import (
    DeadLettered,
    Fact,
    JobDue,
    JobEvent,
    JobFailedFact,
    JobSpec,
    JobSubmitted,
    RecordRejected,
    ReleaseDecided,
    ReleaseOverdue,
    ReleaseRequested,
)
from jobledger.streams.coordinator.coordinator import Coordinator, supervise
from jobledger.streams.coordinator.faust import faust_app
from jobledger.streams.coordinator.faust.faust_app import Options, changelog
from jobledger.streams.coordinator.rules.decisions import Place, decide
from jobledger.streams.coordinator.rules.schedule_rows import (
    NO_FLOOR,
    Marker,
    Scheduled,
    encode_row,
    floor_key,
    row_key,
)
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

PARTITIONS = 2
SPEC = JobSpec(b'{"to": "a"}', {"tenant": "acme"}, None)
#: Session timeout in seconds for tests in which the next coordinator waits for the session's end, two coordinators
#: share the partitions, or a request must be able to take longer.
SHORT_S = 2.0


class Running:
    """A coordinator in a thread."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(supervise(self.coordinator, self._stop))
        except Exception as exc:  # noqa: BLE001  # the test checks the error
            self.error = exc

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def health(self) -> dict[str, Any]:
        """Return the coordinator's health."""
        return self.coordinator.health()

    def stop(self) -> None:
        """Ask the coordinator to end, and wait for its end."""
        self._stop.set()
        self._thread.join(PATIENCE * 30)
        assert not self._thread.is_alive()

    def ended(self, timeout: float = 60.0) -> BaseException | None:
        """Wait until the coordinator ends by itself, for ``timeout`` seconds times `PATIENCE`. Return the error that it
        raised."""
        self._thread.join(PATIENCE * timeout)
        assert not self._thread.is_alive(), "it went on"
        return self.error


class Lab:
    """A namespace: its topics, functions that write records, and functions that read them."""

    def __init__(self, broker: str, namespace: str, folder: Path, queues: tuple[str, ...] = ("mail",)) -> None:
        self.settings, self.names, self.folder = Settings(bootstrap=broker), Names(namespace), folder
        self.admin: AdminClient = clients.admin(self.settings)
        self.create(*queues)
        self.writer = LogWriter(self.settings, self.names)
        self.reader = LogReader(self.settings)
        self.running: list[Running] = []

    def create(self, *queues: str) -> None:
        """Create the topics, with these queues."""
        specs = topology.desired(self.names, dict.fromkeys(queues, PARTITIONS), partitions=PARTITIONS, replication=1)
        topics.apply(self.admin, topics.plan(self.admin, specs))

    def start(self, folder: str = "a", partitions: int = PARTITIONS, **options: float) -> Running:
        """Start a coordinator. ``folder`` names its local copy. A coordinator with another folder waits until the last
        session has ended."""
        chosen = Options(**{"commit_interval": 0.1, **options})  # type: ignore[arg-type]
        made = Coordinator(
            self.names, self.settings, partitions=partitions, options=chosen, data_dir=self.folder / folder
        )
        running = Running(made)
        self.running.append(running)
        return running

    def ready(self, **given: Any) -> Running:
        """Start a coordinator and wait until it is ready."""
        running = self.start(**given)
        wait_for(lambda: running.health()["ready"] or not running.alive)
        assert running.alive, running.error
        return running

    def send(
        self, fact: Fact, job: str | None = None, run: int = 1, release: int = 1, attempt: int = 1, **more: Any
    ) -> str:
        """Write one event to the coordination topic, and return the job's id."""
        job = job or str(uuid_utils.uuid7())
        fields = {"task": "send", "queue": "mail", "key": None, "home": job, "trace": None, **more}
        event = JobEvent(
            "id", job, run, attempt, release, 0, fields["task"], fields["queue"], fields["key"], fields["home"], "test",
            fields["trace"], fact,
        )  # fmt: skip
        self.writer.send([Outgoing(self.names.coordination, codec.encode(event), job)])
        return job

    def submit(self, delay_ms: int = 0, **more: Any) -> str:
        """Submit a delayed job, and return its id."""
        return self.send(JobSubmitted(SPEC, delay_ms), release=0, **more)

    def messages(self, topic: str) -> list[Message]:
        """Return all records of a topic. A topic that was just created may have no leaders for a moment."""
        deadline = time.monotonic() + PATIENCE * 30
        while True:
            try:
                return [
                    m for p in range(clients.partitions_of(self.settings, topic)) for m in self.reader.read(topic, p, 0)
                ]
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise

    def events(self, topic: str) -> list[JobEvent]:
        """Return all events of a topic. Records that are no events are left out."""
        found = []
        for message in self.messages(topic):
            with contextlib.suppress(SchemaError):  # some tests write garbage
                found.append(codec.decode(message.value()))
        return found

    def released_jobs(self, queue: str = "mail") -> list[tuple[str, int, int]]:
        """Return the releases on the work topic as (job, run, release), sorted, with copies."""
        return sorted((e.job_id, e.run, e.release) for e in self.events(self.names.jobs(queue)))

    def await_released(self, *wanted: tuple[str, int, int], queue: str = "mail") -> None:
        """Wait until at least these releases are on the work topic."""
        wait_for(lambda: set(wanted) <= set(self.released_jobs(queue)))

    def committed(self) -> int:
        """Return the sum of the group's committed offsets."""
        consumer = Consumer({**self.settings.librdkafka(), "group.id": self.names.coordinator_group})
        try:
            places = [TopicPartition(self.names.coordination, p) for p in range(PARTITIONS)]
            found = consumer.committed(places, PATIENCE * 10)
            return sum(max(f.offset, 0) for f in found)
        finally:
            consumer.close()

    def close(self) -> None:
        for running in self.running:
            running.stop()
        self.reader.close()
        self.writer.close()


def wait_for(fact: Callable[[], object], timeout: float = 60.0) -> None:
    """Poll ``fact`` until it is true."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not fact():
        assert time.monotonic() < deadline, f"it did not come to be within {PATIENCE * timeout:g} s"
        time.sleep(0.05)


@pytest.fixture
def lab(broker: str, namespace: str, tmp_path: Path) -> Iterator[Lab]:
    """Yield a new namespace. Its coordinators are stopped after the test."""
    made = Lab(broker, namespace, tmp_path)
    yield made
    made.close()


def test_a_delayed_job_is_released_once_and_not_before_it_is_due(lab: Lab) -> None:
    """The record has the whole job, release 1, the due time and the headers, and is in the partition that librdkafka's
    partitioner chooses for its key. The record is not appended before it is due. The offset is committed."""
    running = lab.ready()
    job = lab.submit(700, trace="00-ab-cd-01")
    keyed = [lab.submit(random.randrange(300), key=f"customer-{n}") for n in range(20)]
    lab.await_released((job, 1, 1), *((other, 1, 1) for other in keyed))
    found = {codec.decode(m.value()).job_id: m for m in lab.messages(lab.names.jobs("mail"))}
    assert len(found) == len(lab.released_jobs()) == 21
    message = found[job]
    event = codec.decode(message.value())
    assert isinstance(event.fact, JobDue)
    assert event.fact.spec == SPEC
    assert (event.run, event.release, event.attempt, event.task, event.queue) == (1, 1, 1, "send", "mail")
    assert (event.home, event.trace) == (job, "00-ab-cd-01")
    assert event.source.startswith("coordinator@")
    assert dict(message.headers() or []) == {"jl-job": job.encode(), "jl-run": b"1", "jl-release": b"1"}
    assert message.timestamp()[1] * 1000 >= event.fact.due_at

    # Send the same keys with librdkafka's own partitioner.
    probe, placed = Producer(producer_config(lab.settings)), {}
    for other in found.values():
        key = bytes(other.key() or b"")
        probe.produce(
            lab.names.dead_letter, b"x", key, on_delivery=lambda _, m: placed.update({m.key(): m.partition()})
        )
    assert probe.flush(PATIENCE * 10) == 0
    assert {bytes(m.key() or b""): m.partition() for m in found.values()} == placed
    wait_for(lambda: lab.committed() >= 42)
    assert running.health()["fired"] == 21


def test_duplicates_and_decisions_of_other_instances_release_nothing_twice(lab: Lab) -> None:
    """There are repeated requests, and decisions of other instances about past, future and unknown releases. Each
    release still has one `JobDue`."""
    lab.ready()
    job = lab.submit(0)
    lab.await_released((job, 1, 1))
    lab.send(ReleaseDecided(0), job)
    for _ in range(3):
        lab.send(ReleaseRequested(SPEC, 50), job, release=2, attempt=2)
    lab.send(ReleaseDecided(0), job, release=7)
    lab.send(ReleaseDecided(0))
    lab.await_released((job, 1, 2))
    for release in (1, 2):
        lab.send(ReleaseRequested(SPEC, 0), job, release=release)
        lab.send(ReleaseDecided(0), job, release=release)
    last = lab.submit(0)
    lab.await_released((last, 1, 1))
    assert lab.released_jobs() == sorted([(job, 1, 1), (job, 1, 2), (last, 1, 1)])
    second = next(e for e in lab.events(lab.names.jobs("mail")) if e.release == 2)
    assert second.attempt == 2


def test_a_decision_by_a_clock_that_is_fast_releases_nothing_early(lab: Lab) -> None:
    """Another instance decides too early, five times. The append time of a decision counts, not the clock of the
    instance."""
    lab.ready()
    job = lab.submit(1500)
    for _ in range(5):
        lab.send(ReleaseDecided(0), job)
    lab.await_released((job, 1, 1))
    (message,) = lab.messages(lab.names.jobs("mail"))
    event = codec.decode(message.value())
    assert isinstance(event.fact, JobDue)
    assert message.timestamp()[1] * 1000 >= event.fact.due_at


def test_an_overdue_release_is_sent_again_with_the_same_id_or_scheduled(lab: Lab) -> None:
    """A `ReleaseOverdue` about a release in the past sends the same record again. About an unknown release, it
    schedules that release."""
    lab.ready()
    job = lab.submit(0)
    lab.await_released((job, 1, 1))
    (first,) = lab.events(lab.names.jobs("mail"))
    assert isinstance(first.fact, JobDue)
    lab.send(ReleaseOverdue(SPEC, first.fact.due_at), job)
    wait_for(lambda: len(lab.released_jobs()) == 2)
    assert {e.event_id for e in lab.events(lab.names.jobs("mail"))} == {first.event_id}
    lost = lab.send(ReleaseOverdue(SPEC, 1), release=3, attempt=2)
    lab.await_released((lost, 1, 3))


@pytest.mark.parametrize("folder", ["same", "another"])
def test_scheduled_jobs_survive_a_restart(lab: Lab, folder: str) -> None:
    """With its local copy, or restored from the changelog, the coordinator releases each job once."""
    first = lab.ready(folder="same", session_timeout=SHORT_S)
    jobs = [lab.submit(random.randrange(1000, 4000)) for _ in range(30)]
    wait_for(lambda: first.health()["scheduled"] + first.health()["fired"] == 30)
    first.stop()
    lab.ready(folder=folder, session_timeout=SHORT_S)
    lab.await_released(*((job, 1, 1) for job in jobs))
    assert lab.released_jobs() == sorted((job, 1, 1) for job in jobs)


def test_an_unreadable_record_becomes_a_dead_letter_and_stops_nothing(lab: Lab) -> None:
    """Garbage, half an event, an unknown schema and a record without a value are copied to the dead letters with their
    position, each with its own event id."""
    running = lab.ready()
    good = codec.encode(JobEvent("i", "j", 1, 1, 0, 0, "t", "mail", None, "j", "s", None, JobSubmitted(SPEC, 0)))
    bad = [b"\xff\xfe garbage", good[:30], codec.MAGIC + b"\x01" * 8 + b"x", None]
    for value in bad:
        lab.writer.send([Outgoing(lab.names.coordination, value, "k")])
    job = lab.submit(0)
    lab.await_released((job, 1, 1))
    wait_for(lambda: len(lab.messages(lab.names.dead_letter)) == 4)
    letters = lab.events(lab.names.dead_letter)
    facts = [event.fact for event in letters if isinstance(event.fact, RecordRejected)]
    assert sorted(fact.raw_value or b"" for fact in facts) == sorted(value or b"" for value in bad)
    assert {fact.topic for fact in facts} == {lab.names.coordination}
    assert {fact.raw_key for fact in facts} == {b"k"}
    assert {event.job_id for event in letters} == {""}
    assert len({event.event_id for event in letters}) == 4
    assert running.alive


def test_an_event_of_a_later_schema_is_read_with_the_schema_of_its_writer(lab: Lab) -> None:
    """The later schema has one more field, and is published before its first use."""
    lab.ready()
    later = json.loads(codec.SCHEMA_TEXT)
    later["fields"].insert(0, {"name": "invented", "type": "string", "default": ""})
    text = json.dumps(later)
    lab.writer.send([Outgoing(lab.names.schemas, text.encode(), codec.fingerprint(text).hex())])
    job = str(uuid_utils.uuid7())
    out = io.BytesIO()
    datum = {
        "invented": "later", "event_id": job, "job_id": job, "run": 1, "attempt": 1, "release": 0, "occurred_at": 0,
        "task": "t", "queue": "mail", "key": None, "home": job, "source": "s", "trace": None,
        "fact": ("jobledger.JobSubmitted", {"spec": {"args": b"{}", "tags": {}, "parent": None}, "delay_ms": 10}),
    }  # fmt: skip
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(text)), datum)
    value = codec.MAGIC + codec.fingerprint(text) + out.getvalue()
    lab.writer.send([Outgoing(lab.names.coordination, value, job)])
    lab.await_released((job, 1, 1))


def test_an_unknown_fact_stops_the_coordinator_and_is_never_skipped(lab: Lab) -> None:
    """The error names the position and says what to do. The offset is not committed, however often the coordinator
    starts."""
    later = json.loads(codec.SCHEMA_TEXT)
    later["fields"][-1]["type"].append(
        {"type": "record", "name": "LockTaken", "fields": [{"name": "holder", "type": "string"}]}
    )
    text = json.dumps(later)
    lab.writer.send([Outgoing(lab.names.schemas, text.encode(), codec.fingerprint(text).hex())])
    datum = {
        "event_id": "e", "job_id": "j", "run": 1, "attempt": 1, "release": 0, "occurred_at": 0, "task": "t",
        "queue": "mail", "key": None, "home": "j", "source": "s", "trace": None,
        "fact": ("jobledger.LockTaken", {"holder": "x"}),
    }  # fmt: skip
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(text)), datum)
    lab.writer.send([Outgoing(lab.names.coordination, codec.MAGIC + codec.fingerprint(text) + out.getvalue(), "j")])
    for _ in range(2):
        error = lab.start().ended()
        assert isinstance(error, UnknownFact)
        assert "LockTaken" in str(error)
        assert "upgrade" in str(error)
        assert f"{lab.names.coordination}[" in str(error)
    assert lab.committed() == 0
    assert lab.messages(lab.names.dead_letter) == []


def test_a_release_waits_until_its_work_topic_exists(lab: Lab) -> None:
    """The release is held back and reported, and other queues continue. Decisions do not accumulate. The job is
    released when the topic exists."""
    running = lab.ready()
    held, other = lab.submit(0, queue="later"), lab.submit(0)
    lab.await_released((other, 1, 1))
    wait_for(lambda: running.health()["missing_topics"] == [lab.names.jobs("later")])
    last = lab.submit(0)
    lab.await_released((last, 1, 1))
    wait_for(lambda: running.health()["scheduled"] == 1)
    lab.create("mail", "later")
    lab.await_released((held, 1, 1), queue="later")
    wait_for(lambda: running.health()["missing_topics"] == [])
    decided = [e for e in lab.events(lab.names.coordination) if e.job_id == held and isinstance(e.fact, ReleaseDecided)]
    assert len(decided) <= 6
    assert lab.released_jobs("later") == [(held, 1, 1)]


def test_a_release_too_large_for_its_work_topic_fails_only_its_job(lab: Lab) -> None:
    """The records of its batch are sent again one by one. The job fails, and its dead letter contains the whole job."""
    limit = ConfigEntry("max.message.bytes", "4000", incremental_operation=AlterConfigOpType.SET)
    topic = ConfigResource(ResourceType.TOPIC, lab.names.jobs("mail"), incremental_configs=[limit])
    for future in lab.admin.incremental_alter_configs([topic]).values():
        future.result(timeout=20)
    spec = JobSpec(b'{"to": "%s"}' % (b"a" * 20_000), {"tenant": "acme"}, None)
    small = [lab.submit(0) for _ in range(20)]
    large = lab.send(JobSubmitted(spec, 0), release=0)
    small += [lab.submit(0) for _ in range(20)]
    running = lab.ready()
    lab.await_released(*((job, 1, 1) for job in small))
    wait_for(lambda: lab.messages(lab.names.lifecycle) and lab.messages(lab.names.dead_letter))
    (failed,) = lab.events(lab.names.lifecycle)
    (letter,) = lab.events(lab.names.dead_letter)
    assert isinstance(failed.fact, JobFailedFact)
    assert isinstance(letter.fact, DeadLettered)
    assert [(e.job_id, e.run, e.release) for e in (failed, letter)] == [(large, 1, 1)] * 2
    assert (failed.fact.reason, letter.fact.reason) == ("too-large", "too-large")
    assert "max.message.bytes" in failed.fact.error.message
    assert letter.fact.spec == spec
    assert running.alive
    wait_for(lambda: running.health()["scheduled"] == 0)
    metrics = running.coordinator.metrics.registry
    wait_for(lambda: metrics.get_sample_value("jobledger_coordinator_undeliverable_jobs_total") == 1)


@pytest.mark.extended
def test_lost_offsets_release_nothing_again_after_markers_were_removed(lab: Lab) -> None:
    """After the removal of markers, only the floor of each partition is left in the changelog. A group that has lost
    its offsets reads all events again and skips them, with and without the local copy."""
    first = lab.ready(folder="a", keep_markers=0.5, session_timeout=SHORT_S)
    jobs = [lab.submit(random.randrange(200)) for _ in range(20)]
    lab.await_released(*((job, 1, 1) for job in jobs))
    left = {floor_key(p) for p in range(PARTITIONS)}

    def rows() -> set[bytes]:
        found: dict[bytes, bytes | None] = {}
        for message in lab.messages(changelog(lab.names)):
            found[bytes(message.key() or b"")] = message.value()
        return {key for key, value in found.items() if value is not None}

    wait_for(lambda: rows() and rows() <= left)
    first.stop()

    def forgotten() -> bool:
        with contextlib.suppress(KafkaException):  # a static member does not leave the group, its session must end
            lab.admin.delete_consumer_groups([lab.names.coordinator_group])[lab.names.coordinator_group].result(10)
            return True
        return False

    for folder in ("a", "b"):
        wait_for(forgotten)
        again = lab.ready(folder=folder, keep_markers=0.5, session_timeout=SHORT_S)
        wait_for(lambda: lab.committed() >= 40)
        last = lab.submit(0)
        lab.await_released((last, 1, 1))
        jobs.append(last)
        wait_for(lambda: rows() <= left)
        again.stop()
    assert lab.released_jobs() == sorted((job, 1, 1) for job in jobs)


@pytest.mark.extended
def test_a_recreated_coordination_topic_is_read_from_its_start(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """The old changelog says that all events below some offset are processed. The coordinator logs that the topic was
    recreated, and processes the new events. Waiting jobs are still released. The same holds after a restart with and
    without the local copy."""
    first = lab.ready(folder="a", keep_markers=0.3, session_timeout=SHORT_S)
    for _ in range(20):
        lab.submit(0)
    wait_for(lambda: any(m.key() == floor_key(m.partition() or 0) for m in lab.messages(changelog(lab.names))))
    waits = [lab.submit(6_000) for _ in range(4)]
    wait_for(lambda: first.health()["scheduled"] == 4)
    first.stop()
    before = len(lab.released_jobs())

    lab.admin.delete_topics([lab.names.coordination])[lab.names.coordination].result(30)
    wait_for(lambda: lab.names.coordination not in lab.admin.list_topics(timeout=10).topics)
    lab.create("mail")
    lab.writer.close()
    lab.reader.close()
    lab.writer, lab.reader = LogWriter(lab.settings, lab.names), LogReader(lab.settings)
    jobs = []
    for folder in ("a", "a", "b"):
        again = lab.ready(folder=folder, keep_markers=0.3, session_timeout=SHORT_S)
        jobs += [lab.submit(0) for _ in range(4)]
        lab.await_released(*((job, 1, 1) for job in jobs))
        again.stop()
    assert "the topic was recreated" in caplog.text
    lab.ready(folder="b")
    lab.await_released(*((job, 1, 1) for job in waits))
    assert len(lab.released_jobs()) == before + len(jobs) + len(waits)


def scheduled(job: str, partition: int, offset: int, due: int) -> Scheduled:
    """Return the row that the event at ``offset`` would have made."""
    event = JobEvent("i", job, 1, 1, 1, 0, "t", "mail", None, job, "s", None, ReleaseRequested(SPEC, None, due))
    made = decide(None, NO_FLOOR, event, Place(partition, offset, 0)).row
    assert isinstance(made, Scheduled)
    return made


def test_a_late_write_of_a_paused_instance_is_undone_at_the_next_restore(lab: Lab) -> None:
    """The last record in the changelog is an older row. The newer row wins, and is written to the changelog again."""
    first = lab.ready(folder="a", session_timeout=SHORT_S)
    job = lab.submit(0)
    lab.await_released((job, 1, 1))
    wait_for(lambda: lab.committed() >= 2)
    first.stop()
    marker = next(m for m in lab.messages(changelog(lab.names)) if m.key() == job.encode() and m.value() is not None)
    partition = marker.partition() or 0
    stale = encode_row(scheduled(job, partition, 0, 1))
    lab.writer.send([Outgoing(changelog(lab.names), stale, row_key(job), partition)])

    def newest() -> object:
        return [m.value() for m in lab.messages(changelog(lab.names)) if m.key() == job.encode()][-1]

    assert newest() == stale
    lab.ready(folder="b")
    wait_for(lambda: newest() != stale)
    other = lab.submit(0)
    lab.await_released((other, 1, 1))
    assert lab.released_jobs() == sorted([(job, 1, 1), (other, 1, 1)])


def test_a_late_write_of_another_instance_is_undone_at_the_owners_next_write(lab: Lab) -> None:
    """A record of another instance in the changelog appears as a gap. The group confirms that the owner still owns the
    partition, and the owner writes its row again."""
    running = lab.ready()
    job = lab.submit(3_600_000)
    wait_for(lambda: running.health()["scheduled"] == 1)
    mine = next(m for m in lab.messages(changelog(lab.names)) if m.key() == job.encode())
    partition = mine.partition() or 0
    forged = encode_row(Marker(partition, 0, 1, 1, 0))
    lab.writer.send([Outgoing(changelog(lab.names), forged, row_key(job), partition)])

    def newest() -> object:
        return [m.value() for m in lab.messages(changelog(lab.names)) if m.key() == job.encode()][-1]

    assert newest() == forged
    while newest() == forged:
        other = lab.submit(0)  # some of these jobs are in that partition
        lab.await_released((other, 1, 1))
    assert newest() == mine.value()
    assert running.alive


def test_wrong_partition_counts_and_missing_topics_are_refused_at_the_start(
    broker: str, namespace: str, tmp_path: Path, lab: Lab
) -> None:
    """Faust would continue to run and do nothing. So the coordinator ends with an error that names the topic and both
    numbers."""
    error = lab.start(partitions=5).ended()
    assert isinstance(error, ConfigError)
    assert lab.names.coordination in str(error)
    assert "2 partitions, not 5" in str(error)
    nowhere = Running(Coordinator(Names("nowhere"), lab.settings, partitions=2, data_dir=tmp_path / "n"))
    assert isinstance(nowhere.ended(), TopicMissing)


@pytest.mark.extended
def test_instances_that_join_and_leave_share_the_partitions_and_release_each_job(lab: Lab) -> None:
    """An instance joins and leaves, joins again, and then the other one leaves. Partitions move each time. All jobs are
    released, and none too early."""
    one = lab.ready(folder="one", session_timeout=SHORT_S)
    jobs = [lab.submit(random.randrange(15_000)) for _ in range(300)]
    two = lab.start(folder="two", session_timeout=SHORT_S)
    wait_for(lambda: one.health()["partitions"] and two.health()["partitions"])
    assert sorted(one.health()["partitions"] + two.health()["partitions"]) == [0, 1]
    two.stop()
    wait_for(lambda: one.health()["partitions"] == [0, 1], 15)
    three = lab.start(folder="two", session_timeout=SHORT_S)
    wait_for(lambda: one.health()["partitions"] and three.health()["partitions"])
    one.stop()
    lab.await_released(*((job, 1, 1) for job in jobs))
    assert set(lab.released_jobs()) == {(job, 1, 1) for job in jobs}
    assert len(lab.released_jobs()) <= len(jobs) + 5, "clean hand-overs repeat next to nothing"
    for message in lab.messages(lab.names.jobs("mail")):
        fact = codec.decode(message.value()).fact
        assert isinstance(fact, JobDue)
        assert message.timestamp()[1] * 1000 >= fact.due_at


def test_a_coordinator_without_progress_after_a_rebalance_ends(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faust waits forever for a part of the table that it does not get. The coordinator ends, so that its supervisor
    can start it again."""
    monkeypatch.setattr("jobledger.streams.coordinator.coordinator.recovering", lambda app: True)
    running = lab.ready()
    monkeypatch.setattr("jobledger.streams.coordinator.coordinator.START_TIMEOUT", 2.0)
    error = running.ended()
    assert isinstance(error, BrokerUnavailable)
    assert "made no progress for 2 s with a rebalance of its group, or reading the part of its table" in str(error)


def test_a_broker_that_gives_no_answer_while_the_table_is_restored_is_asked_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust would take the missing answer for its own stop, and would complete no rebalance any more. So the
    coordinator asks again."""
    settings, seek = faust_app.faust_settings, faust_app.SourceConsumer.perform_seek
    asked: list[float] = []

    async def once_without_an_answer(consumer: Any) -> None:
        asked.append(time.monotonic())
        await (asyncio.sleep(3600) if len(asked) == 1 else seek(consumer))

    monkeypatch.setattr(faust_app, "faust_settings", lambda *given: {**settings(*given), "broker_request_timeout": 4.0})
    monkeypatch.setattr(faust_app.SourceConsumer, "perform_seek", once_without_an_answer)
    running = lab.ready(session_timeout=SHORT_S)  # shorter than a request may take
    assert len(asked) > 1
    job = lab.submit(0)
    lab.await_released((job, 1, 1))
    assert running.health()["not_ready_s"] < 60


def test_a_broker_that_gives_no_answer_for_too_long_ends_the_coordinator(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator ends, so that its supervisor can start it again."""
    settings = faust_app.faust_settings

    async def without_an_answer(consumer: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(faust_app, "faust_settings", lambda *given: {**settings(*given), "broker_request_timeout": 3.0})
    monkeypatch.setattr(faust_app.SourceConsumer, "perform_seek", without_an_answer)
    error = lab.start(patience=4.0, session_timeout=SHORT_S).ended()
    assert isinstance(error, BrokerUnavailable)
    assert "to restore its table had no answer for 6 s" in str(error)


def test_metrics_count_events_releases_and_lateness(lab: Lab) -> None:
    """Events are counted by verdict, lateness is a histogram, and gauges agree with the health."""
    running = lab.ready()
    job = lab.submit(0)
    lab.submit(3_600_000)
    lab.await_released((job, 1, 1))
    metrics = running.coordinator.metrics.registry
    prefix = "jobledger_coordinator_"
    # A release is on its topic before the coordinator counts it.
    wait_for(lambda: metrics.get_sample_value(prefix + "events_total", {"verdict": "scheduled"}) == 2)
    wait_for(lambda: metrics.get_sample_value(prefix + "events_total", {"verdict": "released"}) == 1)
    wait_for(lambda: (running.health()["scheduled"], running.health()["ready"]) == (1, True))
    assert metrics.get_sample_value(prefix + "events_total", {"verdict": "scheduled"}) == 2
    assert metrics.get_sample_value(prefix + "events_total", {"verdict": "released"}) == 1
    assert metrics.get_sample_value(prefix + "releases_total") == 1
    assert metrics.get_sample_value(prefix + "lateness_seconds_count") == 1
    assert metrics.get_sample_value(prefix + "scheduled") == 1
    assert metrics.get_sample_value(prefix + "ready") == 1


def test_timestamps_of_writers_shorten_no_delay_and_changed_settings_are_reported(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a topic has message.timestamp.type=CreateTime, a delay counts from the time when the record is read,
    whatever timestamp its writer chose. Health and log name the topic, the setting and its value, until the setting is
    restored."""
    monkeypatch.setattr(topic_watch, "LOOK_S", 0.5)
    topic = lab.names.coordination

    def set_to(value: str) -> None:
        entry = ConfigEntry("message.timestamp.type", value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        for future in lab.admin.incremental_alter_configs([resource]).values():
            future.result(timeout=20)

    running = lab.ready()
    assert running.health()["topic_problems"] == []
    set_to("CreateTime")
    wanted = f"topic {topic} has message.timestamp.type=CreateTime and needs LogAppendTime"
    wait_for(lambda: [wanted in said for said in running.health()["topic_problems"]] == [True])
    assert any(wanted in record.message and record.levelname == "ERROR" for record in caplog.records)
    job = str(uuid_utils.uuid7())
    fact = JobSubmitted(SPEC, 4_000)
    event = JobEvent("id", job, 1, 1, 0, 0, "send", "mail", None, job, "test", None, fact)
    producer = Producer(producer_config(lab.settings))
    sent_ms = time.time_ns() // 1_000_000
    producer.produce(topic, codec.encode(event), job.encode(), timestamp=sent_ms - 54_000)
    assert producer.flush(20) == 0
    lab.await_released((job, 1, 1))
    (released,) = (m for m in lab.messages(lab.names.jobs("mail")) if codec.decode(m.value()).job_id == job)
    assert released.timestamp()[1] - sent_ms >= 4_000
    set_to("LogAppendTime")
    wait_for(lambda: running.health()["topic_problems"] == [])
    assert running.alive


def test_partitions_added_while_the_coordinator_runs_are_reported(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator does not read partitions that are added to the coordination topic while it runs. Its health says
    so, and the other partitions are served."""
    monkeypatch.setattr(topic_watch, "LOOK_S", 0.5)
    running = lab.ready()
    topic = lab.names.coordination
    lab.admin.create_partitions([NewPartitions(topic, PARTITIONS + 1)])[topic].result(timeout=20)
    wait_for(
        lambda: f"{topic} has {PARTITIONS + 1} partitions, not {PARTITIONS}" in str(running.health()["topic_problems"])
    )
    assert running.alive
