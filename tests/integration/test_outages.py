"""What a worker process logs: failed jobs, outages of its broker, its start and its stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobledger import Settings
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topics import ensure
from tests.integration import logging_app

pytestmark = pytest.mark.kafka


def until(check: Callable[[], bool], what: str) -> None:
    """Poll ``check`` until it is true."""
    deadline = time.monotonic() + 90
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


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
            until(lambda: "assigned partitions" in out.read_text(), "the worker serves")
            assert "WARNING" not in out.read_text()
            job = logging_app.fails.submit("k")
            app.close()
            until(lambda: "failed for good" in out.read_text(), "the job fails")
            kafka.stop()
            until(lambda: "cannot be reached" in out.read_text(), "the outage is said")
            kafka.start()
            until(lambda: "connected again" in out.read_text(), "its end is said")
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
    assert f"APP ERROR {head} failed for good, exhausted at attempt 2: {tail}" in lines
    told = [line for line in lines if line.startswith(("APP WARNING jobledger.kafka", "APP ERROR jobledger.kafka"))]
    assert len(told) == 1, told
    assert f"{kafka.bootstrap} cannot be reached, and is tried again: " in told[0]
    assert sum("connected again" in line for line in lines) == 1
    after = lines[next(n for n, line in enumerate(lines) if "connected again" in line) :]
    assert not [line for line in after if "Connection refused" in line or "cannot be reached" in line]
