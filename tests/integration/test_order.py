"""Which job runs next: keys, turns of tenants, priorities, limits, pauses, cancels and expiry, with a real broker."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import pytest

from jobledger import App, Breaker, Queue, Retry, Settings, Snooze, current_job
from jobledger.client.commands import Job
from jobledger.consumers.scheduling.wait_queues import WaitQueues
from jobledger.consumers.state.work import JobRun, WaitQueue
from jobledger.consumers.worker.worker import Worker
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import (
    JobCancelledFact,
    JobExpiredFact,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobStarted,
    JobSucceeded,
    fact_name,
)
from tests.integration.worker_app import closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka


class Seen:
    """The jobs that ran, in order: name and time of each start and of each end."""

    def __init__(self) -> None:
        self.began: list[tuple[Any, float]] = []
        self.ended: list[tuple[Any, float]] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.open = threading.Event()
        self.fail = True
        self.blocked: Callable[[], bool] = lambda: False  # whether the worker has noticed the block

    async def run(self, name: Any, group: str, seconds: float) -> None:
        self.began.append((name, time.monotonic()))
        self.running[group] += 1
        self.most[group] = max(self.most[group], self.running[group])
        try:
            await asyncio.sleep(seconds)
        finally:
            self.running[group] -= 1
            self.ended.append((name, time.monotonic()))

    def names(self) -> list[Any]:
        return [name for name, _ in self.began]


def built(broker: str, namespace: str, seen: Seen) -> App:
    app = App(
        namespace,
        settings=Settings(bootstrap=broker, submit_timeout=20.0),
        partitions=2,
        queues=[
            Queue("default"),
            Queue("fair", fair_by="tenant"),
            Queue("levels", priorities=True),
            Queue("slow", rate="20/s", concurrency=4),
        ],
    )

    @app.task(
        key="account", timeout=10, retry=Retry(max_attempts=3, initial=1.0, factor=1.0, jitter=False), key_hold_max=600
    )
    async def book(account: str, n: int, fails: int = 0, seconds: float = 0.01) -> int:
        await seen.run((account, n, current_job().attempt), account, seconds)
        if current_job().attempt <= fails:
            raise ValueError(f"attempt {current_job().attempt}")
        return n

    @app.task(
        key="account",
        timeout=10,
        key_hold_max=600,
        retry=Retry(max_attempts=200, initial=1.0, factor=1.0, jitter=False),
    )
    async def knocks(account: str) -> None:
        await seen.run((account, current_job().attempt), account, 0)
        if seen.fail:
            raise ValueError("not yet")

    @app.task(key="account", timeout=10, retry=Retry(max_attempts=9, initial=30.0), key_hold_max=2.0)
    async def stuck(account: str, how: str = "fails") -> None:
        await seen.run((account, "stuck", current_job().attempt), account, 0)
        if how == "snoozes":
            raise Snooze(60.0, "not before midnight")
        raise ValueError("no luck")

    @app.task(key="account", timeout=0.5, retry=Retry(max_attempts=2, initial=0.1, jitter=False))
    async def blocks(account: str) -> None:
        began = time.monotonic()
        seen.began.append(((account, current_job().attempt), began))
        # No `await`, on purpose.
        until(lambda: time.monotonic() - began > 0.5 and seen.blocked(), what="the worker seeing what blocks its loop")

    @app.task(queue="fair")
    async def serve(tenant: str, n: int) -> None:
        await seen.run((tenant, n), "fair", 0.01)

    @app.task(queue="fair")
    def serve_in_thread(tenant: str, n: int) -> None:
        seen.began.append(((tenant, n), time.monotonic()))
        time.sleep(0.01)

    @app.task(queue="fair", key="account", timeout=10)
    async def keyed_serve(tenant: str, account: str, n: int) -> None:
        await seen.run((tenant, n), "fair", 0.01)

    @app.task(
        key="account",
        timeout=10,
        key_hold_max=30,
        breaker=Breaker(failures=3, reset=30.0),
        retry=Retry(max_attempts=9, initial=20.0),
    )
    async def trips(account: str, n: int) -> None:
        await seen.run(("trips", n), "trips", 0)
        raise ConnectionError("it is down")

    @app.task(queue="levels")
    async def work(n: int, seconds: float = 0.01) -> None:
        await seen.run((current_job().tags.get("level", "normal"), n), "levels", seconds)

    @app.task(queue="slow")
    async def call(n: int, seconds: float = 0.0) -> None:
        await seen.run(n, "slow", seconds)

    @app.task(rate="4/s")
    async def rated(n: int) -> None:
        await seen.run(("rated", n), "rated", 0)

    @app.task
    async def free(n: int) -> None:
        await seen.run(("free", n), "free", 0)

    @app.task(
        breaker=Breaker(failures=3, reset=1.0), retry=Retry(max_attempts=50, initial=0.05, jitter=False, cap=0.05)
    )
    async def flaky(n: int) -> None:
        await seen.run(("flaky", n), "flaky", 0)
        if seen.fail:
            raise ConnectionError("it is down")

    @app.task
    async def waits(n: int) -> int:
        await seen.run(("waits", n), "waits", 0)
        while not seen.open.is_set():
            await asyncio.sleep(0.01)
        return n

    ensure(app, app.settings)
    return app


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def app(broker: str, seen: Seen) -> Iterator[App]:
    made = built(broker, f"o{uuid.uuid4().hex[:12]}", seen)
    yield made
    made.close()


def partitions_assigned(workers: Sequence[Worker]) -> bool:
    """Return whether each of these workers has its share of the two partitions, and may run their jobs."""
    shares = [[partition.ready for partition in worker.partitions()] for worker in workers]
    return all(shares) and all(map(all, shares)) and sum(map(len, shares)) == 2


def fetched_records(worker: Worker, level: str) -> int:
    """Return the number of records of a priority that the worker has fetched and may choose from."""
    if worker.dispatcher is None:
        return 0
    stages = [stage for stage in worker.dispatcher.pipe.lanes.by_topic.values() if stage.priority == level]
    return sum(len(partition.raw) for stage in stages for partition in list(stage.parts))


def wait_for_outcomes(app: App, count: int, timeout: float = 60.0) -> dict[str, list[Any]]:
    """Wait until ``count`` jobs have an outcome, and return the outcomes by job."""

    def found() -> dict[str, list[Any]] | None:
        seen = {
            job: [r.event.fact for r in records if not isinstance(r.event.fact, JobRetried | JobSnoozed)]
            for job, records in closings(app).items()
        }
        seen = {job: facts for job, facts in seen.items() if facts}
        return seen if len(seen) >= count else None

    return until(found, timeout, f"{count} ends")  # type: ignore[no-any-return]  # the type of `found`


# -- keys -------------------------------------------------------------------------------------------------------------


def test_jobs_of_one_key_run_one_at_a_time_in_the_order_of_submission(
    app: App, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KEY_ORDER: while a job of the key waits for its retry, no later job of the key starts. Jobs of other keys do not
    wait."""
    hold = WaitQueues._hold
    again: list[Callable[[], None]] = []

    def hold_on(wait_queues: WaitQueues, work: JobRun, wait_queue: WaitQueue, seconds: float) -> None:
        hold(wait_queues, work, wait_queue, 3600.0)  # the test ends the wait
        again.append(lambda: wait_queues._again(work, wait_queue, 0.0))

    monkeypatch.setattr(WaitQueues, "_hold", hold_on)
    book = app.tasks["book"]
    jobs = [book.job("a", n, fails=1 if n == 3 else 0) for n in range(10)]
    jobs += [book.job(f"other-{n % 20}", n) for n in range(200)]
    app.submit_many(jobs)
    with working(app) as worker:
        until(lambda: again and sum(name[0] != "a" for name in seen.names()) == 200, what="the jobs of the other keys")
        assert worker.dispatcher is not None
        worker.dispatcher.call(again[0])
        facts = wait_for_outcomes(app, 210)
    assert len(again) == 1
    assert all(isinstance(f, JobSucceeded) for of in facts.values() for f in of)
    mine = [(n, attempt) for (account, n, attempt) in seen.names() if account == "a"]
    assert mine == [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), *((n, 1) for n in range(4, 10))]
    assert max(most for group, most in seen.most.items()) == 1
    for other in range(20):
        assert [n for (account, n, _) in seen.names() if account == f"other-{other}"] == list(range(other, 200, 20))
    before_it_went_on = [name for name in seen.names()[: seen.names().index(("a", 3, 2))] if name[0] != "a"]
    assert len(before_it_went_on) == 200, "the other keys waited for it"


