"""Records what a worker tells Prometheus while a burst of jobs comes and is worked off: autoscaling.json, for its test.

One worker that does 40 jobs a second; 3,000 of them come at once after 30 seconds. Run again only if metrics change:

    python -m tests.recorded.record
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from jobledger import App, Settings
from jobledger.consumers.worker.metrics import WorkerMetrics
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topics import ensure
from tests.integration.worker_app import working

WANTED = ("wait_seconds_bucket", "lag", "paused", "oldest_wait_seconds")
EVERY_S, SCRAPES, BURST_AT, JOBS = 5, 60, 6, 3_000


def main() -> None:
    """Record, and write."""
    with EmbeddedKafka() as kafka:
        app = App("shop", settings=Settings(bootstrap=kafka.bootstrap), partitions=6)

        @app.task(queue="mail")
        async def send(n: int) -> None:
            await asyncio.sleep(0.05)

        ensure(app, app.settings)
        series: dict[str, list[float | None]] = {}
        with working(app, concurrency=2) as worker:
            while worker.control_reader is None:
                time.sleep(0.1)
            registry = CollectorRegistry()
            registry.register(WorkerMetrics(worker))
            began = time.monotonic()
            for number in range(SCRAPES):
                if number == BURST_AT:
                    app.submit_many(send.job(n) for n in range(JOBS))
                time.sleep(max(0.0, began + number * EVERY_S - time.monotonic()))
                for family in text_string_to_metric_families(generate_latest(registry).decode()):
                    for sample in family.samples:
                        if sample.name.removeprefix("jobledger_worker_") in WANTED:
                            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                            row = series.setdefault(f"{sample.name}{{{labels}}}", [None] * number)
                            row.append(round(sample.value, 3))
        app.close()
    told = {"interval_s": EVERY_S, "burst_at_s": BURST_AT * EVERY_S, "jobs": JOBS, "series": series}
    Path(__file__).with_name("autoscaling.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
