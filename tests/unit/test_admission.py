"""What admission makes of a work record: a job that begins, a job that waits, an outcome without a run, a dead letter,
or nothing. No Kafka and no thread: the test takes each record and acknowledges each sent one."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from jobledger import App, Queue
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.scheduling.dispatcher import Dispatcher
from jobledger.consumers.scheduling.schema_resolver import read
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.offset_tracker import PartitionOffsets
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.prior_state import NOTHING_FOLLOWS, PriorFact
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.definitions.retry import Retry
from jobledger.errors import RegistryNeeded, UnknownFact
from jobledger.log.commit_metadata import Restored
from jobledger.schemas import codec
from jobledger.schemas.events import (
    CRASHES_TAG,
    UNKNOWN_TASK_TAG,
    DeadLettered,
    ErrorInfo,
    Fact,
    JobCancelledFact,
    JobDue,
    JobExpiredFact,
    JobFailedFact,
    JobLeased,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    Leased,
    RecordRejected,
    ReleaseRequested,
)
from tests.pipe_bench import HeldCode, PartsBench, event, job, put

#: The wait queues of a partition are crowded when so many jobs wait, with a lookahead of 100 jobs.
CROWDED = 25


def shop(code: HeldCode | None = None) -> App:
    """Return an app with a plain task, a keyed task, and a task whose tenants take turns."""
    app = App(
        "shop", queues=[Queue("default", partitions=1), Queue("fair", partitions=1, fair_by="tenant")], partitions=1
    )
    held = code or HeldCode()

    @app.task
    def plain(n: int = 0) -> None: ...

    @app.task(key="k", timeout=30)
    async def keyed(k: str, n: int = 0) -> None:
        await held.run(n)

    @app.task(queue="fair")
    def fair(n: int = 0) -> None: ...

    return app


def keyed(n: int, key: str = "a", **about: Any) -> bytes:
    return job("keyed", key=key, k=key, n=n, **about)


def offsets_of(partition: Partition) -> PartitionOffsets:
    assert partition.offsets is not None
    return partition.offsets


def watermark(partition: Partition) -> int:
    """Return how many records of the partition are done, from its beginning on."""
    return offsets_of(partition).watermark


# -- accepted and rejected --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fact", [JobSubmitted(JobSpec(b"{}")), JobDue(JobSpec(b"{}"), 1)], ids=["JobSubmitted", "JobDue"]
)
def test_a_job_begins_at_once_and_is_done_when_its_outcome_is_acknowledged(fact: Fact) -> None:
    """Sending the outcome is not enough: until the acknowledgement, the next owner must find the record."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        bench.take(partition, event(fact, "plain"))
        assert (bench.kinds(), bench.running, watermark(partition)) == (["JobStarted"], [0], 0)
        bench.succeed(partition.live[0])
        assert (bench.kinds()[1:], bench.running, watermark(partition)) == (["JobSucceeded"], [], 0)
        bench.acknowledge()
        assert (watermark(partition), partition.live) == (1, {})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"not an event", ""),
        (None, ""),
        (
            event(JobSubmitted(JobSpec(b"{}"), delay_ms=5), "plain"),
            "a JobSubmitted with a delay or a due time does not belong",
        ),
        (
            event(JobSubmitted(JobSpec(b"{}"), due_at=5), "plain"),
            "a JobSubmitted with a delay or a due time does not belong",
        ),
        (event(JobStarted("w", None, {}, "t", 0), "plain"), "a JobStarted does not belong"),
        (event(JobSubmitted(JobSpec(b"{}")), "plain", job_id=""), "it names no job"),
    ],
    ids=["garbage", "tombstone", "delayed", "due later", "a worker's fact", "no job id"],
)
def test_a_record_that_is_no_job_becomes_a_dead_letter(value: bytes | None, why: str) -> None:
    """The dead letter has the record unchanged. The record is done when the dead letter is acknowledged, so it cannot
    be lost between the two."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        message = bench.message(partition, value, key=b"its key")
        bench.pipe.admission.take_up(partition, message, bench.clock.now)
        (letter,) = bench.facts(RecordRejected)
        assert (letter.topic, letter.partition, letter.offset) == (partition.topic, 0, 0)
        assert (letter.raw_key, letter.raw_value) == (b"its key", value)
        assert letter.error
        assert why in letter.error
        assert bench.kept.topics == [bench.app.names.dead_letter]
        assert (bench.pipe.admission.counts.rejected, bench.running, watermark(partition)) == (1, [], 0)
        bench.acknowledge()
        assert (watermark(partition), partition.live) == (1, {})


def test_a_record_that_a_former_owner_has_done_is_neither_run_nor_rejected_again() -> None:
    """The completion map says that the records at offsets 1 and 2 are done. Only the record before them is new. A later
    copy of the job that was done is a duplicate."""
    with PartsBench(shop()) as bench:
        partition = bench.partition(restored=Restored(0, ((1, 3),)))
        known = job("plain")
        bench.take(partition, job("plain"), known, b"not an event", known)
        assert (bench.kinds(), bench.running) == (["JobStarted"], [0])
        assert (bench.pipe.admission.counts.duplicates, bench.pipe.admission.counts.rejected) == (1, 0)
        bench.succeed(partition.live[0])
        bench.acknowledge()
        assert watermark(partition) == 4


@pytest.mark.parametrize(
    ("error", "says"),
    [(UnknownFact("a fact of version 9"), "upgrade this worker"), (RegistryNeeded("schema 7"), "schema 7")],
    ids=["newer fact", "registry"],
)
def test_a_record_that_this_worker_cannot_judge_stops_the_partition(error: Any, says: str) -> None:
    """Such a record may be a valid job, so it is not rejected, and it is not done. Another worker can run it."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        message = bench.message(partition, b"")
        fresh = offsets_of(partition).receive(0)
        bench.pipe.admission.judge(partition, message, error, fresh, bench.clock.now)
        assert partition.stopped is not None
        assert says in partition.stopped
        assert (bench.kinds(), watermark(partition), partition.begin_taking()) == ([], 0, False)


