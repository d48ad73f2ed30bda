"""Measures domain events: how fast they are emitted and routed, how fast a bare loop of the same run is, how soon a
handler starts, and how fast a projection is.

The bare loop is the smallest program that could be called a router: it reads and writes one Avro record for each event,
without ids, acknowledgements and commits.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import fastavro
import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.cimpl import NewTopic
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from bench import harness
from bench.endtoend import PARTITIONS, Processes
from bench.harness import Figure
from jobledger import App
from jobledger.config import Settings
from jobledger.consumers.router.router import Router
from jobledger.definitions.event_types import EventType
from jobledger.kafka.clients import admin, consumer_config, partitions_of, producer_config
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import JobSucceeded
from jobledger.streams.projections.projection_store import ProjectionStore

#: Events that are emitted per second while the time until their handler starts is measured.
PACE = 200


def run(settings: Settings, events: int, latencies: int) -> list[Figure]:
    """Measure all figures of domain events."""
    names = harness.fresh_names("events")
    os.environ.update(BENCH_NAMESPACE=names.namespace, BENCH_PARTITIONS=str(PARTITIONS))
    from bench import apps  # its namespace comes from the environment

    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    app.event(apps.Emitted)
    app.on(apps.Emitted, queue="bench", name="handle")(apps.handle.fn)
    ensure(app, settings)
    bare_topic = f"{names.namespace}.bare"
    client = admin(settings)
    client.create_topics([NewTopic(bare_topic, PARTITIONS, 1)])[bare_topic].result(timeout=20)
    try:
        began = time.perf_counter()
        app.emit_many(apps.Emitted(n) for n in range(events))
        emitted = events / (time.perf_counter() - began)
        bare = _bare(settings, app.events["Emitted"], bare_topic, events)
        routed = _routed(app, events)
        waits = _waits(settings, app, apps.Emitted, latencies)
    finally:
        app.close()
        harness.drop(settings, names)
    how = f"{events:,} events with one handler each, until acknowledged"
    return [
        Figure("emit_many", emitted, "events/s", None, True, None, f"{events:,} events"),
        Figure("router, one process", routed, "events/s", 10_000, True, bare, how),
        Figure(
            "emit → handler p50", harness.percentile(waits, 0.5), "ms", 10.0, False, None, f"{PACE} events a second"
        ),
        Figure(
            "emit → handler p99", harness.percentile(waits, 0.99), "ms", None, False, None, f"{PACE} events a second"
        ),
    ]


def _routed(app: App, events: int) -> float:
    """Return the events per second, measured from the acknowledgement of the first batch of jobs to that of the
    last."""
    router, stop = Router(app.registry, app.settings), threading.Event()
    thread = threading.Thread(target=router.run, args=(stop,))
    thread.start()
    try:
        while not router.jobs:
            time.sleep(0.001)
        began, before = time.perf_counter(), router.jobs
        while router.jobs < events:
            if not thread.is_alive():
                raise RuntimeError("the router ended")
            time.sleep(0.005)
        return (events - before) / (time.perf_counter() - began)
    finally:
        stop.set()
        thread.join()


def _bare(settings: Settings, kind: EventType, topic: str, events: int) -> float:
    """Run the bare loop, which does the least that a router could do. Return the events per second."""
    schema = fastavro.parse_schema(json.loads(kind.schema))
    consumer = Consumer(consumer_config(settings))
    parts = range(partitions_of(settings, kind.topic))
    consumer.assign([TopicPartition(kind.topic, p, 0) for p in parts])
    producer = Producer(producer_config(settings, linger_ms=1))
    done, began = 0, 0.0
    while done < events:
        for message in consumer.consume(1000, 0.05):
            began = began or time.perf_counter()
            plain = fastavro.schemaless_reader(io.BytesIO((message.value() or b"")[10:]), schema, None)
            out = io.BytesIO()
            fastavro.schemaless_writer(out, schema, plain)
            producer.produce(topic, out.getvalue(), b"%d" % done)
            done += 1
        producer.poll(0)
    producer.flush(30)
    took = time.perf_counter() - began
    consumer.close()
    return events / took


def _waits(settings: Settings, app: App, event: type, count: int) -> Sequence[float]:
    """Return the milliseconds from just before `emit` to the handler's first line. Router and worker are separate
    processes."""
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, app.names.namespace, Path(folder))
        try:
            processes.start("worker", "worker", "bench.apps:app")
            processes.start("router", "router", "bench.apps:app")
            ids = set()
            before = _results(app)
            warm = app.emit(event(time.time_ns()))
            deadline = time.monotonic() + 60
            wanted = app.registry.handler("handle").job_id(warm.event_id)
            while wanted not in _results(app):  # the backlog of the earlier figures is run first
                processes.check()
                if time.monotonic() > deadline:
                    raise RuntimeError("no event was handled within 60 s")
                time.sleep(0.2)
            for _ in range(count):
                handle = app.emit(event(time.time_ns()))
                ids.add(app.registry.handler("handle").job_id(handle.event_id))
                time.sleep(1 / PACE)
            while not ids <= (found := _results(app)).keys():
                processes.check()
                time.sleep(0.2)
        finally:
            processes.stop()
    assert not ids & before.keys()
    return [found[job_id] for job_id in ids]


def _results(app: App) -> dict[str, float]:
    """Return the results of the handlers, by job id."""
    read = decoder(app.settings, app.names)
    found: dict[str, float] = {}
    with LogReader(app.settings) as reader:
        for partition in range(partitions_of(app.settings, app.names.lifecycle)):
            for message in reader.read(app.names.lifecycle, partition, 0):
                event = recorded(message, read.decode).event
                if isinstance(event.fact, JobSucceeded) and event.fact.result is not None:
                    found[event.job_id] = msgspec.json.decode(event.fact.result)
    return found


def projection(settings: Settings, events: int) -> list[Figure]:
    """Run a projection in a process of its own over a log of events. Return its speed and how much its resident memory
    varied."""
    names = harness.fresh_names("projection")
    os.environ.update(BENCH_NAMESPACE=names.namespace, BENCH_PARTITIONS=str(PARTITIONS))
    from bench import apps  # its namespace comes from the environment

    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    app.event(apps.Emitted)
    ensure(app, settings)
    samples: list[float] = []
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder))
        try:
            for first in range(0, events, 100_000):
                app.emit_many(apps.Emitted(n) for n in range(first, min(events, first + 100_000)))
            process = processes.start("projection", "projections", "run", "bench.apps:app")
            store = ProjectionStore(processes.env["JOBLEDGER_STATUS_URL"], names.namespace)
            began, before, done = 0.0, 0, 0
            while done < events:
                time.sleep(0.25)
                processes.check()
                done = _folded(store.engine)
                if done and not began:
                    began, before = time.perf_counter(), done
                if done > events / 10:
                    samples.append(process.memory_info().rss / 2**20)
            took = time.perf_counter() - began
            store.close()
        finally:
            processes.stop()
            app.close()
            harness.drop(settings, names)
    median = harness.percentile(samples, 0.5)
    spread = max(max(samples) - median, median - min(samples)) / median * 100
    how = f"{events:,} events into 1,000 rows, SQLite, offsets in the same transactions"
    return [
        Figure("projection", (events - before) / took, "events/s", 40_000, True, None, how),
        Figure(
            "projection's memory spread", spread, "%", 10.0, False, None, f"± around {median:.0f} MiB, after a tenth"
        ),
    ]


def _folded(engine: Engine) -> int:
    try:
        with engine.connect() as db:
            return int(db.execute(text("SELECT COALESCE(SUM(next_offset), 0) FROM jobledger_projections")).scalar_one())
    except OperationalError:  # the table does not exist yet
        return 0
