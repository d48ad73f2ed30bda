"""The workers' reports, from real worker processes over the log to the status table."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from jobledger import App, Settings, WorkerState, WorkerStatus
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.clients import admin, answer_of
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import rebuild, verify
from jobledger.streams.status.store import open_reader
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

APP = Path(__file__).with_name("workers_app.py")


class World:
    """A namespace whose status table is written by the test itself, and worker processes."""

    def __init__(self, broker: str, namespace: str, folder: Path, stack: ExitStack) -> None:
        self.stack, self.free = stack, folder / "free"
        self.url = f"sqlite:///{folder / 'status.db'}"
        self.environ = {
            **os.environ,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_STATUS_URL": self.url,
            "JOBLEDGER_HOME": str(folder),
            "JOBLEDGER_VERSION": "2.4.1",
            "NAMESPACE": namespace,
            "FREE": str(self.free),
        }
        self.settings = Settings(bootstrap=broker, status_url=self.url, home=folder)
        self.app = App(namespace, settings=self.settings, partitions=2, queues=["mail", "slow"])
        stack.callback(self.app.close)

        @self.app.task(queue="mail", name="hold")
        async def hold() -> None: ...

        self.hold = hold
        ensure(self.app, self.settings)
        self.start_table()

    def start_table(self) -> None:
        """Start a materializer in this process."""
        self._stop = threading.Event()
        self.table = Materializer(self.app.names, self.settings, ["mail", "slow"], self.url)
        self._thread = threading.Thread(target=self.table.run, args=(self._stop,))
        self._thread.start()
        self.stack.callback(self.stop_table)
        wait_until(lambda: self.table.active, 20, "the materializer becoming active")

    def stop_table(self) -> None:
        self._stop.set()
        self._thread.join(20 * PATIENCE)

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker process, and return it when the table has its first report."""
        process = subprocess.Popen(
            [sys.executable, "-m", "jobledger", "worker", f"{APP}:app"], env=self.environ, stderr=subprocess.DEVNULL
        )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        wait_until(lambda: self.status(process) is not None, 30, "the worker's first report")
        return process

    def status(self, process: subprocess.Popen[bytes]) -> WorkerStatus | None:
        """Return the last report of a process in the table."""
        return next((status for status in self.app.workers() if status.pid == process.pid), None)

    def run_one(self, process: subprocess.Popen[bytes]) -> str:
        """Submit a job, and return its id when the worker has reported that it runs."""
        job_id = self.hold.submit().job_id

        def reported() -> bool:
            status = self.status(process)
            return status is not None and job_id in status.jobs

        wait_until(reported, 20, "the report of the running job")
        return job_id

    def keys(self) -> dict[bytes, bool]:
        """Return the keys on the topic of reports, and whether the last record of each is a report."""
        with LogReader(self.settings) as log:
            found: dict[bytes, bool] = {}
            for message in log.read(self.app.names.workers, 0, 0):
                key = message.key()
                assert isinstance(key, bytes)
                found[key] = message.value() is not None
        return found


@pytest.fixture
def world(broker: str, namespace: str, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(broker, namespace, tmp_path, stack)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def test_a_worker_is_in_the_table_while_it_runs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Its report names the running jobs. It leaves the table when it stops without an error."""
    process = world.worker()
    job_id = world.run_one(process)
    found = world.status(process)
    assert found is not None
    assert found.worker == f"{socket.gethostname()}:{process.pid}"
    assert (found.version, found.queues, found.tasks, found.running) == ("2.4.1", ("mail", "slow"), ("hold",), 1)
    assert found.state(now()) is WorkerState.ALIVE
    assert found.started_at < found.jobs[job_id] < now()
    assert found.memory_bytes is None or found.memory_bytes > 1_000_000
    assert found.partitions >= 1

    def reported_again() -> bool:
        latest = world.status(process)
        return latest is not None and latest.reported_at > found.reported_at

    wait_until(reported_again, 10, "the next report")
    shown = _listed(world, "--json")
    (row,) = json.loads(shown)
    assert (row["worker"], row["state"], row["queues"]) == (found.worker, "alive", ["mail", "slow"])
    assert list(row["jobs"]) == [job_id]
    assert found.worker in _listed(world)

    world.free.touch()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60 * PATIENCE) == 0
    assert time.monotonic() - began < 20 * PATIENCE
    wait_until(lambda: world.status(process) is None, 10, "the worker leaving the table")
    assert world.keys() == {found.worker.encode(): False}


def _listed(world: World, *options: str) -> str:
    command = [sys.executable, "-m", "jobledger", "workers", "list", "--namespace", world.app.names.namespace, *options]
    return subprocess.run(command, env=world.environ, check=True, capture_output=True, text=True).stdout


def test_a_killed_worker_is_silent_and_then_removed(world: World) -> None:
    """The maintenance removes its row, and its report from the topic. A rebuild fills the table from the topic."""
    killed, alive = world.worker(), world.worker()
    killed.kill()
    killed.wait()
    status = world.status(killed)
    assert status is not None
    last = status.reported_at
    assert status.state(last + dt.timedelta(seconds=16)) is WorkerState.SILENT

    world.stop_table()
    report = rebuild(world.app.names, world.settings, ["mail", "slow"], world.url)
    assert report.jobs == 0
    assert verify(world.app.names, world.settings, ["mail", "slow"], world.url).equal
    world.start_table()
    wait_until(lambda: None not in (world.status(killed), world.status(alive)), 20, "both workers in the new table")

    cadence = Cadence(gone_after=(now() - last).total_seconds() + 1.0, patience=20.0)
    with closing(open_reader(world.url, world.app.names.namespace)) as reader:
        maintenance = Maintenance(
            *(world.app.names, world.settings, list(world.app.lanes), reader),
            cadence=cadence,
            forget_workers=world.table.forget_workers,
        )
        wait_until(lambda: maintenance.remove_workers() > 0, 20, "the removal of the killed worker")
        maintenance.close()
    wait_until(lambda: world.status(killed) is None, 10, "the killed worker leaving the table")
    assert world.status(alive) is not None
    assert world.keys()[status.worker.encode()] is False


def test_without_the_topic_a_worker_runs_and_says_so_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The worker does not make the broker create the topic. Jobs run as before."""
    topic, settings = world.app.names.workers, world.settings
    client = admin(settings)
    answer_of(client.delete_topics([topic], request_timeout=10.0)[topic], 10.0)
    world.free.touch()
    caplog.set_level(logging.WARNING, "jobledger.worker")
    made = Worker(world.app.registry, settings, WorkerOptions(grace=1.0))
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        world.hold.submit().wait(60 * PATIENCE)
        wait_until(lambda: "workers list" in caplog.text, 20, "the warning")
    finally:
        made.stop()
        thread.join(60 * PATIENCE)
    assert made.error is None
    assert caplog.text.count("workers list") == 1
    assert f"{topic}: the topic does not exist" in caplog.text
    assert topic not in client.list_topics(timeout=10.0).topics
