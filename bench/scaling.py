"""Measures scaling by partition: the same queue with one, two and four workers; the cost of a worker that joins; and
the cost of idle processes.

The jobs wait, as jobs do that call another service. So a worker is limited by its ``--concurrency`` and not by this
machine's cores.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from confluent_kafka import KafkaException, TopicPartition

from bench import harness
from bench.endtoend import Processes, _committed, _nap
from bench.harness import Figure
from jobledger import App
from jobledger.config import Settings
from jobledger.kafka.clients import admin
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import JobStarted

PARTITIONS = 12
#: Number of jobs that a worker runs at once, and seconds that each job takes: an ideal worker runs 1,000 jobs a second.
CONCURRENCY, NAP_S = 50, 0.05
IDEAL = CONCURRENCY / NAP_S


def run(settings: Settings, seconds: int = 20) -> list[Figure]:
    """Measure the jobs per second of one, two and four workers over twelve partitions, and a worker that joins.
    ``seconds``: how long ideal workers need for the jobs of one measurement."""
    found: list[Figure] = []
    one = 0.0
    for workers in (1, 2, 4):
        rate = _drained(settings, workers, round(IDEAL * workers * seconds))
        one = one or rate
        note = f"{CONCURRENCY} × {NAP_S * 1000:.0f} ms jobs at once in each; {rate / one:.2f} × one worker"
        target = None if workers == 1 else one * workers * 0.9
        found.append(
            Figure(f"{workers} workers, {PARTITIONS} partitions", rate, "jobs/s", target, True, IDEAL * workers, note)
        )
    return [*found, *_joined(settings, seconds)]  # fmt: skip


def _backlog(app: App, jobs: int) -> list[TopicPartition]:
    """Submit jobs. Return the ends of the work topic's partitions."""
    nap = app.task(queue="bench", name="nap")(_nap)
    ends = [0] * PARTITIONS
    for start in range(0, jobs, 50_000):
        for handle in app.submit_many(nap.job(i, NAP_S) for i in range(start, min(jobs, start + 50_000))):
            ends[handle.position.partition] = max(ends[handle.position.partition], handle.position.offset + 1)
    return [TopicPartition(app.names.jobs("bench"), number, end) for number, end in enumerate(ends)]


def _drained(settings: Settings, workers: int, jobs: int) -> float:
    """Submit jobs to workers that are ready. Return the rate of starts, from the time when 10 % of the jobs have
    started to the time when 80 % have."""
    names = harness.fresh_names("scaling")
    harness.create(settings, names, ["bench"], PARTITIONS)
    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder), PARTITIONS)
        try:
            # The workers are ready first, each with an equal share of the partitions. Then the jobs are submitted.
            for number in range(workers):
                processes.start(f"worker-{number}", "worker", "bench.apps:app", "--concurrency", str(CONCURRENCY))
            _settle(settings, names, workers)
            ends = _backlog(app, jobs)
            _drain(settings, names, ends, processes)
            starts = _starts(settings, names)
        finally:
            processes.stop()
            app.close()
            harness.drop(settings, names)
    assert len(starts) == jobs, f"{len(starts):,} starts of {jobs:,} jobs"
    # The beginning and the end are left out: the first jobs start while others are still submitted, and the last ones
    # when some partitions are empty already.
    low, high = starts[jobs // 10], starts[jobs * 8 // 10]
    return jobs * 0.7 / (high - low) * 1000


def _joined(settings: Settings, seconds: int) -> list[Figure]:
    """Start a second worker while the first one is running jobs. Return the longest time in which no job starts, and
    the time until the second worker starts its first job."""
    names = harness.fresh_names("join")
    harness.create(settings, names, ["bench"], PARTITIONS)
    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    words = ("worker", "bench.apps:app", "--concurrency", str(CONCURRENCY))
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder), PARTITIONS)
        try:
            processes.start("worker-0", *words)
            _settle(settings, names, 1)
            ends = _backlog(app, round(IDEAL * seconds))
            time.sleep(min(5.0, seconds / 4))
            joined = time.time() * 1000
            processes.start("worker-1", *words)
            _drain(settings, names, ends, processes)
            starts = _starts(settings, names)
            second = _starts(settings, names, after_ms=joined, new_worker=True)
        finally:
            processes.stop()
            app.close()
            harness.drop(settings, names)
    around = [at for at in starts if at > joined - 1_000]
    gap = max(after - before for before, after in itertools.pairwise(around) if before < second[0] + 3_000)
    took = (second[0] - joined) / 1000
    return [
        Figure("a worker joins: longest time in which nothing starts", gap, "ms", None, False, None, "one worker at work, a second joins"),
        Figure("a worker joins: its first job", took, "s", None, False, None, "after its process was started"),
    ]  # fmt: skip


