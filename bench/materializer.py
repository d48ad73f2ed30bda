"""Measures how many events per second the materializer writes into the status table, with rows, counters, positions and
offsets, in SQLite and PostgreSQL; and a bare loop.

The input is a backlog of plain jobs: one third submissions on the work topic, one third starts and one third successes
on the lifecycle topic, with ids ordered by time. The PostgreSQL server is the one that `tests.postgres` finds, and is
not tuned. The bare loop uses librdkafka's consumer and the codec, and does nothing with the events.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import uuid_utils
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from bench import harness
from bench.harness import Figure
from jobledger.config import Settings
from jobledger.kafka.clients import consumer_config
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas.events import Fact, JobEvent, JobSpec, JobStarted, JobSubmitted, JobSucceeded
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_reader
from tests.postgres import NoPostgres, databases

PARTITIONS = 6
QUEUE = "mail"
ROUNDS = 3


def run(settings: Settings, jobs: int = 100_000) -> list[Figure]:
    """Measure the bare loop and the materializer alternately in three rounds over the same log, and use the best round
    of each. Then measure the time until a submission is visible."""
    figures: list[Figure] = []
    names = harness.fresh_names("table")
    harness.create(settings, names, [QUEUE], PARTITIONS)
    try:
        _fill(settings, names, jobs)
        figures += _measure("", settings, names, jobs, _sqlite)
        try:
            with databases(fsync=True) as server:
                print(f"  PostgreSQL: {server.what}", file=sys.stderr, flush=True)
                figures += _measure(" (PostgreSQL)", settings, names, jobs, server.database)
        except NoPostgres as why:
            print(f"  without PostgreSQL: {why}", file=sys.stderr, flush=True)
    finally:
        harness.drop(settings, names)
    return figures


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        yield f"sqlite:///{Path(folder) / 'status.db'}"


def _measure(
    which: str, settings: Settings, names: Names, jobs: int, place: Callable[[], AbstractContextManager[str]]
) -> list[Figure]:
    """Measure with one kind of database. ``place``: yields the URL of an empty database, for each round a new one."""
    bare = ours = 0.0
    bare_cpu = our_cpu = float("inf")
    for _ in range(ROUNDS):
        before = time.process_time()
        bare = max(bare, _bare(settings, names, 3 * jobs))
        between = time.process_time()
        with place() as url:
            ours = max(ours, _materialize(settings, names, jobs, url))
        bare_cpu, our_cpu = min(bare_cpu, between - before), min(our_cpu, time.process_time() - between)
    with place() as url:
        waits = _latency(settings, url)
    note = f"best of {ROUNDS}, {3 * jobs:,} events of {jobs:,} jobs; bare: consume + decode"
    return [
        Figure(f"materializer{which}", ours, "events/s", 40_000, True, bare, note),
        Figure(f"materializer{which}, CPU", our_cpu / jobs / 3 * 1e6, "µs/event", None, False, bare_cpu / jobs / 3 * 1e6, "all threads of the process, least of the rounds"),
        Figure(f"visible{which} p50", harness.percentile(waits, 0.5), "ms", None, False, None, "acknowledged → in the table, idle"),
        Figure(f"visible{which} p99", harness.percentile(waits, 0.99), "ms", None, False, None, "acknowledged → in the table, idle"),
    ]  # fmt: skip


def _event(job_id: str, fact: Fact) -> bytes:
    return codec.encode(
        JobEvent(
            str(uuid_utils.uuid7()), job_id, 1, 1, 1, now_us(), "send_mail", QUEUE, None, None, "worker@h:1", None, fact
        )
    )


def _fill(settings: Settings, names: Names, jobs: int) -> None:
    work, lifecycle = names.jobs(QUEUE), names.lifecycle
    writer = LogWriter(settings, names, linger_ms=5.0)
    spec = JobSpec(b'{"to":"user1@example.org","template":"welcome"}')
    try:
        for begin in range(0, jobs, 20_000):
            records = []
            for number in range(begin, min(jobs, begin + 20_000)):
                job_id, partition = str(uuid_utils.uuid7()), number % PARTITIONS
                started = JobStarted("host:4711", None, {}, work, number // PARTITIONS)
                records += [
                    Outgoing(work, _event(job_id, JobSubmitted(spec)), job_id, partition),
                    Outgoing(lifecycle, _event(job_id, started), job_id, partition),
                    Outgoing(lifecycle, _event(job_id, JobSucceeded(None, 1_234)), job_id, partition),
                ]
            writer.send(records)
    finally:
        writer.close()


def _bare(settings: Settings, names: Names, events: int) -> float:
    consumer = Consumer(consumer_config(settings))
    topics = (names.jobs(QUEUE), names.lifecycle)
    consumer.assign([TopicPartition(t, p, OFFSET_BEGINNING) for t in topics for p in range(PARTITIONS)])
    try:
        first = consumer.consume(1, 30.0)
        seen, began = len(first), time.perf_counter()
        while seen < events:
            for message in consumer.consume(4_000, 0.05):
                codec.decode(message.value())
                message.topic(), message.partition(), message.offset()
                seen += 1
        return events / (time.perf_counter() - began)
    finally:
        consumer.close()


def _materialize(settings: Settings, names: Names, jobs: int, url: str) -> float:
    made = Materializer(names, settings, [QUEUE], url)
    stop = threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    began = 0.0
    while made.position() < 3 * jobs and thread.is_alive():
        if not began and made.active:
            began = time.perf_counter()
        time.sleep(0.01)
    took = time.perf_counter() - began
    stop.set()
    thread.join()
    reader = open_reader(url, names.namespace)
    try:
        counts = reader.counts_by_state()
        assert counts["succeeded"] == jobs == sum(counts.values()), f"{jobs} jobs were written, the table has {counts}"
    finally:
        reader.close()
    return 3 * jobs / took


def _latency(settings: Settings, url: str, rounds: int = 100) -> list[float]:
    """Return the milliseconds from a submission's acknowledgement until the table contains the submission. Submissions
    are sent one at a time."""
    own = harness.fresh_names("seen")
    harness.create(settings, own, [QUEUE], PARTITIONS)
    made, stop = Materializer(own, settings, [QUEUE], url), threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    writer = LogWriter(settings, own)
    waits = []
    try:
        for number in range(rounds + 5):
            job_id = str(uuid_utils.uuid7())
            sent = writer.send([Outgoing(own.jobs(QUEUE), _event(job_id, JobSubmitted(JobSpec(b"{}"))), job_id)])[0]
            began = time.perf_counter()
            place = (sent.topic, sent.partition)
            while made.offsets().get(place, 0) <= sent.offset:
                time.sleep(0.0002)
            if number >= 5:  # the first submissions also wait for connections
                waits.append((time.perf_counter() - began) * 1000)
    finally:
        writer.close()
        stop.set()
        thread.join()
        harness.drop(settings, own)
    return waits
