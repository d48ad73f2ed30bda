"""The wire format with a real Schema Registry: what is registered and written, and that all parts read both framings."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fastavro
import httpx2
import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.cimpl import NewTopic

from jobledger import App, BrokerUnavailable, ConfigError, Settings
from jobledger.consumers.router.router import Router
from jobledger.consumers.worker.worker import Worker
from jobledger.errors import RegistryNeeded, RegistryUnavailable, SchemaRefused
from jobledger.kafka.clients import admin, partitions_of
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import decoder
from jobledger.log.schema_registry import COMPATIBILITY, SchemaRegistry
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas import codec, confluent_frame
from jobledger.schemas.events import (
    ErrorInfo,
    JobEvent,
    JobFailedFact,
    JobSpec,
    JobSubmitted,
    JobSucceeded,
    RecordRejected,
)
from jobledger.streams.coordinator.coordinator import Coordinator, supervise
from jobledger.streams.coordinator.faust.faust_app import Options
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import verify
from tests.integration.test_router import routing
from tests.integration.worker_app import build, closings, log_of, made, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

OWN = codec.MAGIC + codec.FINGERPRINT
#: An id that is in no registry of these tests.
NOWHERE = 0x7FFF_FF00


def with_registry(app: App, url: str | None) -> App:
    """Return the same app with another registry, as in another process of the deployment."""
    settings = app.settings
    return build(app.names.namespace, settings.resolve_bootstrap(), schema_registry=url, home=settings.home)


def raw_of(app: App, *topics: str) -> list[bytes]:
    """Return every value of the topics, unchanged."""
    found = []
    with LogReader(app.settings) as reader:
        for topic in topics:
            for partition in range(partitions_of(app.settings, topic)):
                found += [m.value() or b"" for m in reader.read(topic, partition, 0)]
    return found


def event_topics(app: App) -> list[str]:
    """Return the topics of events."""
    names = app.names
    return [names.jobs("default"), names.lifecycle, names.coordination, names.dead_letter, names.workers]


def framed(event: JobEvent, schema_id: int) -> bytes:
    """Frame an event as another writer would."""
    return confluent_frame.head(schema_id) + codec.encode(event)[len(OWN) :]


def submission(task: str = "add", args: bytes = b'{"a":1}') -> JobEvent:
    """Return the submission of a job."""
    job = str(uuid.uuid4())
    return JobEvent(
        job, job, 1, 1, 1, 0, task, "default", None, None, "test", None, JobSubmitted(JobSpec(args))
    )  # fmt: skip


def produce(app: App, topic: str, *values: bytes, partition: int = 0) -> None:
    """Write these bytes unchanged."""
    writer = LogWriter(app.settings, None)
    try:
        writer.send(Outgoing(topic, value, "k", partition) for value in values)
    finally:
        writer.close()


def reason_at(worker: Worker, place: str) -> str | None:
    """Return why the worker is unhealthy if it has stopped at this record; else None."""
    reasons: list[str] = worker.health()["reasons"]
    return next((reason for reason in reasons if place in reason), None)


def streams_of(app: App, folder: Path) -> tuple[Materializer, Coordinator]:
    """Create the two parts of an app's stream processor."""
    table = Materializer(app.names, app.settings, ["default"], f"sqlite:///{folder / 'status.db'}")
    options = Options(session_timeout=2.0, commit_interval=0.1)
    return table, Coordinator(
        app.names, app.settings, partitions=app.partitions, options=options, data_dir=folder / "coordinator"
    )


@contextlib.contextmanager
def streaming(app: App, folder: Path) -> Iterator[Materializer]:
    """Run the coordinator and the materializer of an app in threads. Their errors are raised at the end of the block."""
    stop = threading.Event()
    raised: list[BaseException] = []
    table, coordinator = streams_of(app, folder)

    def run(what: Any) -> None:
        try:
            what()
        except BaseException as exc:  # noqa: BLE001  # raised again in the test's thread
            raised.append(exc)

    works = (lambda: table.run(stop), lambda: asyncio.run(supervise(coordinator, stop)))
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        until(lambda: raised or (table.active and coordinator.health()["ready"]), 60.0, "the streams being ready")
        yield table
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE * 40)
        assert not any(thread.is_alive() for thread in threads)
    if raised:
        raise raised[0]