def test_a_retry_in_place_is_recorded_and_closes_no_release(app: App) -> None:
    """`JobRetried` has ``in_place``, the release stays the same, attempts are counted, and no new release is requested."""
    handle = app.tasks["book"].submit("k", 1, fails=2)
    with working(app):
        wait_for_outcomes(app, 1)
    facts = facts_of(app, handle.job_id)
    assert [type(f) for f in facts] == [JobStarted, JobRetried, JobStarted, JobRetried, JobStarted, JobSucceeded]
    assert all(f.in_place for f in facts if isinstance(f, JobRetried))
    records = [r.event for r in log_of(app, app.names.lifecycle) if r.event.job_id == handle.job_id]
    assert {e.release for e in records} == {1}
    assert [e.attempt for e in records] == [1, 1, 2, 2, 3, 3]
    assert log_of(app, app.names.coordination) == []


def test_each_attempt_in_place_has_its_own_time_limit(app: App, seen: Seen) -> None:
    """A coroutine blocks the event loop beyond its time limit and is retried in place. The second attempt times out as
    the first one did."""
    with working(app) as worker:
        seen.blocked = lambda: (
            worker.dispatcher is not None and worker.dispatcher.pipe.executor.overdue_on_loop is not None
        )
        handle = app.tasks["blocks"].submit("k")
        facts = wait_for_outcomes(app, 1)
    assert seen.names() == [("k", 1), ("k", 2)]
    retried = next(f for f in facts_of(app, handle.job_id) if isinstance(f, JobRetried))
    assert retried.in_place
    (failed,) = facts[handle.job_id]
    assert isinstance(failed, JobFailedFact), failed
    assert failed.reason == "timeout"


