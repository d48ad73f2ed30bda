"""`jobledger audit` on a real broker: the log of real processes has no fault, and every planted fault is found at its
position."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from jobledger.schemas import codec
from jobledger.schemas import events as ev
from tests.acceptance import rawlog
from tests.acceptance.fleet import Fleet

pytestmark = pytest.mark.kafka

APP = """\
from jobledger import App, Reject, Retry, current_job

app = App({namespace!r}, partitions=2)
TWICE = Retry(max_attempts=2, initial=0.2, jitter=False)


@app.task
async def add(a: int) -> int:
    return a + 1


@app.task(retry=TWICE)
async def fail(a: int) -> None:
    raise ValueError(str(a))


@app.task(retry=TWICE, queue="mail")
def flaky(a: int) -> int:
    if current_job().attempt == 1:
        raise ValueError("at first")
    return a


@app.task(key="account", timeout=20, retry=TWICE)
async def keyed(account: int) -> int:
    if current_job().attempt == 1:
        raise ValueError("in place")
    return account


@app.task(long=True, lease=60)
async def leased(a: int) -> int:
    if current_job().attempt == 1:
        raise ValueError("on a lease")
    return a


@app.task
async def refuse(a: int) -> None:
    raise Reject("no")
"""

SUBMIT = ["add a=1", "add a=2 --delay 1", "fail a=1", "flaky a=1", "keyed account=1", "leased a=1", "refuse a=1"]


@pytest.fixture
def fleet(broker: str, namespace: str, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace with its topics, and an app whose tasks end in every possible way."""
    app = tmp_path / f"audited_{namespace}.py"
    app.write_text(APP.format(namespace=namespace))
    with Fleet(tmp_path / "fleet", broker, namespace, target=f"{app}:app") as made:
        code, _, errors = made.run("topics", "apply", made.target, "--yes")
        assert code == 0, errors
        yield made


def audited(fleet: Fleet, *words: str, code: int = 0) -> dict[str, Any]:
    """Return the report of an audit that must exit with this code."""
    found, report, errors = fleet.run("audit", fleet.target, *words)
    assert found == code, (found, report, errors)
    return report or {}


def test_the_log_of_real_processes_has_no_fault_and_changes_to_the_table_are_found(fleet: Fleet) -> None:
    """Jobs succeed, are delayed, retried, retried in place, leased and rejected. The audit exits with 0, also while
    they run. A changed, a deleted and an added row of the table are three faults."""
    fleet.start("worker")
    fleet.start("streams")
    ids = [fleet.run("submit", fleet.target, *words.split())[1]["job_id"] for words in SUBMIT]
    open_then = audited(fleet, "--no-table")["open"]
    assert 0 <= open_then <= len(ids)

    def over() -> bool:
        lifecycle = rawlog.read(fleet.bootstrap, fleet.namespace).of("lifecycle")
        return {r.head["job_id"] for r in lifecycle if r.fact in ("JobSucceeded", "JobFailed")} == set(ids)

    # Only then are audits started, each of which is a process of its own.
    fleet.until(over, 60.0, "all jobs have an outcome in the log")

    def ended() -> bool:
        report = audited(fleet, "--no-table")
        return bool(report["jobs"] == len(ids) and report["open"] == 0)

    fleet.until(ended, 60.0, "all jobs ended")

    def compared() -> bool:
        report = audited(fleet, "--finished")
        return bool(report["rows"] == len(ids)) and "not-committed" not in report["notes"]

    fleet.until(compared, 60.0, "the table has read them all, and the workers have committed them all")
    for member in fleet.members:
        fleet.stop(member)
    report = audited(fleet, "--finished")
    assert report["clean"] is True
    assert report["faults"] == []
    assert (report["jobs"], report["rows"], report["open"]) == (len(ids), len(ids), 0)
    mail = audited(fleet, "--finished", "--queue", "mail")
    assert (mail["jobs"], mail["rows"]) == (1, 1)
    late = audited(fleet, "--finished", "--since", "0s")
    assert (late["jobs"], late["records"]) == (0, 0)

    with sqlite3.connect(fleet.status) as table:
        table.execute("UPDATE jobs SET state = 'failed' WHERE job_id = ?", (ids[0],))
        table.execute("DELETE FROM jobs WHERE job_id = ?", (ids[1],))
        columns = "state, task, queue, run, attempt, release, submitted_ms, slots"
        table.execute(
            f"INSERT INTO jobs (job_id, {columns}) SELECT 'nobody', {columns} FROM jobs WHERE job_id = ?", (ids[0],)
        )
    table.close()
    report = audited(fleet, "--finished", code=4)
    found = {
        fault["kind"]: [(each["job_id"], each["positions"]) for each in fault["first"]] for fault in report["faults"]
    }
    assert {kind: [job for job, _ in several] for kind, several in found.items()} == {
        "row-missing": [ids[1]],
        "row-differs": [ids[0]],
        "row-unknown": ["nobody"],
    }
    assert found["row-differs"][0][1][0].startswith(f"{fleet.namespace}.")
    assert audited(fleet, "--finished", "--no-table")["rows"] is None