@pytest.fixture
def api(registry_url: str) -> Iterator[httpx2.Client]:
    """Yield a client of the registry's own API, which uses no code of Jobledger."""
    with httpx2.Client(base_url=registry_url + "/", headers={"Content-Type": "application/json"}) as client:
        yield client


# -- the client ------------------------------------------------------------------------------------------------------


def test_a_subject_is_registered_once_and_its_compatibility_is_kept(
    registry_url: str, api: httpx2.Client, namespace: str
) -> None:
    """A second registration returns the same id. A new subject is BACKWARD_TRANSITIVE. A compatibility that an operator
    sets later is kept."""
    subject = f"{namespace}.jobs.a-value"
    client = SchemaRegistry(registry_url)
    first = client.register(subject, codec.SCHEMA_TEXT)
    assert SchemaRegistry(registry_url).register(subject, codec.SCHEMA_TEXT) == first
    assert api.get(f"subjects/{subject}/versions").json() == [1]
    assert api.get(f"config/{subject}").json() == {"compatibilityLevel": COMPATIBILITY}
    api.put(f"config/{subject}", json={"compatibility": "FULL_TRANSITIVE"}).raise_for_status()
    later = codec.SCHEMA_TEXT.replace(
        '"name": "trace"', '"name": "shade", "type": "string", "default": ""}, {"name": "trace"', 1
    )
    second = client.register(subject, later)
    assert second != first
    assert api.get(f"config/{subject}").json() == {"compatibilityLevel": "FULL_TRANSITIVE"}
    found = client.schema(second)
    assert found is not None
    assert codec.fingerprint(found) == codec.fingerprint(later)


def test_an_unknown_id_has_no_schema(registry_url: str) -> None:
    """The registry's answer 404 means that there is no schema."""
    assert SchemaRegistry(registry_url).schema(NOWHERE, sure=False) is None


def test_a_registry_that_refuses_the_schema_stops_the_writer(
    broker: str, registry_url: str, api: httpx2.Client, namespace: str
) -> None:
    """Nothing is sent, and the error names the subject."""
    app = made(namespace, broker, schema_registry=registry_url)
    subject = f"{app.names.jobs('default')}-value"
    other = {"type": "record", "name": "JobEvent", "namespace": "jobledger", "fields": [{"name": "z", "type": "int"}]}
    api.post(f"subjects/{subject}/versions", json={"schema": json.dumps(other)}).raise_for_status()
    api.put(f"config/{subject}", json={"compatibility": "FULL_TRANSITIVE"}).raise_for_status()
    with pytest.raises(SchemaRefused, match=subject):
        app.tasks["add"].submit(1)
    assert raw_of(app, app.names.jobs("default")) == []
    app.close()


def test_an_unreachable_registry_is_an_error_of_the_first_submission(broker: str, namespace: str) -> None:
    """The submission fails with an error that names the setting. Nothing is sent."""
    app = made(namespace, broker, schema_registry=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RegistryUnavailable, match="JOBLEDGER_SCHEMA_REGISTRY"):
        app.tasks["add"].submit(1)
    assert raw_of(app, app.names.jobs("default")) == []
    app.close()


# -- end to end ------------------------------------------------------------------------------------------------------


