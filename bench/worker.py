"""Measures what a worker process does in a second, and a bare librdkafka loop in the same run. Prints JSON.

The bare loop is the smallest program that could be called a worker: it decodes each record, starts an asyncio task,
sends two facts, and tracks the offsets that are not done. It has no group, no memory of duplicates, no delivery reports
and no commits. Each figure is measured in a process of its own.

    python bench/worker.py [--jobs N] [--bootstrap HOST:PORT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import uuid_utils
from confluent_kafka import Consumer, Producer, TopicPartition

from jobledger import App, Settings
from jobledger.consumers.worker.main import run_tuned
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.clients import consumer_config, producer_config
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topics import ensure
from jobledger.process.identity import now_us, source
from jobledger.schemas.codec import decode, encode
from jobledger.schemas.events import JobEvent, JobStarted, JobSubmitted, JobSucceeded

PARTITIONS = 4
TURNS = 3
NAP_S = 0.05
NAPS_AT_ONCE = 500


def build(namespace: str, bootstrap: str) -> App:
    """Create the app that is measured."""
    app = App(namespace, settings=Settings(bootstrap=bootstrap), partitions=PARTITIONS)

    @app.task
    async def noop(n: int) -> None:
        pass

    @app.task
    async def nap(n: int) -> None:
        await asyncio.sleep(NAP_S)

    @app.task
    async def stamp(at_ns: int) -> None:
        LATENCIES.append((time.time_ns() - at_ns) / 1e6)

    @app.task
    def plain(n: int) -> None:
        pass

    return app


LATENCIES: list[float] = []


def cpu_s() -> float:
    """Return the CPU seconds that all threads of this process have used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bare(namespace: str, bootstrap: str, jobs: int, task: str, at_once: int) -> dict[str, Any]:
    """Run the loop with which the worker is compared, over a work topic of its own, until ``jobs`` jobs have ended and
    their facts are sent. Return its figures."""
    app = build(namespace, bootstrap)
    settings, names = app.settings, app.names
    writer = source("bare")

    async def main() -> dict[str, Any]:
        producer = Producer(producer_config(settings, linger_ms=2))
        consumer = Consumer(consumer_config(settings))
        consumer.assign([TopicPartition(names.jobs("default"), p, 0) for p in range(PARTITIONS)])
        pending: list[dict[int, None]] = [{} for _ in range(PARTITIONS)]
        room = asyncio.Semaphore(at_once)
        done = 0
        function = app.tasks[task].fn

        def fact(event: JobEvent, body: Any) -> bytes:
            return encode(
                JobEvent(
                    str(uuid_utils.uuid7()), event.job_id, 1, 1, 1, now_us(), task, "default", None, None, writer,
                    None, body,
                )
            )  # fmt: skip

        async def one(message: Any) -> None:
            nonlocal done
            partition, offset = message.partition(), message.offset()
            event = decode(message.value())
            started = fact(event, JobStarted(writer, None, {}, names.jobs("default"), offset))
            producer.produce(names.lifecycle, started, event.job_id, partition)
            assert isinstance(event.fact, JobSubmitted)
            await function(**json.loads(event.fact.spec.args))
            closed = fact(event, JobSucceeded(None, 1))
            producer.produce(names.lifecycle, closed, event.job_id, partition)
            del pending[partition][offset]
            done += 1
            room.release()

        began = used = 0.0
        tasks: set[asyncio.Task[None]] = set()
        while done < jobs:
            batch = consumer.consume(200, 0)
            producer.poll(0)
            if batch and not began:
                began, used = time.perf_counter(), cpu_s()
            for message in batch:
                if message.error() is None:
                    pending[message.partition() or 0][message.offset() or 0] = None
                    await room.acquire()
                    task_ = asyncio.get_running_loop().create_task(one(message))
                    tasks.add(task_)
                    task_.add_done_callback(tasks.discard)
            await asyncio.sleep(0 if batch else 0.001)
        producer.flush(10)
        took = time.perf_counter() - began
        consumer.close()
        return figures(jobs, took, cpu_s() - used)

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def figures(jobs: int, took: float, used: float) -> dict[str, Any]:
    """Return the rate of a run, and its CPU seconds for 1,000 jobs."""
    return {
        "jobs": jobs,
        "seconds": round(took, 2),
        "jobs_per_s": round(jobs / took),
        "cpu_s_per_1000": round(used / jobs * 1000, 4),
    }


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest run. This run was disturbed least, because other work of the machine can only slow it down."""
    return max(runs, key=lambda run: float(run["jobs_per_s"]))


def rates(runs: list[dict[str, Any]]) -> list[int]:
    """Return the jobs per second of every run, in the order of the runs."""
    return [run["jobs_per_s"] for run in runs]


def worked(
    namespace: str, bootstrap: str, jobs: int, task: str, at_once: int, app: App | None = None
) -> dict[str, Any]:
    """Run the real worker over a work topic until every fact is acknowledged. The flush of the bare loop waits for the
    same. Return the worker's figures."""
    app = app or build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions(concurrency=at_once))
    found: dict[str, Any] = {}

    def watch() -> None:
        while worker.dispatcher is None or not worker.dispatcher.pipe.running.begun:
            time.sleep(0.001)
        began, used = time.perf_counter(), cpu_s()
        runtime = worker.dispatcher.pipe.tasks.runtimes[task]
        memory = []
        assert worker.sender is not None
        while runtime.succeeded < jobs or worker.sender.unacknowledged:
            time.sleep(0.005)
            if runtime.succeeded > jobs // 4:
                memory.append(rss_mb())
        found.update(figures(jobs, time.perf_counter() - began, cpu_s() - used))
        while any(p.offsets.pending for p in worker.partitions() if p.offsets):
            time.sleep(0.005)
        found["seconds_until_done"] = round(time.perf_counter() - began, 2)
        if memory:
            found["rss_mb"] = {"first": memory[0], "most": max(memory), "last": memory[-1]}
        worker.stop()

    threading.Thread(target=watch, daemon=True).start()
    run_tuned(worker)
    return found