def _settle(settings: Settings, names: Names, workers: int) -> None:
    """Wait until the group has all its members and every partition has an owner."""
    client, group = admin(settings), names.worker_group("bench")
    deadline = time.monotonic() + 60
    while True:
        owned: list[int] = []
        with contextlib.suppress(KafkaException):  # a broker that has just started has no coordinator of the group
            members = client.describe_consumer_groups([group], request_timeout=5)[group].result().members
            owned = [len(m.assignment.topic_partitions) for m in members]
        if len(owned) == workers and sum(owned) == PARTITIONS and max(owned) - min(owned) <= 1:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{group} has members with {owned} partitions after 60 s")
        time.sleep(0.2)
    time.sleep(1.0)


def _drain(settings: Settings, names: Names, ends: Sequence[TopicPartition], processes: Processes) -> None:
    client, group = admin(settings), names.worker_group("bench")
    parts = [TopicPartition(end.topic, end.partition) for end in ends]
    deadline = time.monotonic() + 300
    while _committed(client, group, list(parts)) < sum(end.offset for end in ends):
        time.sleep(0.5)
        processes.check()
        if time.monotonic() > deadline:
            raise RuntimeError("the jobs were not done after 300 s")


def _starts(settings: Settings, names: Names, *, after_ms: float = 0.0, new_worker: bool = False) -> list[int]:
    """Return the append times of all starts in ms, sorted. ``new_worker``: only starts of workers whose first start is
    later than ``after_ms``."""
    decode = decoder(settings, names).decode
    by_worker: dict[str, list[int]] = {}
    with LogReader(settings) as reader:
        for partition in range(PARTITIONS):
            low, high = reader.bounds(names.lifecycle, partition)
            for message in reader.read(names.lifecycle, partition, low, high):
                found = recorded(message, decode)
                if isinstance(found.event.fact, JobStarted):
                    by_worker.setdefault(found.event.source, []).append(message.timestamp()[1])
    return sorted(at for times in by_worker.values() if not new_worker or min(times) > after_ms for at in times)


def idle(settings: Settings, seconds: int = 60) -> list[Figure]:
    """Measure the memory (USS) and the CPU time that each part uses while no job runs, including its child processes;
    those of the broker, if it runs on this machine; and the totals."""
    names = harness.fresh_names("idle")
    os.environ.update(BENCH_NAMESPACE=names.namespace, BENCH_PARTITIONS=str(PARTITIONS))
    from bench import apps  # only here, because the import reads the namespace from the environment
    from jobledger.kafka.topics import ensure

    app = App(names.namespace, settings=settings, partitions=PARTITIONS)
    app.event(apps.Emitted)
    harness.create(settings, names, ["bench"], PARTITIONS)
    ensure(app, settings)
    parts = {
        "worker": ("worker", "bench.apps:app"),
        "router": ("router", "bench.apps:app"),
        "coordinator": ("coordinator", "bench.apps:app"),
        "materializer": ("materializer", "bench.apps:app"),
        "projections": ("projections", "run", "bench.apps:app"),
    }
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        processes = Processes(settings, names.namespace, Path(folder), PARTITIONS)
        try:
            running = {name: processes.start(name, *words) for name, words in parts.items()}
            _settle(settings, names, 1)
            time.sleep(min(20, seconds))
            processes.check()
            broker = _listening(settings.resolve_bootstrap())
            running |= {} if broker is None else {"broker": broker}
            before = {name: _cpu(process) for name, process in running.items()}
            time.sleep(seconds)
            used = {name: (_cpu(process) - before[name]) / seconds * 100 for name, process in running.items()}
            memory = {name: _memory(process) for name, process in running.items()}
        finally:
            processes.stop()
            app.close()
            harness.drop(settings, names)
    note = f"idle for {seconds} s, {PARTITIONS} partitions"
    rows = {name: (name,) for name in parts} | {"all parts of ours": tuple(parts)}
    if "broker" in running:
        rows |= {"broker": ("broker",), "all of it, broker included": tuple(running)}
    figures: list[Figure] = []
    for name, of in rows.items():
        mib, cpu = sum(memory[each] for each in of), sum(used[each] for each in of)
        figures.append(Figure(f"idle, {name}: memory", mib, "MiB", None, False, None, note))
        figures.append(Figure(f"idle, {name}: CPU", cpu, "% of a core", None, False, None, note))
    return figures


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _memory(process: psutil.Process) -> float:
    """Return the memory, in MiB, that belongs to a process and its child processes alone (the sum of their USS)."""
    return sum(each.memory_full_info().uss for each in _family(process)) / 2**20


def _listening(address: str) -> psutil.Process | None:
    """Return the process of this machine that listens at ``host:port``; None if there is none, or if this user may not
    see it."""
    host, _, port = address.partition(",")[0].rpartition(":")
    if host not in ("localhost", "127.0.0.1"):
        return None
    with contextlib.suppress(psutil.AccessDenied):
        for each in psutil.net_connections("tcp"):
            here = each.laddr and each.laddr.port == int(port)
            if here and each.status == psutil.CONN_LISTEN and each.pid is not None:
                return psutil.Process(each.pid)
    return None


def _cpu(process: psutil.Process) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in _family(process))
