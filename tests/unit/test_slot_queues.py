"""Jobs that wait for a free thread or child process: their order, and what is checked again when a slot is free. No
Kafka and no thread: the jobs "run" until the test ends them."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger import App, Breaker, Queue
from jobledger.consumers.scheduling.lanes import Lane
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.work import Partition
from jobledger.definitions.policy import Limits
from jobledger.schemas import codec
from jobledger.schemas.events import JobCancelledFact, JobExpiredFact, JobStarted
from tests.pipe_bench import PartsBench, job


def shop(**options: Any) -> App:
    """Return an app with two plain functions, and two queues. ``options``: options of the function ``held``."""
    app = App("shop", queues=[Queue("default", partitions=1), Queue("few", partitions=1)])

    @app.task
    def other(n: int = 0) -> None: ...

    @app.task(queue="few", **options)
    def held(n: int = 0) -> None: ...

    return app


def occupied(bench: PartsBench, waiting: int, **about: Any) -> tuple[Partition, Partition]:
    """Let a job of ``other`` occupy the only thread, and let jobs of ``held`` wait for it. Return the partition of
    each queue. ``about``: see `job`."""
    first, second = bench.partition(), bench.partition(queue="few")
    bench.take(first, job("other"))
    bench.take(second, *(job("held", queue="few", **about) for _ in range(waiting)))
    assert bench.pipe.slot_queues.start() == 0, "no thread is free"
    return first, second


def started(bench: PartsBench) -> list[int]:
    """Return the offsets of the jobs of ``held`` that were started, in order."""
    return [
        event.fact.work_offset
        for event in bench.kept.events()
        if isinstance(event.fact, JobStarted) and event.task == "held"
    ]


def test_each_free_slot_begins_one_job_in_the_order_of_arrival() -> None:
    """The jobs before it have begun; the jobs behind it wait."""
    with PartsBench(shop(), threads=1) as bench:
        first, second = occupied(bench, 3)
        bench.succeed(first.live[0])
        for n in range(3):
            assert bench.pipe.slot_queues.start() == 1
            assert started(bench) == list(range(n + 1))
            assert bench.pipe.tasks.threads.running == 1
            assert bench.pipe.slot_queues.start() == 0
            bench.succeed(second.live[n])
        assert bench.pipe.tasks.threads.running == 0


def test_no_more_jobs_begin_than_the_worker_may_run_at_once() -> None:
    """Threads are free, but the concurrency of the worker is used up."""
    with PartsBench(shop(), threads=3, concurrency=2) as bench:
        partition = bench.partition(queue="few")
        bench.take(partition, *(job("held", queue="few") for _ in range(6)))
        assert bench.running == [0, 1, 2], "the dispatcher limits what it takes; admission does not"
        for n in (0, 1):
            bench.succeed(partition.live[n])
        assert bench.pipe.slot_queues.start() == 1
        assert bench.running == [2, 3]
        assert bench.pipe.tasks.threads.free(0.0) == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_job_that_must_not_start_any_more_is_closed_and_leaves_the_slot_to_the_next(how: str) -> None:
    """The job was cancelled, or has expired, while it waited."""
    with PartsBench(shop(), threads=1) as bench:
        first, second = bench.partition(), bench.partition(queue="few")
        value = job("held", queue="few", expires_in_ms=5_000 if how == "expired" else None)
        bench.take(first, job("other"))
        bench.take(second, value, job("held", queue="few"))
        if how == "cancelled":
            bench.pipe.control.cancels[codec.decode(value).job_id, 1] = Cancelled("me", None)
        bench.advance(5.0)
        bench.succeed(first.live[0])
        assert bench.pipe.slot_queues.start() == 2
        assert len(bench.facts(JobCancelledFact if how == "cancelled" else JobExpiredFact)) == 1
        assert started(bench) == [1]
        bench.acknowledge()
        assert list(second.live) == [1]


@pytest.mark.parametrize("gate", ["paused task", "breaker"])
def test_a_job_whose_task_may_not_start_gives_its_slot_to_another_task(gate: str) -> None:
    """The job waits for its task in a wait queue. It begins when its gate is open."""
    with PartsBench(shop(breaker=Breaker(failures=1, reset=20.0)), threads=1) as bench:
        first, second = bench.partition(), bench.partition(queue="few")
        bench.take(second, job("held", queue="few"), job("held", queue="few"))
        bench.take(first, job("other"))
        assert started(bench) == [0]
        if gate == "paused task":
            bench.pause("task", "held")
            bench.succeed(second.live[0])
        else:
            failing = second.live[0]
            bench.pipe.recorder.raised(failing, ValueError("no"), False)
            bench.reports.ended(failing)
            bench.free()
        bench.lanes.turns.took(bench.lanes.by_topic[first.topic], 1)  # so the other queue is first
        assert bench.pipe.slot_queues.start() == 2
        assert (started(bench), second.backlog.count) == ([0], 1)
        assert [work.partition for work in bench.pipe.running.jobs] == [first]
        bench.succeed(first.live[0])
        assert bench.serve() == 0
        if gate == "paused task":
            bench.resume()
        else:
            bench.advance(20.0)
        bench.serve()
        assert started(bench) == [0, 1]


def test_a_paused_queue_keeps_its_jobs_in_order_and_the_slot_goes_to_another_queue() -> None:
    """The queue's limits hold for all of its tasks, so no job behind the first one can begin either."""
    with PartsBench(shop(), threads=1) as bench:
        first, _second = occupied(bench, 2)
        bench.take(first, job("other"))
        bench.pause("queue", "few")
        bench.succeed(first.live[0])
        assert bench.pipe.slot_queues.start() == 1
        assert (started(bench), len(bench.pipe.running.jobs)) == ([], 1)
        bench.succeed(first.live[1])
        assert bench.pipe.slot_queues.start() == 0
        bench.resume()
        assert bench.pipe.slot_queues.start() == 1
        assert started(bench) == [0]


