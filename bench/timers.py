"""Measures how late the coordinator releases jobs, how many jobs it can schedule and release per second, and what it
costs when idle. Prints one JSON object.

Everything is read from the raw topics: a release's lateness is the append time of its `JobDue` minus its due time, both
by the broker's clock. The coordinator is a process of its own, as in production.

    python bench/timers.py [--bootstrap HOST:PORT] [--timers 10000] [--spread 20] [--throughput 15000] [--partitions 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import uuid_utils

from jobledger.config import Settings
from jobledger.kafka import clients, topics, topology
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas.events import JobDue, JobEvent, JobSpec, JobSubmitted

QUEUE = "bench"
ARGS = b'{"to": "somebody@example.org", "template": "welcome", "padding": "' + b"x" * 100 + b'"}'

CHILD = """
import sys
from pathlib import Path
from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from jobledger.streams.coordinator.coordinator import run_coordinator

bootstrap, namespace, partitions, folder = sys.argv[1:]
sys.exit(run_coordinator(Names(namespace), Settings(bootstrap=bootstrap), int(partitions), data_dir=Path(folder)))
"""


def submission(names: Names, due_at: int | None, delay_ms: int | None) -> Outgoing:
    """Return the record of a delayed job for the coordination topic."""
    job = str(uuid_utils.uuid7())
    event = JobEvent(
        job,
        job,
        1,
        1,
        0,
        now_us(),
        "bench",
        QUEUE,
        None,
        job,
        "bench",
        None,
        JobSubmitted(JobSpec(ARGS), delay_ms, due_at),
    )
    return Outgoing(names.coordination, codec.encode(event), job)


def create(settings: Settings, names: Names, partitions: int) -> None:
    """Create the namespace's topics."""
    admin = clients.admin(settings)
    specs = topology.desired(names, {QUEUE: partitions}, partitions=partitions, replication=1)
    topics.apply(admin, topics.plan(admin, specs))


