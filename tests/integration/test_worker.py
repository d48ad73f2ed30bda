"""The worker with a real broker: which jobs it runs, what it writes and what it commits."""

from __future__ import annotations

import gc
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.cimpl import NewTopic

from jobledger import App, BrokerUnavailable, ConfigError, Settings, TopicMissing
from jobledger.config import DEFAULT_MAX_RECORD_BYTES
from jobledger.consumers.partitions.takeover import Takeover
from jobledger.consumers.state.progress import PROGRESS_INTERVAL_S
from jobledger.consumers.state.work import JobRun
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.definitions.retry import Retry
from jobledger.kafka.clients import admin, producer, producer_config
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topics import ensure
from jobledger.log import commit_metadata
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas.events import (
    DeadLettered,
    JobDue,
    JobEvent,
    JobFailedFact,
    JobProgressed,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    RecordRejected,
    ReleaseRequested,
)
from tests.integration.worker_app import closings, facts_of, limit_records, log_of, made, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


def event_of(job_id: str, task: str, args: bytes, *, release: int = 1, attempt: int = 1, fact: Any = None) -> JobEvent:
    return JobEvent(
        str(uuid.uuid4()), job_id, 1, attempt, release, now_us(), task, "default", None, None, "test", None,
        fact or JobSubmitted(JobSpec(args, {"tenant": "acme"})),
    )  # fmt: skip


def send(app: App, *records: Outgoing) -> None:
    writer = LogWriter(app.settings, app.names)
    try:
        writer.send(records)
    finally:
        writer.close()


def committed(app: App) -> dict[int, tuple[int, str | None]]:
    """Return what the worker group has committed, by partition."""
    group = app.names.worker_group("default")
    parts = [TopicPartition(app.names.jobs("default"), p) for p in range(3)]
    client = admin(app.settings)  # a reference: without the client, its answers are lost
    asked = client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, parts)])
    found = asked[group].result(timeout=20).topic_partitions
    return {t.partition: (t.offset, t.metadata) for t in found if t.offset >= 0}


def all_done(app: App, worker: Worker) -> bool:
    """Return whether every work record is done, acknowledged and below the watermark."""
    ends = {p.number: p.offsets for p in worker.partitions()}
    return len(ends) == 3 and all(o is not None and not o.pending for o in ends.values())


@pytest.fixture(scope="module")
def ran(broker: str) -> Iterator[tuple[App, dict[str, str], Worker]]:
    """Yield an app and its worker, which has run one job of every kind, and the ids of the jobs by name."""
    app = made(f"t{uuid.uuid4().hex[:12]}", broker, max_record_bytes=200_000)
    tasks: dict[str, Any] = dict(app.tasks)
    jobs = {
        "add": tasks["add"].using(tags={"tenant": "acme"}).submit(1, b=2),
        "in_thread": tasks["add_in_thread"].submit(5),
        "returns_much": tasks["returns_much"].submit(300_000),
        "reports": tasks["reports"].submit(200),
        "hang": tasks["hang"].submit(7),
        **{n: tasks[n].submit() for n in _PLAIN},
    }
    with working(app) as worker:
        until(lambda: {h.job_id for h in jobs.values()} <= set(closings(app)))
        until(lambda: all_done(app, worker), what="everything done")
        yield app, {name: handle.job_id for name, handle in jobs.items()}, worker
    app.close()


_PLAIN = ("fail", "fail_in_thread", "never", "reject", "later", "snooze", "leave", "reject_in_a_group",
          "snooze_in_a_group", "cancels_itself", "returns_nonsense", "waits_for_a_job")  # fmt: skip

Ran = tuple[App, dict[str, str], Worker]


def test_start_and_success_are_in_the_lifecycle_partition_of_the_work_record(ran: Ran) -> None:
    """Start and success are on the lifecycle topic, in this order, in the partition with the number of the work
    record's partition."""
    app, jobs, worker = ran
    mine = [r for r in log_of(app, app.names.lifecycle) if r.event.job_id == jobs["add"]]
    work = next(r for r in log_of(app, app.names.jobs("default")) if r.event.job_id == jobs["add"])
    started, succeeded = mine
    assert started.event.fact == JobStarted(worker.source, None, {}, work.position.topic, work.position.offset, 0)
    assert isinstance(succeeded.event.fact, JobSucceeded)
    assert succeeded.event.fact.result == b"3"
    for r in mine:
        assert r.position.partition == work.position.partition
        assert (r.event.run, r.event.attempt, r.event.release) == (1, 1, 1)
        assert (r.event.task, r.event.queue, r.event.source) == ("add", "default", worker.source)


