"""What is checked and counted when a job begins. No Kafka and no thread: no code of a job runs here."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger import App, Queue
from jobledger.consumers.state.outcome import Cancelled, Expired
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.log.commit_metadata import decode
from jobledger.schemas import codec
from jobledger.schemas.events import JobStarted, Leased
from tests.pipe_bench import PartsBench, job


def shop(**options: Any) -> App:
    """Return an app with a plain function. ``options``: its options."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task(**options)
    def plain(n: int = 0) -> None: ...

    return app


def job_run(bench: PartsBench, partition: Partition, value: bytes, offset: int = 0) -> JobRun:
    """Return a job as admission passes it on, ready to start."""
    assert partition.offsets is not None
    partition.offsets.receive(offset)
    event = codec.decode(value)
    work = JobRun(partition, offset, event, bench.reports.arrived)
    work.runtime = bench.runtime(event.task)
    partition.live[offset] = work
    assert bench.pipe.recorder.takes_arguments(work)
    return work


def test_a_job_begins_only_while_a_slot_is_free_where_its_code_runs() -> None:
    """The other jobs wait, in order, and nothing is sent for them."""
    with PartsBench(shop(), threads=2) as bench:
        partition = bench.partition()
        works = [job_run(bench, partition, job("plain"), n) for n in range(4)]
        for work in works:
            bench.pipe.starter.start(work, bench.clock.now)
        assert (bench.running, len(bench.facts(JobStarted))) == ([0, 1], 2)
        assert bench.pipe.tasks.threads.running == 2
        assert [work.waiting for work in works] == [False, False, True, True]
        assert list(bench.lanes.all[0].waiting["threads"]) == works[2:]
        for work in works[:2]:
            bench.succeed(work)
        assert bench.pipe.tasks.threads.running == 0


def test_a_coroutine_needs_no_slot() -> None:
    """The worker's concurrency limits coroutines; the starter does not."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task
    async def light(n: int = 0) -> None: ...

    with PartsBench(app, threads=1) as bench:
        partition = bench.partition()
        for n in range(5):
            bench.pipe.starter.start(job_run(bench, partition, job("light"), n), bench.clock.now)
        assert bench.running == [0, 1, 2, 3, 4]


def test_a_cancelled_job_is_refused_and_only_in_the_cancelled_run() -> None:
    """The outcome names who cancelled. A cancel comes before an expiry."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        work = job_run(bench, partition, job("plain"))
        assert work.event is not None
        control, refused = bench.pipe.control, bench.pipe.starter.refused
        assert refused(work) is None
        control.cancels[work.event.job_id, 2] = Cancelled("me", "the next run")
        assert refused(work) is None
        control.cancels[work.event.job_id, 1] = Cancelled("me", "this run")
        work.expires_at = 1
        assert refused(work) == Cancelled("me", "this run")


def test_an_expiry_is_a_time_of_the_brokers_clock() -> None:
    """This machine's clock is ten seconds behind the broker's, as the append time of a record has shown."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        work = job_run(bench, partition, job("plain"))
        here_ms = int(bench.clock.wall() * 1000)
        work.expires_at = (here_ms + 12_000) * 1000
        bench.kept.clock.observe(here_ms + 10_000)
        bench.advance(1.75)
        assert bench.pipe.starter.refused(work) is None
        bench.advance(0.5)
        assert bench.pipe.starter.refused(work) == Expired(work.expires_at)


def test_a_job_that_begins_is_counted_at_the_limits_of_its_task_and_queue_until_it_ends() -> None:
    """A job that only waits for a slot is not counted."""
    app = App("shop", queues=[Queue("default", partitions=1, concurrency=5)])

    @app.task(concurrency=3, adaptive=True)
    def plain(n: int = 0) -> None: ...

    with PartsBench(app, threads=1) as bench:
        partition = bench.partition()
        works = [job_run(bench, partition, job("plain"), n) for n in range(2)]
        for work in works:
            bench.pipe.starter.start(work, bench.clock.now)
        runtime = bench.runtime("plain")
        assert runtime.adaptive is not None
        gates = (bench.lanes.limiters["default"], runtime.limiter, runtime.adaptive)
        assert [gate.running for gate in gates] == [1, 1, 1]
        assert (runtime.started, bench.pipe.running.begun) == (1, 1)
        bench.succeed(works[0])
        assert [gate.running for gate in gates] == [0, 0, 0]


def test_a_begun_record_is_named_in_the_next_commit() -> None:
    """If this worker dies, the next owner suspects the jobs that were begun. A job that waits for a slot was not
    begun."""
    with PartsBench(shop(), threads=1) as bench:
        partition = bench.partition()
        for n in range(3):
            bench.pipe.starter.start(job_run(bench, partition, job("plain"), n), bench.clock.now)
        assert partition.offsets is not None
        snapshot = partition.offsets.snapshot()
        assert snapshot is not None
        assert decode(snapshot.offset, snapshot.metadata, 10).begun == 1


def test_a_long_job_takes_its_lease_before_its_code_may_run() -> None:
    """`JobLeased` and `Leased` are sent, and no start. The code may run when both are acknowledged."""
    with PartsBench(shop(timeout=600, lease=30)) as bench:
        partition = bench.partition()
        bench.pipe.starter.start(job_run(bench, partition, job("plain")), bench.clock.now)
        assert bench.kinds() == ["JobLeased", "Leased"]
        assert [(fact.worker, fact.lease_ms) for fact in bench.facts(Leased)] == [("worker@unit:1", 30_000)]
        bench.acknowledge(1)
        assert not bench.reports.asked
        bench.acknowledge()
        assert [asked.name for asked, _ in bench.reports.asked] == ["LEASED"]
        assert partition.offsets is not None
        assert partition.offsets.watermark == 1, "from now on the lease keeps the job, and not the record"


@pytest.mark.parametrize("known", [True, False])
def test_the_time_that_a_job_has_waited_is_counted_once(known: bool) -> None:
    """A second attempt in place does not count again, and a record without a time does not count."""
    with PartsBench(shop()) as bench:
        partition = bench.partition()
        work = job_run(bench, partition, job("plain"))
        work.appended = 1 if known else 0
        lane = bench.lanes.all[0]
        for _ in range(2):
            bench.pipe.starter.start(work, bench.clock.now)
        assert sum(lane.wait_counts) == known
        assert lane.wait_counts[-1] == known, "it has waited since 1970"