def test_a_record_of_another_schema_is_judged_after_its_schema_was_looked_up() -> None:
    """Until then the partition takes no other record, so that no later job of the same key overtakes this one."""
    later = json.loads(codec.SCHEMA_TEXT)
    later["fields"].append({"name": "extra", "type": "int", "default": 0})
    text = json.dumps(later)
    mark = codec.fingerprint(text)
    decoder = codec.Decoder(lambda asked: text if asked == mark else None)
    value = codec.MAGIC + mark + job("plain")[10:] + b"\0"
    with PartsBench(shop(), decoder=decoder) as bench:
        partition = bench.partition()
        message = bench.message(partition, value)
        bench.pipe.admission.take_up(partition, message, bench.clock.now)
        assert (partition.resolving, partition.has_records, bench.kinds()) == (True, False, [])
        bench.pipe.admission.resolved(partition, message, read(decoder, value), True)
        assert (partition.resolving, partition.has_records) == (False, True)
        assert partition.resolved is not None
        bench.pipe.admission.judge(partition, *partition.resolved, bench.clock.now)
        assert (bench.kinds(), bench.running) == (["JobStarted"], [0])


# -- duplicates -------------------------------------------------------------------------------------------------------


def test_only_the_first_record_of_a_release_counts() -> None:
    """A second record of the release is done at once, also while the job runs. Another release of the job, and another
    run, are no duplicates."""
    spec = JobSubmitted(JobSpec(b"{}"))
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        first = event(spec, "plain", job_id="j" * 36)
        bench.take(partition, first, first)
        assert (bench.running, bench.pipe.admission.counts.duplicates) == ([0], 1)
        assert (offsets_of(partition).pending, list(partition.live)) == (1, [0])
        bench.take(partition, event(spec, "plain", job_id="j" * 36, release=2))
        bench.take(partition, event(spec, "plain", job_id="j" * 36, run=2))
        assert (bench.running, bench.pipe.admission.counts.duplicates) == ([0, 2, 3], 1)
        bench.succeed(partition.live[0])
        bench.acknowledge()
        assert watermark(partition) == 2


# -- settled by what a former owner wrote ---------------------------------------------------------------------------