def test_a_plain_function_runs_in_a_thread_and_knows_its_job(ran: Ran) -> None:
    """A function without `async` runs in a job thread, where `current_job` returns its job."""
    app, jobs, _ = ran
    result = facts_of(app, jobs["in_thread"])[-1].result
    assert msgspec.json.decode(result)["sum"] == 6
    assert msgspec.json.decode(result)["thread"].startswith("jobledger-job-")
    assert msgspec.json.decode(result)["attempt"] == 1


def test_reject_and_snooze_work_inside_a_task_group(ran: Ran) -> None:
    """`Reject` and `Snooze` have the same effect inside an `asyncio.TaskGroup` as outside."""
    app, jobs, _ = ran
    rejected, snoozed = facts_of(app, jobs["reject_in_a_group"])[-1], facts_of(app, jobs["snooze_in_a_group"])[-1]
    assert isinstance(rejected, JobFailedFact)
    assert rejected.reason == "rejected"
    assert "ValueError: beside it; Reject: no such city" in rejected.error.message
    assert isinstance(snoozed, JobSnoozed)
    assert (snoozed.delay_ms, snoozed.reason) == (9000, "not yet")


def test_a_failed_attempt_requests_the_next_release(ran: Ran) -> None:
    """`JobRetried` closes the release. The derived request has the next release and attempt, and the whole job."""
    app, jobs, _ = ran
    fact = facts_of(app, jobs["fail"])[-1]
    assert isinstance(fact, JobRetried)
    assert (fact.error.type, fact.error.message, fact.delay_ms) == ("ValueError", "attempt 1", 500)
    assert fact.error.traceback is not None
    assert "worker_app.py" in fact.error.traceback
    assert "executor.py" not in fact.error.traceback
    requests = [r for r in log_of(app, app.names.coordination) if r.event.job_id == jobs["fail"]]
    assert len(requests) == 1
    request = requests[0].event
    assert isinstance(request.fact, ReleaseRequested)
    assert (request.release, request.attempt, request.fact.delay_ms, request.home) == (2, 2, 500, None)
    assert request.event_id == str(uuid.uuid5(uuid.UUID(request.job_id), "1/2/request"))


@pytest.mark.parametrize(
    ("name", "reason", "error"),
    [
        ("fail_in_thread", "exhausted", "tests.integration.worker_app.Unprintable"),
        ("never", "never", "KeyError"),
        ("reject", "rejected", "jobledger.definitions.retry.Reject"),
        ("leave", "never", "SystemExit"),
        ("hang", "timeout", "TimeoutError"),
        ("cancels_itself", "exhausted", "asyncio.exceptions.CancelledError"),
        ("returns_nonsense", "bad-result", "TypeError"),
        ("returns_much", "bad-result", "PayloadTooLarge"),
    ],
)
def test_a_job_that_cannot_succeed_fails_and_is_dead_lettered(ran: Ran, name: str, reason: str, error: str) -> None:
    """Every kind of final failure has its own reason and error, in the fact and in the dead letter."""
    app, jobs, _ = ran
    fact = facts_of(app, jobs[name])[-1]
    assert isinstance(fact, JobFailedFact)
    assert (fact.reason, fact.error.type) == (reason, error)
    dead = [r.event.fact for r in log_of(app, app.names.dead_letter) if r.event.job_id == jobs[name]]
    assert [(d.reason, d.error.type) for d in dead if isinstance(d, DeadLettered)] == [(reason, error)]


def test_the_failure_of_a_too_large_result_names_size_and_limit(ran: Ran) -> None:
    """The error message contains the size of the result and the limit."""
    app, jobs, _ = ran
    message = facts_of(app, jobs["returns_much"])[-1].error.message
    assert "200000" in message
    assert "300" in message


