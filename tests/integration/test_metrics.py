"""The metrics of a worker with a real broker. The dashboard and the alerts query only metrics that exist."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from jobledger import NO_RETRY, App, Breaker, Queue, Settings
from jobledger.consumers.worker.metrics import WorkerMetrics
from jobledger.consumers.worker.worker import Worker
from jobledger.kafka.topics import ensure
from tests.integration.worker_app import until, working

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]


def samples_of(worker: Worker) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample, by name and labels."""
    registry = CollectorRegistry()
    registry.register(WorkerMetrics(worker))
    text = generate_latest(registry).decode()
    return {
        (s.name.removeprefix("jobledger_worker_"), tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_a_worker_exports_every_metric(broker: str, namespace: str) -> None:
    """The worker exports counts by task and outcome, histograms, running and waiting jobs, lag, gap, completion map,
    gates and rebalances. Jobs that were in the log before the worker's start count with their whole wait."""
    app = App(
        namespace,
        settings=Settings(bootstrap=broker, submit_timeout=20.0),
        queues=[Queue("mail", partitions=1, priorities=True), Queue("held", partitions=1)],
    )
    gate: dict[str, bool] = {}

    @app.task(queue="mail")
    async def quick(n: int) -> None: ...

    @app.task(queue="mail", retry=NO_RETRY, rate="1000/s", breaker=Breaker(failures=1, reset=3600))
    def broken(n: int) -> None:
        raise ValueError(n)

    @app.task(queue="mail")
    async def waits(n: int) -> None:
        import asyncio

        while not gate:
            await asyncio.sleep(0.01)

    @app.task(queue="held")
    async def never(n: int) -> None: ...

    ensure(app, app.settings)
    for n in range(5):
        quick.submit(n)
    quick.using(priority="high").submit(1)
    time.sleep(1.0)
    with working(app) as worker:
        until(lambda: worker.dispatcher is not None and worker.dispatcher.pipe.tasks.runtimes["quick"].succeeded == 6)
        broken.submit(1)
        waits.submit(1)
        app.pause(queue="held", reason="tried")
        until(lambda: worker.dispatcher is not None and worker.dispatcher.pipe.lanes.limiters["held"].paused)
        for n in range(7):
            never.submit(n)
        for n in range(3):
            quick.submit(n)

        def counted() -> bool:
            figures = samples_of(worker)
            lag = figures.get(("lag", (("partition", "0"), ("priority", "normal"), ("queue", "held"))))
            return lag == 7 and figures["jobs_ended_total", mail("quick", outcome="succeeded")] == 9

        def mail(task: str, **more: str) -> tuple[tuple[str, str], ...]:
            return tuple(sorted({"task": task, "queue": "mail", **more}.items()))

        until(counted)

        def lane(queue: str, priority: str, **more: str) -> tuple[tuple[str, str], ...]:
            return tuple(sorted({"queue": queue, "priority": priority, **more}.items()))

        def whole() -> dict[tuple[str, tuple[tuple[str, str], ...]], float] | None:
            """Return the samples once the worker has committed and the broker has answered the request for the lag."""
            figures = samples_of(worker)
            done = figures.get(("lag", lane("mail", "normal", partition="0"))) == 4
            return figures if done and figures["pending", lane("mail", "normal", partition="0")] == 1 else None

        found = until(whole)
        assert found["jobs_started_total", mail("quick")] == 9
        assert found["jobs_ended_total", mail("broken", outcome="failed")] == 1
        assert found["in_flight", mail("waits")] == 1
        assert found["run_seconds_count", mail("quick")] == 9
        assert found["run_seconds_bucket", mail("quick", le="+Inf")] == 9
        assert found["wait_seconds_count", lane("mail", "normal")] == 5 + 1 + 1 + 3
        assert found["wait_seconds_count", lane("mail", "high")] == 1
        # The jobs that were submitted before the worker's start have waited for more than a second. Later jobs may have
        # waited less.
        assert found["wait_seconds_bucket", lane("mail", "high", le="1.0")] == 0
        assert found["wait_seconds_bucket", lane("mail", "high", le="+Inf")] == 1
        assert found["wait_seconds_bucket", lane("mail", "normal", le="1.0")] <= 5
        assert found["wait_seconds_sum", lane("mail", "normal")] > 5
        assert (
            found["watermark_gap", lane("mail", "normal", partition="0")] == 4
        )  # the job that waits, and three behind it
        assert found["pending", lane("mail", "normal", partition="0")] == 1
        assert 10 < found["map_bytes", lane("mail", "normal", partition="0")] < 200
        assert found["braked", lane("mail", "normal", partition="0")] == 0
        assert found["lag", lane("mail", "normal", partition="0")] == 4
        assert found["rebalances_total", lane("mail", "normal", kind="assigned")] == 1
        assert found["commits_total", lane("mail", "normal")] > 0
        assert found["failed_commits_total", lane("mail", "normal")] == 0
        assert found["paused", (("kind", "queue"), ("name", "held"))] == 1
        assert found["paused", (("kind", "queue"), ("name", "mail"))] == 0
        assert found["limit_rate", (("kind", "task"), ("name", "broken"))] == 1000
        assert found["circuit_open", (("task", "broken"),)] == 1
        assert found["circuit_trips_total", (("task", "broken"),)] == 1
        assert found["oldest_wait_seconds", lane("held", "normal")] > 0
        asked = set(re.findall(r"jobledger_worker_\w+", (ROOT / "docker/alerts.yml").read_text("utf-8")))
        board = json.loads((ROOT / "docker/grafana/jobledger.json").read_text("utf-8"))
        for panel in board["panels"]:
            for target in panel["targets"]:
                asked |= set(re.findall(r"jobledger_worker_\w+", target["expr"]))
        health = {f"jobledger_worker_{name}" for name in ("healthy", "queue_held", *worker.health())}
        assert asked - health - {f"jobledger_worker_{name}" for name, _ in found} == set()
        gate["open"] = True
    app.close()