NO = ErrorInfo("ValueError", "no")
#: A fact of the former owner, and what must be sent again: the kind of the record, its release, attempt and due time
#: in ms after the fact.
PRIOR: dict[str, tuple[Fact, tuple[type, int, int, int | None] | None]] = {
    "succeeded": (JobSucceeded(b"1"), None),
    "the next release is known": (NOTHING_FOLLOWS, None),
    "cancelled": (JobCancelledFact("me", "wrong list"), None),
    "expired": (JobExpiredFact(5), None),
    "retried": (JobRetried(NO, 3_000), (ReleaseRequested, 2, 2, 3_000)),
    "snoozed": (JobSnoozed(4_000, "later"), (ReleaseRequested, 2, 1, 4_000)),
    "failed": (JobFailedFact("exhausted", NO), (DeadLettered, 1, 1, None)),
    "leased": (JobLeased("worker@other:1", 30_000), (Leased, 1, 1, None)),
}


@pytest.mark.parametrize("how", PRIOR)
def test_a_release_that_the_log_settles_already_is_not_run(how: str) -> None:
    """Only the records that derive from the fact are sent again, because the former owner may not have sent them. The
    record is done when they are acknowledged. Until then the next owner must find the fact, too."""
    fact, again = PRIOR[how]
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        value = job("plain")
        partition.prior.scanned_to = 1
        partition.prior.settled[release_key(codec.decode(value).job_id, 1, 1)] = PriorFact(70, 1_000_000, fact)
        partition.offsets = PartitionOffsets(Restored(0), 90)
        bench.take(partition, value)
        assert (bench.running, bench.pipe.admission.counts.found_settled, bench.facts(JobStarted)) == ([], 1, [])
        assert partition.prior.used_up
        if again is None:
            assert (bench.kinds(), watermark(partition), partition.live) == ([], 1, {})
            return
        kind, release, attempt, after_ms = again
        (sent,) = bench.kept.events()
        assert (type(sent.fact), sent.release, sent.attempt) == (kind, release, attempt)
        if isinstance(sent.fact, ReleaseRequested):
            assert (sent.fact.delay_ms, sent.fact.due_at) == (None, (1_000_000 + (after_ms or 0)) * 1000)
        if isinstance(sent.fact, Leased):
            assert sent.fact.worker == "worker@other:1", "the lease is the other worker's, not this one's"
        assert (watermark(partition), offsets_of(partition).floor) == (0, 70)
        bench.acknowledge()
        assert (watermark(partition), offsets_of(partition).floor, partition.live) == (1, 90, {})


def test_a_snooze_for_an_unknown_task_that_is_sent_again_keeps_counting() -> None:
    """Otherwise a crash after each such snooze would let the job wait for its task for ever."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        value = job("elsewhere", tags={UNKNOWN_TASK_TAG: "2", "shop": "north"})
        prior = PriorFact(7, 1_000, JobSnoozed(60_000, "unknown-task"))
        partition.prior.settled[release_key(codec.decode(value).job_id, 1, 1)] = prior
        bench.take(partition, value)
        (asked,) = bench.facts(ReleaseRequested)
        assert asked.spec.tags == {UNKNOWN_TASK_TAG: "3", "shop": "north"}


def test_findings_of_the_takeover_are_dropped_when_all_scanned_records_are_received() -> None:
    """Until then the floor of the commit stays at the beginning of the scan. A record whose schema is looked up counts
    as not received."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        offsets = partition.offsets = PartitionOffsets(Restored(0), 40)
        partition.prior.scanned_to, partition.prior.suspect_below = 2, 0
        partition.prior.starts[1] = 1
        offsets.hold(5)
        bench.take(partition, job("plain"))
        bench.pipe.admission.scan_passed(partition)
        assert (partition.prior.used_up, offsets.floor) == (False, 5)
        bench.take(partition, job("plain"))
        partition.resolving = True
        bench.pipe.admission.scan_passed(partition)
        assert (partition.prior.used_up, offsets.floor) == (False, 5)
        partition.resolving = False
        bench.pipe.admission.scan_passed(partition)
        assert (partition.prior.used_up, partition.prior.scanned_to, offsets.floor) == (True, 0, 40)


# -- parked -----------------------------------------------------------------------------------------------------------