def test_retry_later_and_snooze_keep_their_own_delays(ran: Ran) -> None:
    """`RetryLater` uses an attempt, `Snooze` does not. Both request the next release after the delay that they name."""
    app, jobs, _ = ran
    later, snoozed = facts_of(app, jobs["later"])[-1], facts_of(app, jobs["snooze"])[-1]
    assert isinstance(later, JobRetried)
    assert isinstance(snoozed, JobSnoozed)
    assert (later.delay_ms, snoozed.delay_ms, snoozed.reason) == (7500, 9000, "not yet")
    asked = {r.event.job_id: r.event for r in log_of(app, app.names.coordination)}
    assert (asked[jobs["later"]].release, asked[jobs["later"]].attempt) == (2, 2)
    assert (asked[jobs["snooze"]].release, asked[jobs["snooze"]].attempt) == (2, 1)


def test_a_fallback_runs_with_the_same_arguments(ran: Ran) -> None:
    """When a task with a fallback has finally failed, the fallback runs as a new job."""
    app, jobs, _ = ran
    fallback = str(uuid.uuid5(uuid.UUID(jobs["hang"]), "1/fallback"))
    found = until(lambda: [f for f in facts_of(app, fallback) if isinstance(f, JobSucceeded)])
    assert found[0].result == f'"rescued 7 of {jobs["hang"]}"'.encode()


def test_progress_is_throttled_and_the_last_report_is_sent(ran: Ran) -> None:
    """200 quick reports become only a few facts, one every tenth of a second. The last report is sent before the job's
    outcome."""
    app, jobs, _ = ran
    facts = facts_of(app, jobs["reports"])
    progress = [f for f in facts if isinstance(f, JobProgressed)]
    assert isinstance(facts[-1], JobSucceeded)
    instant_s = facts[-1].duration_us / 1e6  # on a busy machine this may be long
    assert 1 <= len(progress) <= 5 + instant_s / PROGRESS_INTERVAL_S
    assert (progress[-1].done, progress[-1].total, progress[-1].sequence) == (200, 200, 200)


def test_waiting_for_a_job_inside_a_job_is_refused(ran: Ran) -> None:
    """A job may submit another job, but must not wait for it. The id of the other job is computed from its parent."""
    app, jobs, _ = ran
    child = msgspec.json.decode(facts_of(app, jobs["waits_for_a_job"])[-1].result)
    assert uuid.UUID(child).version == 5
    until(lambda: [f for f in facts_of(app, child) if isinstance(f, JobSucceeded)])


def test_done_records_are_committed_with_a_takeover_floor(ran: Ran) -> None:
    """Soon after the last job, the group's offsets are at the ends of the log, not clean, and with a takeover floor."""
    app, _, worker = ran

    def caught_up() -> dict[int, tuple[int, str | None]] | None:
        now = committed(app)
        ends = {p.number: p.offsets.end for p in worker.partitions() if p.offsets is not None}
        return now if {p: offset for p, (offset, _) in now.items()} == ends else None

    found = until(caught_up)
    for partition, (offset, metadata) in found.items():
        said = commit_metadata.decode(offset, metadata, offset)
        assert not said.clean
        assert said.floor is not None
        assert said.floor <= max(
            (r.position.offset + 1 for r in log_of(app, app.names.lifecycle) if r.position.partition == partition),
            default=0,
        )