@pytest.mark.parametrize(("how", "text"), [("fails", "no luck"), ("snoozes", "not before midnight")])
def test_a_key_is_held_for_a_bounded_time(app: App, seen: Seen, how: str, text: str) -> None:
    """A wait beyond `key_hold_max` dead-letters the job with a reason, and the next job of the key starts."""
    first = app.tasks["stuck"].submit("k", how)
    second = app.tasks["book"].submit("k", 2)
    with working(app):
        facts = wait_for_outcomes(app, 2)
    (failed,) = facts[first.job_id]
    assert isinstance(failed, JobFailedFact)
    assert failed.reason == "key-held"
    assert text in failed.error.message
    assert isinstance(facts[second.job_id][0], JobSucceeded)
    assert [r.event.job_id for r in log_of(app, app.names.dead_letter)] == [first.job_id]


def test_the_next_owner_continues_the_count_of_attempts_in_place(app: App, seen: Seen) -> None:
    """A worker that stops while a job holds its key hands over cleanly. No attempt is made twice."""
    handle = app.tasks["knocks"].submit("k")
    with working(app):
        until(lambda: any(isinstance(f, JobRetried) for f in facts_of(app, handle.job_id)))
    before = len(seen.names())
    with working(app):
        until(lambda: len(seen.names()) > before)
        seen.fail = False
        wait_for_outcomes(app, 1)
    facts, attempts = facts_of(app, handle.job_id), len(seen.names())
    assert sum(isinstance(f, JobRetried) for f in facts) == attempts - 1
    assert seen.names() == [("k", attempt) for attempt in range(1, attempts + 1)]


