"""Queues that grow while all parts run: partitions are added, or a second queue replaces the first."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without __all__
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)
from sqlalchemy import Column, Integer, MetaData, String, Table

from jobledger import App, ConfigError, Queue, Retry, Settings, current_job
from jobledger.consumers.worker.worker import Worker
from jobledger.kafka import topic_watch
from jobledger.kafka.clients import admin, partitions_of
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobSucceeded
from jobledger.streams.coordinator.coordinator import Coordinator, supervise
from jobledger.streams.coordinator.faust.faust_app import Options
from jobledger.streams.projections import runner as projection_runner
from jobledger.streams.projections.runner import ProjectionRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import verify
from tests.integration.test_router import routing
from tests.integration.worker_app import closings, log_of, until, working

pytestmark = pytest.mark.kafka


@dataclass(frozen=True)
class Seen:
    number: int


def declared(namespace: str, settings: Settings, queues: list[Queue], *, queue: str, events: int) -> App:
    """Return one version of the app: its task is on ``queue``, and the topic of its events has ``events`` partitions."""
    app = App(namespace, settings=settings, partitions=4, queues=queues)
    app.event(partitions=events)(Seen)

    @app.task(queue=queue, retry=Retry(max_attempts=3, initial=0.5, jitter=False))
    async def work(number: int, fail: int = 0) -> int:
        if current_job().attempt <= fail:
            raise ValueError(number)
        return number

    @app.on(Seen, queue=queue)
    async def handle(event: Seen) -> int:
        return event.number

    table = Table("seen", MetaData(), Column("key", String, primary_key=True), Column("events", Integer))

    @app.projection(Seen, table=table, key=lambda event: "all")
    def count(row: Any, event: Seen) -> dict[str, int]:
        return {"events": (row["events"] if row else 0) + 1}

    return app


@contextmanager
def threads(*runs: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each function in a thread until the end of the block, and raise its error."""
    stop, failed = threading.Event(), list[BaseException]()

    def run(one: Callable[[threading.Event], None]) -> None:
        try:
            one(stop)
        except BaseException as exc:  # noqa: BLE001  # raised below
            failed.append(exc)

    running = [threading.Thread(target=run, args=(one,)) for one in runs]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join(40)
    if failed:
        raise failed[0]


def states(app: App) -> dict[str, int]:
    """Return the number of jobs in each state, from the status table."""
    return {state: count for state, count in app.status_table().counts_by_state().items() if count}


