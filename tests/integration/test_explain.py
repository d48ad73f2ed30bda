"""Why jobs are where they are, with a real broker, a worker and a status table. No coordinator and no plan runner run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from jobledger import App, Cause, Explanation, JobHandle, Settings, State
from jobledger.client import explaining
from jobledger.errors import JobNotFound
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import Position
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_store
from tests.integration import explain_app
from tests.integration.worker_app import working
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

UNKNOWN_ID = "00000000-0000-7000-8000-000000000000"


class World:
    """The app, its jobs by name, and the environment for commands."""

    def __init__(self, broker: str, folder: Path, stack: ExitStack) -> None:
        url = f"sqlite:///{folder / 'status.db'}"
        self.namespace = f"t{uuid.uuid4().hex[:12]}"
        self.settings = Settings(bootstrap=broker, status_url=url, home=folder, submit_timeout=20.0)
        explain_app.OPEN = folder / "open"
        self.app = explain_app.build(self.namespace)
        self.app.settings = self.settings
        stack.callback(self.app.close)
        self.environ = {
            **os.environ,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_STATUS_URL": url,
            "JOBLEDGER_HOME": str(folder),
            "NAMESPACE": self.namespace,
        }
        ensure(self.app, self.settings)
        self._materialize(stack)
        stack.enter_context(working(self.app, queues=["work", "paused", "limited"]))
        stack.callback(explain_app.OPEN.touch)  # before the worker is stopped
        self.jobs = self._submit()

    def _materialize(self, stack: ExitStack) -> None:
        stop = threading.Event()
        table = Materializer(self.app.names, self.settings, list(self.app.lanes), str(self.settings.status_url))
        thread = threading.Thread(target=table.run, args=(stop,))
        thread.start()
        stack.callback(thread.join, 60 * PATIENCE)
        stack.callback(stop.set)
        wait_until(lambda: table.active, 30, "the materializer becoming active")

    def _submit(self) -> dict[str, JobHandle[Any]]:
        tasks: Any = self.app.tasks
        self.app.pause(queue="paused", reason="their maintenance", by="ann")
        jobs = {
            "ended": tasks["add"].submit(1, b=-1),
            "paused": tasks["add"].using(queue="paused").submit(1),
            "idle": tasks["add"].using(queue="idle").submit(1),
            "delayed": tasks["add"].using(delay=3600).submit(1),
            "overdue": tasks["add"].using(delay=0.1).submit(1),
            "backs off": tasks["later"].submit(),
            "holds the key": tasks["book"].submit("a-17"),
            "waits for the key": tasks["book"].submit("a-17"),
            "also waits for the key": tasks["book"].submit("a-17"),
            "leased": tasks["render"].submit(),
            "at the limit": tasks["one_at_a_time"].submit(),
            "beyond the limit": tasks["one_at_a_time"].submit(),
        }
        expected = {
            "ended": State.FAILED,
            "backs off": State.RETRYING,
            "holds the key": State.RUNNING,
            "leased": State.RUNNING,
            "at the limit": State.RUNNING,
        }
        for name, handle in jobs.items():
            state = expected.get(name)
            wait_until(lambda handle=handle, state=state: self._is(handle, state), 30, f"the job that is {name}")  # type: ignore[misc]  # the defaults bind the loop's values
        return jobs

    def _is(self, handle: JobHandle[Any], state: State | None) -> bool:
        try:
            return state is None or self.app.job(handle.job_id).state is state
        except JobNotFound:
            return False

    def explained(self, name: str, *first: str) -> tuple[Explanation, Cause]:
        """Return a job's explanation, and its first cause, which must be one of ``first`` within some seconds."""
        last: list[Explanation] = []

        def found() -> bool:
            last[:] = [self.app.explain(self.jobs[name].job_id)]
            return last[0].causes[0].cause.value in first

        wait_until(found, 30, f"{first} as the cause of the job that is {name}: {last}")
        return last[0], last[0].causes[0]


