"""What a worker process logs: failed jobs, outages of its broker, its start and its stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Producer

from jobledger import App, Settings
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.broker_process import BROKER_CONFIG
from jobledger.kafka.embedded.defaults import START_TIMEOUT_S
from jobledger.kafka.topics import ensure
from tests.integration import logging_app
from tests.integration.worker_app import until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


@pytest.mark.extended
def test_a_worker_logs_failures_and_outages_and_nothing_else(tmp_path: Path) -> None:
    """The log has the app's format. It contains a retry, a failure, the broker's outage once, and its end. There is no
    warning at the start, and none when broker and worker stop together."""
    with EmbeddedKafka(tmp_path / "kafka") as kafka:
        app = logging_app.app
        app.settings = Settings(bootstrap=kafka.bootstrap, submit_timeout=30.0)
        ensure(app, app.settings)
        command = [sys.executable, "-m", "jobledger", "worker", "tests.integration.logging_app:app"]
        env = {**os.environ, "JOBLEDGER_BOOTSTRAP": kafka.bootstrap, "LOGGING_SET_UP": "1"}
        out = tmp_path / "log"
        with out.open("wb") as file:
            worker = subprocess.Popen([*command, "--grace", "5"], stdout=file, stderr=file, env=env)
        try:
            until(lambda: "assigned partitions" in out.read_text(), what="the worker serves")
            assert "WARNING" not in out.read_text()
            job = logging_app.fails.submit("k")
            app.close()
            until(lambda: "no further attempt" in out.read_text(), what="the job fails")
            kafka.stop()
            until(lambda: "cannot be reached" in out.read_text(), what="the outage is logged")
            kafka.start()
            until(lambda: "connected again" in out.read_text(), what="its end is logged")
            worker.send_signal(signal.SIGTERM)
            kafka.stop()
            worker.wait(60)
        finally:
            worker.kill()
            worker.wait()
    lines = out.read_text().splitlines()
    assert all(line.startswith("APP ") for line in lines), lines
    head = f"jobledger.worker: job {job.job_id} (fails)"
    tail = "ValueError: no such city"
    assert f"APP WARNING {head} is tried again in 0.1 s at attempt 1: {tail}" in lines
    assert f"APP ERROR {head} failed (exhausted), with no further attempt, at attempt 2: {tail}" in lines
    told = [line for line in lines if line.startswith(("APP WARNING jobledger.kafka", "APP ERROR jobledger.kafka"))]
    assert len(told) == 1, told
    assert f"{kafka.bootstrap} cannot be reached, and is tried again: " in told[0]
    assert sum("connected again" in line for line in lines) == 1
    after = lines[next(n for n, line in enumerate(lines) if "connected again" in line) :]
    assert not [line for line in after if "Connection refused" in line or "cannot be reached" in line]


@pytest.mark.extended
def test_a_worker_reports_that_its_group_coordinator_does_not_answer(tmp_path: Path) -> None:
    """The broker cannot load the worker's group, because ``__consumer_offsets`` has a damaged record. The client
    reports nothing, so the worker asks. Its health is bad until the group can be loaded; then it runs jobs."""
    with EmbeddedKafka(tmp_path / "kafka", timeout=PATIENCE * START_TIMEOUT_S) as kafka:
        settings = Settings(bootstrap=kafka.bootstrap, submit_timeout=60.0)
        app = App(f"t{uuid.uuid4().hex[:12]}", settings=settings, partitions=1)
        task = app.task(noop)
        ensure(app, settings)
        group = app.names.worker_group("default")
        with working(app) as worker:
            until(lambda: any(worker.partitions()), what="the group exists")
        number = _write_damaged_record(settings, group)
        kafka.stop()
        kafka.start()
        with working(app) as worker:
            until(lambda: worker.health()["status"] == "unhealthy", 60.0, "the worker reports the problem")
            (reason,) = worker.health()["reasons"]
            assert f"lane default: the group coordinator of {group} has not answered for" in reason
            kafka.stop()
            (damaged,) = (tmp_path / "kafka").glob(f"**/__consumer_offsets-{number}")
            shutil.rmtree(damaged)
            kafka.start()
            until(lambda: worker.health()["status"] == "ok", 60.0, "the worker has its partition")
            task.submit()
            until(lambda: worker.health()["succeeded"] == 1, what="the job runs")
        app.close()


async def noop() -> None:
    """Do nothing."""


def _write_damaged_record(settings: Settings, group: str) -> int:
    """Write a record that no broker can read to the partition of ``__consumer_offsets`` that has ``group``. Return the
    number of the partition."""
    hashed = 0
    for letter in group:  # Java's `String.hashCode`, by which a broker chooses the partition
        hashed = (31 * hashed + ord(letter)) & 0xFFFF_FFFF
    signed = hashed if hashed < 1 << 31 else hashed - (1 << 32)
    number = abs(signed) % int(BROKER_CONFIG["offsets.topic.num.partitions"])
    # A broker accepts records for its own topics only from a client with this id.
    sender = Producer({"bootstrap.servers": settings.bootstrap, "client.id": "__admin_client"})
    # Key: version 3 of the coordinator's records, the metadata of a group, whose text is cut.
    sender.produce("__consumer_offsets", key=b"\x00\x03\x00", value=b"\x00\x00", partition=number)
    assert sender.flush(PATIENCE * 20) == 0
    return number