@pytest.mark.parametrize("bytes_", [64 << 20, 100_000], ids=["read on", "full"])
def test_a_hot_key_delays_neither_other_keys_nor_plain_jobs(app: App, seen: Seen, bytes_: int) -> None:
    """There are thousands of jobs of one key before the other jobs, and the other jobs run soon. If one partition has
    so many waiting jobs that it is not read further, this holds for the other partitions."""
    book, free = app.tasks["book"], app.tasks["free"]
    hot = app.submit_many(book.job("hot", n, seconds=0.02) for n in range(4000))
    others = app.submit_many([*(book.job(f"other-{n}", n) for n in range(40)), *(free.job(n) for n in range(40))])
    near = hot[0].position.partition
    far = [handle for handle in others if handle.position.partition != near]
    expected = {handle.job_id for handle in (others if bytes_ > 1_000_000 else far)}
    assert expected
    with working(app, queues=["default"], lookahead=400, lookahead_bytes=bytes_) as worker:
        until(lambda: expected <= set(closings(app)), 30.0, "the others")
        ran = sum(name[0] == "hot" for name in seen.names())
        assert ran < 2000, "the others waited for the hot key"
        # The other partitions may be done before the partition of the hot key is read.
        most = 500 if bytes_ > 1_000_000 else 100
        until(lambda: sum(p.backlog.count for p in worker.partitions()) > most, 30.0, "the hot key's jobs wait")
        full = bytes_ < 1_000_000
        until(
            lambda: (near in [p.number for p in worker.partitions() if p.backlog.full]) == full, 30.0, "as much as may"
        )
    order = [n for account, n, _ in (name for name in seen.names() if name[0] == "hot")]
    assert order == list(range(len(order))), "the hot key's order"


@pytest.mark.parametrize("how", ["paused", "open circuit"])
def test_a_waiting_keyed_task_delays_no_other_task(app: App, seen: Seen, how: str) -> None:
    """Thousands of jobs of a keyed task that is paused, or whose circuit is open, are before jobs of another task. The
    other task's jobs run soon."""
    trips = app.tasks["trips"]
    app.submit_many(trips.job(f"k{n}", n) for n in range(3000))
    app.submit_many(app.tasks["free"].job(n) for n in range(20))
    if how == "paused":
        app.pause(task="trips", reason="their maintenance")
    with working(app, queues=["default"], lookahead=400):
        until(lambda: sum(name[0] == "free" for name in seen.names()) == 20, 20.0, "the others")
        began = sum(name[0] == "trips" for name in seen.names())
    assert began == 0 if how == "paused" else began < 150


# -- fairness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["serve", "serve_in_thread"])
def test_a_hot_tenant_does_not_starve_the_others(app: App, seen: Seen, task: str) -> None:
    """A tenant with ten jobs behind a thousand jobs of another tenant does not wait for all of them."""
    work = app.tasks[task]
    app.submit_many(work.using(tags={"tenant": "hot"}).job("hot", n) for n in range(1000))
    app.submit_many(work.using(tags={"tenant": "small"}).job("small", n) for n in range(10))
    with working(app, concurrency=4, threads=4):
        wait_for_outcomes(app, 1010, timeout=90.0)
    order = seen.names()
    last = max(at for at, (tenant, _) in enumerate(order) if tenant == "small")
    assert last < 600, f"the last of the small tenant was number {last}"
    assert Counter(order).most_common(1)[0][1] == 1


def test_a_tenant_gets_its_turns_behind_any_backlog_of_another(app: App, seen: Seen) -> None:
    """Five thousand jobs of one tenant are many more than a worker reads ahead. Jobs of another tenant behind them
    still get their turns."""
    work = app.tasks["serve"]
    app.submit_many(work.using(tags={"tenant": "hot"}).job("hot", n) for n in range(5000))
    app.submit_many(work.using(tags={"tenant": "small"}).job("small", n) for n in range(10))
    with working(app, concurrency=4, queues=["fair"], lookahead=400):
        until(lambda: sum(tenant == "small" for tenant, _ in seen.names()) == 10, 60.0, "the small tenant")
    order = seen.names()
    last = max(at for at, (tenant, _) in enumerate(order) if tenant == "small")
    assert last < 2500, f"the last of the small tenant was number {last}"
    assert Counter(order).most_common(1)[0][1] == 1


def test_tenants_take_turns_whatever_keys_they_have(app: App, seen: Seen) -> None:
    """A tenant with five hundred keys gets no more turns than a tenant with one key."""
    work = app.tasks["keyed_serve"]
    app.submit_many(work.using(tags={"tenant": "hot"}).job("hot", f"k{n}", n) for n in range(500))
    app.submit_many(work.using(tags={"tenant": "small"}).job("small", "only", n) for n in range(10))
    app.pause(queue="fair", reason="until all are there")
    with working(app, concurrency=2, queues=["fair"]) as worker:
        until(lambda: sum(partition.backlog.count for partition in worker.partitions()) == 510, what="all of them")
        app.resume(queue="fair")
        wait_for_outcomes(app, 510, timeout=60.0)
    order = seen.names()
    last = max(at for at, (tenant, _) in enumerate(order) if tenant == "small")
    assert last < 150, f"the last of the small tenant was number {last}"
    assert [n for tenant, n in order if tenant == "small"] == list(range(10))