def test_jobs_of_other_versions_and_unreadable_records_stop_nothing(broker: str, namespace: str) -> None:
    """Unreadable records are dead-lettered unchanged, and the jobs around them run. A job of an unknown task waits, and
    fails after its attempts. For arguments that do not fit, the error names both the arguments and the signature."""
    app = made(namespace, broker)
    topic = app.names.jobs("default")
    lost, bad, newer, due = (str(uuid.uuid4()) for _ in range(4))
    snoozed_out = str(uuid.uuid4())
    future = codec.SCHEMA_TEXT.replace('"name": "trace"', '"name": "shade", "type": "string"}, {"name": "trace"', 1)
    good = event_of(newer, "add", b'{"a":1}')
    foreign = future_bytes(future, good)
    conditioned = JobSubmitted(JobSpec(b"{}"), delay_ms=5)
    garbage = [
        Outgoing(topic, b"garbage", "k", 0),
        Outgoing(topic, None, "k", 0),
        Outgoing(topic, codec.MAGIC + b"\1\2\3\4\5\6\7\x08rest", "k", 0),
        Outgoing(topic, codec.encode(good)[:40], "k", 0),
        Outgoing(topic, codec.encode(event_of("j", "add", b"{}", fact=JobSucceeded())), "k", 0),
        Outgoing(topic, codec.encode(event_of("j", "add", b"{}", fact=conditioned)), "k", 0),
    ]
    send(
        app,
        Outgoing(app.names.schemas, future.encode(), codec.fingerprint(future).hex()),
        *garbage,
        Outgoing(topic, foreign, newer, 0),
        Outgoing(topic, codec.encode(event_of(lost, "lost", b"{}")), lost, 0),
        Outgoing(topic, codec.encode(event_of(bad, "add", b'{"c":1}')), bad, 0),
        Outgoing(topic, codec.encode(event_of(due, "add", b'{"a":3}', release=4, attempt=2,
                                              fact=JobDue(JobSpec(b'{"a":3}'), now_us()))), due, 0),
        Outgoing(topic, codec.encode(event_of(snoozed_out, "lost", b"{}", release=5, fact=JobDue(
            JobSpec(b"{}", {"jl-unknown-task": "2"}), now_us()))), snoozed_out, 0),
    )  # fmt: skip
    with working(app, unknown_task=Retry(max_attempts=2, initial=30, jitter=False)) as worker:
        until(lambda: len(closings(app)) == 5)
        until(lambda: all_done(app, worker), what="everything passed")
        assert worker.health()["rejected"] == len(garbage)
    ends = {job: records[0].event for job, records in closings(app).items()}
    assert ends[newer].fact.result == b"2"  # type: ignore[union-attr]
    assert (ends[due].release, ends[due].attempt) == (4, 2)
    snoozed = ends[lost].fact
    assert isinstance(snoozed, JobSnoozed)
    assert (snoozed.reason, snoozed.delay_ms) == ("unknown-task", 30_000)
    failed = ends[snoozed_out].fact
    assert isinstance(failed, JobFailedFact)
    assert failed.reason == "unknown-task"
    request = next(r.event.fact for r in log_of(app, app.names.coordination) if r.event.job_id == lost)
    assert isinstance(request, ReleaseRequested)
    assert request.spec.tags == {"tenant": "acme", "jl-unknown-task": "1"}
    misfit = ends[bad].fact
    assert isinstance(misfit, JobFailedFact)
    assert misfit.reason == "bad-arguments"
    assert '{"c":1}' in misfit.error.message
    assert "(a: int, b: int = 1)" in misfit.error.message
    rejected = [r.event.fact for r in log_of(app, app.names.dead_letter)]
    kept = {f.offset: f.raw_value for f in rejected if isinstance(f, RecordRejected)}
    assert kept == {n: g.value for n, g in enumerate(garbage)}
    app.close()


def future_bytes(schema: str, event: JobEvent) -> bytes:
    """Encode an event as a later version would, with one more field."""
    import io
    import json

    import fastavro

    parsed = fastavro.parse_schema(json.loads(schema.replace("timestamp-micros", "none")))
    datum = msgspec.structs.asdict(event)
    fact = event.fact
    assert isinstance(fact, JobSubmitted)
    body = msgspec.structs.asdict(fact) | {"spec": msgspec.structs.asdict(fact.spec)}
    datum |= {"fact": ("jobledger.JobSubmitted", body), "shade": "blue"}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, parsed, datum)
    return codec.MAGIC + codec.fingerprint(schema) + out.getvalue()


def test_an_unknown_fact_stops_only_its_partition(broker: str, namespace: str) -> None:
    """A record with an unknown fact is never skipped: its partition stops, the worker is unhealthy, and the other
    partitions continue."""
    app = made(namespace, broker)
    topic = app.names.jobs("default")
    future = codec.SCHEMA_TEXT.replace("JobExpired", "JobTeleported")
    before, after, elsewhere = (str(uuid.uuid4()) for _ in range(3))
    unknown = future_fact(future, event_of("x", "add", b"{}"))
    send(
        app,
        Outgoing(app.names.schemas, future.encode(), codec.fingerprint(future).hex()),
        Outgoing(topic, codec.encode(event_of(before, "add", b'{"a":1}')), before, 1),
        Outgoing(topic, unknown, "x", 1),
    )
    with working(app) as worker:
        until(lambda: any("JobTeleported" in reason for reason in worker.health()["reasons"]))
        assert worker.health()["status"] == "unhealthy"
        send(
            app,
            Outgoing(topic, codec.encode(event_of(after, "add", b'{"a":2}')), after, 1),
            Outgoing(topic, codec.encode(event_of(elsewhere, "add", b'{"a":3}')), elsewhere, 2),
        )
        until(lambda: elsewhere in closings(app))
        until(lambda: committed(app).get(2, (0, ""))[0] == 1)
        health = worker.health()
    assert "JobTeleported" in health["reasons"][0]
    assert "upgrade this worker" in health["reasons"][0]
    assert set(closings(app)) == {before, elsewhere}
    assert committed(app)[1][0] == 1
    app.close()


