"""The worker's loop in situations that a test cannot produce with a real broker. Dispatcher, wait queues, executor,
ack tracker and offsets are the real ones; records for Kafka are kept in a list. The same parts run against a real
broker in tests/integration and tests/acceptance."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger import App, Breaker, Queue, Snooze, current_job
from jobledger.config import Settings
from jobledger.consumers.partitions.committer import LOST_S, Committer
from jobledger.consumers.running.placement import UNSEEN_CRASHES
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.offset_tracker import Snapshot
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.definitions.policy import Limits
from jobledger.definitions.retry import Retry
from jobledger.errors import BrokerUnavailable, JobledgerError
from jobledger.kafka.outage import outage_of
from jobledger.log.commit_metadata import decode
from jobledger.schemas import codec, confluent_frame
from jobledger.schemas.events import (
    ErrorInfo,
    JobCancelledFact,
    JobEvent,
    JobExpiredFact,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobSucceeded,
    LeaseRenewed,
)
from tests.pipe_bench import LIMIT, Bench, FreeChildren, for_ever, job, put, run, starts, until


def test_a_lost_partition_does_not_block_the_jobs_that_wait_for_a_limit() -> None:
    """Jobs of two partitions wait for a limit that opens when a job ends. One partition is lost, and the jobs of the
    other one continue."""
    app = App("shop", queues=[Queue("default", partitions=2)])
    ran: list[str] = []

    @app.task(key="k", timeout=30, concurrency=2)
    async def book(k: str) -> None:
        ran.append(k)
        await asyncio.sleep(0.02)

    async def test() -> None:
        bench = Bench(app)
        first, second = bench.partition(0), bench.partition(1)
        for name, partition in (("p", first), ("q", second)):
            put(partition, [job("book", key=f"{name}{n}", k=f"{name}{n}") for n in range(20)])
        bench.dispatcher.wake()
        await until(lambda: len(ran) >= 2)
        first.give_up()
        bench.dispatcher.no_longer_owned([first])
        await until(lambda: sum(name[0] == "q" for name in ran) == 20)
        assert not bench.failed
        bench.close()

    run(test)


def test_a_free_thread_goes_to_a_task_that_is_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait queues of a paused task come before those of another task for the same thread. The turn passes to the
    other task."""
    app = App("shop", queues=[Queue("default", partitions=2, fair_by="tenant")])
    ran: list[str] = []

    @app.task
    def paused(n: int) -> None:
        ran.append("paused")

    @app.task
    def free(n: int) -> None:
        ran.append("free")

    async def test() -> None:
        bench = Bench(app, threads=1)
        partition = bench.partition()
        busy: list[Any] = []
        monkeypatch.setattr(bench.dispatcher.pipe.executor, "submit", busy.append)  # the job's thread does not end
        put(partition, [job("free", n=0), *(job(name, n=n) for n in range(1, 4) for name in ("paused", "free"))])
        bench.dispatcher.wake()
        await until(lambda: busy and partition.backlog.count == 6)
        scope = bench.dispatcher.pipe.tasks.runtimes["paused"].limiter
        scope.paused = "by me"
        for runtime in bench.dispatcher.pipe.tasks.runtimes.values():
            runtime.regate()
        for n in range(4):
            await until(lambda n=n: len(busy) > n)  # type: ignore[misc]  # n is bound
            bench.dispatcher.pipe.reports.ended_in_thread(busy[n])
        assert [work.event.task for work in busy] == ["free"] * 4
        bench.close()

    run(test)