def imported(namespace: str, bootstrap: str) -> App:
    """Return the app of `bench.apps`, which child processes can import. Call this only once in a process, because the
    import fixes the app's namespace."""
    os.environ["BENCH_NAMESPACE"], os.environ["BENCH_PARTITIONS"] = namespace, str(PARTITIONS)
    from bench.apps import app

    app.settings = Settings(bootstrap=bootstrap)
    return app


def isolated(namespace: str, bootstrap: str, jobs: int, task: str) -> dict[str, Any]:
    """Submit jobs of a task that runs in child processes, then measure them with `worked`. There are as many child
    processes as CPUs."""
    app = imported(namespace, bootstrap)
    ensure(app, app.settings)
    app.submit_many(app.tasks[task].job(n) for n in range(jobs))
    return worked(namespace, bootstrap, jobs, task, 100, app)


def rss_mb() -> float:
    """Return the resident memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def latency(namespace: str, bootstrap: str, jobs: int, rate: float) -> dict[str, Any]:
    """Measure the time from submission to start. Another process submits the jobs one by one, ``rate`` a second."""
    app = build(namespace, bootstrap)
    worker = Worker(app.registry, app.settings, WorkerOptions())

    def watch() -> None:
        while worker.health()["status"] != "ok" or not any(p.ready for p in worker.partitions()):
            time.sleep(0.01)
        child = multiprocessing.get_context("spawn").Process(
            target=submit_slowly, args=(namespace, bootstrap, jobs, rate)
        )
        child.start()
        child.join()
        deadline = time.monotonic() + 10
        while len(LATENCIES) < jobs and time.monotonic() < deadline:
            time.sleep(0.01)
        worker.stop()

    threading.Thread(target=watch, daemon=True).start()
    run_tuned(worker)
    return spread(LATENCIES[50:])


def spread(values: list[float]) -> dict[str, Any]:
    """Return the percentiles of values in milliseconds."""
    cut = statistics.quantiles(values, n=1000)
    return {
        "n": len(values),
        "p50_ms": round(cut[499], 2),
        "p95_ms": round(cut[949], 2),
        "p99_ms": round(cut[989], 2),
        "max_ms": round(max(values), 2),
    }


def submit_slowly(namespace: str, bootstrap: str, jobs: int, rate: float) -> None:
    """Submit jobs one by one, ``rate`` a second. Runs in a process of its own."""
    app = build(namespace, bootstrap)
    task = app.tasks["stamp"]
    begin = time.monotonic()
    for n in range(jobs):
        time.sleep(max(0.0, begin + n / rate - time.monotonic()))
        task.submit(time.time_ns())
    app.close()


def bare_hop(namespace: str, bootstrap: str, jobs: int, rate: float) -> dict[str, Any]:
    """Measure the same path without Jobledger's code: another process produces, this process polls."""
    settings = Settings(bootstrap=bootstrap)
    app = build(namespace, bootstrap)
    consumer = Consumer(consumer_config(settings))
    consumer.assign([TopicPartition(app.names.jobs("default"), p, 0) for p in range(PARTITIONS)])
    child = multiprocessing.get_context("spawn").Process(target=produce_slowly, args=(namespace, bootstrap, jobs, rate))
    child.start()
    seen: list[float] = []
    while len(seen) < jobs:
        message = consumer.poll(0.1)
        if message is not None and message.error() is None:
            value = message.value()
            assert value is not None
            seen.append((time.time_ns() - int(value)) / 1e6)
    consumer.close()
    child.join()
    return spread(seen[50:])