def test_all_parts_work_with_a_registry(
    broker: str, registry_url: str, api: httpx2.Client, namespace: str, tmp_path: Path
) -> None:
    """Client, worker, coordinator and materializer frame every event. Every topic with events has a subject, and no
    other topic has one. The table agrees with the log."""
    app = made(namespace, broker, schema_registry=registry_url, home=tmp_path)
    add: Any = app.tasks["add"]
    jobs = [add.submit(n) for n in range(20)]
    with working(app), streaming(app, tmp_path) as table:
        jobs += app.submit_many(add.job(n) for n in range(50))
        jobs.append(app.tasks["fail"].submit(1))
        jobs.append(add.using(delay=0.5).submit(1))
        jobs.append(asyncio.run(_submitted(add)))
        until(lambda: {j.job_id for j in jobs} <= _ended(app), 60.0, "all jobs ended")
        until(table.caught_up)
    report = verify(app.names, app.settings, ["default"], f"sqlite:///{tmp_path / 'status.db'}")
    assert report.equal
    assert report.jobs == len(jobs)
    values = raw_of(app, *event_topics(app))
    # A worker that stops removes its report with a record that has no value.
    assert {value[:1] for value in values if value} == {b"\0"}
    subjects = {s for s in api.get("subjects").json() if s.startswith(namespace + ".")}
    assert subjects == {f"{topic}-value" for topic in event_topics(app)}
    for subject in subjects:
        assert api.get(f"config/{subject}").json() == {"compatibilityLevel": COMPATIBILITY}
        assert api.get(f"subjects/{subject}/versions").json() == [1]
    # A reader with the registry's API and without Jobledger reads the records.
    schema = fastavro.parse_schema(
        json.loads(api.get(f"schemas/ids/{confluent_frame.id_of(values[0])}").json()["schema"])
    )
    read: Any = fastavro.schemaless_reader(io.BytesIO(values[0][5:]), schema, None)
    assert read["job_id"] in {j.job_id for j in jobs}
    app.close()


async def _submitted(task: Any) -> Any:
    return await task.submit_async(7)


def _ended(app: App) -> set[str]:
    return {
        job
        for job, facts in closings(app).items()
        if any(isinstance(r.event.fact, JobSucceeded | JobFailedFact) for r in facts)
    }


def test_a_deployment_can_switch_to_the_registry_and_back(
    broker: str, registry_url: str, namespace: str, tmp_path: Path
) -> None:
    """Records with both framings are in one topic. Workers with either setting run all jobs, and no job runs twice. The
    table is the same with every setting. After the return, framed records can be read without the registry."""
    plain = made(namespace, broker, home=tmp_path)
    registered = with_registry(plain, registry_url)
    jobs: list[str] = []

    def all_ended() -> bool:
        return set(jobs) <= _ended(plain)

    for turn, (sender, runner) in enumerate(
        [(plain, registered), (registered, plain), (plain, plain), (registered, registered), (plain, registered)]
    ):
        jobs += [sender.tasks["add"].submit(turn * 10 + n).job_id for n in range(6)]
        jobs.append(sender.tasks["add"].using(delay=0.2).submit(turn * 10 + 9).job_id)
        with working(runner), streaming(runner, tmp_path) as table:
            until(all_ended, 60.0, "all jobs ended")
            until(table.caught_up)
    ends = closings(plain)
    assert {job: len(ends[job]) for job in jobs} == dict.fromkeys(jobs, 1)
    assert closings(registered).keys() == ends.keys()
    for topic in (plain.names.jobs("default"), plain.names.lifecycle, plain.names.coordination):
        assert {value[:1] for value in raw_of(plain, topic)} == {b"\0", codec.MAGIC[:1]}
    url = f"sqlite:///{tmp_path / 'status.db'}"
    away = replace(plain.settings, schema_registry=f"http://127.0.0.1:{free_port()}")
    for settings in (plain.settings, registered.settings, away):
        assert verify(plain.names, settings, ["default"], url).equal
    plain.close()
    registered.close()