@contextlib.contextmanager
def coordinator(settings: Settings, names: Names, partitions: int) -> Iterator[psutil.Process]:
    """Run a coordinator process during the block, and yield it once it has released a first job."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, settings.resolve_bootstrap(), names.namespace, str(partitions), folder]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        try:
            writer = LogWriter(settings, names)
            writer.send([submission(names, None, 0)])
            writer.close()
            await_released(settings, names, 1, 60)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def count(reader: LogReader, names: Names, partitions: int) -> int:
    """Return the number of records in the work topic."""
    return sum(reader.bounds(names.jobs(QUEUE), p)[1] for p in range(partitions))


def await_released(settings: Settings, names: Names, wanted: int, timeout: float) -> None:
    """Wait until the work topic has ``wanted`` records. Raises `SystemExit` after ``timeout`` seconds."""
    partitions = clients.partitions_of(settings, names.jobs(QUEUE))
    deadline = time.monotonic() + timeout
    with LogReader(settings) as reader:
        while (found := count(reader, names, partitions)) < wanted:
            if time.monotonic() > deadline:
                raise SystemExit(f"only {found} of {wanted} were released within {timeout:g} s")
            time.sleep(0.02)


def lateness(settings: Settings, names: Names, partitions: int, start: int) -> tuple[list[float], int, int]:
    """Return how late each release was that was due at ``start`` (µs) or later, in milliseconds and sorted; the number
    of these releases; and the number of their distinct event ids."""
    late: list[float] = []
    ids: set[str] = set()
    total = 0
    with LogReader(settings) as reader:
        for partition in range(partitions):
            for message in reader.read(names.jobs(QUEUE), partition, 0):
                event = codec.decode(message.value())
                assert isinstance(event.fact, JobDue)
                if event.fact.due_at < start:
                    continue  # the first job, which showed that the coordinator was ready
                total += 1
                ids.add(event.event_id)
                late.append(message.timestamp()[1] - event.fact.due_at / 1000)
    return sorted(late), total, len(ids)


def percentile(values: list[float], part: float) -> float:
    """Return the value that the share ``part`` (0-1) of the sorted ``values`` does not exceed."""
    return round(values[min(len(values) - 1, int(part * len(values)))], 1)


def measure_lateness(settings: Settings, partitions: int, timers: int, spread: float) -> dict[str, object]:
    """Measure ``timers`` releases, all of which are requested beforehand, and are due evenly over ``spread``
    seconds."""
    names = Names(f"bench{uuid.uuid4().hex[:8]}")
    create(settings, names, partitions)
    with coordinator(settings, names, partitions) as process:
        writer = LogWriter(settings, names, linger_ms=5.0)
        lead = 2.0 + timers / 2_000  # the time to request them all
        start = now_us() + int(lead * 1_000_000)
        step = spread * 1_000_000 / timers
        writer.send([submission(names, start + int(i * step), None) for i in range(timers)])
        writer.close()
        time.sleep(max(0.0, (start - now_us()) / 1e6))
        before = sum(process.cpu_times()[:2])
        await_released(settings, names, timers + 1, spread + 60)
        busy = sum(process.cpu_times()[:2]) - before
    late, total, distinct = lateness(settings, names, partitions, start)
    return {
        "timers": timers,
        "spread_s": spread,
        "released": total,
        "duplicates": total - distinct,
        "early": sum(x < 0 for x in late),
        "p50_ms": percentile(late, 0.5),
        "p99_ms": percentile(late, 0.99),
        "max_ms": round(late[-1], 1),
        "cpu_share": round(busy / spread, 2),
    }


def measure_throughput(settings: Settings, partitions: int, jobs: int) -> dict[str, object]:
    """Measure how fast ``jobs`` jobs with a delay of 0 are scheduled, decided, read back, released and marked."""
    names = Names(f"bench{uuid.uuid4().hex[:8]}")
    create(settings, names, partitions)
    with coordinator(settings, names, partitions) as process:
        records = [submission(names, None, 0) for _ in range(jobs)]
        writer = LogWriter(settings, names, linger_ms=5.0)
        before = sum(process.cpu_times()[:2])
        began = time.monotonic()
        writer.send(records)
        sent = time.monotonic() - began
        await_released(settings, names, jobs + 1, 300)
        took = time.monotonic() - began
        busy = sum(process.cpu_times()[:2]) - before
        writer.close()
    return {
        "jobs": jobs,
        "submitting_s": round(sent, 2),
        "took_s": round(took, 2),
        "set_and_fire_per_s": round(jobs / took),
        "cpu_share": round(busy / took, 2),
        "cpu_us_per_job": round(busy / jobs * 1e6),
    }


def measure_idle(settings: Settings, partitions: int, seconds: float) -> dict[str, object]:
    """Measure the CPU time and the memory of a coordinator without work."""
    names = Names(f"bench{uuid.uuid4().hex[:8]}")
    create(settings, names, partitions)
    with coordinator(settings, names, partitions) as process:
        time.sleep(2.0)
        before = sum(process.cpu_times()[:2])
        time.sleep(seconds)
        return {
            "cpu_share": round((sum(process.cpu_times()[:2]) - before) / seconds, 3),
            "rss_mb": round(process.memory_info().rss / 1e6),
        }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", help="an existing broker; without it an embedded one is started")
    parser.add_argument("--timers", type=int, default=10_000)
    parser.add_argument("--spread", type=float, default=20.0, help="seconds over which the timers are due")
    parser.add_argument("--throughput", type=int, default=15_000, help="jobs of the throughput run")
    parser.add_argument("--partitions", type=int, default=4)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        bootstrap = options.bootstrap or stack.enter_context(EmbeddedKafka()).bootstrap
        settings = Settings(bootstrap=bootstrap, home=Path(stack.enter_context(tempfile.TemporaryDirectory())))
        figures: dict[str, object] = {"partitions": options.partitions, "cores": os.cpu_count()}
        if options.throughput:  # measured first, because it warms up a new broker
            figures["throughput"] = measure_throughput(settings, options.partitions, options.throughput)
        if options.timers:
            figures["lateness"] = measure_lateness(settings, options.partitions, options.timers, options.spread)
        figures["idle"] = measure_idle(settings, options.partitions, 5.0)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