def crowd(bench: PartsBench, partition: Partition) -> None:
    """Let so many jobs of key ``a`` wait that the partition is crowded."""
    bench.take(partition, *(keyed(n) for n in range(CROWDED)))
    assert (partition.backlog.count, partition.backlog.parked) == (CROWDED, 0)


def test_of_a_job_that_must_wait_in_a_crowded_partition_only_the_record_is_kept() -> None:
    """A job that need not wait begins in the same partition. A duplicate of a parked record is still a duplicate."""
    with PartsBench(shop(), lookahead=100) as bench:
        partition = bench.partition()
        crowd(bench, partition)
        value = keyed(CROWDED)
        bench.take(partition, value, value, job("plain"))
        assert (partition.backlog.count, partition.backlog.parked) == (CROWDED + 1, 1)
        assert CROWDED not in partition.live
        assert bench.running == [CROWDED + 2]
        assert bench.pipe.admission.counts.duplicates == 1


@pytest.mark.parametrize("why", ["started before", "attempt announced", "its lease has expired"])
def test_a_job_that_a_former_owner_started_or_leased_is_not_parked(why: str) -> None:
    """A parked record could not keep what the log says about the job: its starts, or the number of its next attempt."""
    with PartsBench(shop(), lookahead=100) as bench:
        partition = bench.partition()
        crowd(bench, partition)
        value = keyed(CROWDED, tags={CRASHES_TAG: "1"} if why == "its lease has expired" else None)
        key = release_key(codec.decode(value).job_id, 1, 1)
        partition.prior.scanned_to = 100
        if why == "started before":
            partition.prior.starts[key] = 2
        elif why == "attempt announced":
            partition.prior.next_attempts[key] = (3, 0, 0)
        bench.take(partition, value)
        assert (partition.backlog.count, partition.backlog.parked) == (CROWDED + 1, 0)
        one = partition.live[CROWDED]
        assert one.event is not None
        expected = {"started before": (True, 2, 1), "attempt announced": (False, 0, 3)}.get(why, (True, 1, 1))
        assert (one.suspect, one.starts_before, one.event.attempt) == expected
        assert partition.prior.used_up


def test_a_tenants_job_whose_task_is_paused_is_snoozed_when_the_memory_for_parked_records_is_half_used() -> None:
    """Until then the tenant's jobs are parked. Afterwards they go back to the coordinator, so that the records of other
    tasks behind them are taken."""
    with PartsBench(shop(), lookahead=100, lookahead_bytes=2_000) as bench:
        partition = bench.partition(queue="fair")
        bench.pause("task", "fair")
        values = [job("fair", queue="fair", tags={"tenant": "x"}, n=n) for n in range(CROWDED + 5)]
        bench.take(partition, *values)
        parked, snoozed = partition.backlog.parked, bench.facts(JobSnoozed)
        assert 1 <= parked <= 3
        assert len(snoozed) == 5 - parked
        assert all("paused by me" in fact.reason for fact in snoozed)
        assert 1_000 <= partition.backlog.parked_bytes < 2_000


# -- held back in the partition ---------------------------------------------------------------------------------------


def dispatcher_of(bench: PartsBench) -> Dispatcher:
    """Let the dispatcher take the records of this test, on the loop of the test."""
    return Dispatcher(bench.pipe, cast(WorkerProducer, bench.kept), bench.ack_tracker, 64)


def test_no_record_is_taken_while_the_backlog_of_a_partition_is_full() -> None:
    """Records are taken again when a quarter of the space is free, not when one job has ended."""
    code = HeldCode()
    with PartsBench(shop(code), lookahead=100, lookahead_bytes=4_000) as bench:
        partition = bench.partition()
        dispatcher = dispatcher_of(bench)
        put(partition, [keyed(n) for n in range(100)])
        dispatcher.wake()
        bench.step()
        left = len(partition.raw)
        assert code.began == [0]
        assert (partition.backlog.full, partition.idle, left > 50) == (True, True, True)
        assert 4_000 <= partition.backlog.parked_bytes < 4_000 + 16 * 1_000
        used: list[int] = []
        for n in range(100):
            used.append(partition.backlog.parked_bytes)
            code.end(n)
            bench.step()
            bench.ack_tracker.serve()  # as its thread does
            bench.step()
            assert code.began == list(range(n + 2))
            if len(partition.raw) < left:
                break
        assert used[-1] >= 3_000 > used[-1] - 500, "the last job's record was the one that made enough room"
        assert len(used) > 2