@pytest.mark.parametrize("gate", ["task", "queue", "paused task", "paused queue", "breaker"])
def test_a_gate_that_closes_while_a_job_waits_for_a_thread_holds_it_back(
    gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates were open when the job was taken. The worker checks them again when a thread is free."""
    limit = 1 if gate == "queue" else None
    app = App("shop", queues=[Queue("default", partitions=1), Queue("few", partitions=1, concurrency=limit)])

    @app.task
    def other(n: int) -> None: ...

    @app.task(queue="few", concurrency=1 if gate == "task" else None, breaker=Breaker(1) if gate == "breaker" else None)
    def held(n: int) -> None: ...

    async def test() -> None:
        bench = Bench(app, threads=4)
        given: list[JobRun] = []
        monkeypatch.setattr(bench.dispatcher.pipe.executor, "submit", given.append)
        d = bench.dispatcher
        first, second = bench.partition(), bench.partition(queue="few")
        put(first, [job("other", n=n) for n in range(4)])
        d.wake()
        await until(lambda: len(given) == 4)
        put(second, [job("held", queue="few", n=n) for n in range(6)])
        d.wake()
        await until(lambda: len(d.pipe.lanes.by_topic[second.topic].waiting.get("threads", ())) == 6)
        if gate == "paused task":
            d.pipe.control.paused["task", "held"] = "by me"
            d.regate()
        elif gate == "paused queue":
            d.pipe.control.paused["queue", "few"] = "by me"
            d.regate()
        elif gate == "breaker":
            breaker = d.pipe.tasks.runtimes["held"].breaker
            assert breaker is not None
            breaker._open_until = time.monotonic() + 3600
        for work in given[:4]:
            d.pipe.reports.ended_in_thread(work)
        await asyncio.sleep(0.2)
        begun = 1 if gate in ("task", "queue") else 0
        assert len(given) == 4 + begun
        if begun:  # each end lets the next job begin
            for n in range(5):
                d.pipe.reports.ended_in_thread(given[4 + n])
                await until(lambda n=n: len(given) == 6 + n)  # type: ignore[misc]  # n is bound
        elif gate != "breaker":
            d.pipe.control.paused.clear()
            d.regate()
            await until(lambda: len(given) == 8)
        assert not bench.failed
        bench.close()

    run(test)


def test_jobs_whose_task_was_paused_while_they_waited_for_a_thread_do_not_wait_for_all_later_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Records of another task are taken all the time. When the pause ends, the jobs join the jobs that wait for a
    thread."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task
    def paused(n: int) -> None: ...

    @app.task
    def other(n: int) -> None: ...

    async def test() -> None:
        bench = Bench(app, threads=1)
        d = bench.dispatcher
        given: list[JobRun] = []
        monkeypatch.setattr(d.pipe.executor, "submit", given.append)
        partition = bench.partition()
        put(partition, [job("other", n=0), *(job("paused", n=n) for n in range(3))])
        d.wake()
        await until(lambda: len(given) == 1 and len(d.pipe.lanes.all[0].waiting["threads"]) == 3)
        d.pipe.control.paused["task", "paused"] = "by me"
        d.regate()
        put(partition, [job("other", n=n) for n in range(1, 1_500)])

        async def ended(least: int) -> None:
            while len(given) < least:
                count = len(given)
                d.pipe.reports.ended_in_thread(given[-1])
                await until(lambda count=count: len(given) > count)  # type: ignore[misc]  # count is bound

        await ended(10)
        d.pipe.control.paused.clear()
        d.regate()
        await ended(400)
        assert [work.runtime.name for work in given if work.runtime].count("paused") == 3
        assert not bench.failed
        bench.close()

    run(test)


def test_a_suspect_that_waits_for_a_slot_is_not_snoozed() -> None:
    """The next release of a snoozed job would not be a suspect, so it would run beside other jobs."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task
    async def work(n: int) -> None: ...

    async def test() -> None:
        bench = Bench(app, lookahead=1)
        d = bench.dispatcher
        partition = bench.partition()
        runtime = d.pipe.tasks.runtimes["work"]
        runtime.limiter.paused = "by me"
        runtime.regate()
        put(partition, [job("work", n=n) for n in range(60)])
        d.wake()
        await until(lambda: partition.backlog.count == 50)
        assert d.wait_queues.half_full(partition)
        waiting = partition.backlog.wait_queues["task", "work"].works[0]
        assert isinstance(waiting, JobRun)
        one = JobRun(partition, 1_000, waiting.event, bench.arrived)
        one.suspect = True
        before = len(bench.kept.sent)
        d.wait_queues.wait_for_gate(one, runtime, ("task", "work"), time.monotonic())
        assert (partition.backlog.count, len(bench.kept.sent)) == (51, before)
        bench.close()

    run(test)


@pytest.mark.parametrize("kind", ["task", "queue"])
def test_a_limit_counts_the_jobs_that_were_running_when_it_was_set(kind: str) -> None:
    """No job begins until fewer jobs run than the limit allows. After all jobs have ended, the count is 0."""
    app = App("shop", queues=[Queue("default", partitions=1)])
    free, running = asyncio.Semaphore(0), 0

    @app.task
    async def held(n: int) -> None:
        nonlocal running
        running += 1
        await free.acquire()
        running -= 1

    async def test() -> None:
        bench = Bench(app)
        d = bench.dispatcher
        partition = bench.partition()
        put(partition, [job("held", n=n) for n in range(5)])
        d.wake()
        await until(lambda: running == 5)
        place = (kind, "held" if kind == "task" else "default")
        d.pipe.control.limits[place] = Limits(None, 2)
        d.regate()
        put(partition, [job("held", n=n) for n in range(5)])
        d.wake()
        await asyncio.sleep(0.2)
        assert running == 5
        for left in (4, 3, 2, 2, 2):
            free.release()
            await until(lambda left=left: running == left)  # type: ignore[misc]  # left is bound
            await asyncio.sleep(0.05)
            assert running == left
        for _ in range(5):
            free.release()
        await until(lambda: len(bench.kept.ended()) == 10)
        scope = d.pipe.lanes.limiters["default"] if kind == "queue" else d.pipe.tasks.runtimes["held"].limiter
        assert scope.running == 0
        assert not bench.failed
        bench.close()

    run(test)


def test_room_is_made_although_the_longest_wait_queue_ends_with_a_suspect() -> None:
    """Suspects are kept. The newest jobs of another paused task are given back to the coordinator."""
    app = App("shop")

    @app.task
    async def many(n: int) -> None: ...

    @app.task
    async def few(n: int) -> None: ...

    async def test() -> None:
        bench = Bench(app)
        partition = bench.partition()
        for runtime in bench.dispatcher.pipe.tasks.runtimes.values():
            runtime.limiter.paused = "by me"
            runtime.regate()
        put(partition, [*(job("many", n=n) for n in range(5)), *(job("few", n=n) for n in range(3))])
        bench.dispatcher.wake()
        await until(lambda: partition.backlog.count == 8 and len(bench.dispatcher.wait_queues.awaited) == 2)
        longest = partition.backlog.wait_queues["task", "many"]
        longest.works[-1].suspect = True
        bench.dispatcher.wait_queues.make_room(partition)
        assert (len(longest.works), len(partition.backlog.wait_queues["task", "few"].works)) == (5, 1)
        assert [type(fact) for fact in bench.kept.facts()] == [JobSnoozed, JobSnoozed]
        assert not bench.failed
        bench.close()

    run(test)


def test_a_record_that_breaks_the_schema_resolver_ends_the_worker() -> None:
    """Otherwise the resolver's thread would end, and the partition would wait forever."""

    class Breaks(codec.Decoder):
        def asks(self, value: bytes | None) -> bool:
            return True

        def decode(self, value: bytes | None) -> JobEvent:
            raise RuntimeError("no such thing")

    app = App("shop")

    async def test() -> None:
        bench = Bench(app, decoder=Breaks())
        put(bench.partition(), [b"of another writer"])
        bench.dispatcher.wake()
        await until(lambda: bench.failed)
        assert "default[0]" in str(bench.failed[0])
        assert "no such thing" in str(bench.failed[0])
        bench.close()

    run(test)


def test_a_cancel_before_the_first_step_of_a_coroutine_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cancel arrives between the decision to start and the first step. The job ends as cancelled, and its slot is
    free."""
    app = App("shop")

    @app.task
    async def work(n: int) -> None:
        await asyncio.sleep(30)

    async def test() -> None:
        bench = Bench(app)
        partition = bench.partition()
        value = job("work", n=1)
        job_id = codec.decode(value).job_id
        places = bench.dispatcher.placement
        begin = places.begin_code

        def ordered_meanwhile(*about: Any) -> None:
            bench.dispatcher.call(bench.dispatcher.cancelled, job_id, 1, Cancelled("me", "wrong list"))
            begin(*about)

        monkeypatch.setattr(places, "begin_code", ordered_meanwhile)
        put(partition, [value])
        bench.dispatcher.wake()
        await until(lambda: any(isinstance(fact, JobCancelledFact) for fact in bench.kept.facts()))
        await until(lambda: not bench.dispatcher.running_jobs.jobs)
        bench.close()

    run(test)


@pytest.mark.parametrize("tuned", [False, True], ids=["asyncio", "uvloop"])
def test_context_variables_do_not_pass_from_job_to_job(tuned: bool) -> None:
    """A context variable that a job sets is not visible in the next job, although the end of the first job starts the
    next one."""
    import uvloop

    tenant: contextvars.ContextVar[str | None] = contextvars.ContextVar("tenant", default=None)
    app, seen = App("shop"), list[str | None]()

    @app.task
    async def sets(n: int) -> None:
        seen.append(tenant.get())
        tenant.set(f"tenant {n}")

    async def test() -> None:
        bench = Bench(app, concurrency=1)
        put(bench.partition(), [job("sets", n=n) for n in range(5)])
        bench.dispatcher.wake()
        await until(lambda: len(seen) == 5)
        bench.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if tuned else None) as runner:
        runner.run(test())
    assert seen == [None] * 5


def test_a_key_keeps_its_order_while_a_schema_is_looked_up() -> None:
    """Another thread looks up the schema of the first record. The later records of the same key wait for this
    record."""
    app, order = App("shop"), list[int]()

    @app.task(key="k", timeout=30)
    async def keyed(k: str, n: int) -> None:
        order.append(n)

    def slowly(schema_id: int, likely: bool) -> str:
        time.sleep(0.05)
        return codec.SCHEMA_TEXT

    async def test() -> None:
        bench = Bench(app, decoder=codec.Decoder(None, slowly))
        values = [confluent_frame.head(7) + job("keyed", key="a", k="a", n=n)[10:] for n in range(300)]
        put(bench.partition(), values)
        bench.dispatcher.wake()
        await until(lambda: len(order) == 300)
        bench.close()

    run(test)
    assert order == list(range(300))


def test_limits_hold_for_records_of_another_schema() -> None:
    """Jobs whose records another version wrote run in the order of the log, and not more than the limit at once."""
    app, most, running = App("shop"), 0, 0
    order: list[int] = []

    @app.task
    async def slow(n: int) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        order.append(n)
        await asyncio.sleep(0.01)
        running -= 1

    later = json.loads(codec.SCHEMA_TEXT)
    later["fields"].append({"name": "extra", "type": "int", "default": 0})
    text = json.dumps(later)
    mark = codec.fingerprint(text)

    async def test() -> None:
        bench = Bench(app, decoder=codec.Decoder(lambda asked: text if asked == mark else None), concurrency=10)
        put(bench.partition(), [codec.MAGIC + mark + job("slow", n=n)[10:] + b"\0" for n in range(200)])
        bench.dispatcher.wake()
        await until(lambda: len(order) == 200)
        bench.close()

    run(test)
    assert most == 10
    assert order == sorted(order)


def test_an_attempt_in_place_is_passed_to_the_next_owner_before_its_retry_is_acknowledged() -> None:
    """The partition is handed over while the `JobRetried` of a keyed job is not acknowledged. The commit says "not
    clean", so the next owner reads the lifecycle partition."""
    app = App("shop")

    @app.task(key="k", timeout=30, retry=Retry(max_attempts=3, initial=10.0))
    async def book(k: str) -> None:
        raise ValueError("x")

    async def test() -> None:
        bench = Bench(app)
        bench.kept.frozen = True
        partition = bench.partition()
        put(partition, [job("book", key="a", k="a")])
        bench.dispatcher.wake()
        await until(lambda: any(isinstance(fact, JobRetried) for fact in bench.kept.facts()))
        await until(lambda: not partition.busy)
        partition.give_up()
        committed: list[Any] = []

        def commit(offsets: list[Any], asynchronous: bool) -> list[Any]:
            committed.extend(offsets)
            return []

        consumer = SimpleNamespace(commit=commit)
        committer = Committer(
            Settings(), cast(Any, consumer), "g", partition.lease, bench.ack_tracker, bench.failed.append
        )
        committer.commit([partition], final=True)
        restored = decode(committed[0].offset, committed[0].metadata, 10)
        assert not restored.clean
        assert restored.floor == 0
        bench.close()

    run(test)


def test_a_commit_that_the_client_has_lost_ends_the_worker() -> None:
    """A commit that does not return ends the worker, because its queue would make no progress. An outage of the cluster
    is an exception."""
    asked, returns = threading.Event(), threading.Event()
    failed: list[JobledgerError] = []

    def commit(offsets: list[Any], asynchronous: bool) -> list[Any]:
        asked.set()
        returns.wait(60.0)
        return []

    settings = Settings(bootstrap="lost.example:9092")
    lease = OwnershipLease(60.0, lambda: None)
    ack_tracker = cast(Any, SimpleNamespace(commits_stopped=False))
    committer = Committer(settings, cast(Any, SimpleNamespace(commit=commit)), "g", lease, ack_tracker, failed.append)
    taken = [(Partition("shop.jobs.mail", 0, lease, 0, None), Snapshot(0, ""))]
    thread = threading.Thread(target=committer.commit_snapshots, args=(taken,))
    committer.check(time.monotonic() + 2 * LOST_S)
    thread.start()
    assert asked.wait(60.0)
    committer.check(time.monotonic() + LOST_S / 2)
    outage_of(settings).said = True
    committer.check(time.monotonic() + 2 * LOST_S)
    assert not failed
    outage_of(settings).said = False
    committer.check(time.monotonic() + 2 * LOST_S)
    assert [type(error) for error in failed] == [BrokerUnavailable]
    assert "group g" in str(failed[0])
    returns.set()
    thread.join(60.0)
    committer.check(time.monotonic() + 2 * LOST_S)
    assert len(failed) == 1


def test_a_refused_commit_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Refusals of the same kind are logged in one line for all partitions of a queue, until a commit is accepted."""
    refusals: list[Exception] = []

    def commit(offsets: list[Any], asynchronous: bool) -> list[Any]:
        if refusals:
            raise refusals.pop()
        return []

    lease = OwnershipLease(60.0, lambda: None)
    ack_tracker = cast(Any, SimpleNamespace(commits_stopped=False))
    consumer = cast(Any, SimpleNamespace(commit=commit))
    committer = Committer(Settings(), consumer, "g", lease, ack_tracker, lambda error: None)
    taken = [(Partition("shop.jobs.mail", number, lease, 0, None), Snapshot(0, "")) for number in range(3)]
    loading = KafkaException(KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS))
    with caplog.at_level("INFO", logger="jobledger.worker"):
        for accepted in (False, False, True, False):
            refusals[:] = [] if accepted else [loading]
            assert committer.commit_snapshots(taken) is accepted
    assert sum("was refused" in record.message for record in caplog.records) == 2
    assert committer.last_error is not None
    assert committer.errors == 9


def test_an_incomplete_exception_of_a_user_fails_only_its_job() -> None:
    """A user's subclass of `Snooze` does not call the `__init__` of `Snooze`. The job fails, and the worker
    continues."""

    class Busy(Snooze):
        def __init__(self) -> None:
            pass

    app = App("shop")

    @app.task
    async def work(n: int) -> None:
        raise Busy

    async def test() -> None:
        bench = Bench(app)
        put(bench.partition(), [job("work", n=n) for n in range(3)])
        bench.dispatcher.wake()
        await until(lambda: sum(isinstance(fact, JobFailedFact) for fact in bench.kept.facts()) == 3)
        assert {fact.reason for fact in bench.kept.facts() if isinstance(fact, JobFailedFact)} == {"never"}
        assert not bench.failed
        bench.close()

    run(test)


def test_an_unexpected_error_in_the_loop_ends_the_worker() -> None:
    """An error in a callback of the event loop is not only logged."""

    async def test() -> None:
        bench = Bench(App("shop"))
        bench.dispatcher.call(lambda: cast(Any, None).nothing)
        await until(lambda: bench.failed)
        assert "a function on the worker's event loop failed" in str(bench.failed[0])
        bench.close()

    run(test)


async def waits_for_a_child() -> tuple[Bench, FreeChildren, Partition]:
    """Return a worker with one isolated job. The job's start is sent, and the job waits for a child process."""
    app = App("shop")

    @app.task(isolation="process")
    def isolated(n: int) -> None:
        raise AssertionError("runs in no process of this test")

    bench = Bench(app)
    children, partition = FreeChildren(bench.dispatcher.placement), bench.partition()
    put(partition, [job("isolated", n=0)])
    bench.dispatcher.wake()
    await until(lambda: starts(bench) == 1)
    return bench, children, partition


def end_ownership_lease(partition: Partition) -> None:
    """Let the ownership lease end, as after a pause of the worker."""
    partition.lease.until = time.monotonic() - 1.0


def lose(bench: Bench, partition: Partition) -> None:
    """Give the partition to another worker."""
    partition.gone = True
    partition.give_up()
    bench.dispatcher.no_longer_owned([partition])


@pytest.mark.parametrize("lost", [False, True])
def test_a_job_that_waits_for_a_child_is_not_run_before_the_lease_is_confirmed(lost: bool) -> None:
    """A worker is paused while an isolated job waits for a child process. After the pause the worker first asks the
    group, and does not run the job if another worker has the partition."""

    async def test() -> None:
        bench, children, partition = await waits_for_a_child()
        end_ownership_lease(partition)
        children.free()
        assert (children.given, partition.lease.wanted) == ([], True)
        if lost:
            lose(bench, partition)
        partition.lease.confirm(time.monotonic())  # for the partitions that are assigned now
        if lost:
            await until(lambda: not bench.dispatcher.running_jobs.jobs)
            assert partition.live, "not done: the next owner's"
        else:
            await until(lambda: children.given)
        assert [work.offset for work in children.given] == [0] * (not lost)
        assert (starts(bench), bench.failed) == (1, [])
        bench.close()

    run(test)


@pytest.mark.parametrize("lost", [False, True])
def test_a_job_whose_child_died_is_not_started_again_before_the_lease_is_confirmed(lost: bool) -> None:
    """A child died while its worker was paused. After the pause the worker sends no second `JobStarted` before the
    group has confirmed the partition, and none if another worker has the partition."""

    async def test() -> None:
        bench, children, partition = await waits_for_a_child()
        children.free()
        (work,) = children.given
        end_ownership_lease(partition)
        bench.dispatcher.placement._died(work, ErrorInfo("ProcessDied", "signal 9"), True)
        assert (starts(bench), partition.lease.wanted) == (1, True)
        assert not partition.busy, "a handover does not wait for it"
        if lost:
            lose(bench, partition)
        partition.lease.confirm(time.monotonic())
        if lost:
            await until(lambda: not bench.dispatcher.running_jobs.jobs)
        else:
            await until(lambda: starts(bench) == 2)
            bench.ack_tracker.serve()
            children.free()
            await until(lambda: len(children.given) == 2)
        assert (starts(bench), bench.failed) == (2 - lost, [])
        bench.close()

    run(test)


@pytest.mark.parametrize("paused", [False, True])
def test_a_second_start_that_cannot_be_sent_ends_the_worker(monkeypatch: pytest.MonkeyPatch, paused: bool) -> None:
    """A child died, and the producer takes no more records for the second start of the job. The worker must end: the
    event loop would only log the error, and the job would keep its slot and never run."""
    app = App("shop")

    @app.task(isolation="process")
    def isolated(n: int) -> None:
        raise AssertionError("runs in no process of this test")

    def full(*args: object) -> None:
        raise BrokerUnavailable("the send queue stayed full")

    async def test() -> None:
        bench = Bench(app)
        children, partition = FreeChildren(bench.dispatcher.placement), bench.partition()
        put(partition, [job("isolated", n=0)])
        bench.dispatcher.wake()
        await until(lambda: starts(bench) == 1)
        children.free()
        (work,) = children.given
        monkeypatch.setattr(bench.kept, "send", full)
        if paused:
            end_ownership_lease(partition)
        bench.dispatcher.placement.died(work, ErrorInfo("ProcessDied", "signal 9"), True)
        if paused:
            await until(lambda: partition.lease.wanted)
            assert not bench.failed
            partition.lease.confirm(time.monotonic())
        await until(lambda: bench.failed)
        assert [str(error) for error in bench.failed] == ["the send queue stayed full"]
        assert not partition.taking
        bench.close()

    run(test)


def test_a_job_that_waits_for_a_thread_is_not_run_before_the_lease_is_confirmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker is paused while a job waits for a thread. The job begins when the group has confirmed the partition."""
    app = App("shop")

    @app.task
    def plain(n: int) -> None:
        raise AssertionError("runs in no thread of this test")

    async def test() -> None:
        bench = Bench(app, threads=1)
        partition = bench.partition()
        given: list[JobRun] = []
        monkeypatch.setattr(bench.dispatcher.pipe.executor, "submit", given.append)
        put(partition, [job("plain", n=n) for n in range(2)])
        bench.dispatcher.wake()
        await until(lambda: len(partition.live) == 2)
        end_ownership_lease(partition)
        bench.dispatcher.pipe.reports.ended_in_thread(given[0])
        await until(lambda: partition.lease.wanted)
        assert (len(given), starts(bench)) == (1, 1)
        partition.lease.confirm(time.monotonic())
        bench.dispatcher.wake()  # as the fetch thread's lease does
        await until(lambda: len(given) == 2)
        bench.close()

    run(test)


#: The job lease of a task whose time limit makes it a long task.
JOB_LEASE_MS = 60_000


def noting(ran: list[int], *, timeout: float = 30, breaker: Breaker | None = None) -> App:
    """Return an app with a coroutine and a function that note in ``ran`` that they ran. Both have a time limit."""
    app = App("shop")

    @app.task(timeout=timeout, breaker=breaker, lease=JOB_LEASE_MS / 1000)
    async def coroutine(n: int) -> None:
        ran.append(n)

    @app.task(timeout=timeout, breaker=breaker, lease=JOB_LEASE_MS / 1000)
    def function(n: int) -> None:
        ran.append(n)

    return app


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("task", ["coroutine", "function"])
def test_code_that_did_not_begin_before_a_pause_waits_for_the_ownership_lease(
    monkeypatch: pytest.MonkeyPatch, task: str, lost: bool
) -> None:
    """A worker is paused after it has sent the starts of jobs and before their code begins. After the pause no code
    begins before the group has confirmed the partition, also if the time limit is over by then. No code begins if
    another worker has the partition."""
    ran: list[int] = []
    app = noting(ran)

    async def test() -> None:
        bench = Bench(app)
        bench.dispatcher.pipe.executor.start_threads(1)
        partition = bench.partition()
        numbers = [0, 1, 2] if task == "coroutine" else [0]  # a thread begins its code at once
        started = bench.dispatcher.pipe.recorder.started

        def then_paused(*about: Any) -> None:
            started(*about)
            if starts(bench) == len(numbers) and not partition.lease.wanted:
                end_ownership_lease(partition)
                if task == "function":
                    bench.dispatcher.pipe.executor.late(*partition.live.values())

        asked: Counter[int] = Counter()
        certain = RunningJobs.partition_certain

        def counted(work: JobRun) -> bool:
            asked[work.offset] += 1
            return certain(work)

        monkeypatch.setattr(RunningJobs, "partition_certain", staticmethod(counted))
        monkeypatch.setattr(bench.dispatcher.pipe.recorder, "started", then_paused)
        put(partition, [job(task, n=n) for n in numbers])
        bench.dispatcher.wake()
        await until(lambda: len(asked) == len(numbers) and min(asked.values()) >= 3)
        assert (ran, starts(bench), len(partition.live)) == ([], len(numbers), len(numbers))
        if lost:
            lose(bench, partition)
        partition.lease.confirm(time.monotonic())
        await until(lambda: not bench.dispatcher.running_jobs.jobs)
        bench.ack_tracker.serve()
        assert ran == [] if lost else sorted(ran) == numbers
        assert len(bench.kept.ended()) == (0 if lost else len(numbers))
        assert sum(isinstance(fact, JobSucceeded) for fact in bench.kept.facts()) == (0 if lost else len(numbers))
        assert (starts(bench), bench.failed) == (len(numbers), [])
        bench.dispatcher.pipe.executor.close()
        bench.close()

    run(test)


@pytest.mark.parametrize("task", ["coroutine", "function"])
def test_code_that_did_not_begin_before_its_partition_was_lost_does_not_run(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """The partition is lost after the starts of jobs are sent and before their code begins. The group confirms the
    lane's other partitions, so the common lease is valid, but no job of the lost partition begins. These jobs do not
    count as answers of the service behind a circuit breaker."""
    ran: list[int] = []
    app = noting(ran, breaker=Breaker(failures=5))

    async def test() -> None:
        bench = Bench(app)
        bench.dispatcher.pipe.executor.start_threads(1)
        partition = bench.partition()
        breaker = bench.dispatcher.pipe.tasks.runtimes[task].breaker
        assert breaker is not None
        breaker.end(time.monotonic(), 0.0, False, 0.0)
        numbers = [0, 1, 2] if task == "coroutine" else [0]
        started = bench.dispatcher.pipe.recorder.started

        def then_lost(*about: Any) -> None:
            started(*about)
            if starts(bench) == len(numbers):
                lose(bench, partition)

        monkeypatch.setattr(bench.dispatcher.pipe.recorder, "started", then_lost)
        put(partition, [job(task, n=n) for n in numbers])
        bench.dispatcher.wake()
        await until(lambda: starts(bench) == len(numbers) and not bench.dispatcher.running_jobs.jobs)
        assert time.monotonic() < partition.lease.until
        assert (ran, bench.kept.ended(), len(partition.live)) == ([], [], len(numbers))
        assert breaker.describe().endswith("open after 1 failure in a row")
        assert bench.failed == []
        bench.dispatcher.pipe.executor.close()
        bench.close()

    run(test)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("lease", ["held", "over", "lost, and then renewed"])
@pytest.mark.parametrize("task", ["coroutine", "function"])
def test_a_long_job_that_did_not_begin_before_a_pause_depends_on_its_job_lease(
    monkeypatch: pytest.MonkeyPatch, task: str, lease: str, paused: bool
) -> None:
    """A worker's process is paused before the code of a long job begins. After the pause the code begins if the worker
    still holds the job's lease, whether the group has confirmed the partition or not. If the coordinator may have given
    the job to another worker, the code does not begin, and the worker gives the lease back. Otherwise a renewal that
    was under way could keep the lease until the worker exits. A lease that was lost stays lost when that renewal is
    acknowledged."""
    ran: list[int] = []
    held = lease == "held"
    app = noting(ran, timeout=600)

    async def test() -> None:
        bench = Bench(app)
        bench.dispatcher.pipe.executor.start_threads(1)
        partition, leases = bench.partition(), bench.leases
        started = bench.dispatcher.pipe.recorder.started

        def then_paused(*about: Any) -> None:
            started(*about)
            (work,) = bench.dispatcher.running_jobs.jobs
            assert work.lease is not None
            work.lease.renew_at = 0.0
            bench.kept.frozen = True
            leases._look()  # a renewal is under way
            if paused:
                end_ownership_lease(partition)
            if not held:
                work.lease.until = time.monotonic() - 1.0
            if lease == "lost, and then renewed":
                leases._look()
                work.lease.until = time.monotonic() + JOB_LEASE_MS / 1000

        monkeypatch.setattr(bench.dispatcher.pipe.recorder, "started", then_paused)
        put(partition, [job(task, n=0)])
        bench.dispatcher.wake()
        await until(lambda: bench.dispatcher.running_jobs.jobs)
        await until(lambda: bench.reported(not bench.dispatcher.running_jobs.jobs))
        bench.kept.frozen = False
        await until(lambda: bench.reported(not bench.kept.unacknowledged))
        renewed = [fact.lease_ms for fact in bench.kept.facts() if isinstance(fact, LeaseRenewed)]
        succeeded = sum(isinstance(fact, JobSucceeded) for fact in bench.kept.facts())
        assert (ran, succeeded, renewed) == ([0] * held, held, [JOB_LEASE_MS] + [0] * (not held))
        await until(lambda: leases.count == 0)
        assert (starts(bench), bench.failed) == (1, [])
        bench.dispatcher.pipe.executor.close()
        bench.close()

    run(test)


def test_the_duration_of_a_suspect_does_not_include_a_pause_before_its_code() -> None:
    """A worker is paused after it has created the coroutine of a suspect. The duration counts from the first step of
    the coroutine."""
    ran: list[int] = []
    paused: list[JobRun] = []
    app = noting(ran)

    async def test() -> None:
        bench = Bench(app)
        partition, places = bench.partition(), bench.dispatcher.placement
        partition.prior.scanned_to = partition.prior.suspect_below = 1
        run_code = places.run_code

        def then_paused(work: JobRun) -> None:
            run_code(work)
            if not paused:
                paused.append(work)
                assert work.suspect
                end_ownership_lease(partition)
                work.began -= 3600.0

        places.run_code = then_paused  # type: ignore[method-assign]
        put(partition, [job("coroutine", n=0)])
        bench.dispatcher.wake()
        await until(lambda: bench.reported(partition.lease.wanted))
        assert ran == []
        partition.lease.confirm(time.monotonic())
        await until(lambda: not bench.dispatcher.running_jobs.jobs)
        (took,) = [fact.duration_us for fact in bench.kept.facts() if isinstance(fact, JobSucceeded)]
        assert (ran, took < 1800e6, bench.failed) == ([0], True, [])
        bench.close()

    run(test)


def test_a_commit_wakes_jobs_that_wait_for_the_lease_only_if_it_is_recent() -> None:
    """An accepted commit confirms the lease from the time of its request. If this time is too long ago, the next commit
    wakes the waiting jobs."""
    woken = Counter[str]()
    lease = OwnershipLease(3600.0, lambda: woken.update(["woken"]))
    lease.wanted = True
    lease.confirm(time.monotonic() - 7200.0)  # this commit took two hours
    assert lease.wanted
    assert not woken
    lease.confirm(time.monotonic())
    assert woken == {"woken": 1}
    assert [lease.wanted] == [False]


def test_jobs_behind_thousands_of_jobs_of_one_key_run() -> None:
    """Most of these jobs wait as parked records, so the worker continues to read and runs the jobs behind them."""
    app, ran = App("shop"), list[str]()

    @app.task(key="k", timeout=60)  # the longest time limit of a keyed task: the other jobs must run in that time
    async def book(k: str) -> None:
        ran.append(k)
        if k == "hot":
            await for_ever()

    async def test() -> None:
        bench = Bench(app, lookahead_bytes=64 << 20)
        partition = bench.partition()
        put(partition, [job("book", key="hot", k="hot") for _ in range(40_000)])
        put(partition, [job("book", key=f"k{n}", k=f"k{n}") for n in range(200)])
        bench.dispatcher.wake()
        await until(lambda: len(ran) == 201, 30.0)
        assert ran.count("hot") == 1
        assert partition.backlog.parked > 30_000
        partition.give_up()
        bench.dispatcher.no_longer_owned([partition])
        await until(lambda: bench.dispatcher.wait_queues.parked_bytes == 0)
        bench.close()

    run(test)


def keyed_app(ran: list[Any]) -> App:
    """Return an app with keyed tasks for every outcome."""
    app = App("shop")

    @app.task(key="k", timeout=30)
    async def book(k: str, n: int = 0) -> None:
        ran.append((k, n, time.monotonic()))

    @app.task(key="k", timeout=60)  # the longest time limit of a keyed task
    async def holds(k: str) -> None:
        await for_ever()

    @app.task(key="k", timeout=30, retry=Retry(max_attempts=1))
    async def fails(k: str) -> None:
        raise ValueError("no")

    @app.task(key="k", timeout=30)
    async def huge(k: str) -> str:
        return "x" * (LIMIT + 1)

    @app.task(key="k", timeout=30, retry=Retry(max_attempts=2, initial=0.2, jitter=False))
    async def twice(k: str) -> None:
        ran.append((k, current_job().attempt, time.monotonic()))
        raise ValueError("no")

    return app


WAYS: dict[str, tuple[bytes, type]] = {
    "success": (job("book", key="a", k="a"), JobSucceeded),
    "failure": (job("fails", key="a", k="a"), JobFailedFact),
    "result too large": (job("huge", key="a", k="a"), JobFailedFact),
    "bad arguments": (job("book", key="a", nobody=1), JobFailedFact),
    "expired": (job("book", key="a", k="a", expires_at=1), JobExpiredFact),
    "cancelled": (job("book", key="a", k="a"), JobCancelledFact),
    "crashed": (job("book", key="a", k="a"), JobFailedFact),
}


@pytest.mark.parametrize("parked", [False, True], ids=["job", "parked record"])
@pytest.mark.parametrize("how", WAYS)
def test_the_next_job_of_a_key_begins_when_the_outcome_of_the_previous_job_is_in_the_log(
    how: str, parked: bool
) -> None:
    """The next job of a key begins when any outcome of the previous job is acknowledged, and not when it is sent. Jobs
    of other keys do not wait."""
    ran: list[Any] = []
    app = keyed_app(ran)
    value, end = WAYS[how]

    async def test() -> None:
        bench = Bench(app, lookahead=100)
        d, kept = bench.dispatcher, bench.kept
        kept.frozen = True
        partition = bench.partition()
        event = codec.decode(value)
        if how == "cancelled":
            d.pipe.control.cancels[event.job_id, 1] = Cancelled("me", "wrong list")
        if how == "crashed":
            partition.prior.starts, partition.prior.scanned_to = (
                {release_key(event.job_id, 1, 1): UNSEEN_CRASHES},
                10_000,
            )
        waiting = [job("holds", key="h", k="h") for _ in range(60 if parked else 0)]
        put(partition, [*waiting, value, job("book", key="a", k="next")])
        d.wake()
        await until(lambda: any(type(fact) is end for fact in kept.facts()))
        put(partition, [job("book", key="c", k="other")])
        d.wake()
        await until(lambda: any(k == "other" for k, *_ in ran))
        await until(lambda: len(d.running_jobs.jobs) == parked)
        assert (partition.backlog.parked > 0) == parked
        assert not any(k == "next" for k, *_ in ran)
        kept.frozen = False
        await until(lambda: any(k == "next" for k, *_ in ran))
        assert not bench.failed
        bench.close()

    run(test)


@pytest.mark.parametrize("tuned", [False, True], ids=["asyncio", "uvloop"])
def test_a_delay_in_place_counts_from_the_acknowledgement(tuned: bool) -> None:
    """The delay begins when the `JobRetried` is in the log, and does not end a fraction of a millisecond early. So the
    log shows no attempt before its time. Later jobs of the key wait for all attempts."""
    import uvloop

    ran: list[Any] = []
    app = keyed_app(ran)
    keys = 40

    async def test() -> None:
        bench = Bench(app, concurrency=100)
        put(bench.partition(), [job(task, key=f"k{n}", k=f"k{n}") for task in ("twice", "book") for n in range(keys)])
        bench.dispatcher.wake()
        await until(lambda: len(ran) == 3 * keys)
        assert not bench.failed
        asked: dict[str, float] = {}
        for value, at in zip(bench.kept.sent, bench.kept.acknowledged_at, strict=False):
            event = codec.decode(value)
            if isinstance(event.fact, JobRetried):
                asked[str(event.key)] = at
        for key, at in asked.items():
            (_, _, first), (_, again, second), (_, after, _) = [each for each in ran if each[0] == key]
            assert (again, after) == (2, 0)
            assert first < at <= second - 0.2
        assert len(asked) == keys
        bench.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if tuned else None) as runner:
        runner.run(test())


def test_an_otherwise_idle_worker_sends_the_facts_of_a_keyed_job_at_once() -> None:
    """All jobs have one key, so no other job can begin before the outcome is acknowledged, and the outcome is not held
    back for a batch. While another job runs, facts of keyed jobs are sent in batches."""
    ran: list[Any] = []
    app = keyed_app(ran)

    async def test() -> None:
        bench = Bench(app)
        d = bench.dispatcher
        bench.kept.lingers = True
        partition = bench.partition()
        put(partition, [job("book", key="a", k="a", n=n) for n in range(5)])
        d.wake()
        # The last outcome is acknowledged, too.
        await until(lambda: len(ran) == 5 and not d.wait_queues.awaiting_acknowledgement)
        assert bench.hurried >= 4
        put(partition, [job("holds", key="h", k="h")])
        d.wake()
        await until(lambda: d.running_jobs.jobs)
        hurried = bench.hurried
        put(partition, [job("book", key="a", k="a", n=5), job("book", key="b", k="b")])
        d.wake()
        await until(lambda: len(ran) == 7 and len(d.running_jobs.jobs) == 1)
        assert bench.hurried == hurried
        bench.close()

    run(test)


def test_the_next_job_of_a_key_begins_in_the_pass_that_takes_the_acknowledgement() -> None:
    """The job has ended, and its outcome is acknowledged, when the dispatcher makes a pass. The next job of the key
    begins in this pass. It does not wait for the ack tracker's thread, which does not run in this test."""
    ran: list[Any] = []
    app = keyed_app(ran)

    async def test() -> None:
        bench = Bench(app)
        put(bench.partition(), [job("holds", key="h", k="h"), *(job("book", key="a", k="a", n=n) for n in range(5))])
        bench.dispatcher.wake()
        await until(lambda: len(ran) == 5)
        assert (bench.hurried, len(bench.dispatcher.running_jobs.jobs)) == (0, 1)
        bench.close()

    run(test)


def test_the_next_job_of_a_key_waits_for_the_acknowledgement_and_the_end_of_the_code() -> None:
    """The acknowledgement of the outcome may come before the slot is free. The next job of the key waits for both."""
    ran: list[Any] = []
    app = keyed_app(ran)

    async def test() -> None:
        bench = Bench(app)
        d = bench.dispatcher
        bench.kept.frozen = True
        put(bench.partition(), [job("holds", key="a", k="a"), job("book", key="a", k="next")])
        d.wake()
        await until(lambda: d.running_jobs.jobs)
        (work,) = d.running_jobs.jobs
        assert work.wait_queue is not None
        d.pipe.reports.attempt_acknowledged(work)
        await until(lambda: work.wait_queue is not None and work.wait_queue.over == 1)
        assert work.wait_queue.busy
        d.placement.stop(work, Cancelled("me", "enough"))
        await until(lambda: ran)
        bench.close()

    run(test)


@given(
    st.lists(st.tuples(st.sampled_from(("book", "fails", "huge", "nobody")), st.sampled_from("ab")), max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=200),
)
@settings(max_examples=40)
def test_no_job_of_a_key_begins_before_all_earlier_outcomes_are_acknowledged(
    jobs: list[tuple[str, str]], steps: list[tuple[int, int]]
) -> None:
    """The jobs have any outcomes, and the acknowledgements come at any time.

    ``steps``: how many acknowledgements come, and then how many turns the event loop makes. After the steps, one comes
    in each turn."""
    ran: list[Any] = []
    app = keyed_app(ran)
    values = [job("book", key=key, nobody=1) if task == "nobody" else job(task, key=key, k=key) for task, key in jobs]
    before: dict[str, list[str]] = {}
    of_key: dict[str, list[str]] = {"a": [], "b": []}
    for value, (_, key) in zip(values, jobs, strict=True):
        job_id = codec.decode(value).job_id
        before[job_id] = list(of_key[key])
        of_key[key].append(job_id)

    async def test() -> None:
        bench = Bench(app)
        kept = bench.kept
        kept.frozen = True
        put(bench.partition(), values)
        bench.dispatcher.wake()
        following = itertools.chain(steps, itertools.repeat((1, 1)))
        while len(kept.ended()) < len(jobs):
            sent = len(kept.sent)
            acknowledged, turns = next(following)
            kept.deliver(acknowledged)
            bench.ack_tracker.drain()
            for _ in range(turns):
                await asyncio.sleep(0)
            for value in kept.sent[sent:]:
                event = codec.decode(value)
                assert set(before[event.job_id]) <= set(kept.ended())
        assert not bench.failed
        bench.close()

    run(test)
