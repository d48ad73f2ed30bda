"""Measures the cost and the effect of ordering: keys, priorities, a slow job among short ones, two processes instead of
one.

Each figure is measured in separate processes and in separate namespaces.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from bench.harness import Figure, percentile
from bench.worker import alone, cpu_s
from jobledger import App, Queue, Settings
from jobledger.consumers.worker.main import run_tuned
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.topics import ensure

PARTITIONS, LEVELS = 4, 3
KEYS = 10_000
#: Short jobs that are submitted per second while one slow job runs.
RATE = 2_000
#: Seconds between two submissions with high priority, while there is a backlog of jobs with low priority.
EVERY_S = 0.02

WAITS: list[float] = []
RAN: list[str] = []


def build(namespace: str, bootstrap: str) -> App:
    """Create the app that is measured."""
    app = App(
        namespace,
        settings=Settings(bootstrap=bootstrap),
        partitions=PARTITIONS,
        queues=["default", Queue("levels", priorities=True)],
    )

    @app.task
    async def noop(n: int) -> None:
        pass

    @app.task(key="account", timeout=30)
    async def keyed(account: int, n: int) -> None:
        pass

    @app.task
    async def stamp(at_ns: int) -> None:
        WAITS.append((time.time_ns() - at_ns) / 1e6)

    @app.task
    async def slow(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @app.task(queue="levels")
    async def level(name: str, at_ns: int = 0) -> None:
        RAN.append(name)
        if at_ns:
            WAITS.append((time.time_ns() - at_ns) / 1e6)
        await asyncio.sleep(0.005)

    return app


def made(bootstrap: str) -> App:
    """Create an app with a new namespace, and its topics."""
    app = build(f"bench{uuid.uuid4().hex[:8]}", bootstrap)
    ensure(app, app.settings)
    return app


def ready(worker: Worker) -> bool:
    """Return whether the worker is ready to run jobs of all its partitions."""
    parts = list(worker.partitions())
    return bool(parts) and all(p.ready for p in parts) and worker.health()["status"] == "ok"


def beside(worker: Worker, watch: Callable[[], None]) -> None:
    """Run the worker until ``watch``, which runs in another thread, has returned."""

    def whole() -> None:
        try:
            watch()
        finally:
            worker.stop()

    threading.Thread(target=whole, daemon=True).start()
    run_tuned(worker)


# -- keys -------------------------------------------------------------------------------------------------------------


def drained(namespace: str, bootstrap: str, task: str, jobs: int) -> dict[str, float]:
    """Run one worker over a topic with ``jobs`` jobs until every fact is acknowledged. Return the jobs per second, and
    the CPU seconds for 1,000 jobs."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(queues=["default"]))
    found: dict[str, float] = {}

    def watch() -> None:
        while worker.dispatcher is None or not worker.dispatcher.pipe.running.begun:
            time.sleep(0.001)
        began, used = time.perf_counter(), cpu_s()
        runtime = worker.dispatcher.pipe.tasks.runtimes[task]
        assert worker.sender is not None
        while runtime.succeeded < jobs or worker.sender.unacknowledged:
            time.sleep(0.005)
        found.update(rate=jobs / (time.perf_counter() - began), cpu=(cpu_s() - used) / jobs * 1000)

    beside(worker, watch)
    return found


# -- two processes ----------------------------------------------------------------------------------------------------