def future_fact(schema: str, event: JobEvent) -> bytes:
    """Encode an event whose fact only ``schema`` knows."""
    import io
    import json

    import fastavro

    parsed = fastavro.parse_schema(json.loads(schema.replace("timestamp-micros", "none")))
    datum = msgspec.structs.asdict(event) | {"fact": ("jobledger.JobTeleported", {"expired_at": 1})}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, parsed, datum)
    return codec.MAGIC + codec.fingerprint(schema) + out.getvalue()


def test_a_second_record_of_a_release_is_dropped_also_by_the_next_owner(broker: str, namespace: str) -> None:
    """The first record of a release in its partition counts, in one worker and after a restart."""
    app = made(namespace, broker)
    topic = app.names.jobs("default")
    job = str(uuid.uuid4())
    record = Outgoing(topic, codec.encode(event_of(job, "add", b'{"a":1}')), job, 0)
    headed = Outgoing(topic, record.value, job, 0, [("jl-job", job.encode()), ("jl-run", b"1"), ("jl-release", b"2")])
    other = Outgoing(topic, codec.encode(event_of(job, "add", b'{"a":2}', release=2)), job, 0, headed.headers)
    send(app, record, record, other)
    with working(app) as worker:
        until(lambda: len(closings(app).get(job, ())) == 2)
        until(lambda: all_done(app, worker))
        assert worker.health()["duplicates"] == 1
    send(app, record, other)
    with working(app) as worker:
        until(lambda: worker.health().get("duplicates") == 2)
        until(lambda: all_done(app, worker))
    assert app.ran == [("add", 1), ("add", 2)]  # type: ignore[attr-defined]
    assert committed(app)[0][0] == 5
    app.close()


def test_offsets_without_a_record_are_skipped_and_logged(
    broker: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program's producer writes transactions. Their markers have offsets but no records. Both jobs run,
    everything is committed, and the log names the offsets that were regarded as done."""
    app = made(namespace, broker)
    config = producer_config(app.settings, timeout=20.0) | {"transactional.id": namespace, "linger.ms": 5}
    sender = producer(config)
    sender.init_transactions(PATIENCE * 20)  # the first transaction of a broker creates a topic
    jobs = [str(uuid.uuid4()) for _ in range(2)]
    for job in jobs:
        sender.begin_transaction()
        sender.produce(app.names.jobs("default"), codec.encode(event_of(job, "add", b'{"a":1}')), job, partition=0)
        sender.commit_transaction(PATIENCE * 20)
    with caplog.at_level(logging.WARNING), working(app) as worker:
        until(lambda: set(closings(app)) == set(jobs))
        until(lambda: all_done(app, worker))
        until(lambda: "jobs.default[0]: 1 offsets below 3 have no record" in caplog.text)
    assert committed(app)[0][0] == 3
    app.close()


def test_a_clean_restart_runs_nothing_again(broker: str, namespace: str) -> None:
    """After a stop, the offsets are committed as clean. The next worker searches for no outcomes, and runs only the
    remaining jobs."""
    app = made(namespace, broker)
    app.submit_many(app.tasks["add"].job(n) for n in range(500))
    with working(app):
        until(lambda: len(closings(app)) >= 300)
    left = len(closings(app))
    for partition, (offset, metadata) in committed(app).items():
        assert commit_metadata.decode(offset, metadata, 1 << 40).clean, partition
    with working(app) as worker:
        until(lambda: len(closings(app)) == 500)
        until(lambda: all_done(app, worker))
        assert worker.health()["found_closed"] == 0
    assert left >= 300
    assert sorted(a for _, a in app.ran) == list(range(500))  # type: ignore[attr-defined]
    app.close()


def test_a_takeover_that_a_stop_interrupts_is_repeated_by_the_next_owner(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the takeover has not found all closing facts, no job runs, and nothing is committed as clean."""
    app = made(namespace, broker)
    app.submit_many(app.tasks["add"].job(n) for n in range(60))
    with working(app) as worker:
        until(lambda: len(closings(app)) == 60)
        until(lambda: all_done(app, worker))
    # The same state as after the death of an owner that had committed nothing.
    zero = [TopicPartition(app.names.jobs("default"), p, 0) for p in range(3)]
    client = admin(app.settings)  # a reference: without the client, its answers are lost
    asked = client.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(app.names.worker_group("default"), zero)])
    for answer in asked.values():
        answer.result(10)
    read = Takeover._read

    cut = threading.Event()

    def cut_short(self: Takeover, *about: Any) -> None:
        self.close()
        cut.set()
        read(self, *about)

    with monkeypatch.context() as patched:
        patched.setattr(Takeover, "_read", cut_short)
        with working(app) as worker:
            until(lambda: cut.is_set() and worker.takeover is not None and not worker.takeover.is_alive())
    for partition, (offset, metadata) in committed(app).items():
        assert not commit_metadata.decode(offset, metadata, 1 << 40).clean, partition
    with working(app) as worker:
        until(lambda: worker.health().get("found_closed") == 60)
    assert sorted(a for _, a in app.ran) == list(range(60))  # type: ignore[attr-defined]
    app.close()


