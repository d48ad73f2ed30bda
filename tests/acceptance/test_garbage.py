"""Poison on every topic while good jobs run: no job is lost, nothing is blocked, and all poison is kept and counted.

There is one deliberate exception: an unknown fact that must be acted on stops its partition until the process is
upgraded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fastavro
import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from tests.acceptance import independent
from tests.acceptance.chaos_app import Fate, fate
from tests.acceptance.fleet import TARGET, Fleet, FleetError
from tests.acceptance.promises import Promise
from tests.acceptance.rawlog import SCHEMA_FILE, SINGLE_OBJECT, plain
from tests.acceptance.test_survival import Service, counts, judge, start_parts, wait_until_ended

pytestmark = pytest.mark.kafka

UPGRADED = "tests/acceptance/upgraded_app.py:app"
PARTITIONS = 4
GOOD_JOBS = 500
SEED = "garbage"
BIG_KEY = b"k" * (900 << 10)
DOMAIN_SCHEMA = json.dumps(
    {"type": "record", "name": "shop.OrderPlaced", "fields": [{"name": "order", "type": "string"}]}
)
HOUR_MS = 3_600_000


def future_schema() -> str:
    """Return the schema as a later version may have it: with a new header field, a new field of a fact, and a new fact."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    fact = next(f for f in schema["fields"] if f["name"] == "fact")
    submitted = next(r for r in fact["type"] if r["name"] == "JobSubmitted")
    submitted["fields"].append({"name": "note", "type": "string", "default": ""})
    unlocked = [{"name": "spec", "type": "JobSpec"}, {"name": "due_at", "type": "long"}]
    fact["type"].append({"type": "record", "name": "JobUnlocked", "fields": unlocked})
    schema["fields"].insert(0, {"name": "tenant", "type": ["null", "string"], "default": None})
    return json.dumps(schema)


class Poison:
    """Writes records to the topics of a namespace that Jobledger would not write. ``placed``: the positions of the
    unreadable records."""

    def __init__(self, bootstrap: str, namespace: str) -> None:
        self.namespace = namespace
        self._producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})
        self.placed: dict[tuple[str, int, int], bytes | None] = {}
        self._text = future_schema()
        self._future = fastavro.parse_schema(plain(json.loads(self._text)))
        self._own = fastavro.parse_schema(plain(json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))))

    def put(
        self, topic: str, value: bytes | None, key: bytes | None = None, partition: int = 0
    ) -> tuple[str, int, int]:
        """Write a record, wait for its acknowledgement, and return its position."""
        found: list[tuple[KafkaError | None, Message]] = []
        full = f"{self.namespace}.{topic}"
        self._producer.produce(
            full, value, key, partition=partition, on_delivery=lambda error, message: found.append((error, message))
        )
        self._producer.flush(30)
        error, message = found[0]
        assert error is None, error
        return full, partition, message.offset() or 0

    def garbage(self, topic: str, partition: int, *, keyed: bool = False) -> None:
        """Write one record of each kind of bytes that are no event."""
        good = self.event("JobSubmitted", self.body(), future=False, job=str(uuid.uuid4()))
        unknown = SINGLE_OBJECT + os.urandom(8) + good[10:]
        values = [
            None,
            b"",
            b"\x00\xff garbage",
            b'{"fact": "JobSubmitted"}',
            good[:2],
            good[:9],
            good[: len(good) // 2],
            good[:-1],
            good[:10] + b"\xff" * 40,
            unknown,
            b"\x00\x00\x00\x00\x07" + good[:9:-1],  # the frame of a registry without an event
            os.urandom(2_000),
            self.domain_event(),  # an event on the wrong topic
        ]
        for n, value in enumerate(values):
            # Compacted topics accept no record without a key.
            key = f"garbage-{n}".encode() if keyed else (None, b"\xff\xfe", b"")[n % 3]
            self.placed[self.put(topic, value, key, partition)] = value
        small = b"a key larger than any dead letter's room for it"
        self.placed[self.put(topic, small, BIG_KEY, partition)] = small

    def publish(self) -> None:
        """Publish the later schema, as its writers do before they use it."""
        self._publish(self._text)

    def publish_domain(self) -> None:
        """Publish the schema of the domain event."""
        self._publish(DOMAIN_SCHEMA)

    def _publish(self, text: str) -> None:
        self.put("schemas", text.encode(), independent.fingerprint(text).hex().encode())

    def domain_event(self) -> bytes:
        """Encode a domain event by hand. Its schema is published, but is no schema of job events."""
        out = io.BytesIO()
        fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(DOMAIN_SCHEMA)), {"order": "7"})
        return SINGLE_OBJECT + independent.fingerprint(DOMAIN_SCHEMA) + out.getvalue()

    def body(self, number: int = 0, **more: Any) -> dict[str, Any]:
        """Return the submission of the job with this number."""
        spec: dict[str, Any] = {"args": json.dumps({"number": number}).encode(), "tags": {}, "parent": None}
        return {"spec": spec, "delay_ms": None, "due_at": None, **more}

    def event(self, fact: str, body: dict[str, Any], *, future: bool = True, **head: Any) -> bytes:
        """Encode an event by hand."""
        job = head.pop("job")
        datum = {
            "event_id": str(uuid.uuid4()),
            "job_id": job,
            "run": 1,
            "attempt": 1,
            "release": 1,
            "occurred_at": time.time_ns() // 1000,
            "task": "quick",
            "queue": "default",
            "key": None,
            "home": None,
            "source": "poison",
            "trace": None,
            **head,
            "fact": (f"jobledger.{fact}", body),
        }
        out = io.BytesIO()
        fastavro.schemaless_writer(out, self._future if future else self._own, datum)
        text = self._text if future else SCHEMA_FILE.read_text(encoding="utf-8")
        return SINGLE_OBJECT + independent.fingerprint(text) + out.getvalue()