@pytest.fixture(scope="module")
def world(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(broker, tmp_path_factory.mktemp("explain"), stack)


def kinds(explained: Explanation) -> list[str]:
    return [each.cause.value for each in explained.causes]


def test_a_paused_queue(world: World) -> None:
    """The cause says who paused the queue, why, and since when."""
    explained, cause = world.explained("paused", "queue-paused")
    assert explained.state == "queued"
    assert kinds(explained) == ["queue-paused"]
    assert "queue paused is paused since" in cause.detail
    assert cause.detail.endswith("by ann: their maintenance")
    assert cause.since is not None
    assert abs(cause.since.timestamp() - time.time()) < 600
    assert explained.likely_start is None
    assert "paused" in explained.likely_start_note


def test_a_queue_without_a_worker(world: World) -> None:
    """No worker has ever joined the group of the queue."""
    explained, cause = world.explained("idle", "no-worker")
    assert kinds(explained) == ["no-worker"]
    assert f"{world.namespace}.worker.idle has no member" in cause.detail


def test_jobs_that_wait_for_a_time(world: World) -> None:
    """A delayed job, a job that backs off after an error, and a job that no coordinator releases."""
    delayed, _ = world.explained("delayed", "delayed")
    assert (delayed.state, kinds(delayed)) == ("scheduled", ["delayed"])
    assert delayed.likely_start is not None
    assert delayed.likely_start == world.app.job(world.jobs["delayed"].job_id).due_at
    backs_off, cause = world.explained("backs off", "backs-off")
    assert (backs_off.state, kinds(backs_off)) == ("retrying", ["backs-off"])
    assert "ConnectionError: the relay does not answer; the next attempt waits until" in cause.detail
    assert backs_off.likely_start == world.app.job(world.jobs["backs off"].job_id).due_at
    wait_until(lambda: "not-released" in kinds(world.app.explain(world.jobs["overdue"].job_id)), 30, "the overdue job")
    late = world.app.explain(world.jobs["overdue"].job_id)
    assert "no coordinator runs" in late.causes[1].detail
    assert late.likely_start is None


def test_a_key_that_is_held(world: World) -> None:
    """The first job of the key holds it for every later one."""
    holder = world.jobs["holds the key"].job_id
    explained, cause = world.explained("waits for the key", "key-held")
    assert f"key 'a-17' is held by job {holder}, which is running since" in cause.detail
    assert "must end before" not in cause.detail
    assert explained.likely_start is None
    _, cause = world.explained("also waits for the key", "key-held")
    assert cause.detail.endswith("2 jobs of this key must end before")


def test_a_limit_that_is_reached(world: World) -> None:
    """The cause names the limit, and whether it is in the code or who set it at run time."""
    explained, cause = world.explained("beyond the limit", "queue-limit")
    assert kinds(explained)[0] == "queue-limit"
    assert "limited to 1 job at once for all workers together (in the code): 1 job run" in cause.detail
    world.app.limit(task="one_at_a_time", concurrency=1, by="bob", reason="slowly")
    explained = world.app.explain(world.jobs["beyond the limit"].job_id)
    assert kinds(explained)[:2] == ["queue-limit", "task-limit"]
    assert "(set by bob: slowly)" in explained.causes[1].detail
    assert explained.causes[1].since is not None
    world.app.limit(task="one_at_a_time")


def test_running_jobs(world: World) -> None:
    """The cause names the worker, and the job lease of a long job is alive."""
    for name in ("holds the key", "leased"):
        explained, cause = world.explained(name, "running")
        assert (explained.state, kinds(explained)) == ("running", ["running"])
        assert f":{os.getpid()}" in cause.detail
        assert cause.since == world.app.job(world.jobs[name].job_id).started_at


def test_an_ended_job_and_its_redrive(world: World) -> None:
    """An ended job says how it ended, and in which plan its next run waits."""
    explained, cause = world.explained("ended", "ended")
    assert (explained.state, kinds(explained)) == ("failed", ["ended"])
    assert "ValueError: b is negative (exhausted)" in cause.detail
    plan = world.app.redrive(ids=[world.jobs["ended"].job_id], by="ann", reason="mended")
    wait_until(lambda: bool(world.app.plans()), 30, "the plan in the table")
    plan.pause(by="bob", reason="wait")
    job_id = world.jobs["ended"].job_id
    wait_until(lambda: "paused" in world.app.explain(job_id).causes[-1].detail, 30, "the pause of the plan")
    explained = world.app.explain(job_id)
    assert kinds(explained) == ["ended", "waits-in-plan"]
    assert f"plan {plan.plan} (redrive, paused)" in explained.causes[1].detail
    assert "made by ann: mended, last steered by bob: wait" in explained.causes[1].detail


def test_an_unknown_job_is_not_found(world: World) -> None:
    """An unknown id is an error, and never a job that waits; a job that the table has not read yet is unknown."""
    with pytest.raises(JobNotFound):
        world.app.explain(UNKNOWN_ID)
    with pytest.raises(JobNotFound):
        asyncio.run(world.app.explain_async(UNKNOWN_ID))
    handle = world.jobs["paused"]
    assert kinds(handle.explain()) == ["queue-paused"]
    far = Position(handle.position.topic, 0, handle.position.offset + 1_000)
    explained = world.app.client.explain(UNKNOWN_ID, at_least=far)
    assert (explained.state, kinds(explained)) == ("unknown", ["unknown-job", "table-behind"])


def test_sources_that_cannot_be_read_are_named(world: World, tmp_path: Path) -> None:
    """Without the broker the table's facts remain; without the table nothing is known; neither is an error, and neither
    takes long."""
    job_id, nowhere = world.jobs["paused"].job_id, "127.0.0.1:1"
    for settings, state, expected in (
        (
            Settings(bootstrap=nowhere, status_url=world.settings.status_url),
            "queued",
            ["waits-for-slot", "source-unread"],
        ),
        (Settings(bootstrap=nowhere, status_url=f"sqlite:///{tmp_path / 'none.db'}"), "unknown", ["table-unreadable"]),
    ):
        app = App(world.namespace, settings=settings)
        with closing(app):
            began = time.monotonic()
            explained = app.explain(job_id)
            assert time.monotonic() - began < PATIENCE * explaining.LOG_S
        assert (explained.state, kinds(explained)) == (state, expected)
        assert explained.likely_start is None
    with open_store(f"sqlite:///{tmp_path / 'empty.db'}", world.namespace) as store:
        assert store.acquire()
    app = App(world.namespace, settings=Settings(bootstrap=nowhere, status_url=f"sqlite:///{tmp_path / 'empty.db'}"))
    with closing(app):
        explained = app.client.explain(job_id, at_least=world.jobs["paused"].position)
    assert kinds(explained) == ["unknown-job", "table-behind", "source-unread"]


def test_the_command_explains(world: World) -> None:
    """`jobledger jobs explain` prints text or JSON, and its exit code is 3 for an unknown job."""
    target, job_id = f"{Path(explain_app.__file__)}:app", world.jobs["paused"].job_id

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobledger", "jobs", "explain", target, *words],
            env=world.environ, capture_output=True, text=True, timeout=60 * PATIENCE, check=False,
        )  # fmt: skip

    shown = json.loads(run(job_id, "--json").stdout)
    assert set(shown) == {"job_id", "state", "causes", "likely_start", "likely_start_note"}
    assert (shown["job_id"], shown["state"], shown["likely_start"]) == (job_id, "queued", None)
    (cause,) = shown["causes"]
    assert set(cause) == {"cause", "since", "detail"}
    assert cause["cause"] == "queue-paused"
    text = run(job_id).stdout
    assert "queue-paused  queue paused is paused since" in text
    assert "likely start  not known: the job does not start as long as its queue is paused" in text
    assert run(UNKNOWN_ID).returncode == 3