@pytest.mark.parametrize("how", ["paused", "limited", "paused meanwhile"])
def test_a_waiting_task_of_a_fair_queue_delays_no_other_task(app: App, seen: Seen, how: str) -> None:
    """Thousands of jobs of a task that is paused, or that may start twice a second, are before jobs of another task.
    The other task's jobs run soon."""
    app.submit_many(app.tasks["serve"].using(tags={"tenant": "a"}).job("a", n) for n in range(3000))
    app.submit_many(app.tasks["serve_in_thread"].using(tags={"tenant": "a"}).job("quick", n) for n in range(20))
    if how == "paused":
        app.pause(task="serve")
    elif how == "limited":
        app.limit(task="serve", rate="2/s")
    with working(app, concurrency=1, queues=["fair"], lookahead=400, lookahead_bytes=400_000) as worker:
        if how == "paused meanwhile":  # the pause comes when the worker has read as much as it may
            until(lambda: any(partition.backlog.full for partition in worker.partitions()), 20.0, "a full partition")
            assert not [tenant for tenant, _ in seen.names() if tenant == "quick"]
            app.pause(task="serve")
        until(lambda: sum(tenant == "quick" for tenant, _ in seen.names()) == 20, 20.0, "the others")
    last = max(at for at, (tenant, _) in enumerate(seen.names()) if tenant == "quick")
    assert last < (1500 if how == "paused meanwhile" else 150), f"the last of the others was number {last}"


# -- priorities -------------------------------------------------------------------------------------------------------


def test_high_priority_passes_a_backlog_of_low_priority_which_still_progresses(app: App, seen: Seen) -> None:
    """A job with high priority starts within a few starts after the worker has fetched its record. While there are
    always jobs with high priority, low priority gets its share."""
    work = app.tasks["work"]
    low = work.using(priority="low", tags={"level": "low"})
    high = work.using(priority="high", tags={"level": "high"})
    app.submit_many(low.job(n) for n in range(1500))
    app.pause(queue="levels", reason="until both are there")
    handle = high.submit(1)
    with working(app, concurrency=4) as worker:
        until(lambda: fetched_records(worker, "high") == 1 and fetched_records(worker, "low") > 100)
        app.resume(queue="levels")
        until(lambda: ("high", 1) in seen.names())
        at = seen.names().index(("high", 1))
        assert at < 40, f"{at} low ones came first"
        app.submit_many(high.job(n) for n in range(2, 602))
        wait_for_outcomes(app, 2101, timeout=90.0)
    assert handle.job_id in closings(app)
    order = [level for level, _ in seen.names()]
    first, last = order.index("high"), len(order) - 1 - order[::-1].index("high")
    among = order[first:last].count("low")
    assert among >= 600 / 64 / 2, f"only {among} low ones ran among 600 high ones"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_limits_hold_for_all_workers_together(app: App, seen: Seen) -> None:
    """Two workers serve a queue of two partitions that allows four jobs at once and twenty starts a second. Together
    the workers never exceed these limits."""
    app.pause(queue="slow", reason="until each has its partition")
    app.submit_many(app.tasks["call"].job(n, 0.05) for n in range(80))
    with ExitStack() as both:
        workers = [both.enter_context(working(app, queues=["slow"])) for _ in range(2)]
        until(lambda: partitions_assigned(workers), 60.0, "a partition for each")
        app.resume(queue="slow")
        wait_for_outcomes(app, 80, timeout=60.0)
    assert seen.most["slow"] <= 4
    times = sorted(at for _, at in seen.began)
    took = times[-1] - times[0]
    assert took >= 80 / 20 * 0.8, f"80 jobs at 20 a second took {took:.1f} s"
    assert took < 80 / 20 * 4.0, f"80 jobs at 20 a second took {took:.1f} s: they could have gone faster"
    for at in range(len(times) - 30):
        assert times[at + 30] - times[at] > 0.75, "thirty began within less than a second"