def good_number(steps: tuple[str, ...]) -> int:
    """Return the number of a job of the task `quick` with these steps."""

    def fits(life: Fate) -> bool:
        return life.kind == "quick" and life.steps == steps

    return next(n for n in range(10_000, 100_000) if fits(fate(n, SEED)))


def committed(fleet: Fleet, group: str, topic: str, partition: int) -> int:
    """Return the offset that a group has committed; -1001: none."""
    consumer = Consumer({"bootstrap.servers": fleet.bootstrap, "group.id": f"{fleet.namespace}.{group}"})
    try:
        found = consumer.committed([TopicPartition(f"{fleet.namespace}.{topic}", partition)], timeout=20)
        return found[0].offset
    finally:
        consumer.close()


def rejected(log: independent.Log) -> dict[tuple[str, int, int], bytes | None]:
    """Return the unreadable records in the dead letters, by the position where they were found."""
    return {
        (r.body["topic"], r.body["partition"], r.body["offset"]): r.body["raw_value"]
        for r in log.of("dead-letter")
        if r.fact == "RecordRejected"
    }


def test_garbage_on_every_topic_is_dead_lettered_and_good_jobs_continue(
    broker: str, namespace: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """There are fourteen kinds of bytes that are no event, on every partition of every topic, before and while 500 jobs
    run. Those on topics that must be acted on are in the dead letters, with their bytes and positions. Every job ends
    as expected, events of a published later schema are read, and the table agrees with the log."""
    began = time.monotonic()
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, broker, namespace, seed=SEED))
        start_parts(fleet)
        poison = Poison(broker, namespace)
        acted_on = [(t, p) for t in ("jobs.default", "lifecycle", "coordination") for p in range(PARTITIONS)]

        def spoil() -> None:
            for topic, partition in acted_on:
                poison.garbage(topic, partition)
            for partition in range(PARTITIONS):
                poison.garbage("dead-letter", partition)
            for topic in ("control", "schemas"):
                poison.garbage(topic, 0, keyed=True)

        poison.publish_domain()
        spoil()
        start_parts(fleet, worker=2, coordinator=1, materializer=1)
        service = Service(fleet, 0, GOOD_JOBS, rate=GOOD_JOBS / 10)
        stack.callback(service.close)
        fleet.until(lambda: counts(fleet)[0] >= GOOD_JOBS // 10, 60.0, "the first jobs ended in spite of garbage")
        spoil()

        # Records of a later version: jobs that this version can run, and unknown facts on topics where no part must act
        # on them.
        poison.publish()
        plain_number, delayed_number = good_number(("ok",)), good_number(("error", "ok"))
        later = {str(uuid.uuid4()): n for n in (plain_number, delayed_number)}
        first, second = later
        poison.put("jobs.default", poison.event("JobSubmitted", poison.body(plain_number, note="new"), job=first))
        delayed = poison.event(
            "JobSubmitted", poison.body(delayed_number, delay_ms=300, note="new"), job=second, release=0, home=second
        )
        poison.put("coordination", delayed, second.encode(), partition=1)
        for topic in ("lifecycle", "dead-letter", "control"):
            unlocked = poison.event("JobUnlocked", {"spec": poison.body()["spec"], "due_at": 1}, job=str(uuid.uuid4()))
            poison.put(topic, unlocked, b"future")
        # A valid event on the wrong topic.
        lost = poison.event(
            "JobStarted", {"worker": "w", "work_topic": "t", "work_offset": 0, "takeover": 0}, job=first
        )
        misplaced = poison.put("jobs.default", lost, partition=2)

        wait_until_ended(fleet, service, 60.0)
        fleet.until(lambda: set(later) <= ended_jobs(fleet), 30.0, "the later version's jobs ended")
        short = {f"{namespace}.{t}" for t, _ in acted_on}
        wanted = {place: raw for place, raw in poison.placed.items() if place[0] in short}
        # Wait also for unreadable records after the last good record of a partition. The checks below report missing
        # ones.
        with contextlib.suppress(FleetError):
            fleet.until(
                lambda: wanted.keys() <= rejected(independent.read(broker, namespace)).keys(),
                30.0,
                "what is unreadable is in the dead letters",
            )
        log, audit = judge(fleet, service, seed=SEED)

        kept = rejected(log)
        keys = [r.body["raw_key"] for r in log.of("dead-letter") if r.fact == "RecordRejected"]
        Promise.POISON_IS_CONTAINED.hold(
            {p: r for p, r in kept.items() if p != misplaced} == wanted,
            f"missing {sorted(set(wanted) - set(kept))[:5]}, too many {sorted(set(kept) - set(wanted))[:5]}",
        )
        cut = [key for key in keys if key is not None and len(key) > 1_000]
        Promise.POISON_IS_CONTAINED.hold(
            len(cut) == 2 * len(acted_on) and all(BIG_KEY.startswith(key) for key in cut), "large keys are kept in part"
        )
        Promise.POISON_IS_CONTAINED.hold(misplaced in kept, "an event that does not belong on a work topic is kept")
        Promise.POISON_IS_CONTAINED.hold(not fleet.deaths, f"processes ended by themselves: {fleet.deaths}")
        say(
            f"garbage: {len(poison.placed)} unreadable records on {len({p[:2] for p in poison.placed})} partitions, "
            f"{len(kept)} kept in the dead letters; {counts(fleet)[0]} jobs ended in "
            f"{time.monotonic() - began:.0f} s; within the limits: {dict(audit.noted)}"
        )


def ended_jobs(fleet: Fleet) -> set[str]:
    """Return the ids of jobs that have ended according to the status table."""
    return {job for job, final in independent.table(fleet.status).items() if final.state in independent.ENDED}


@pytest.mark.extended
def test_an_unknown_fact_stops_its_partition_until_the_worker_is_upgraded(
    broker: str, namespace: str, tmp_path: Path
) -> None:
    """A fact on a work topic that this worker does not know is not skipped, by this worker or by the next ones. The
    worker says that it must be upgraded, the other partitions continue, and an upgraded worker loses nothing."""
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, broker, namespace, seed=SEED))
        start_parts(fleet, worker=1, coordinator=1, materializer=1)
        poison = Poison(broker, namespace)
        poison.publish()
        job = str(uuid.uuid4())
        number = good_number(("ok",))
        waits = poison.event("JobSubmitted", poison.body(number, delay_ms=HOUR_MS), job=job, release=0, home=job)
        poison.put("coordination", waits, job.encode())
        unlocked = {"spec": poison.body(number)["spec"], "due_at": time.time_ns() // 1000}
        where = poison.put("jobs.default", poison.event("JobUnlocked", unlocked, job=job, home=job), job.encode())
        worker = fleet.of("worker")[0]
        fleet.until(lambda: "upgrade this worker" in worker.output(), 30.0, "the worker says that it must be upgraded")

        service = Service(fleet, 0, 100, rate=200)
        stack.callback(service.close)
        fleet.until(service.done, 60.0, "the service submitted everything")

        def others_ended() -> bool:
            """Return whether the jobs that do not wait behind the unknown fact have ended. Raises an error if the fact
            was skipped."""
            log = independent.read(broker, namespace)
            executions = independent.read_executions(fleet.executions)
            behind = {r.head["job_id"] for r in log.work() if r.partition == where[1] and r.offset >= where[2]}
            open_jobs = {j for j, f in independent.fold(log.records).items() if f.state not in independent.ENDED}
            found = independent.audit(log, executions=executions)
            ran = job in {e.job_id for e in executions}
            Promise.POISON_IS_CONTAINED.hold(not ran, "the job was run by a worker that does not know how")
            at = log.committed.get(where[:2], 0)
            Promise.POISON_IS_CONTAINED.hold(at <= where[2], f"offset {where[2]} was passed: {at} is committed")
            passed = [kind for kind in found.counts if kind.startswith(("committed-", "unreadable-"))]
            Promise.NOTHING_PASSED_OVER.hold(not passed, found)
            return len(behind) > 1 and open_jobs <= behind

        fleet.until(others_ended, 60.0, "the jobs of the other partitions ended")
        # Neither a crash nor a restart may skip the fact.
        fleet.kill(worker)
        said = worker.output().count("upgrade this worker")
        fleet.tend()
        fleet.until(lambda: worker.output().count("upgrade this worker") > said, 40.0, "it says so after a kill -9")
        others_ended()
        said = worker.output().count("upgrade this worker")
        fleet.stop(worker)
        fleet.restart(worker)
        fleet.until(lambda: worker.output().count("upgrade this worker") > said, 40.0, "it says so after a restart")
        others_ended()

        fleet.stop(worker)
        fleet.start("worker", "--concurrency", "50", target=UPGRADED)
        wait_until_ended(fleet, service, 60.0)
        fleet.until(lambda: job in ended_jobs(fleet), 30.0, "the job from the future ended")
        log, _ = judge(fleet, service, seed=SEED)
        assert independent.fold(log.records)[job].state == "succeeded"


@pytest.mark.extended
def test_an_unknown_fact_stops_the_coordinator_until_it_is_upgraded(
    broker: str, namespace: str, tmp_path: Path
) -> None:
    """A fact on the coordination topic that this coordinator does not know ends it with an error, again and again, and
    is never skipped. Plain jobs run meanwhile, and an upgraded coordinator releases the jobs behind the fact."""
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, broker, namespace, seed=SEED))
        start_parts(fleet, worker=1, coordinator=1, materializer=1)
        poison = Poison(broker, namespace)
        poison.publish()
        job, plain_job = str(uuid.uuid4()), str(uuid.uuid4())
        unlocked = poison.event("JobUnlocked", {"spec": poison.body()["spec"], "due_at": 1}, job=str(uuid.uuid4()))
        where = poison.put("coordination", unlocked, job.encode(), partition=3)
        number = good_number(("ok",))
        waits = poison.event("JobSubmitted", poison.body(number, delay_ms=0), job=job, release=0, home=job)
        poison.put("coordination", waits, job.encode(), partition=3)
        coordinator = fleet.of("coordinator")[0]
        fleet.until(lambda: len(fleet.deaths) >= 2, 60.0, "the coordinator ends, and ends again")
        Promise.POISON_IS_CONTAINED.hold(
            "upgrade this coordinator" in coordinator.output(), f"what it says:\n{coordinator.tail()}"
        )
        Promise.POISON_IS_CONTAINED.hold(all(code != 0 for _, code in fleet.deaths), f"exit codes {fleet.deaths}")
        poison.put("jobs.default", poison.event("JobSubmitted", poison.body(number), job=plain_job), b"k")
        fleet.until(lambda: plain_job in ended_jobs(fleet), 30.0, "a plain job ended meanwhile")
        passed = committed(fleet, "coordinator", "coordination", 3)
        Promise.POISON_IS_CONTAINED.hold(passed <= where[2], f"offset {where[2]} was passed: {passed}")
        assert independent.fold(independent.read(broker, namespace).records)[job].state == "scheduled"

        coordinator.wanted = False
        fleet.kill(coordinator)
        fleet.start("coordinator", target=UPGRADED)
        fleet.until(lambda: job in ended_jobs(fleet), 40.0, "the job that waited behind it ended")
        code, report, errors = fleet.run("verify", TARGET)
        Promise.STATUS_CONVERGES.hold(code == 0 and report["equal"] is True, f"{code} {report} {errors[-2000:]}")
