"""Faults of the router: it is killed or frozen, or its broker is stopped. Each pair of event and handler still has
exactly one job, which runs once."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from jobledger import App, Settings
from jobledger.kafka import topics
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.defaults import START_TIMEOUT_S
from jobledger.schemas.events import JobStarted, JobSubmitted, JobSucceeded
from tests.acceptance import events_app
from tests.acceptance.fleet import Fleet, Member
from tests.integration.worker_app import log_of, until
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

BEYOND_SESSION_S = 9.0


def wait_until_routing(fleet: Fleet, router: Member) -> None:
    """Wait until a router has partitions. Before that it does not react to signals."""
    fleet.until(lambda: "assigned [" in router.output().rpartition("--- life ")[2], 60.0, f"{router.name} that routes")


@pytest.mark.parametrize(("events", "kills"), [(600, 2), pytest.param(6_000, 12, marks=pytest.mark.extended)])
def test_each_event_and_handler_is_one_job_whatever_happens_to_the_router(
    tmp_path: Path, say: Callable[[str], None], events: int, kills: int
) -> None:
    """Of two routers, one is killed several times at random moments, and the other is frozen beyond its session. The
    broker is stopped once."""
    dice = random.Random(7)
    with EmbeddedKafka(timeout=PATIENCE * START_TIMEOUT_S) as kafka:
        namespace = f"r{uuid.uuid4().hex[:10]}"
        # Events are also emitted while the broker is unavailable, for as long as its stop and its start take.
        settings = Settings(bootstrap=kafka.bootstrap, submit_timeout=30.0 * PATIENCE)
        app = App(namespace, settings=settings, partitions=4)
        app.event(key="user")(events_app.Happened)
        app.on(events_app.Happened, queue="crm")(events_app.sync.fn)
        app.on(events_app.Happened, queue="mail")(events_app.write.fn)
        topics.ensure(app, app.settings)
        with Fleet(tmp_path, kafka.bootstrap, namespace, target="tests/acceptance/events_app.py:app") as fleet:
            ids: list[str] = []

            def emit() -> None:
                for first in range(0, events, 100):
                    batch = (events_app.Happened(n, f"user-{n % 50}") for n in range(first, first + 100))
                    ids.extend(handle.event_id for handle in app.emit_many(batch))
                    time.sleep(0.2)

            emitting = threading.Thread(target=emit)
            emitting.start()
            killed, frozen = fleet.start("router"), fleet.start("router")
            for kill in range(kills):
                time.sleep(dice.uniform(0.3, 2.5))
                fleet.kill(killed)
                fleet.tend()
                if kill == kills // 3:
                    fleet.freeze(frozen)
                    time.sleep(BEYOND_SESSION_S)
                    fleet.thaw(frozen)
                if kill == kills * 2 // 3:
                    kafka.stop()
                    time.sleep(3.0)
                    kafka.start()
            emitting.join(timeout=60 * PATIENCE)
            assert len(ids) == events
            wanted = {handler.job_id(event_id) for event_id in ids for handler in app.registry.handlers["Happened"]}

            def submitted() -> Counter[str]:
                records = [r for queue in app.queues for r in log_of(app, app.names.jobs(queue))]
                return Counter(r.event.job_id for r in records if isinstance(r.event.fact, JobSubmitted))

            def all_there() -> bool:
                fleet.tend()
                return set(submitted()) >= wanted

            until(all_there, timeout=90.0, what="a job for each event and handler")
            assert set(submitted()) == wanted
            for router in (killed, frozen):
                wait_until_routing(fleet, router)
                assert fleet.stop(router) == 0, router.tail()
            fleet.start("worker")
            until(
                lambda: len(_facts_by_job(app, JobSucceeded)) >= len(wanted), timeout=90.0, what="the end of all jobs"
            )
            runs = Counter(line.split()[1] for line in fleet.lines())
            again = sum(count - 1 for count in submitted().values())
            fleet.stop(fleet.members[-1])
        assert Counter(runs.values()) == {1: 2 * events}
        assert Counter(_facts_by_job(app, JobStarted).values()) == {1: 2 * events}
        app.close()
    say(f"router: {events} events, {len(wanted)} jobs, each run once; submitted again {again}x; {dict(fleet.did)}")


def _facts_by_job(app: App, fact: type) -> Counter[str]:
    """Return how many facts of a kind each job has."""
    return Counter(r.event.job_id for r in log_of(app, app.names.lifecycle) if isinstance(r.event.fact, fact))