def test_no_record_is_taken_while_the_completion_map_could_become_too_long() -> None:
    """Every second of twenty thousand records is done. When the others are done, too, the next tick lets the dispatcher
    continue."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        dispatcher = dispatcher_of(bench)
        offsets = offsets_of(partition)
        for offset in range(20_000):
            offsets.receive(offset)
        for offset in range(1, 20_000, 2):
            offsets.done(offset)
        put(partition, [job("plain")])
        dispatcher.wake()
        bench.step()
        assert (partition.braked, partition.idle, len(partition.raw), bench.running) == (True, True, 1, [])
        for offset in range(0, 20_000, 2):
            offsets.done(offset)
        dispatcher.tick()
        bench.step()
        assert (partition.braked, len(partition.raw), bench.running) == (False, 0, [20_000])


# -- jobs that must not run -------------------------------------------------------------------------------------------


def test_an_expiry_in_milliseconds_counts_from_the_append_time() -> None:
    """A job that is taken too late is closed as expired, with the time of its expiry, and is not started."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        early, late = job("plain", expires_in_ms=5_000), job("plain", expires_in_ms=5_000)
        appended = int(bench.clock.wall() * 1000)
        bench.take(partition, early)
        message = bench.message(partition, late)
        bench.advance(5.0)
        bench.pipe.admission.take_up(partition, message, bench.clock.now)
        assert bench.running == [0]
        (fact,) = bench.facts(JobExpiredFact)
        assert fact.expired_at == (appended + 5_000) * 1000
        bench.acknowledge()
        assert list(partition.live) == [0]


def test_a_cancelled_job_is_closed_and_not_started() -> None:
    """The cancel holds for one run of the job: the next run begins."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        value = job("plain")
        cancelled = codec.decode(value)
        bench.pipe.control.cancels[cancelled.job_id, 1] = Cancelled("me", "wrong list")
        bench.take(partition, value, event(cancelled.fact, "plain", job_id=cancelled.job_id, run=2))
        assert bench.facts(JobCancelledFact) == [JobCancelledFact("me", "wrong list")]
        assert bench.running == [1]
        bench.acknowledge()
        assert watermark(partition) == 1


def test_a_job_whose_arguments_do_not_fit_fails_without_a_start() -> None:
    """The dead letter is sent when the failure is acknowledged, and the record is done after that."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        bench.take(partition, job("plain", nobody=1))
        assert [fact.reason for fact in bench.facts(JobFailedFact)] == ["bad-arguments"]
        assert bench.kinds() == ["JobFailedFact"]
        bench.acknowledge(1)
        assert (bench.kinds(), watermark(partition)) == (["JobFailedFact", "DeadLettered"], 0)
        bench.acknowledge()
        assert watermark(partition) == 1


def test_a_job_of_an_unknown_task_is_snoozed_until_the_backoff_is_exhausted() -> None:
    """Another worker may know the task. The tag counts the snoozes; then the job fails."""
    with PartsBench(shop(), unknown_backoff=Retry(max_attempts=2, initial=3.0, jitter=False)) as bench:
        partition = bench.partition()
        for seen in range(3):
            bench.take(partition, job("elsewhere", tags={} if not seen else {UNKNOWN_TASK_TAG: str(seen)}))
        bench.acknowledge()
        assert [(fact.delay_ms, fact.reason) for fact in bench.facts(JobSnoozed)] == [
            (3_000, "unknown-task"),
            (6_000, "unknown-task"),
        ]
        assert [fact.spec.tags for fact in bench.facts(ReleaseRequested)] == [
            {UNKNOWN_TASK_TAG: "1"},
            {UNKNOWN_TASK_TAG: "2"},
        ]
        assert [fact.reason for fact in bench.facts(JobFailedFact)] == ["unknown-task"]
        assert (bench.running, watermark(partition)) == ([], 3)