@pytest.mark.parametrize("workers", [1, 2])
def test_with_one_hot_partition_a_worker_has_only_its_share_of_the_limit(app: App, seen: Seen, workers: int) -> None:
    """A queue of two partitions allows twenty starts a second, and all jobs are in one partition. A single worker has
    the whole limit. Of two workers, each has half of the limit."""
    handles = app.submit_many(app.tasks["call"].job(n, 0.01) for n in range(110))
    cold = [handle for handle in handles if handle.position.partition == 1]
    app.commands.cancel([Job(handle.job_id, 1) for handle in cold], "another partition")
    hot = len(handles) - len(cold)
    app.pause(queue="slow", reason="until the partitions are dealt out")
    with ExitStack() as all_of_them:
        running = [all_of_them.enter_context(working(app, queues=["slow"])) for _ in range(workers)]
        until(lambda: partitions_assigned(running), 60.0, "each worker's share")
        app.resume(queue="slow")
        wait_for_outcomes(app, 110, timeout=60.0)
    assert len(seen.began) == hot
    times = sorted(at for _, at in seen.began)
    # From the median time of four starts, so that a pause of this process does not count.
    rate = 4 / median(later - at for at, later in zip(times, times[4:], strict=False))
    assert 20 / workers * 0.6 < rate < 20 / workers * 1.2, f"{rate:.1f} a second with {workers} workers"


def test_a_limited_task_does_not_hold_up_the_rest_of_its_queue(app: App, seen: Seen) -> None:
    """A thousand jobs of a task that may start four times a second are before jobs of another task. The other task's
    jobs run soon."""
    app.submit_many(app.tasks["rated"].job(n) for n in range(1000))
    app.submit_many(app.tasks["free"].job(n) for n in range(50))
    with working(app, queues=["default"], lookahead=400):
        until(lambda: sum(name[0] == "free" for name in seen.names()) == 50, 20.0, "the others")
    order = seen.names()
    last = max(at for at, name in enumerate(order) if name[0] == "free")
    rated = sum(name[0] == "rated" for name in order[:last])
    assert rated < 200
    aside = [r.event.fact for r in log_of(app, app.names.lifecycle) if isinstance(r.event.fact, JobSnoozed)]
    assert aside
    assert "task rated: 4 a second" in (aside[0].reason or "")


def test_limits_are_changed_at_run_time_and_hold_for_workers_that_come_later(app: App, seen: Seen) -> None:
    """A control command replaces the limits in the code, until the command is removed."""
    app.limit(queue="slow", rate=500, concurrency=50, reason="they raised our quota")
    app.submit_many(app.tasks["call"].job(n) for n in range(500))
    with working(app, queues=["slow"]) as worker:
        wait_for_outcomes(app, 500)
        assert seen.began[-1][1] - seen.began[0][1] < 20.0, "the code's limits take longer"
        app.limit(queue="slow", rate="5/s")
        until(
            lambda: worker.dispatcher is not None and worker.dispatcher.pipe.lanes.limiters["slow"].rate == 5.0,
            what="the order",
        )
        began = time.monotonic()
        app.submit_many(app.tasks["call"].job(n) for n in range(500, 530))
        time.sleep(2.0)
        assert len(seen.began) - 500 <= 5 * (time.monotonic() - began) + 1
        assert [(s.kind, s.name, s.limits.rate) for s in app.commands.standing() if s.limits] == [
            ("queue", "slow", 5.0)
        ]
        app.limit(queue="slow")
        wait_for_outcomes(app, 530)
    assert app.commands.standing() == []


# -- pauses -----------------------------------------------------------------------------------------------------------


def test_a_paused_queue_starts_nothing_until_it_is_resumed(app: App, seen: Seen) -> None:
    """The pause is requested while no worker runs, and workers respect it. After the resume, jobs start at once."""
    app.pause(queue="slow", reason="their maintenance", by="ann@desk")
    app.submit_many(app.tasks["call"].job(n) for n in range(5))
    app.submit_many(app.tasks["free"].job(n) for n in range(5))
    with working(app):
        wait_for_outcomes(app, 5)
        time.sleep(0.5)
        assert not [name for name in seen.names() if isinstance(name, int)]
        (standing,) = app.commands.standing()
        assert (standing.name, standing.paused) == ("slow", "by ann@desk: their maintenance")
        app.resume(queue="slow")
        wait_for_outcomes(app, 10, timeout=10.0)
    assert app.commands.standing() == []


