"""Measures the web process over a large status table, while events are folded into this table, and the submission of jobs
over HTTP beside a bare route.

    python -m bench.web --jobs 1000000                          # a new SQLite table with made-up jobs
    python -m bench.web --url postgresql://…/database           # filled by `bench.seed_table --without-offsets`

JSON on stdout, a table on stderr. ``--events``: how many events a second another process writes and the materializer
folds meanwhile. One request is made at a time; the times are those of the client, over one connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import uuid_utils

from bench import harness, seed_table
from bench.harness import Figure
from jobledger.config import Settings
from jobledger.job import JobStatus
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas.events import Fact, JobEvent, JobSpec, JobStarted, JobSubmitted, JobSucceeded
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import StatusReader, open_reader

NAMESPACE = "shop"
PARTITIONS = 6
QUEUES = sorted({queue for _, queue in seed_table.TASKS})
#: Number of requests of each kind, and of requests that are not counted before them.
ROUNDS, WARM = 200, 5
#: Seconds for which the events are folded before the first request is measured.
SETTLE_S = 5.0


def main() -> int:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="JOBLEDGER_STATUS_URL of a table that is filled; else a new SQLite table is used")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="number of jobs of a new table")
    parser.add_argument("--events", type=int, default=5_000, help="events a second that are folded meanwhile")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="number of requests of each kind")
    parser.add_argument("--bootstrap", help="Kafka's address; else JOBLEDGER_BOOTSTRAP, else an embedded broker")
    given = parser.parse_args()
    with harness.broker(given.bootstrap) as settings, contextlib.ExitStack() as stack:
        url = given.url
        if url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jobledger-bench-"))
            url = f"sqlite:///{Path(folder) / 'status.db'}"
            options = seed_table.Options(given.jobs, now_ms=round(time.time() * 1000))
            seed_table.fill(url, NAMESPACE, options, tell=True, with_offsets=False)
        figures = run(settings, url, given.events, given.rounds)
        figures += submissions(settings, url, given.rounds * 20)
    print(harness.as_json(figures))
    harness.show(figures)
    return 0


def run(settings: Settings, url: str, events: int, rounds: int) -> list[Figure]:
    """Measure the pages and the API over the table at ``url``."""
    names = Names(NAMESPACE)
    harness.create(settings, names, QUEUES, PARTITIONS)
    figures: list[Figure] = []
    try:
        with child("fold", settings, url), contextlib.closing(open_reader(url, NAMESPACE)) as reader:
            number = sum(reader.counts_by_state().values())
            note = f"{number:,} jobs, {events:,} events a second folded meanwhile"
            known = reader.search(state="failed", limit=1).jobs[0]
            with feeding(settings, events) as fed:
                time.sleep(SETTLE_S)
                with serving(settings, url) as (client, took):
                    figures.append(Figure("first page after the start", took * 1000, "ms", 1_000, False, None, note))
                    for name, path, target in kinds(known):
                        times = timed(lambda path=path: asked(client, path), rounds)  # type: ignore[misc]  # bound in this iteration
                        for share, what in ((0.5, "p50"), (0.99, "p99")):
                            limit = target if what == "p99" else None
                            value = harness.percentile(times, share) * 1000
                            figures.append(Figure(f"{name} {what}", value, "ms", limit, False, None, path))
                waits = visible(settings, names, reader, rounds)
                figures += [
                    Figure("event → visible p50", harness.percentile(waits, 0.5) * 1000, "ms", 20, False, None, note),
                    Figure("event → visible p99", harness.percentile(waits, 0.99) * 1000, "ms", 100, False, None, note),
                    Figure("events written", fed(), "events/s", events * 0.95, True, None, "while the pages were read"),
                ]
    finally:
        harness.drop(settings, names)
    return figures


def kinds(known: JobStatus) -> list[tuple[str, str, float | None]]:
    """Return the requests: name, path, and the limit of the p99 in ms. ``known``: a job that failed."""
    job = quote(known.job_id)
    filters = {
        "state": "state=failed",
        "two states": "state=failed&state=cancelled",
        "task": "task=import_orders",
        "queue": "queue=media",
        "tag": "tag=tenant%3Dtenant-007",
        "common tag": "tag=region%3Deu",
        "two tags": "tag=region%3Deu&tag=tenant%3Dtenant-007",
        "key": "key=customer-77",
        "last version": f"version={seed_table.VERSIONS[-1]}",
        "first version": f"version={seed_table.VERSIONS[0]}",
        "unknown version": "version=nobody",
        "error": "error=KeyError",
        "error text": "error_text=gateway-3",
        "unknown error text": "error_text=nobody",
        "fingerprint": f"fingerprint={known.fingerprint}",
        "id prefix": f"id_prefix={job[:8]}",
        "since": "since=2h",
        "until": "until=3d",
        "late": "late=10m",
        "attempts": "attempts_least=1",
        "state and task": "state=failed&task=import_orders",
        "state and tag": "state=cancelled&tag=tenant%3Dtenant-007",
        "task and version": f"task=import_orders&version={seed_table.VERSIONS[0]}",
        "unknown task": "task=nobody",
    }
    return [
        ("point read", f"/api/v1/jobs/{job}?args=false", 5),
        ("overview", "/", 100),
        ("all jobs", "/jobs", 50),
        *((f"jobs by {name}", f"/jobs?{query}", 50.0) for name, query in filters.items()),
        ("errors", "/errors", None),
        ("queues", "/queues", None),
    ]


def asked(client: httpx.Client, path: str) -> None:
    """Make a request that must succeed."""
    answer = client.get(path)
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}"


def timed(ask: Callable[[], None], rounds: int) -> list[float]:
    """Return the seconds of each of the calls."""
    for _ in range(WARM):
        ask()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return times


@contextlib.contextmanager
def serving(settings: Settings, url: str) -> Iterator[tuple[httpx.Client, float]]:
    """Run `jobledger web`. Yield a client, and the seconds from the moment when it listens to its first page."""
    port = free_port()
    environ = {
        **os.environ,
        "JOBLEDGER_BOOTSTRAP": settings.resolve_bootstrap(),
        "JOBLEDGER_STATUS_URL": url,
        "BENCH_NAMESPACE": NAMESPACE,
    }
    argv = [sys.executable, "-m", "jobledger", "web", "bench.web_app:app", "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen(argv, env=environ, stdout=subprocess.DEVNULL)
    try:
        wait_until_listening(process, port)
        began = time.perf_counter()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            asked(client, "/")
            yield client, time.perf_counter() - began
        print(f"  jobledger web: {psutil.Process(process.pid).memory_info().rss >> 20} MiB", file=sys.stderr)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    """Return as soon as the process accepts connections at the port of this machine."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        assert process.poll() is None, f"the process that was to listen at port {port} has ended"
        time.sleep(0.005)


