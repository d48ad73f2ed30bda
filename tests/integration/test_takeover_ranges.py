"""What a takeover reads: several ranges of partitions on one connection, and outcomes on every lifecycle partition."""

from __future__ import annotations

import time
import uuid

import pytest
from confluent_kafka import Message

from jobledger import App, Queue, Settings
from jobledger.consumers.partitions.range_reader import RangeReader
from jobledger.kafka import topics, topology
from jobledger.kafka.clients import admin
from jobledger.kafka.partitioner import partition_of
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topics import ensure
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from tests.integration.worker_app import log_of, until, working

pytestmark = pytest.mark.kafka

PARTITIONS = 4


def test_ranges_of_a_partition_can_be_read_again_on_the_same_connection(broker: str, namespace: str) -> None:
    """Ranges of the same partitions can be read one after the other. No record is missing at the place where an earlier
    range ended."""
    names, settings = Names(namespace), Settings(bootstrap=broker)
    wanted = topology.desired(names, {"mail": 2}, partitions=2, replication=1)
    client = admin(settings)
    topics.apply(client, topics.plan(client, wanted))
    writer = LogWriter(settings, None)
    writer.send(Outgoing(names.jobs("mail"), b"x", None, p) for p in (0, 1) for _ in range(20))
    writer.close()
    log = RangeReader(settings, lambda: False)
    began = time.monotonic()
    try:
        for ranges in ({0: (0, 7), 1: (3, 20)}, {0: (0, 20), 1: (0, 1)}, {1: (5, 20)}, {0: (7, 8)}):
            seen: dict[int, list[int]] = {}

            def take(message: Message, seen: dict[int, list[int]] = seen) -> None:
                seen.setdefault(message.partition() or 0, []).append(message.offset() or 0)

            log.read({(names.jobs("mail"), p): r for p, r in ranges.items()}, take)
            assert seen == {p: list(range(*r)) for p, r in ranges.items()}
    finally:
        log.close()
    assert time.monotonic() - began < 20, "a range was waited for until something else moved it"


def test_without_committed_offsets_jobs_with_an_outcome_are_not_run_again(broker: str, namespace: str) -> None:
    """The group has expired or was deleted. Outcomes of leased jobs are on the lifecycle partitions that follow from
    the jobs' ids, not on those of the work records. The takeover finds them there. Only the job without an outcome is
    leased again, and no retry is requested for a cancelled job."""
    settings = Settings(bootstrap=broker, submit_timeout=20.0)
    app = App(namespace, settings=settings, partitions=PARTITIONS, queues=[Queue("slow", partitions=1)])
    ran: list[str] = []

    @app.task(queue="slow", long=True, lease=5)
    async def crunch(name: str) -> None:
        ran.append(name)

    ensure(app, settings)
    names, writer = app.names, LogWriter(settings, app.names)

    def put(topic: str, job: str, fact: ev.Fact, release: int = 1, partition: int | None = 0) -> int:
        event = ev.JobEvent(
            str(uuid.uuid4()), job, 1, 1, release, now_us(), "crunch", "slow", None, None, "test", None, fact
        )
        return writer.send([Outgoing(topic, codec.encode(event), job, partition)])[0].partition

    spec = ev.JobSpec(b'{"name":"x"}')
    ended, lost, cancelled = ([str(uuid.uuid4()) for _ in range(8)] for _ in range(3))
    running = str(uuid.uuid4())
    for job in (*ended, *lost, *cancelled, running):
        put(names.jobs("slow"), job, ev.JobSubmitted(spec))
    places = set()
    for job in (*ended, *lost, running):
        put(names.lifecycle, job, ev.JobLeased("w", 5_000))
        put(names.lifecycle, job, ev.JobStarted("w", None, {}, names.jobs("slow"), 0))
    for job in ended:
        place = put(names.lifecycle, job, ev.JobSucceeded(), partition=None)
        assert place == partition_of(job.encode(), PARTITIONS)
        places.add(place)
    for job in lost:  # the lease ended, and the job succeeded at the second release
        put(names.jobs("slow"), job, ev.JobDue(spec, 1), 2)
        put(names.lifecycle, job, ev.JobLeased("w", 5_000), 2)
        put(names.lifecycle, job, ev.JobSucceeded(), 2, None)
    for job in cancelled:  # retried, and cancelled before the retry was due
        put(names.lifecycle, job, ev.JobRetried(ev.ErrorInfo("E", "m"), 60_000))
        put(names.lifecycle, job, ev.JobCancelledFact("me"), 2, None)
    writer.close()
    assert len(places) > 1, "eight ids on one of four partitions"

    with working(app) as worker:
        until(lambda: worker.health().get("found_closed") == 33, what="every record's end being found")
        until(lambda: all(p.offsets and not p.offsets.pending for p in worker.partitions()), what="everything done")
    assert ran == []
    asked = [(r.event.job_id, type(r.event.fact)) for r in log_of(app, names.coordination)]
    assert asked == [(running, ev.Leased)]
    app.close()
