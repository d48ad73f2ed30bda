"""Does by hand what docs/wire.md describes: what a program with the schema, an Avro library and a Kafka client can do."""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import fastavro.schema
import pytest
from confluent_kafka import Producer

from jobledger import App, Queue, Settings
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobCancelledFact, JobSucceeded
from tests.integration.worker_app import closings, log_of, until, working

pytestmark = pytest.mark.kafka

SCHEMA = (Path(__file__).resolve().parents[2] / "schemas" / "job_event.avsc").read_text("utf-8")


class Stranger:
    """Writes records as docs/wire.md says, without code of Jobledger."""

    def __init__(self, broker: str, namespace: str) -> None:
        self._namespace = namespace
        canonical = fastavro.schema.to_parsing_canonical_form(json.loads(SCHEMA))
        fingerprint = bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
        self._head, self._parsed = b"\xc3\x01" + fingerprint, fastavro.parse_schema(json.loads(SCHEMA))
        self._producer = Producer({"bootstrap.servers": broker, "partitioner": "murmur2_random", "acks": "all"})
        self.send("schemas", fingerprint.hex(), SCHEMA.encode())

    def send(self, topic: str, key: str, value: bytes | None) -> None:
        """Write one record, and wait for its acknowledgement."""
        self._producer.produce(f"{self._namespace}.{topic}", value, key)
        self._producer.flush()

    def event(self, name: str, fact: dict[str, Any], **fields: Any) -> bytes:
        """Encode an event."""
        plain = {
            "event_id": str(uuid.uuid4()),
            "job_id": "",
            "run": 0,
            "attempt": 0,
            "release": 0,
            "occurred_at": time.time_ns() // 1000,
            "task": "",
            "queue": "",
            "key": None,
            "home": None,
            "source": "stranger",
            "trace": None,
            **fields,
            "fact": (f"jobledger.{name}", fact),
        }
        datum = io.BytesIO()
        fastavro.schemaless_writer(datum, self._parsed, plain)
        return self._head + datum.getvalue()

    def job(self, task: str, queue: str, args: dict[str, Any], priority: str | None = None, **fields: Any) -> bytes:
        """Encode a submission."""
        fields = {"event_id": fields["job_id"], "run": 1, "attempt": 1, "release": 1, **fields}
        spec: dict[str, Any] = {"args": json.dumps(args).encode(), "tags": {}, "parent": None, "priority": priority}
        return self.event(
            "JobSubmitted", {"spec": spec, "delay_ms": None, "due_at": None}, task=task, queue=queue, **fields
        )

    def close(self) -> None:
        """Close the connection."""
        self._producer.close()


Ran = list[tuple[str, int]]


@pytest.fixture
def lab(broker: str, namespace: str) -> Iterator[tuple[App, Stranger, Ran, threading.Event]]:
    """Yield an app with a keyed task and a queue with priorities, a writer, a list of what the tasks ran, and a gate
    for which jobs can wait."""
    app = App(
        namespace,
        settings=Settings(bootstrap=broker),
        partitions=3,
        queues=[Queue("book"), Queue("mail", priorities=True)],
    )
    ran: Ran = []
    gate = threading.Event()

    @app.task(queue="book", key="account", timeout=30)
    async def book(account: str, amount: int) -> None:
        ran.append((account, amount))

    @app.task(queue="mail")
    def send(to: str, number: int = 0, wait: bool = False) -> None:
        ran.append((to, number))
        if wait:
            gate.wait(30)

    ensure(app, app.settings)
    made = Stranger(broker, namespace)
    yield app, made, ran, gate
    gate.set()
    made.close()
    app.close()


def test_keyed_jobs_and_priorities_of_another_program_run(
    lab: tuple[App, Stranger, Ran, threading.Event], say: Callable[[str], None]
) -> None:
    """Jobs of one key are in the same partition as those of Jobledger's client, and run in order. Each priority has its
    own topic, and its jobs run."""
    app, stranger, ran, _ = lab
    ours = [app.tasks["book"].submit(f"a-{n}", -1) for n in range(5)]
    ids = [str(uuid.uuid4()) for _ in range(55)]
    for n in range(50):
        account = f"a-{n % 5}"
        value = stranger.job("book", "book", {"account": account, "amount": n}, job_id=ids[n], key=account)
        stranger.send("jobs.book", account, value)
    for n, (level, priority) in enumerate(
        [(".high", "high"), ("", None), (".low", "low"), (".low", "low"), ("", None)]
    ):
        value = stranger.job("send", "mail", {"to": f"p{n}"}, priority, job_id=ids[50 + n])
        stranger.send(f"jobs.mail{level}", ids[50 + n], value)
    with working(app):
        until(lambda: len(ran) == 60)
        until(lambda: len(closings(app)) == 60)
    for n in range(5):
        assert [amount for account, amount in ran if account == f"a-{n}"] == [-1, *range(n, 50, 5)]
    at = {r.event.job_id: r.position.partition for r in log_of(app, app.names.jobs("book"))}
    assert all(at[ids[n]] == ours[n % 5].position.partition for n in range(50))
    assert [len(log_of(app, app.names.jobs(f"mail{level}"))) for level in (".high", "", ".low")] == [1, 2, 2]
    assert all(isinstance(ends[0].event.fact, JobSucceeded) for ends in closings(app).values())
    say("wire: keyed jobs, priorities and orders by a program that has docs/wire.md only")


def test_control_commands_of_another_program_are_in_force(lab: tuple[App, Stranger, Ran, threading.Event]) -> None:
    """A pause stops a task or a queue until the resume. A limit is in force. A cancel ends a waiting job."""
    app, stranger, ran, _ = lab
    pause = stranger.event("QueuePaused", {"by": "stranger", "reason": "maintenance"}, task="send")
    stranger.send("control", "pause:task:send", pause)
    stranger.send(
        "control", "pause:queue:book", stranger.event("QueuePaused", {"by": "s", "reason": None}, queue="book")
    )
    limit = stranger.event(
        "QueueLimited", {"rate": 100.0, "concurrency": None, "by": "stranger", "reason": None}, queue="mail"
    )
    stranger.send("control", "limit:queue:mail", limit)
    standing = {(s.kind, s.name): s for s in app.commands.standing()}
    assert standing["task", "send"].paused == "by stranger: maintenance"
    limits = standing["queue", "mail"].limits
    assert limits is not None
    assert (limits.rate, limits.concurrency) == (100.0, None)
    waiting, kept = app.tasks["send"].submit("x", 1), app.tasks["send"].submit("y", 2)
    booked = app.tasks["book"].submit("a", 3)
    with working(app):
        cancel = stranger.event("CancelRequested", {"by": "stranger", "reason": "no"}, job_id=waiting.job_id, run=1)
        stranger.send("control", f"cancel:{waiting.job_id}:1", cancel)
        stranger.send("coordination", waiting.job_id, cancel)
        until(lambda: waiting.job_id in closings(app))
        (end,) = closings(app)[waiting.job_id]
        assert end.event.fact == JobCancelledFact("stranger", "no")
        assert ran == []
        resume = stranger.event("QueueResumed", {"by": "stranger", "reason": None}, task="send")
        stranger.send("control", "pause:task:send", resume)
        until(lambda: kept.job_id in closings(app))
        assert ran == [("y", 2)]
        resume = stranger.event("QueueResumed", {"by": "stranger", "reason": None}, queue="book")
        stranger.send("control", "pause:queue:book", resume)
        until(lambda: booked.job_id in closings(app))
        assert ran == [("y", 2), ("a", 3)]