@contextlib.contextmanager
def feeding(settings: Settings, rate: int) -> Iterator[Callable[[], float]]:
    """Write events in a process of its own. Yield a function that returns how many events a second were written."""
    count = Path(tempfile.mkstemp(prefix="jobledger-bench-")[1])
    began = time.perf_counter()
    try:
        with child("feed", settings, str(rate), str(count)):
            yield lambda: int(count.read_text() or "0") / (time.perf_counter() - began)
    finally:
        count.unlink()


@contextlib.contextmanager
def child(what: str, settings: Settings, *words: str) -> Iterator[None]:
    """Run one of the functions of this module in another process until the end of the block."""
    program = f"from bench import web; web.{what}({settings.resolve_bootstrap()!r}, *{words!r})"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
        assert process.poll() is None, f"the process {what} has ended"
    finally:
        process.kill()
        process.wait(30)


def fold(bootstrap: str, url: str) -> None:
    """Fold the log into the table until the process is ended."""
    Materializer(Names(NAMESPACE), Settings(bootstrap=bootstrap), QUEUES, url).run(threading.Event())


def feed(bootstrap: str, rate: str, count: str) -> None:
    """Write ``rate`` events a second until the process is ended: jobs that are submitted, start and succeed. The number
    of events is in the file ``count``."""
    names, settings = Names(NAMESPACE), Settings(bootstrap=bootstrap)
    writer = LogWriter(settings, names, linger_ms=5.0)
    began, written = time.perf_counter(), 0
    while True:
        records = []
        for _ in range(max(1, int(rate) // 60)):
            job_id, (task, queue) = str(uuid_utils.uuid7()), seed_table.TASKS[written % len(seed_table.TASKS)]
            work = names.jobs(queue)
            facts: tuple[tuple[str, Fact], ...] = (
                (work, JobSubmitted(JobSpec(b'{"order":77}', {"region": "eu"}))),
                (names.lifecycle, JobStarted("host:4711", seed_table.VERSIONS[-1], {}, work, 0)),
                (names.lifecycle, JobSucceeded(None, 1_234)),
            )
            records += [Outgoing(topic, event(job_id, task, queue, fact), job_id) for topic, fact in facts]
        writer.send(records)
        written += len(records)
        Path(count).write_text(str(written))
        time.sleep(max(0.0, began + written / int(rate) - time.perf_counter()))


def event(job_id: str, task: str, queue: str, fact: Fact) -> bytes:
    """Return an event of a plain job's first attempt."""
    number = str(uuid_utils.uuid7())
    return codec.encode(JobEvent(number, job_id, 1, 1, 1, now_us(), task, queue, None, None, "worker@h:1", None, fact))


def visible(settings: Settings, names: Names, reader: StatusReader, rounds: int) -> list[float]:
    """Return the seconds from a submission's acknowledgement until a query of the table finds the job."""
    writer = LogWriter(settings, names)
    task, queue = seed_table.TASKS[0]
    waits = []
    try:
        for number in range(rounds + WARM):
            job_id = str(uuid_utils.uuid7())
            writer.send([Outgoing(names.jobs(queue), event(job_id, task, queue, JobSubmitted(JobSpec(b"{}"))), job_id)])
            began = time.perf_counter()
            while not reader.states([job_id]):
                time.sleep(0.001)
            if number >= WARM:
                waits.append(time.perf_counter() - began)
    finally:
        writer.close()
    return waits


def submissions(settings: Settings, url: str, jobs: int) -> list[Figure]:
    """Measure submissions over HTTP beside a bare FastAPI route that reads the same body and does nothing. Both are asked
    in turn, over 16 connections each."""
    names = Names(NAMESPACE)
    harness.create(settings, names, QUEUES, PARTITIONS)
    body = {"task": "send_mail", "args": {}}
    ours: list[float] = []
    bare: list[float] = []
    try:
        with serving(settings, url) as (client, _), bare_route() as other:
            for _ in range(3):
                bare.append(rate_of(other, "/api/v1/jobs", body, jobs))
                ours.append(rate_of(str(client.base_url), "/api/v1/jobs", body, jobs))
    finally:
        harness.drop(settings, names)
    best, least = max(ours), max(bare)
    note = f"{jobs:,} requests over 16 connections, best of 3"
    return [Figure("POST /jobs", best, "requests/s", 0.6 * least, True, least, note)]


@contextlib.contextmanager
def bare_route() -> Iterator[str]:
    """Serve a FastAPI route that reads a JSON body and answers with 202."""
    port = free_port()
    program = (
        "import fastapi, uvicorn\n"
        "app = fastapi.FastAPI()\n"
        "@app.post('/api/v1/jobs', status_code=202)\n"
        "async def submit(body: dict) -> dict: return {'job_id': 'x'}\n"
        f"uvicorn.run(app, port={port}, log_level='error')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until_listening(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def rate_of(address: str, path: str, body: dict[str, Any], requests: int) -> float:
    """Return how many requests a second 16 connections make. The client sends prepared bytes, so that it takes little of
    the CPU."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    each = requests // 16

    def ask() -> None:
        with socket.create_connection((host, int(port)), 60.0) as connection, connection.makefile("rb") as answers:
            for _ in range(each):
                connection.sendall(request)
                status, length = answers.readline(), 0
                while (line := answers.readline().lower()) not in (b"\r\n", b""):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                answer = answers.read(length)
                assert b" 202 " in status, (status, answer[:300])

    with ThreadPoolExecutor(16) as pool:
        began = time.perf_counter()
        for done in [pool.submit(ask) for _ in range(16)]:
            done.result()
        return 16 * each / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
