"""Measures submissions: `submit_many` and a bare loop that produces, and the time until a submission is
acknowledged."""

from __future__ import annotations

import time

from confluent_kafka import Producer

from bench import harness
from bench.harness import Figure
from jobledger import App
from jobledger.config import Settings
from jobledger.kafka.clients import producer_config
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobSpec, JobSubmitted

PARTITIONS = 6
ROUNDS = 3


def run(settings: Settings, jobs: int = 100_000, single: int = 2_000) -> list[Figure]:
    """Measure the bare loop and `submit_many` alternately in three rounds, and use the best round of each. Then measure
    ``single`` submissions, each until it is acknowledged."""
    names = harness.fresh_names("client")
    app = App(names.namespace, settings=settings, partitions=PARTITIONS)

    @app.task(queue="mail")
    async def send_mail(to: str, template: str = "welcome") -> str:
        return to

    harness.create(settings, names, ["mail"], PARTITIONS)
    try:
        app.submit_many(send_mail.job(f"warm-up-{i}@example.org") for i in range(1_000))
        bare, ours = 0.0, 0.0
        for _ in range(ROUNDS):
            bare = max(bare, _bare(settings, names.jobs("mail"), jobs))
            began = time.perf_counter()
            app.submit_many(send_mail.job(f"user{i}@example.org") for i in range(jobs))
            ours = max(ours, jobs / (time.perf_counter() - began))
        acks = []
        for i in range(single):
            began = time.perf_counter()
            send_mail.submit(f"user{i}@example.org")
            acks.append((time.perf_counter() - began) * 1000)
        bare_acks = _bare_acks(settings, names.jobs("mail"), single)
    finally:
        app.close()
        harness.drop(settings, names)
    return [
        Figure("submit_many", ours, "jobs/s", 50_000, True, bare, f"best of {ROUNDS}, {jobs:,} jobs; bare: encode + produce"),
        Figure("acknowledged p50", harness.percentile(acks, 0.5), "ms", 2.0, False, harness.percentile(bare_acks, 0.5), "submit()"),
        Figure("acknowledged p99", harness.percentile(acks, 0.99), "ms", None, False, harness.percentile(bare_acks, 0.99), "submit()"),
    ]  # fmt: skip


def _event(number: int) -> JobEvent:
    job = f"01890a5d-ac96-774b-bcce-{number:012d}"
    spec = JobSpec(b'{"to":"user1@example.org"}')
    return JobEvent(
        job, job, 1, 1, 1, time.time_ns() // 1000, "send_mail", "mail", None, None, "bare", None, JobSubmitted(spec)
    )


def _bare(settings: Settings, topic: str, jobs: int) -> float:
    """Encode and produce records with a delivery callback, and do nothing else. Return the records per second."""
    producer = Producer(producer_config(settings, linger_ms=5.0))
    acked = 0

    def delivered(*_: object) -> None:
        nonlocal acked
        acked += 1

    producer.list_topics(topic, timeout=10)
    began = time.perf_counter()
    for number in range(jobs):
        event = _event(number)
        while True:
            try:
                producer.produce(topic, codec.encode(event), event.job_id, on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.01)
        if not number % 500:
            producer.poll(0)
    producer.flush(60)
    assert acked == jobs, f"{jobs - acked} were not acknowledged"
    rate = jobs / (time.perf_counter() - began)
    producer.close()
    return rate


def _bare_acks(settings: Settings, topic: str, count: int) -> list[float]:
    """Produce ``count`` records, and poll after each until it is acknowledged. Return the milliseconds of each."""
    producer = Producer(producer_config(settings))
    producer.list_topics(topic, timeout=10)
    took = []
    for number in range(count):
        event = _event(number)
        acked: list[object] = []
        began = time.perf_counter()
        producer.produce(topic, codec.encode(event), event.job_id, on_delivery=lambda *a, seen=acked: seen.append(a))
        while not acked:
            producer.poll(1.0)
        took.append((time.perf_counter() - began) * 1000)
    producer.close()
    return took
