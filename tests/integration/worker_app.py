"""Tasks that the worker's tests run, and functions that read what the worker wrote."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without __all__
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from jobledger import NO_RETRY, App, Reject, ResultInsideJob, Retry, RetryLater, Settings, Snooze, current_job
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.clients import admin, batch_limits, partitions_of
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import CLOSING, Recorded
from tests.patience import PATIENCE

PARTITIONS = 3


class Unprintable(Exception):
    """An exception whose ``str()`` fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


async def _raises(error: Exception) -> None:
    raise error


def build(namespace: str, bootstrap: str, **more: Any) -> App:
    """Create the app of the tests. ``app.ran`` lists the executions, each with its task and its first argument."""
    app = App(namespace, settings=Settings(bootstrap=bootstrap, submit_timeout=20.0, **more), partitions=PARTITIONS)
    ran: list[tuple[str, Any]] = []
    gates: dict[str, threading.Event] = {}
    app.ran, app.gates = ran, gates  # type: ignore[attr-defined]

    @app.task
    async def add(a: int, b: int = 1) -> int:
        ran.append(("add", a))
        return a + b

    @app.task
    def add_in_thread(a: int, b: int = 1) -> dict[str, int | str]:
        ran.append(("add_in_thread", a))
        job = current_job()
        return {"sum": a + b, "thread": threading.current_thread().name, "attempt": job.attempt}

    @app.task(retry=Retry(max_attempts=2, initial=0.5, jitter=False))
    async def fail(a: int = 0) -> None:
        ran.append(("fail", a))
        raise ValueError(f"attempt {current_job().attempt}")

    @app.task(retry=NO_RETRY)
    def fail_in_thread() -> None:
        raise Unprintable

    @app.task(retry=Retry(max_attempts=3, never=(KeyError,)))
    async def never() -> None:
        raise KeyError("k")

    @app.task
    async def reject() -> None:
        raise Reject("it can never be done")

    @app.task
    async def reject_in_a_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_raises(ValueError("beside it")))
            group.create_task(_raises(Reject("no such city")))

    @app.task
    async def snooze_in_a_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_raises(Snooze(9, "not yet")))

    @app.task
    async def later() -> None:
        raise RetryLater(7.5, "rate limit")

    @app.task
    async def snooze() -> None:
        raise Snooze(9, "not yet")

    @app.task(retry=NO_RETRY)
    async def leave() -> None:
        raise SystemExit(3)

    @app.task(timeout=0.2, retry=NO_RETRY, fallback="rescue")
    async def hang(a: int) -> None:
        await asyncio.sleep(60)

    @app.task
    async def rescue(a: int) -> str:
        ran.append(("rescue", a))
        return f"rescued {a} of {current_job().parent}"

    @app.task(retry=NO_RETRY)
    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    @app.task
    async def returns_nonsense() -> Any:
        return object()

    @app.task
    async def returns_much(size: int) -> str:
        return "x" * size

    @app.task
    async def reports(count: int) -> None:
        for n in range(count):
            current_job().progress(n + 1, count, f"step {n + 1}")

    @app.task
    async def waits_for_a_job() -> str:
        child = await add.submit_async(40, 2)
        try:
            child.result(timeout=1)
        except ResultInsideJob:
            return child.job_id
        return "was not refused"

    @app.task
    async def gated(name: str) -> str:
        ran.append(("gated", name))
        gate = gates.setdefault(name, threading.Event())
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return name

    @app.task
    def gated_in_thread(name: str) -> str:
        ran.append(("gated_in_thread", name))
        gates.setdefault(name, threading.Event()).wait(60)
        return name

    return app


def made(namespace: str, bootstrap: str, **more: Any) -> App:
    """Create the app and its topics."""
    app = build(namespace, bootstrap, **more)
    ensure(app, app.settings)
    return app


def limit_records(app: App, size: int, *topics: str) -> None:
    """Limit the size of records on these topics to ``size`` bytes. Returns as soon as the broker reports the new limit:
    the broker answers from a copy of the settings, which follows the controller's."""
    client = admin(app.settings)  # a reference: without the client, its answers are lost
    less = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resources = [ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[less]) for topic in topics]
    for future in client.incremental_alter_configs(resources).values():
        future.result(timeout=20)
    until(lambda: batch_limits(app.settings, topics) == dict.fromkeys(topics, size), what="the new limit")


@contextlib.contextmanager
def working(app: App, **options: Any) -> Iterator[Worker]:
    """Run a worker of ``app`` in a thread of this process. The worker is stopped at the end of the block, and its error
    is raised."""
    worker = Worker(app.registry, app.settings, WorkerOptions(**{"grace": 10.0, **options}))
    raised: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as exc:  # noqa: BLE001  # raised again in the test's thread
            raised.append(exc)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(timeout=PATIENCE * 40)
        assert not thread.is_alive(), "the worker did not end"
    if raised:
        raise raised[0]


def log_of(app: App, topic: str) -> list[Recorded]:
    """Return every event of a topic, partition by partition."""
    read = decoder(app.settings, app.names)
    with LogReader(app.settings) as reader:
        return [
            recorded(message, read.decode)
            for partition in range(partitions_of(app.settings, topic))
            for message in reader.read(topic, partition, 0)
        ]


def facts_of(app: App, job_id: str) -> list[Any]:
    """Return a job's facts on the lifecycle topic, in the order of the log."""
    return [r.event.fact for r in log_of(app, app.names.lifecycle) if r.event.job_id == job_id]


def closings(app: App) -> dict[str, list[Recorded]]:
    """Return the closing facts on the lifecycle topic, by job."""
    found: dict[str, list[Recorded]] = {}
    for r in log_of(app, app.names.lifecycle):
        if isinstance(r.event.fact, CLOSING):
            found.setdefault(r.event.job_id, []).append(r)
    return found


def until(check: Callable[[], Any], timeout: float = 30.0, what: str = "it") -> Any:
    """Poll ``check`` until it returns a true value, and return that value. ``timeout`` is multiplied by `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE * timeout
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE * timeout:g} s"
        time.sleep(0.05)