def test_the_limit_of_a_queue_is_checked_again_for_each_free_slot() -> None:
    """The limit was set while the jobs waited. Two threads are free, and one job of the queue may run."""
    with PartsBench(shop(), threads=2) as bench:
        first, second = bench.partition(), bench.partition(queue="few")
        bench.take(first, job("other"), job("other"))
        bench.take(second, job("held", queue="few"), job("held", queue="few"))
        bench.pipe.control.limits["queue", "few"] = Limits(None, 1)
        bench.lanes.regate(bench.pipe.control)
        for n in range(2):
            bench.succeed(first.live[n])
        assert bench.pipe.slot_queues.start() == 1
        assert bench.pipe.slot_queues.start() == 0
        bench.succeed(second.live[0])
        assert (bench.pipe.slot_queues.start(), started(bench)) == (1, [0, 1])


def test_a_job_waits_until_the_ownership_lease_is_confirmed() -> None:
    """The worker was paused while the job waited. It asks the group, and the job keeps its place."""
    with PartsBench(shop(), threads=1) as bench:
        first, second = occupied(bench, 2)
        bench.succeed(first.live[0])
        bench.advance(3_601.0)
        assert bench.pipe.slot_queues.start() == 0
        assert (second.lease.wanted, second.taking, started(bench)) == (True, False, [])
        second.lease.confirm(bench.clock.now)
        assert (bench.pipe.slot_queues.start(), started(bench)) == (1, [0])


@pytest.mark.parametrize("why", ["given up", "stopped"])
def test_a_job_of_a_partition_that_is_no_longer_served_is_dropped(why: str) -> None:
    """Nothing is recorded for the job, because it belongs to the next owner. Jobs of other partitions get the slot."""
    with PartsBench(shop(), threads=1) as bench:
        first, second = occupied(bench, 2)
        bench.take(first, job("other"))
        if why == "given up":
            second.give_up()
        else:
            second.start_no_more("upgrade this worker")
        bench.succeed(first.live[0])
        sent = len(bench.kept.sent)
        bench.pipe.slot_queues.start()
        bench.pipe.slot_queues.start()
        assert bench.running == [1]
        assert bench.kinds()[sent:] == ["JobStarted"]
        assert second.offsets is not None
        assert (second.offsets.watermark, second.offsets.pending, second.taking) == (0, 2, False)


def test_a_worker_that_stops_forgets_the_jobs_that_wait_for_a_slot() -> None:
    """They are not live, so the handover does not wait for them, and they are not done."""
    with PartsBench(shop(), threads=1) as bench:
        first, second = occupied(bench, 3)
        bench.pipe.slot_queues.drop()
        assert (second.live, bench.lanes.by_topic[second.topic].waiting["threads"]) == (
            {},
            type(bench.reports.finished)(),
        )
        bench.succeed(first.live[0])
        assert bench.pipe.slot_queues.start() == 0
        assert second.offsets is not None
        assert (second.offsets.pending, second.busy) == (3, False)


def test_among_queues_that_wait_for_a_slot_the_one_with_the_fewest_starts_for_its_weight_is_first() -> None:
    """High priority has 64 starts for each start of low priority."""
    app = App("shop", queues=[Queue("mail", partitions=1, priorities=True)], default_queue="mail")

    @app.task
    def send(n: int = 0) -> None: ...

    def next_of(high_starts: int, low_starts: int) -> str | None:
        """Return the priority that gets the slot after so many starts."""
        with PartsBench(app, threads=1) as bench:
            lanes: dict[str | None, Lane] = {lane.priority: lane for lane in bench.lanes.all}
            normal, high, low = (bench.partition(queue="mail", level=level) for level in (None, "high", "low"))
            bench.take(normal, job("send", queue="mail"))
            bench.take(low, job("send", queue="mail"))
            bench.take(high, job("send", queue="mail"))
            bench.lanes.turns.took(lanes["high"], high_starts)
            bench.lanes.turns.took(lanes["low"], low_starts)
            bench.succeed(normal.live[0])
            assert bench.pipe.slot_queues.start() == 1
            (work,) = bench.pipe.running.jobs
            return bench.lanes.by_topic[work.partition.topic].priority

    assert next_of(0, 1) == "high"
    assert next_of(63, 1) == "high"
    assert next_of(65, 1) == "low"