def shared(namespace: str, bootstrap: str, task: str, pipe: Any) -> None:
    """Run one of several workers of a topic until no job is left. Send through ``pipe`` the number of the worker's
    jobs, and its CPU seconds from its first job to its last."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(queues=["default"]))

    def watch() -> None:
        while not ready(worker):
            time.sleep(0.01)
        assert worker.dispatcher is not None
        runtime = worker.dispatcher.pipe.tasks.runtimes[task]
        pipe.send("ready")
        pipe.recv()
        first = used = last = 0.0
        done, since = 0, time.monotonic()
        while time.monotonic() - since < (60.0 if not done else 2.0):
            if runtime.succeeded != done:
                if not done:
                    first = cpu_s()
                done, since, last = runtime.succeeded, time.monotonic(), cpu_s()
            time.sleep(0.005)
        used = last - first
        pipe.send((done, used))

    beside(worker, watch)


def cpu_of(bootstrap: str, jobs: int, processes: int) -> float:
    """Return the CPU seconds for 1,000 no-op jobs, of all worker processes together. All workers are ready before the
    first job is submitted."""
    app = made(bootstrap)
    context = multiprocessing.get_context("spawn")
    workers = []
    for _ in range(processes):
        here, there = context.Pipe()
        process = context.Process(target=shared, args=(app.names.namespace, bootstrap, "noop", there))
        process.start()
        workers.append((process, here))
    for _, pipe in workers:
        pipe.recv()
    time.sleep(6.0)  # until the group has assigned its partitions
    for _, pipe in workers:
        pipe.send("go")
    # The queue is paused until all jobs are submitted, because the figure must not depend on the rate of submissions
    # and on their CPU time on the same cores.
    app.pause(queue="default")
    app.submit_many(app.tasks["noop"].job(n) for n in range(jobs))
    time.sleep(1.0)
    app.resume(queue="default")
    reports = [pipe.recv() for _, pipe in workers]
    for process, _ in workers:
        process.join()
    app.close()
    assert all(done for done, _ in reports), f"a worker had nothing to do: {reports}"
    return float(sum(used for _, used in reports) / sum(done for done, _ in reports) * 1000)


# -- a slow job among short ones --------------------------------------------------------------------------------------


def submit_steadily(namespace: str, bootstrap: str, jobs: int, slow_s: float) -> None:
    """Submit `RATE` short jobs a second, and a slow job after a tenth of them. Runs in a process of its own."""
    app = build(namespace, bootstrap)
    begin = time.monotonic()
    chunk = RATE // 50
    for first in range(0, jobs, chunk):
        time.sleep(max(0.0, begin + first / RATE - time.monotonic()))
        if slow_s and first <= jobs // 10 < first + chunk:
            app.tasks["slow"].submit(slow_s)
        app.submit_many(app.tasks["stamp"].job(time.time_ns()) for _ in range(chunk))
    app.close()


def waits_beside(namespace: str, bootstrap: str, jobs: int, slow_s: float) -> dict[str, float]:
    """Measure how long short jobs wait for their start, in milliseconds, with a job of ``slow_s`` seconds among them;
    0: without that job."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(queues=["default"]))

    def watch() -> None:
        while not ready(worker):
            time.sleep(0.01)
        child = multiprocessing.get_context("spawn").Process(
            target=submit_steadily, args=(namespace, bootstrap, jobs, slow_s)
        )
        child.start()
        child.join()
        deadline = time.monotonic() + 30
        while len(WAITS) < jobs and time.monotonic() < deadline:
            time.sleep(0.01)

    beside(worker, watch)
    mine = WAITS[jobs // 10 :]
    return {"p50": percentile(mine, 0.5), "p99": percentile(mine, 0.99), "ran": len(WAITS)}


# -- priorities -------------------------------------------------------------------------------------------------------


def waits_of_high(namespace: str, bootstrap: str, backlog: int, count: int) -> dict[str, float]:
    """Measure how long jobs with high priority wait, in milliseconds, while a worker runs a backlog of jobs with low
    priority."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(queues=["levels"]))
    found: dict[str, float] = {}

    def watch() -> None:
        while len(RAN) < 100:
            time.sleep(0.01)
        high = app.tasks["level"].using(priority="high")
        for _ in range(count):
            high.submit("high", time.time_ns())
            time.sleep(EVERY_S)
        while len(WAITS) < count:
            time.sleep(0.01)
        found.update(p50=percentile(WAITS, 0.5), p99=percentile(WAITS, 0.99), left=backlog - RAN.count("low"))

    beside(worker, watch)
    app.close()
    return found


def share_of_low(namespace: str, bootstrap: str, high: int) -> dict[str, float]:
    """Return the share of jobs with low priority in all starts, in percent, while there are always jobs with high
    priority."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(queues=["levels"]))

    # The queue is paused until the worker has the partitions of all priorities: each priority has its own group, and
    # the groups do not assign their partitions at the same moment.
    app.pause(queue="levels")

    def watch() -> None:
        while not (ready(worker) and len(list(worker.partitions())) == LEVELS * PARTITIONS):
            time.sleep(0.05)
        app.resume(queue="levels")
        while RAN.count("high") < high:
            time.sleep(0.05)

    beside(worker, watch)
    app.close()
    both = RAN[RAN.index("low") : len(RAN) - RAN[::-1].index("high")]
    return {"low": both.count("low") / len(both) * 100}


def run(settings: Settings, *, quick: bool = False) -> list[Figure]:
    """Measure every figure."""
    bootstrap = settings.resolve_bootstrap()
    jobs = 20_000 if quick else 100_000
    slow_s = 5.0 if quick else 30.0
    app = made(bootstrap)
    app.submit_many(app.tasks["keyed"].job(n % KEYS, n) for n in range(jobs))
    keyed = alone(drained, app.names.namespace, bootstrap, "keyed", jobs)
    app.close()

    app = made(bootstrap)
    hot_jobs = 2_000
    app.submit_many(app.tasks["keyed"].job(1, n) for n in range(hot_jobs))
    hot = alone(drained, app.names.namespace, bootstrap, "keyed", hot_jobs)
    app.close()

    # One and two processes are measured alternately, and the smallest value of each counts: other work of the machine
    # can only increase a value.
    pairs = [(cpu_of(bootstrap, jobs, 1), cpu_of(bootstrap, jobs, 2)) for _ in range(1 if quick else 2)]
    one, two = (min(each) for each in zip(*pairs, strict=True))

    calm = alone(waits_beside, made(bootstrap).names.namespace, bootstrap, jobs, 0.0)
    slow = alone(waits_beside, made(bootstrap).names.namespace, bootstrap, jobs, slow_s)
    # A job that never started would be missing from the figure, although the figure is about such jobs.
    for found in (calm, slow):
        assert found["ran"] == jobs, f"{found['ran']:,.0f} of {jobs:,} short jobs ran"

    app = made(bootstrap)
    low = app.tasks["level"].using(priority="low")
    app.submit_many(low.job("low") for _ in range(jobs))
    high = alone(waits_of_high, app.names.namespace, bootstrap, jobs, 50 if quick else 200)
    app.close()

    app = made(bootstrap)
    app.submit_many(app.tasks["level"].using(priority="low").job("low") for _ in range(jobs // 5))
    app.submit_many(app.tasks["level"].using(priority="high").job("high") for _ in range(jobs // 5))
    share = alone(share_of_low, app.names.namespace, bootstrap, jobs // 5)
    app.close()
    return [
        Figure(
            f"keyed no-op jobs, {KEYS:,} keys", keyed["rate"], "jobs/s", 10_000, True, None,
            f"{jobs:,} jobs, one process, each key one at a time",
        ),
        Figure(
            "keyed no-op jobs, one key", hot["rate"], "jobs/s", None, True, None,
            f"{hot_jobs:,} jobs, each begun when the end of the one before is acknowledged",
        ),
        Figure(
            "CPU of no-op jobs, two processes", two, "s per 1,000", one * 1.1, False, one,
            "bare: one process; each twice, in turn, the less of it",
        ),
        Figure(
            f"wait p99 beside a {slow_s:g} s job", slow["p99"], "ms", calm["p99"] * 1.1, False, calm["p99"],
            f"{RATE:,} short jobs a second, {jobs:,} in all; bare: without it",
        ),
        Figure(f"high behind {jobs:,} low, p50", high["p50"], "ms", None, False, None, f"{high['left']:,.0f} low ones were left"),
        Figure(f"high behind {jobs:,} low, p99", high["p99"], "ms", 250, False, None, "jobs of 5 ms, 100 at once"),
        Figure("low while high never ends", share["low"], "% of starts", 1.0, True, None, "by weight 1.5 %"),
    ]  # fmt: skip