@pytest.mark.parametrize("how", ["stop", "rebalance"])
def test_a_clean_partition_stays_clean_if_its_takeover_is_interrupted(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A worker that gives up a partition during its takeover, as in a rolling restart, leaves the commit clean. So the
    next owner regards no job as a suspect."""
    app = made(namespace, broker)
    app.submit_many(app.tasks["add"].job(n) for n in range(60))
    with working(app) as worker:
        until(lambda: len(closings(app)) == 60)
        until(lambda: all_done(app, worker))
    before = committed(app)
    app.submit_many(app.tasks["add"].job(n) for n in range(60, 90))
    seed = Takeover._choose_memory_ranges
    marked = threading.Event()
    found: list[tuple[int, bool]] = []

    def late(self: Takeover, topic: str, scans: list[Any]) -> None:
        if not marked.is_set():  # the first takeover: marked as not clean, and slow from here on
            marked.set()
            until(lambda: not all(p.partition.owned for p in scans), what="the loss of a partition")
        else:
            found.extend((p.partition.number, p.restored.clean) for p in scans)
        seed(self, topic, scans)

    with monkeypatch.context() as patched:
        patched.setattr(Takeover, "_choose_memory_ranges", late)
        with working(app):
            until(marked.is_set)
            for partition, (offset, metadata) in committed(app).items():
                assert not commit_metadata.decode(offset, metadata, 1 << 40).clean, partition
            if how == "rebalance":
                with working(app):
                    until(lambda: len(closings(app)) == 90)
        if how == "stop":
            assert committed(app) == before
            with working(app):
                until(lambda: len(closings(app)) == 90)
    assert found
    assert all(clean for _, clean in found), found
    assert sorted(a for _, a in app.ran) == list(range(90))  # type: ignore[attr-defined]
    app.close()


def test_a_takeover_finds_releases_that_have_a_closing_fact(broker: str, namespace: str) -> None:
    """Without committed offsets, releases with a closing fact are not run again. Records that derive from such a fact
    are sent again, with the original due time. Starts without a closing fact are counted in the next start."""
    app = made(namespace, broker)
    topic, lifecycle = app.names.jobs("default"), app.names.lifecycle
    done, retried, snoozed, failed, started, fresh = (str(uuid.uuid4()) for _ in range(6))
    error = {"error": msgspec.convert({"type": "E", "message": "m"}, type=_error_type())}
    ends: dict[str, Any] = {
        done: JobSucceeded(b"1"),
        retried: JobRetried(delay_ms=60_000, **error),
        snoozed: JobSnoozed(30_000, "unknown-task"),
        failed: JobFailedFact("never", **error),
    }
    start = JobStarted("other:1", None, {}, topic, 0, 0)
    send(app, *(Outgoing(topic, codec.encode(event_of(j, "add", b'{"a":1}')), j, 0) for j in ends))
    send(app, Outgoing(topic, codec.encode(event_of(started, "add", b'{"a":8}')), started, 0))
    send(app, Outgoing(topic, codec.encode(event_of(fresh, "add", b'{"a":9}')), fresh, 0))
    send(app, *(Outgoing(lifecycle, codec.encode(event_of(j, "add", b"{}", fact=f)), j, 0) for j, f in ends.items()))
    once = msgspec.structs.replace(start, takeover=1)
    send(
        app,
        Outgoing(lifecycle, codec.encode(event_of(started, "add", b"{}", fact=start)), started, 0),
        Outgoing(lifecycle, codec.encode(event_of(started, "add", b"{}", fact=once)), started, 0),
    )
    with working(app) as worker:
        until(lambda: all_done(app, worker))
        until(lambda: len(closings(app)) == 6)
        assert worker.health()["found_closed"] == 4
    # Job 8 may have ended a worker. So it waits until its start is in the log, and other jobs do not wait for it.
    assert sorted(app.ran) == [("add", 8), ("add", 9)]  # type: ignore[attr-defined]
    appended = {r.event.job_id: r.appended_ms for r in log_of(app, lifecycle) if r.event.job_id in ends}
    asked = {r.event.job_id: r.event for r in log_of(app, app.names.coordination)}
    assert set(asked) == {retried, snoozed}
    for job, attempt, delay_ms in ((retried, 2, 60_000), (snoozed, 1, 30_000)):
        fact = asked[job].fact
        assert isinstance(fact, ReleaseRequested)
        assert (fact.delay_ms, fact.due_at) == (None, (appended[job] + delay_ms) * 1000)
        assert (asked[job].release, asked[job].attempt) == (2, attempt)
    assert asked[snoozed].fact.spec.tags["jl-unknown-task"] == "1"  # type: ignore[union-attr]
    dead = [r.event.job_id for r in log_of(app, app.names.dead_letter)]
    assert dead == [failed]
    starts = [f for f in facts_of(app, started) if isinstance(f, JobStarted)]
    assert starts[-1].takeover == 2
    app.close()


def _error_type() -> Any:
    from jobledger.schemas.events import ErrorInfo

    return ErrorInfo


def test_a_result_the_broker_refuses_fails_the_job(broker: str, namespace: str) -> None:
    """If a closing fact is too large for its topic, the job fails with an error that says so, and the worker continues."""
    app = made(namespace, broker)
    limit_records(app, 20_000, app.names.lifecycle)
    large = app.tasks["returns_much"].submit(50_000).job_id
    small = app.tasks["returns_much"].submit(50).job_id
    with working(app) as worker:
        until(lambda: {large, small} <= set(closings(app)))
        until(lambda: all_done(app, worker))
    fact = facts_of(app, large)[-1]
    assert isinstance(fact, JobFailedFact)
    assert fact.reason == "bad-result"
    assert "max.message.bytes" in fact.error.message
    assert isinstance(facts_of(app, small)[-1], JobSucceeded)
    app.close()


class Clock:
    """Replaces the module `time`. The test can move the clock forward by ``ahead`` seconds."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_a_stopping_worker_waits_for_running_jobs_and_leaves_the_rest(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running jobs that end within the grace time are closed. Other running jobs are cancelled without an outcome and
    run in the next worker. Jobs that only waited for a thread are never started."""
    app, clock = made(namespace, broker), Clock()
    monkeypatch.setattr("jobledger.consumers.worker.worker.time", clock)
    gates: dict[str, threading.Event] = app.gates  # type: ignore[attr-defined]
    for name in ("ends", "stays"):
        gates[name] = threading.Event()
        app.tasks["gated"].submit(name)
    gates["thread"] = threading.Event()
    for _ in range(3):
        app.tasks["gated_in_thread"].submit("thread")
    with working(app, grace=120.0, threads=1) as worker:
        until(lambda: len(app.ran) == 3)  # type: ignore[attr-defined]
        worker.stop()
        until(lambda: worker.dispatcher is not None and not worker.dispatcher.running_jobs.accepting)
        gates["ends"].set()
        gates["thread"].set()
        until(lambda: len(closings(app)) == 2)
        assert not worker.ended.is_set()
        clock.ahead = 120.0  # the grace time is over
    facts = [r.event.fact for rs in closings(app).values() for r in rs]
    assert sorted(f.result or b"" for f in facts if isinstance(f, JobSucceeded)) == [b'"ends"', b'"thread"']
    starts = [r for r in log_of(app, app.names.lifecycle) if isinstance(r.event.fact, JobStarted)]
    assert len(starts) == 3
    gates["stays"].set()
    with working(app) as worker:
        until(lambda: len(closings(app)) == 5)
        until(lambda: all_done(app, worker))
    assert sorted(n for _, n in app.ran).count("ends") == 1  # type: ignore[attr-defined]
    app.close()


def test_a_partition_that_becomes_ready_during_a_wake_up_is_served_at_once(broker: str, namespace: str) -> None:
    """Records that were fetched before the end of a takeover run as soon as the takeover has ended, although nothing
    else happens then."""
    app = made(namespace, broker)
    with working(app) as worker:
        until(lambda: [p.ready for p in worker.partitions()] == [True] * 3)
        owned = list(worker.partitions())
        dispatcher = worker.dispatcher
        assert dispatcher is not None
        dispatcher.no_longer_owned(owned)
        app.tasks["add"].submit(1)
        until(lambda: any(p.raw for p in owned))
        time.sleep(0.2)
        assert not closings(app)

        def at_once() -> None:
            dispatcher.wake()  # as the fetch thread does for a message
            dispatcher.ready(owned)

        dispatcher.call(at_once)
        until(lambda: closings(app), timeout=10.0)
    app.close()


def test_objects_of_an_ended_job_are_freed_without_the_garbage_collector(broker: str, namespace: str) -> None:
    """However a job ends, the worker's objects for the job are freed at once, because they are in no reference cycle.
    So the memory does not depend on the rate of jobs."""

    def works() -> int:
        return sum(type(found) is JobRun for found in gc.get_objects())

    app = made(namespace, broker)
    kinds = ("add", "add_in_thread", "reports", "hang", "reject", "never", "fail_in_thread", "returns_nonsense")
    with working(app, threads=2) as worker:
        gc.collect()
        before = works()  # objects of other tests' workers
        gc.disable()
        try:
            for name in kinds:
                app.submit_many(app.tasks[name].job(*([] if name not in _TAKES_A_NUMBER else [1])) for _ in range(20))
            until(lambda: len(closings(app)) == 20 * (len(kinds) + 1))  # each `hang` has a fallback
            until(lambda: all_done(app, worker), what="everything done")
            # Each of the two threads still refers to its last job.
            until(lambda: works() <= before + 2, 5.0, "their freeing")
            assert worker.dispatcher is not None
            assert worker.dispatcher.running_jobs.begun == 20 * (len(kinds) + 1)
        finally:
            gc.enable()
    app.close()


_TAKES_A_NUMBER = ("add", "add_in_thread", "reports", "hang")


def test_a_second_worker_takes_partitions_and_gives_them_back(broker: str, namespace: str) -> None:
    """While workers join and leave without a crash, every job runs exactly once."""
    app = made(namespace, broker)
    total = 3_000
    with working(app, concurrency=20):
        app.submit_many(app.tasks["add"].job(n) for n in range(total // 2))
        with working(app, concurrency=20) as second:
            until(lambda: any(p.ready for p in second.partitions()), what="the second worker's share")
            app.submit_many(app.tasks["add"].job(n) for n in range(total // 2, total))
            until(lambda: len(app.ran) >= total * 3 // 4)  # type: ignore[attr-defined]
        until(lambda: len(closings(app)) == total)
    assert sorted(a for _, a in app.ran) == list(range(total))  # type: ignore[attr-defined]
    app.close()


def test_a_worker_that_cannot_start_names_the_reason(broker: str, namespace: str) -> None:
    """Missing topics, too few lifecycle partitions, an unknown queue or an unreachable broker are errors at the start."""
    app = App(namespace, settings=Settings(bootstrap=broker), partitions=2)
    app.task(name="t")(_nothing)
    with pytest.raises(TopicMissing, match="topics apply"):
        Worker(app.registry, app.settings).run()
    ensure(app, app.settings)
    wide = App(namespace, settings=app.settings, partitions=2)
    wide.task(name="t", queue="wide")(_nothing)
    client, topic = admin(app.settings), app.names.jobs("wide")
    client.create_topics([NewTopic(topic, 5, 1)])[topic].result(timeout=20)
    until(lambda: topic in client.list_topics(timeout=5).topics)
    with pytest.raises(ConfigError, match="5 partitions"):
        Worker(wide.registry, app.settings).run()
    with pytest.raises(ConfigError, match="nope"):
        Worker(app.registry, app.settings, WorkerOptions(queues=["nope"]))
    away = Settings(bootstrap=f"127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
        Worker(app.registry, away, WorkerOptions(start_timeout=1.0)).run()
    assert time.monotonic() - began < 25
    assert app.settings.max_record_bytes == DEFAULT_MAX_RECORD_BYTES


async def _nothing() -> None:
    pass