def test_a_job_whose_task_is_paused_waits() -> None:
    """The job is not started and has no outcome. After the pause, the jobs begin in the order in which they waited."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        bench.pause("task", "plain")
        bench.take(partition, job("plain"), job("plain"))
        assert (bench.kinds(), partition.backlog.count) == ([], 2)
        assert bench.serve() == 0
        bench.resume()
        bench.serve()
        assert bench.running == [0, 1]


def test_a_job_of_a_limited_task_joins_the_jobs_that_wait_although_its_limit_is_open() -> None:
    """Otherwise records that are taken later would use each slot that becomes free."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task(concurrency=1)
    def one(n: int = 0) -> None: ...

    with PartsBench(app) as bench:
        partition = bench.partition()
        bench.take(partition, job("one"), job("one"))
        bench.serve()
        assert (bench.running, partition.backlog.count) == ([0], 1)
        bench.succeed(partition.live[0])
        bench.take(partition, job("one"))
        assert (bench.running, partition.backlog.count) == ([], 2)
        bench.serve()
        assert bench.running == [1]


# -- suspects ---------------------------------------------------------------------------------------------------------


def test_the_code_of_a_job_that_the_last_owner_may_have_begun_waits_for_its_start_to_be_acknowledged() -> None:
    """Jobs at or above `suspect_below` are not suspects, because the last owner cannot have begun them."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        partition.prior.scanned_to, partition.prior.suspect_below = 10, 1
        bench.take(partition, job("plain"))
        assert (bench.kinds(), partition.busy) == (["JobStarted"], False)
        bench.acknowledge()
        assert partition.busy
        bench.take(partition, job("plain"))
        assert [work.suspect for work in partition.live.values()] == [True, False]


def test_a_new_start_counts_the_starts_that_the_log_has() -> None:
    """Until the new start is acknowledged, the next owner must find the earlier ones: the floor stays at the beginning
    of the scan."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        offsets = partition.offsets = PartitionOffsets(Restored(0), 40)
        value = job("plain")
        partition.prior.scanned_to, partition.prior.floor = 10, 7
        partition.prior.starts[release_key(codec.decode(value).job_id, 1, 1)] = 2
        bench.take(partition, value)
        assert [fact.takeover for fact in bench.facts(JobStarted)] == [2]
        assert (offsets.floor, partition.prior.used_up) == (7, True)


@pytest.mark.parametrize("starts", [2, 3])
@pytest.mark.parametrize("where", ["log", "tag"])
def test_a_job_with_three_starts_without_an_outcome_fails_as_crashed(where: str, starts: int) -> None:
    """The starts are in the log, or the coordinator counted the leases that expired, in a tag. This worker has no child
    processes, so it sees no process end and the limit is three."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        value = job("plain", tags={CRASHES_TAG: str(starts)} if where == "tag" else None)
        partition.prior.scanned_to = 10
        if where == "log":
            partition.prior.starts[release_key(codec.decode(value).job_id, 1, 1)] = starts
        bench.take(partition, value)
        failed = [fact.reason for fact in bench.facts(JobFailedFact)]
        assert (failed, len(bench.facts(JobStarted))) == ((["crashed"], 0) if starts == 3 else ([], 1))


def test_starts_in_the_log_and_expired_leases_are_added() -> None:
    """One start in the log and two expired leases are three starts."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        value = job("plain", tags={CRASHES_TAG: "2"})
        partition.prior.scanned_to = 10
        partition.prior.starts[release_key(codec.decode(value).job_id, 1, 1)] = 1
        bench.take(partition, value)
        assert [fact.reason for fact in bench.facts(JobFailedFact)] == ["crashed"]


def test_a_keyed_job_that_has_crashed_is_closed_in_its_turn() -> None:
    """Its failure must not be in the log before the outcome of the job before it."""
    code = HeldCode()
    with PartsBench(shop(code)) as bench:
        partition = bench.partition()
        values = [keyed(0), keyed(1)]
        partition.prior.scanned_to = 10
        partition.prior.starts[release_key(codec.decode(values[1]).job_id, 1, 1)] = 3
        bench.take(partition, *values)
        bench.serve()
        bench.step()
        assert (code.began, bench.facts(JobFailedFact)) == ([0], [])
        code.end(0)
        bench.free()
        bench.acknowledge()
        bench.free()
        bench.serve()
        assert [fact.reason for fact in bench.facts(JobFailedFact)] == ["crashed"]
        assert isinstance(partition.live[1], JobRun)