class Planter:
    """Writes records to a namespace, as no part of Jobledger would write them."""

    def __init__(self, fleet: Fleet) -> None:
        self.namespace, self.bootstrap = fleet.namespace, fleet.bootstrap
        self._producer = Producer({"bootstrap.servers": fleet.bootstrap, "enable.idempotence": True})

    def close(self) -> None:
        """Close the connection."""
        self._producer.close()

    def put(self, topic: str, value: bytes, partition: int = 0) -> tuple[str, int]:
        """Write one record. Return its position as text, and its append time in ms."""
        found: list[tuple[KafkaError | None, Message]] = []
        self._producer.produce(
            f"{self.namespace}.{topic}",
            value,
            b"planted",
            partition=partition,
            on_delivery=lambda error, message: found.append((error, message)),
        )
        self._producer.flush(30)
        ((error, message),) = found
        assert error is None, error
        return f"{message.topic()}[{partition}]@{message.offset()}", message.timestamp()[1]

    def fact(self, topic: str, fact: ev.Fact, job: str, **head: Any) -> str:
        """Write one event, and return its position."""
        event = ev.JobEvent(
            str(uuid.uuid4()), job, 1, 1, 1, time.time_ns() // 1000, "add", "default", None, None, "planter", None, fact
        )
        return self.put(topic, codec.encode(msgspec.structs.replace(event, **head)))[0]

    def commit(self) -> None:
        """Commit all records in partition 0 of the work topic, as the group of its workers."""
        topic = f"{self.namespace}.jobs.default"
        asker = Consumer({"bootstrap.servers": self.bootstrap, "group.id": f"{self.namespace}.worker.default"})
        try:
            end = asker.get_watermark_offsets(TopicPartition(topic, 0), timeout=20)[1]
            asker.commit(offsets=[TopicPartition(topic, 0, end)], asynchronous=False)
        finally:
            asker.close()


SPEC = ev.JobSpec(b'{"a": 1}')
ERROR = ev.ErrorInfo("E", "m")
SUCCEEDED = ev.JobSucceeded(b"2", 1)
STARTED = ev.JobStarted("host-1:77", None, {}, "t", 0)
WORK, LIFE, COORD, DEAD = "jobs.default", "lifecycle", "coordination", "dead-letter"