def test_a_takeover_reads_both_framings(broker: str, registry_url: str, namespace: str) -> None:
    """Jobs with a closing fact are not run again, and a second record of a release is dropped, whichever framing the
    records have."""
    plain = made(namespace, broker)
    registered = with_registry(plain, registry_url)
    names = plain.names
    done, fresh = [submission() for _ in range(4)], [submission(args=b'{"a":7}') for _ in range(2)]
    facts = [JobSucceeded(b"2", 5), JobFailedFact("rejected", ErrorInfo("X", "no", None))] * 2
    for app, jobs, ends in ((plain, done[:2], facts[:2]), (registered, done[2:], facts[2:])):
        send_events(app, names.jobs("default"), *jobs)
        send_events(
            app, names.lifecycle, *(msgspec.structs.replace(j, fact=f) for j, f in zip(jobs, ends, strict=True))
        )
    send_events(registered, names.jobs("default"), fresh[0])
    with working(plain) as worker:
        until(lambda: fresh[0].job_id in closings(plain))
        assert worker.takeover is not None
        assert worker.takeover.found_settled == 4
        until(lambda: sum(len(p.live) for p in worker.partitions()) == 0, what="everything settled")
    # The same releases again, each with the other framing. The next owner reads them, because they are below its
    # committed offset.
    send_events(plain, names.jobs("default"), *done[2:], fresh[0])
    send_events(registered, names.jobs("default"), *done[:2], fresh[1])
    with working(registered) as worker:
        until(lambda: fresh[1].job_id in closings(plain))
        assert worker.takeover is not None
        assert worker.takeover.seeded == 5
        assert worker.health()["duplicates"] == 5
    assert plain.ran == [("add", 7)]  # type: ignore[attr-defined]
    assert registered.ran == [("add", 7)]  # type: ignore[attr-defined]
    plain.close()
    registered.close()


def test_a_takeover_that_cannot_read_a_closing_fact_runs_nothing(
    broker: str, registry_url: str, namespace: str
) -> None:
    """No reader without the setting can read the closing fact. The partition stops, also for the job of that fact. The
    next owner, which has the setting, finds the fact and does not run the job again."""
    app = made(namespace, broker)
    registered = with_registry(app, registry_url)
    names = app.names
    schema_id = SchemaRegistry(registry_url).register(f"{names.lifecycle}-value", codec.SCHEMA_TEXT)
    done, fresh = submission(), submission(args=b'{"a":7}')
    send_events(app, names.jobs("default"), done, fresh)
    produce(app, names.lifecycle, framed(msgspec.structs.replace(done, fact=JobSucceeded(b"2", 5)), schema_id))
    with working(app) as worker:
        reason = until(lambda: reason_at(worker, f"{names.lifecycle}[0]@0"))
        assert "JOBLEDGER_SCHEMA_REGISTRY" in reason
    with working(registered) as worker:
        until(lambda: fresh.job_id in closings(registered))
        assert worker.takeover is not None
        assert worker.takeover.found_settled == 1
    assert app.ran == []  # type: ignore[attr-defined]
    assert registered.ran == [("add", 7)]  # type: ignore[attr-defined]
    app.close()
    registered.close()


def send_events(app: App, topic: str, *events: JobEvent) -> None:
    """Write events to partition 0, with the framing of the app's settings and without headers."""
    writer = LogWriter(app.settings, app.names)
    try:
        writer.send(Outgoing(topic, codec.encode(event), event.job_id, 0) for event in events)
    finally:
        writer.close()


# -- writers and readers of other programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["ours", "theirs"])
def test_a_plain_confluent_producer_submits_a_job(
    broker: str, registry_url: str, api: httpx2.Client, namespace: str, version: str
) -> None:
    """The producer uses the published schema, or another one that Avro can resolve, with fastavro and five bytes of
    framing. The job runs."""
    app = made(namespace, broker, schema_registry=registry_url)
    topic = app.names.jobs("default")
    schema: Any = json.loads(codec.SCHEMA_TEXT)
    if version == "theirs":
        schema["fields"].insert(3, {"name": "region", "type": "string", "default": "here"})
        schema["fields"][-1]["type"] = schema["fields"][-1]["type"][:2]  # this writer only writes submissions
    answer = api.post(f"subjects/{topic}-value/versions", json={"schema": json.dumps(schema)}).json()
    job = str(uuid.uuid4())
    datum = {
        "event_id": job, "job_id": job, "run": 1, "attempt": 1, "release": 1, "region": "there",
        "occurred_at": time.time_ns() // 1000, "task": "add", "queue": "default", "key": None, "home": None,
        "source": "billing@java", "trace": None,
        "fact": ("jobledger.JobSubmitted",
                 {"spec": {"args": b'{"a": 40, "b": 2}', "tags": {"by": "billing"}, "parent": None},
                  "delay_ms": None, "due_at": None}),
    }  # fmt: skip
    out = io.BytesIO()
    out.write(b"\0" + answer["id"].to_bytes(4, "big"))
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), datum)
    producer = Producer({"bootstrap.servers": broker, "partitioner": "murmur2_random"})
    producer.produce(topic, out.getvalue(), job)
    assert producer.flush(10) == 0
    producer.close()
    with working(app):
        until(lambda: job in closings(app))
    assert closings(app)[job][0].event.fact.result == b"42"  # type: ignore[union-attr]
    app.close()