def test_partitions_are_added_while_everything_runs(
    broker: str, namespace: str, tmp_path: Path, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue and an event's topic grow from two to four partitions. Worker, router, materializer and projection
    continue, and serve the new partitions."""
    monkeypatch.setattr(projection_runner, "LOOK_S", 1.0)
    settings = Settings(bootstrap=broker, status_url=f"sqlite:///{tmp_path / 'status.db'}", home=tmp_path)
    small, large = (
        declared(namespace, settings, [Queue("q", partitions=count)], queue="q", events=count) for count in (2, 4)
    )
    ensure(small, settings)
    url = settings.resolve_status_url(namespace)
    table = Materializer(small.names, settings, ["q"], url)
    runner = ProjectionRunner(small.registry.projections["count"], settings, small.names, ["q"], url)
    with ExitStack() as stack:
        for app in (small, large):
            stack.callback(app.close)
        stack.callback(runner.close)
        stack.enter_context(threads(table.run, runner.run))
        stack.enter_context(working(small))
        stack.enter_context(routing(small))
        small.submit_many(small.tasks["work"].job(n) for n in range(100))
        small.emit_many(Seen(n) for n in range(100))
        until(lambda: len(closings(small)) == 200)
        began = time.monotonic()
        ensure(large, settings)  # as `jobledger topics apply` does
        large.submit_many(large.tasks["work"].job(n) for n in range(100, 200))
        large.emit_many(Seen(n) for n in range(100, 200))
        until(lambda: len(closings(large)) == 400, 60)
        took = time.monotonic() - began
        until(lambda: states(small) == {"succeeded": 400}, 30)
        until(lambda: runner.folded == 200, 30)
        found = Counter(r.position.partition for r in log_of(large, large.names.jobs("q")))
        assert set(found) == {0, 1, 2, 3}
    assert all(len(ends) == 1 for ends in closings(large).values())
    checked = verify(large.names, settings, ["q"], url)
    assert checked.equal
    say(f"growth: two partitions to four; the jobs on the new ones had run {took:.1f} s later")


def test_a_second_queue_takes_over_from_the_first(broker: str, namespace: str, tmp_path: Path) -> None:
    """Jobs that were submitted to the first queue run there, also delayed and retried jobs. New jobs are in the second
    queue."""
    settings = Settings(bootstrap=broker, status_url=f"sqlite:///{tmp_path / 'status.db'}", home=tmp_path)
    first = declared(namespace, settings, [Queue("q", partitions=1)], queue="q", events=2)
    both = declared(namespace, settings, [Queue("q", partitions=1), Queue("q-2", partitions=4)], queue="q-2", events=2)
    url = settings.resolve_status_url(namespace)
    with ExitStack() as stack:
        for app in (first, both):
            stack.callback(app.close)
        ensure(first, settings)
        work = first.tasks["work"]
        old = [work.submit(1), work.submit(2, fail=2), work.using(delay=3).submit(3)]
        ensure(both, settings)
        table = Materializer(both.names, settings, ["q", "q-2"], url)
        quick = Options(commit_interval=0.1)
        made = Coordinator(both.names, settings, partitions=both.partitions, options=quick, data_dir=tmp_path / "c")
        stack.enter_context(threads(table.run, lambda stop: asyncio.run(supervise(made, stop))))
        stack.enter_context(working(both))
        new = [both.tasks["work"].submit(4), both.tasks["work"].submit(5, fail=1)]
        ids = {handle.job_id for handle in [*old, *new]}
        until(lambda: sum(isinstance(e.event.fact, JobSucceeded) for c in closings(both).values() for e in c) == 5, 60)
        until(lambda: states(both) == {"succeeded": 5}, 30)
        where = {row.job_id: row.queue for row in both.jobs()}
        assert set(where) == ids
        assert {where[h.job_id] for h in old} == {"q"}
        assert {where[h.job_id] for h in new} == {"q-2"}


def test_work_partitions_without_a_lifecycle_partition_are_not_served(
    broker: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The work topic gets more partitions than the lifecycle topic. The worker does not serve the additional ones, says
    why and what to do, and serves the others. When the lifecycle topic has as many, all jobs run and the table is
    right."""
    monkeypatch.setattr(topic_watch, "LOOK_S", 0.5)
    settings = Settings(bootstrap=broker, status_url=f"sqlite:///{tmp_path / 'status.db'}", home=tmp_path)
    with ExitStack() as stack:
        app = declared(namespace, settings, [Queue("q", partitions=4)], queue="q", events=1)
        stack.callback(app.close)
        ensure(app, settings)
        client, work, lifecycle = admin(settings), app.names.jobs("q"), app.names.lifecycle
        remedy = f"`kafka-topics.sh --alter --topic {lifecycle} --partitions 6`"
        with working(app) as worker:
            app.tasks["work"].submit(0)
            until(lambda: len(closings(app)) == 1)
            client.create_partitions([NewPartitions(work, 6)])[work].result(timeout=20)
            until(lambda: sum(remedy in reason for reason in worker.health()["reasons"]) == 2, 30)
            assert worker.health()["status"] == "unhealthy"
            until(lambda: partitions_of(settings, work) == 6)
            with closing(declared(namespace, settings, [Queue("q", partitions=4)], queue="q", events=1)) as other:
                handles = other.submit_many(other.tasks["work"].job(n) for n in range(1, 61))
            served = {handle.job_id for handle in handles if handle.position.partition < 4}
            assert 0 < len(served) < 60
            until(lambda: served <= set(closings(app)))
            assert len(closings(app)) == 1 + len(served)
        with pytest.raises(ConfigError, match=re.escape(remedy)):
            Worker(app.registry, settings).run()
        client.create_partitions([NewPartitions(lifecycle, 6)])[lifecycle].result(timeout=20)
        until(lambda: partitions_of(settings, lifecycle) == 6)
        table = Materializer(app.names, settings, ["q"], settings.resolve_status_url(namespace))
        with threads(table.run), working(app):
            until(lambda: len(closings(app)) == 61, 60)
            until(lambda: states(app) == {"succeeded": 61}, 30)
        assert verify(app.names, settings, ["q"], settings.resolve_status_url(namespace)).equal


def test_a_worker_reports_changed_settings_of_a_topic(
    broker: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed retention of a work topic makes the worker unhealthy, until the setting is restored. The reason names
    the topic, the setting and its value. The worker continues to run jobs."""
    monkeypatch.setattr(topic_watch, "LOOK_S", 0.5)
    app = declared(namespace, Settings(bootstrap=broker, home=tmp_path), [Queue("q")], queue="q", events=1)
    ensure(app, app.settings)
    topic, client = app.names.jobs("q"), admin(app.settings)
    with closing(app), working(app) as worker:
        until(lambda: worker.health()["status"] == "ok")
        entry = ConfigEntry("retention.ms", "3600000", incremental_operation=AlterConfigOpType.SET)
        changed = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        client.incremental_alter_configs([changed])[changed].result(timeout=20)
        wanted = f"topic {topic} has retention.ms=3600000 and needs -1"
        until(lambda: any(wanted in reason for reason in worker.health()["reasons"]), 30)
        assert worker.health()["status"] == "unhealthy"
        app.tasks["work"].submit(0)
        until(lambda: len(closings(app)) == 1)
        ensure(app, app.settings)
        until(lambda: worker.health()["status"] == "ok", 30)