def plant(log: Planter) -> dict[str, list[str]]:
    """Plant each fault once, in otherwise correct jobs where possible. Return the positions that the audit must name,
    by kind of fault."""
    wanted: dict[str, list[str]] = {}

    def run(job: str, *, work: bool = True, end: ev.Fact = SUCCEEDED, **head: Any) -> list[str]:
        """Write the records of a job that is submitted, started and ended."""
        made = [log.fact(WORK, ev.JobSubmitted(SPEC), job, event_id=job)] if work else []
        made.append(log.fact(LIFE, STARTED, job, **head))
        return [*made, log.fact(LIFE, end, job, **head)]

    run("clean")
    wanted["not-ended"] = [log.fact(COORD, ev.JobSubmitted(SPEC, 1), "no-end", release=0, home="no-end")]
    wanted["committed-open"] = [log.fact(WORK, ev.JobSubmitted(SPEC), "unclosed", run=0)]
    run("unclosed")
    wanted["submission-missing"] = run("nobody", work=False)[:1]
    _, _, succeeded = run("both")
    wanted["ends-contradict"] = [succeeded, log.fact(LIFE, ev.JobCancelledFact("ann", None), "both")]
    _, _, succeeded = run("again")
    wanted["started-after-end"] = [log.fact(LIFE, STARTED, "again"), succeeded]
    run("twice")
    first = log.fact(WORK, ev.JobSubmitted(SPEC), "two", event_id="two")
    wanted["work-twice"] = [first, log.fact(WORK, ev.JobSubmitted(SPEC), "two", event_id="other")]
    run("two", work=False)
    wanted["dead-letter-missing"] = run("no-letter", end=ev.JobFailedFact("never", ERROR))[-1:]
    run("lettered")
    wanted["dead-letter-without-failure"] = [log.fact(DEAD, ev.DeadLettered(SPEC, "never", ERROR), "lettered")]
    run("letters", end=ev.JobFailedFact("never", ERROR))
    wanted["dead-letter-twice"] = [log.fact(DEAD, ev.DeadLettered(SPEC, "never", ERROR), "letters") for _ in range(2)]
    # The job is due in an hour, but released at once.
    event = ev.JobEvent(
        "e", "early", 1, 1, 0, 1, "add", "default", None, "early", "p", None, ev.JobSubmitted(SPEC, 3_600_000)
    )
    _, at = log.put(COORD, codec.encode(event))
    early = log.fact(WORK, ev.JobDue(SPEC, (at + 3_600_000) * 1000), "early", event_id="due")
    wanted["released-early"] = [early]
    started, _ = run("early", work=False)
    wanted["started-early"] = [started]
    for job in ("first", "second"):
        log.fact(WORK, ev.JobSubmitted(SPEC), job, event_id=job, key="k")
    log.fact(LIFE, STARTED, "first", key="k")
    started = log.fact(LIFE, STARTED, "second", key="k")
    wanted["key-order"] = [started, *(log.fact(LIFE, SUCCEEDED, job, key="k") for job in ("first", "second"))][:2]
    wanted["unreadable-lost"] = [log.put(WORK, b"no event")[0]]
    wanted["committed-misplaced"] = [log.fact(WORK, STARTED, "clean")]
    return wanted


def test_every_planted_fault_is_found_at_its_position(fleet: Fleet) -> None:
    """In each job, one thing is wrong. The audit exits with 4 and reports each kind once, with exactly the planted
    positions. Copies of outcomes and of work records are notes."""
    log = Planter(fleet)
    try:
        wanted = plant(log)
        log.fact(LIFE, SUCCEEDED, "twice")
        log.fact(WORK, ev.JobSubmitted(SPEC), "clean", event_id="clean")
        log.commit()
    finally:
        log.close()
    report = audited(fleet, "--finished", "--no-table", code=4)
    found = {fault["kind"]: fault for fault in report["faults"]}
    assert {kind: fault["first"][0]["positions"] for kind, fault in found.items()} == wanted
    assert {fault["count"] for fault in report["faults"]} == {1}
    assert "host-1:77" in found["started-after-end"]["first"][0]["detail"]
    assert report["notes"]["work-again"] == 1
    assert report["notes"]["ended-again"] == 2  # one of them is the contradiction
    # While workers run, a job without an outcome is no fault. A contradiction is one.
    running = audited(fleet, "--no-table", "--limit", "1", code=4)
    assert {fault["kind"] for fault in running["faults"]} == wanted.keys() - {"not-ended"}
    assert running["open"] == 1
    old = audited(fleet, "--no-table", "--open-for", "0s", code=4)
    assert "not-ended" in {fault["kind"] for fault in old["faults"]}


def test_an_audit_that_cannot_run_exits_with_its_own_code(fleet: Fleet) -> None:
    """Without a status table the exit code is 3. An unknown queue or an invalid time is 2."""
    code, _, errors = fleet.run("audit", fleet.target)
    assert code == 3, errors
    assert "StoreNotFound" in errors
    for words in (["--queue", "nope"], ["--since", "yesterday"], ["--open-for", "long"]):
        code, _, errors = fleet.run("audit", fleet.target, "--no-table", *words)
        assert code == 2, errors
    assert audited(fleet, "--no-table")["jobs"] == 0