def produce_slowly(namespace: str, bootstrap: str, jobs: int, rate: float) -> None:
    """Produce records one by one, ``rate`` a second, with a bare producer. Runs in a process of its own."""
    app = build(namespace, bootstrap)
    producer = Producer(producer_config(app.settings))

    def send() -> None:
        producer.produce(app.names.jobs("default"), str(time.time_ns()).encode(), str(uuid.uuid4()))

    send()
    producer.flush(
        10
    )  # otherwise the next records would also wait for the connection of the first; `submit` also waits
    begin = time.monotonic()
    for n in range(1, jobs):
        time.sleep(max(0.0, begin + n / rate - time.monotonic()))
        send()
        producer.poll(0)
    producer.flush(10)


def _call(pipe: Any, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    pipe.send(function(*args))
    pipe.close()


def alone(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run ``function`` in a new process and return its result."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(there, function, args))
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    finally:
        process.join()
    return result


def prepared(bootstrap: str, task: str, jobs: int) -> str:
    """Create a namespace with ``jobs`` jobs in its work topic, and return the namespace."""
    namespace = f"bench{uuid.uuid4().hex[:8]}"
    app = build(namespace, bootstrap)
    ensure(app, app.settings)
    chosen = app.tasks[task]
    for first in range(0, jobs, 100_000):
        app.submit_many(chosen.job(n) for n in range(first, min(jobs, first + 100_000)))
    app.close()
    return namespace


def measure(bootstrap: str, jobs: int, only: str | None) -> dict[str, Any]:
    """Measure every figure. ``only``: the names of the figures to measure, separated by commas; None: all."""
    report: dict[str, Any] = {}

    def want(name: str) -> bool:
        return only is None or name in only.split(",")

    if want("noop"):
        bares, ours = [], []
        for _ in range(TURNS):
            bare_space, space = prepared(bootstrap, "noop", jobs), prepared(bootstrap, "noop", jobs)
            bares.append(alone(bare, bare_space, bootstrap, jobs, "noop", 100))
            ours.append(alone(worked, space, bootstrap, jobs, "noop", 100))
        report["noop"] = {
            "bare": fastest(bares),
            "worker": fastest(ours),
            "turns": {"bare": rates(bares), "worker": rates(ours)},
        }
    if want("threads"):
        # Enough jobs: if they took only a second, the figure would show the start of a worker rather than its threads.
        space = prepared(bootstrap, "plain", jobs)
        report["threads"] = {"worker": alone(worked, space, bootstrap, jobs, "plain", 100)}
    if want("processes"):
        space, busy = f"bench{uuid.uuid4().hex[:8]}", f"bench{uuid.uuid4().hex[:8]}"
        report["processes"] = {
            "cpus": len(os.sched_getaffinity(0)),
            "noop": alone(isolated, space, bootstrap, jobs // 8, "noop_in_process"),
            "busy_10_ms": alone(isolated, busy, bootstrap, 1_000, "busy_in_process"),
        }
    if want("naps"):
        naps = min(20_000, jobs)
        bare_space, space = prepared(bootstrap, "nap", naps), prepared(bootstrap, "nap", naps)
        report["naps"] = {
            "ideal_jobs_per_s": round(NAPS_AT_ONCE / NAP_S),
            "bare": alone(bare, bare_space, bootstrap, naps, "nap", NAPS_AT_ONCE),
            "worker": alone(worked, space, bootstrap, naps, "nap", NAPS_AT_ONCE),
        }
    if want("latency"):
        hops, rate = 2_000, 300.0
        report["submit_to_start"] = {
            "bare_hop": alone(bare_hop, prepared(bootstrap, "noop", 0), bootstrap, hops, rate),
            "worker": alone(latency, prepared(bootstrap, "noop", 0), bootstrap, hops, rate),
        }
    return report


def main() -> None:
    """Measure with the broker at ``--bootstrap``, else with an embedded broker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--bootstrap", default=os.environ.get("JOBLEDGER_BOOTSTRAP"))
    parser.add_argument("--only", help="noop, threads, processes, naps, latency; separated by commas")
    given = parser.parse_args()
    if given.bootstrap:
        print(json.dumps(measure(given.bootstrap, given.jobs, given.only), indent=2))
        return
    with EmbeddedKafka() as kafka:
        print(json.dumps(measure(kafka.bootstrap, given.jobs, given.only), indent=2))


if __name__ == "__main__":
    main()