def test_the_example_for_other_languages_runs(broker: str, registry_url: str, namespace: str) -> None:
    """The example in docs/wire.md works before any part of Jobledger has registered a schema."""
    app = made(namespace, broker, schema_registry=registry_url)
    block = re.search(r"```python\n(.*?)```", Path("docs/wire.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    text = block[1]
    given: dict[str, Any] = {}
    for shown, here in {
        "localhost:9092": broker,
        "http://localhost:8081": registry_url,
        "shop.jobs.default": app.names.jobs("default"),
        "job_event.avsc": "schemas/job_event.avsc",
    }.items():
        assert text.count(f'"{shown}"') == 1
        text = text.replace(f'"{shown}"', repr(here))
    exec(compile(text, "docs/wire.md", "exec"), given)  # noqa: S102  # a page of this project
    with working(app):
        until(lambda: given["job_id"] in closings(app))
    assert closings(app)[given["job_id"]][0].event.fact.result == b"42"  # type: ignore[union-attr]
    app.close()


def test_without_the_setting_a_framed_record_waits_and_garbage_does_not(
    broker: str, registry_url: str, namespace: str
) -> None:
    """A record whose schema only the registry has stops its partition, and is not rejected. Garbage behind a zero byte
    is dead-lettered. With the setting, the job runs."""
    app = made(namespace, broker)
    topic = app.names.jobs("default")
    registered = with_registry(app, registry_url)
    schema_id = SchemaRegistry(registry_url).register(f"{topic}-value", codec.SCHEMA_TEXT)
    good, elsewhere = submission(), submission()
    produce(app, topic, bytes(40), framed(good, schema_id), partition=0)
    produce(app, topic, codec.encode(elsewhere), partition=1)
    with working(app) as worker:
        reason = until(lambda: reason_at(worker, f"{topic}[0]@1"))
        until(lambda: elsewhere.job_id in closings(app))
        assert "JOBLEDGER_SCHEMA_REGISTRY" in reason
        until(lambda: raw_of(app, app.names.dead_letter))
    with working(registered):
        until(lambda: good.job_id in closings(registered))
    letters = [r.event.fact for r in log_of(registered, app.names.dead_letter)]
    assert [fact.offset for fact in letters if isinstance(fact, RecordRejected)] == [0]
    app.close()
    registered.close()


def test_a_record_with_an_unknown_schema_id_is_rejected(broker: str, registry_url: str, namespace: str) -> None:
    """If the registry has no such schema, the whole record is copied to the dead letters, as with an unknown
    fingerprint. The next job runs."""
    app = made(namespace, broker, schema_registry=registry_url)
    topic = app.names.jobs("default")
    lost, garbage, good = framed(submission(), NOWHERE), b"\0\xff\xff\xff\xff garbage", submission()
    produce(app, topic, lost, garbage, codec.encode(good))
    with working(app):
        until(lambda: good.job_id in closings(app))
        until(lambda: len(raw_of(app, app.names.dead_letter)) == 2)
    letters = [r.event.fact for r in log_of(app, app.names.dead_letter)]
    assert {fact.raw_value for fact in letters if isinstance(fact, RecordRejected)} == {lost, garbage}
    app.close()


def test_an_unreachable_registry_rejects_nothing(broker: str, registry_url: str, namespace: str) -> None:
    """A reader that cannot reach the registry stops with the registry's address. Nothing is dead-lettered, and the job
    runs later."""
    app = made(namespace, broker, schema_registry=registry_url)
    topic = app.names.jobs("default")
    schema_id = SchemaRegistry(registry_url).register(f"{topic}-value", codec.SCHEMA_TEXT)
    job = submission()
    value = framed(job, schema_id)
    produce(app, topic, value)
    address = f"http://127.0.0.1:{free_port()}"
    away = replace(app.settings, schema_registry=address)
    with pytest.raises(RegistryUnavailable, match=address):
        decoder(away, app.names).decode(value)
    with pytest.raises(RegistryNeeded, match="JOBLEDGER_SCHEMA_REGISTRY"):
        decoder(replace(app.settings, schema_registry=None), app.names).decode(value)
    assert issubclass(RegistryUnavailable, BrokerUnavailable)
    with working(app):
        until(lambda: job.job_id in closings(app))
    assert raw_of(app, app.names.dead_letter) == []
    app.close()


class RegistryProxy:
    """A proxy of the registry. While ``closed``, it answers as an overloaded proxy does."""

    def __init__(self, registry_url: str) -> None:
        self.closed = False
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.closed:
                    status, content = 503, b""
                else:
                    sent = httpx2.request(
                        self.command,
                        registry_url + self.path,
                        content=body,
                        headers={"Content-Type": "application/json"},
                    )
                    status, content = sent.status_code, sent.content
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args: Any) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def proxy(registry_url: str) -> Iterator[RegistryProxy]:
    """Yield an open proxy of the registry."""
    made = RegistryProxy(registry_url)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_registry_outage_stops_only_what_needs_the_registry(
    broker: str, registry_url: str, namespace: str, proxy: RegistryProxy
) -> None:
    """Submissions and jobs with known ids continue. A record with another id ends the worker, and is not rejected. The
    job runs when the registry answers again."""
    app = made(namespace, broker, schema_registry=proxy.url)
    topic = app.names.jobs("default")
    # The same schema with another doc text: it has another id in the registry, but the same encoding.
    schema = json.loads(codec.SCHEMA_TEXT) | {"doc": namespace}
    other = SchemaRegistry(registry_url).register(f"{namespace}.elsewhere-value", json.dumps(schema))
    job = submission(args=b'{"a":3}')
    with working(app) as worker:
        first = app.tasks["add"].submit(1).job_id
        until(lambda: first in closings(app))
        proxy.closed = True
        second = app.tasks["add"].submit(2).job_id
        until(lambda: second in closings(app))
        produce(app, topic, framed(job, other))
        until(lambda: worker.error)
        assert isinstance(worker.error, RegistryUnavailable)
        assert "HTTP status 503" in str(worker.error)
    with pytest.raises(RegistryUnavailable), working(app, start_timeout=0.5) as worker:
        until(worker.ended.is_set)
    proxy.closed = False
    with working(app):
        until(lambda: job.job_id in closings(app))
    assert {len(facts) for facts in closings(app).values()} == {1}
    assert raw_of(app, app.names.dead_letter) == []
    app.close()


def test_the_stream_processor_without_the_setting_stops_at_a_framed_record(
    broker: str, registry_url: str, namespace: str, tmp_path: Path
) -> None:
    """Coordinator and materializer raise errors that name the setting, and skip nothing. With the setting they continue
    at the record."""
    app = made(namespace, broker, home=tmp_path)
    registered = with_registry(app, registry_url)
    delayed = submission()
    delayed = JobEvent(
        delayed.event_id, delayed.job_id, 1, 1, 0, 0, "add", "default", None, delayed.job_id, "test", None,
        JobSubmitted(JobSpec(b'{"a":1}'), 1),
    )  # fmt: skip
    schema_id = SchemaRegistry(registry_url).register(f"{app.names.coordination}-value", codec.SCHEMA_TEXT)
    produce(app, app.names.coordination, framed(delayed, schema_id))
    table, coordinator = streams_of(app, tmp_path)
    with pytest.raises(RegistryNeeded, match="JOBLEDGER_SCHEMA_REGISTRY"):
        table.run(threading.Event())
    with pytest.raises(RegistryNeeded, match=r"coordination\[0\]@0: .*JOBLEDGER_SCHEMA_REGISTRY"):
        asyncio.run(supervise(coordinator, threading.Event()))
    assert raw_of(app, app.names.dead_letter) == []
    with working(registered), streaming(registered, tmp_path) as table:
        until(lambda: delayed.job_id in closings(registered))
        until(table.caught_up)
    assert verify(app.names, registered.settings, ["default"], f"sqlite:///{tmp_path / 'status.db'}").equal
    app.close()
    registered.close()


# -- domain events ----------------------------------------------------------------------------------------------------


class Paid(msgspec.Struct, frozen=True):
    order: str
    cents: int = 0


class Weighed(msgspec.Struct, frozen=True):
    parcel: str
    grams: int = 0


def with_events(namespace: str, broker: str, url: str | None, *, avro: bool = True) -> tuple[App, list[Any]]:
    """Create an app with its own event and an event of another system. Return the app, and a list of the events that
    its handlers get."""
    app = App(namespace, settings=Settings(bootstrap=broker, schema_registry=url), partitions=2)
    ran: list[Any] = []
    app.event(Paid)

    @app.on(Paid)
    async def book(event: Paid) -> None:
        ran.append(event)

    if avro:
        app.event(topic=f"{namespace}-scales", format="avro", start="earliest")(Weighed)

        @app.on(Weighed)
        async def ship(event: Weighed) -> None:
            ran.append(event)

    return app, ran


def test_domain_events_are_framed_too_and_read_without_the_registry(
    broker: str, registry_url: str, namespace: str, api: httpx2.Client
) -> None:
    """Events are emitted with and without a registry. A router without a registry handles all of them."""
    app, ran = with_events(namespace, broker, None, avro=False)
    ensure(app, app.settings)
    with_it, _ = with_events(namespace, broker, registry_url, avro=False)
    app.emit(Paid("plain", 1))
    with_it.emit(Paid("framed", 2))
    with_it.emit_many([Paid("framed", 3)])
    app.emit(Paid("plain", 4))
    topic = app.events["Paid"].topic
    assert Counter(value[:1] for value in raw_of(app, topic)) == {b"\xc3": 2, b"\0": 2}
    (version,) = api.get(f"subjects/{topic}-value/versions").json()
    text = api.get(f"subjects/{topic}-value/versions/{version}").json()["schema"]
    assert {f["name"] for f in json.loads(text)["fields"]} == {"order", "cents"}
    produce(app, topic, b"\0garbage with a zero byte", b"\0\0\0\x7f\xff")
    with working(app), routing(app) as router:
        until(lambda: len(ran) == 4)
        until(lambda: router.rejected == 2)
    assert sorted(event.cents for event in ran) == [1, 2, 3, 4]
    app.close()
    with_it.close()


def test_avro_of_other_systems_is_read_with_its_own_schema(
    broker: str, registry_url: str, namespace: str, api: httpx2.Client
) -> None:
    """Another program's record has another name, one more field and one field less. Without the setting, the router
    refuses to start."""
    app, ran = with_events(namespace, broker, registry_url)
    client = admin(app.settings)
    topic = f"{namespace}-scales"
    client.create_topics([NewTopic(topic, 1, 1)])[topic].result(timeout=20)
    ensure(app, app.settings)
    theirs = {
        "type": "record", "name": "ScaleReading", "namespace": "warehouse",
        "fields": [{"name": "scale", "type": "string"}, {"name": "parcel", "type": "string"}],
    }  # fmt: skip
    answer = api.post(f"subjects/{topic}-value/versions", json={"schema": json.dumps(theirs)}).json()
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(theirs), {"scale": "s1", "parcel": "p-7"})
    produce(app, topic, b"\0" + answer["id"].to_bytes(4, "big") + out.getvalue())
    with working(app), routing(app):
        until(lambda: ran == [Weighed("p-7", 0)])
    app.close()
    lost, _ = with_events(namespace, broker, None)
    with pytest.raises(ConfigError, match="JOBLEDGER_SCHEMA_REGISTRY"):
        Router(lost.registry, lost.settings)