def test_a_paused_task_lets_the_others_of_its_queue_run(app: App, seen: Seen) -> None:
    """The jobs of a paused task run after the resume, and the other jobs of the queue run meanwhile."""
    app.pause(task="rated")
    app.submit_many(app.tasks["rated"].job(n) for n in range(5))
    app.submit_many(app.tasks["free"].job(n) for n in range(50))
    with working(app):
        wait_for_outcomes(app, 50)
        assert not [name for name in seen.names() if name[0] == "rated"]
        app.resume(task="rated")
        wait_for_outcomes(app, 55, timeout=10.0)


# -- cancels and expiries ---------------------------------------------------------------------------------------------


def test_a_cancelled_job_is_never_started(app: App, seen: Seen) -> None:
    """CANCEL_IS_DURABLE: the cancel is requested while no worker runs. The fact says who requested it and why, and the
    other jobs run."""
    handles = app.submit_many(app.tasks["free"].job(n) for n in range(20))
    keyed = app.tasks["book"].submit("k", 1)
    for handle in [*handles[::2], keyed]:
        handle.cancel("wrong list")
    with working(app):
        facts = wait_for_outcomes(app, 21)
    assert sorted(n for _, n in seen.names()) == list(range(1, 20, 2))
    for handle in [*handles[::2], keyed]:
        (fact,) = facts[handle.job_id]
        assert isinstance(fact, JobCancelledFact)
        assert fact.reason == "wrong list"
        assert "@" in fact.by


def test_a_running_job_is_cancelled(app: App, seen: Seen) -> None:
    """A coroutine is cancelled at its `await`. A keyed job that waits for its retry in place is not started again."""
    running, other = (app.tasks["waits"].submit(n) for n in range(2))
    held = app.tasks["knocks"].submit("k")
    with working(app):
        until(lambda: len(seen.began) >= 3)
        running.cancel("enough")
        held.cancel()
        facts = wait_for_outcomes(app, 2, timeout=10.0)
        assert isinstance(facts[running.job_id][0], JobCancelledFact)
        assert isinstance(facts[held.job_id][0], JobCancelledFact)
        seen.open.set()
        assert isinstance(wait_for_outcomes(app, 3)[other.job_id][0], JobSucceeded)


def test_an_expired_job_is_not_started(app: App, seen: Seen) -> None:
    """The time to expiry counts from the append of the record. A job that is in time runs."""
    late = app.tasks["free"].using(expires_in=0.5).submit(1)
    intime = app.tasks["free"].using(expires_in=600).submit(2)
    keyed = app.tasks["book"].using(expires_in=0.5).submit("k", 3)
    time.sleep(0.8)
    with working(app):
        facts = wait_for_outcomes(app, 3)
    assert isinstance(facts[late.job_id][0], JobExpiredFact)
    assert isinstance(facts[keyed.job_id][0], JobExpiredFact)
    assert isinstance(facts[intime.job_id][0], JobSucceeded)
    assert seen.names() == [("free", 2)]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_an_open_circuit_uses_no_attempts(app: App, seen: Seen) -> None:
    """After three failures in a row, one job per `reset` is tried. All jobs run as soon as one of these succeeds."""
    app.submit_many(app.tasks["flaky"].job(n) for n in range(30))
    with working(app, concurrency=1):
        until(lambda: len(seen.began) >= 3)
        time.sleep(2.5)
        begun = len(seen.began)  # read before the clock, because this process may be interrupted in between
        assert begun <= 3 + 1 + int(time.monotonic() - seen.began[2][1])  # one a second, which is the `reset`
        seen.fail = False
        most = 3 + 1 + int(time.monotonic() - seen.began[2][1])
        # The retried jobs wait for a coordinator, which does not run here. All other jobs succeed.
        facts = until(lambda: len(found := closings(app)) == 30 and found, 20.0)
    kinds = Counter(fact_name(r.event.fact) for of in facts.values() for r in of)
    assert 3 <= kinds["JobRetried"] <= most, kinds
    assert kinds["JobSucceeded"] == 30 - kinds["JobRetried"]
