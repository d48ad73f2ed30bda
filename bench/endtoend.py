"""Measures the whole system on one machine. Jobs are submitted at a steady rate, run, and become visible in the status
table, while the lag is measured.

Broker, worker, coordinator and materializer are separate processes, as in production; this process submits and reads
the status table. A second measurement lets a worker run a backlog of jobs, and measures the worker's memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench import harness
from bench.harness import Figure
from jobledger.config import Settings

PARTITIONS = 6
STOP_S = 30.0


class Processes:
    """The child processes of one measurement. `stop` ends them by their process ids, with SIGTERM first."""

    def __init__(self, settings: Settings, namespace: str, folder: Path, partitions: int = PARTITIONS) -> None:
        self.env = os.environ | {
            "JOBLEDGER_BOOTSTRAP": settings.resolve_bootstrap(),
            "JOBLEDGER_STATUS_URL": f"sqlite:///{folder / 'status.db'}",
            "JOBLEDGER_HOME": str(folder),
            "BENCH_NAMESPACE": namespace,
            "BENCH_PARTITIONS": str(partitions),
        }
        self._folder = folder
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, *arguments: str) -> psutil.Process:
        """Start ``python -m jobledger`` with ``arguments``, and write its output to ``<name>.log``."""
        with open(self._folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobledger", *arguments], env=self.env, stdout=log, stderr=subprocess.STDOUT
            )
        self._running.append((name, process))
        return psutil.Process(process.pid)

    def check(self) -> None:
        """Raise `RuntimeError`, with the end of its output, if a child process has ended."""
        for name, process in self._running:
            if process.poll() is not None:
                tail = (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{tail}")

    def stop(self) -> None:
        """Send SIGTERM to all child processes, wait `STOP_S` seconds for each, and kill those that still run."""
        for _, process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _, process in self._running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def steady(settings: Settings, rate: int = 4_000, seconds: int = 60) -> list[Figure]:
    """Submit ``rate`` jobs a second for ``seconds``. Return the rate at which jobs became visible, how the lag grew,
    and the CPU time."""
    names = harness.fresh_names("steady")
    harness.create(settings, names, ["bench"], PARTITIONS)
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder))
        os.environ.update({k: v for k, v in processes.env.items() if k.startswith(("JOBLEDGER_", "BENCH_"))})
        try:
            processes.start("worker", "worker", "bench.apps:app")
            processes.start("streams", "streams", "bench.apps:app")
            return _steady(settings, names.namespace, processes, rate, seconds)
        finally:
            processes.stop()
            harness.drop(settings, names)


def _steady(settings: Settings, namespace: str, processes: Processes, rate: int, seconds: int) -> list[Figure]:
    from jobledger import App

    env = processes.env
    app = App(namespace, settings=Settings.from_env(env), partitions=PARTITIONS)
    noop = app.task(queue="bench", name="noop")(_noop)
    try:
        noop.submit(0).wait(60)
        began = time.monotonic()
        cpu = _cpu_seconds()
        submitted, late, lags = 1, 0.0, []
        tick, sample_at = 0.1, 1.0
        for step in range(int(seconds / tick)):
            due = began + step * tick
            time.sleep(max(0.0, due - time.monotonic()))
            late = max(late, time.monotonic() - due)
            app.submit_many(noop.job(submitted + i) for i in range(int(rate * tick)))
            submitted += int(rate * tick)
            if time.monotonic() - began >= sample_at:
                sample_at += 1.0
                processes.check()
                lags.append(submitted - _ended(app))
        took = time.monotonic() - began
        visible_in_time = _ended(app)
        cpu = _cpu_seconds() - cpu
        deadline = time.monotonic() + 60
        while _ended(app) < submitted and time.monotonic() < deadline:
            time.sleep(0.05)
        drained = time.monotonic() - began - took
        assert _ended(app) == submitted, f"{submitted - _ended(app)} jobs never became visible as ended"
    finally:
        app.close()
    half = len(lags) // 2
    early, later = sum(lags[half // 2 : half]) / max(1, half - half // 2), sum(lags[half:]) / max(1, len(lags) - half)
    note = f"{seconds} s at {rate:,}/s; lag {early:,.0f} → {later:,.0f} jobs; drained {drained:.1f} s after; late ≤ {late:.1f} s"
    return [
        Figure("end to end, visible", visible_in_time / took, "jobs/s", 4_000 * 0.98, True, None, note),
        Figure("end to end, lag growth", later - early, "jobs", rate * 0.5, False, None, "second half of the run less the first"),
        Figure("end to end, CPU", cpu / submitted * 1000, "s per 1,000 jobs", None, False, None, "all processes, broker and submitter too"),
    ]  # fmt: skip


async def _noop(number: int) -> None:
    """Declare `bench.apps.noop` for the submitter."""


async def _nap(number: int, seconds: float = 0.05) -> None:
    """Declare `bench.apps.nap` for the submitter."""


def _ended(app: object) -> int:
    table = app.status_table()  # type: ignore[attr-defined]  # an App, which this module does not import at once
    return sum(n for state, n in table.counts_by_state().items() if state == "succeeded")


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process, of all processes below it, and of all Kafka brokers on this machine."""
    here = psutil.Process()
    family: Sequence[psutil.Process] = [here, *here.children(recursive=True)]
    for process in psutil.process_iter(["name", "cmdline"]):
        if process not in family and "kafka.Kafka" in (process.info["cmdline"] or []):
            family = [*family, process]
    total = 0.0
    for process in family:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def backlog(settings: Settings, jobs: int = 1_000_000) -> list[Figure]:
    """Submit ``jobs`` jobs, then start a worker. Return the worker's rate, and how much its resident memory varied
    while it ran the jobs."""
    from confluent_kafka import TopicPartition

    from jobledger import App
    from jobledger.kafka.clients import admin

    names = harness.fresh_names("backlog")
    harness.create(settings, names, ["bench"], PARTITIONS)
    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    noop = app.task(queue="bench", name="noop")(_noop)
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder))
        try:
            ends = [0] * PARTITIONS
            for start in range(0, jobs, 100_000):
                for handle in app.submit_many(noop.job(i) for i in range(start, min(jobs, start + 100_000))):
                    position = handle.position
                    ends[position.partition] = max(ends[position.partition], position.offset + 1)
            client = admin(settings)
            worker = processes.start("worker", "worker", "bench.apps:app")
            group = names.worker_group("bench")
            began, first, samples = time.monotonic(), 0.0, []
            while True:
                time.sleep(1.0)
                processes.check()
                done = _committed(client, group, [TopicPartition(names.jobs("bench"), p) for p in range(PARTITIONS)])
                if done and not first:
                    first = time.monotonic()
                if done > jobs * 0.1:
                    samples.append(worker.memory_info().rss / 2**20)
                if done >= sum(ends):
                    break
                if time.monotonic() - began > 600:
                    raise RuntimeError(f"only {done:,} of {jobs:,} jobs were done after 600 s")
            took = time.monotonic() - (first or began)
        finally:
            processes.stop()
            app.close()
            harness.drop(settings, names)
    median = harness.percentile(samples, 0.5)
    spread = max(max(samples) - median, median - min(samples)) / median * 100
    return [
        Figure("backlog drained", jobs / took, "jobs/s", None, True, None, f"{jobs:,} no-op jobs, one worker process"),
        Figure(
            "worker memory spread", spread, "%", 10.0, False, None, f"± around {median:.0f} MiB, after the first tenth"
        ),
    ]


def _committed(client: object, group: str, partitions: list[object]) -> int:
    from confluent_kafka import ConsumerGroupTopicPartitions

    request = [ConsumerGroupTopicPartitions(group, partitions)]  # type: ignore[arg-type]  # TopicPartitions
    future = client.list_consumer_group_offsets(request)[group]  # type: ignore[attr-defined]  # AdminClient
    return sum(max(0, p.offset) for p in future.result().topic_partitions or ())
