"""Under gevent's monkey patches a client does all it does, and other greenlets run meanwhile; what cannot is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobledger import App
from jobledger.cli.output import Exit
from jobledger.streams.status.materializer import Materializer
from tests.integration.worker_app import made, working

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed"),
]

APP = Path(__file__).with_name("gevent_app.py")
TIMEOUT_S = 500.0

Run = Callable[..., None]


@pytest.fixture
def app(broker: str, namespace: str, tmp_path: Path) -> App:
    """An app of worker's tests with its topics; the other process has one of the same namespace."""
    return made(namespace, broker, status_url=f"sqlite:///{tmp_path}/status.db")


@pytest.fixture
def environ(app: App) -> dict[str, str]:
    """What the other process finds."""
    settings = app.settings
    assert settings.bootstrap is not None
    assert settings.status_url is not None
    found = {"JOBLEDGER_BOOTSTRAP": settings.bootstrap, "JOBLEDGER_STATUS_URL": settings.status_url}
    return {**os.environ, **found, "NAMESPACE": app.names.namespace}


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    """Call a function of `gevent_app` in a process of its own, which must end well."""

    def call(name: str, **more: str) -> None:
        done = subprocess.run(
            [sys.executable, str(APP), name],
            env=environ | more,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return call


def test_a_client_does_everything_and_other_greenlets_run(run: Run, app: App) -> None:
    """Submitting alone and in batches, emitting, cancelling, following, closing; a hundred greenlets at once."""
    run("uses")


def test_greenlets_wait_for_results(run: Run, app: App) -> None:
    """Forty at once, each for its job, which another process's worker runs."""
    url = app.settings.resolve_status_url(app.names.namespace)
    stop = threading.Event()
    materializer = Materializer(app.names, app.settings, list(app.lanes), url)
    thread = threading.Thread(target=materializer.run, args=(stop,))
    thread.start()
    try:
        with working(app):
            run("results")
    finally:
        stop.set()
        thread.join(30)


def test_a_broker_that_is_away_stops_no_greenlet(run: Run) -> None:
    """Thirty first submissions get their error after one time-out, not after thirty; others run meanwhile."""
    run("away")


def test_a_fork_of_gevent_s_submits(run: Run) -> None:
    """Three children, each submits alone and in a batch and ends; the parent submits on."""
    run("forks")


def test_answers_of_admin_clients_reach_greenlets(run: Run) -> None:
    """Thirty times each question that a client asks through librdkafka's own thread, which answers at any moment; the
    process does nothing else."""
    run("asks")


@pytest.mark.skipif(find_spec("eventlet") is None, reason="eventlet is not installed")
def test_eventlet_is_refused(run: Run) -> None:
    """Soon, with what to do; it would stop for good."""
    run("refused", GREEN="eventlet")


@pytest.mark.parametrize("command", ["worker", "router", "streams"])
def test_what_needs_native_threads_is_refused(run: Run, environ: dict[str, str], command: str) -> None:
    """An app whose module patches the process: worker, router and stream processor end with what to do."""
    done = subprocess.run(
        [sys.executable, "-m", "jobledger", command, f"{APP}:app"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, "gevent" in done.stderr) == (Exit.ERROR, True), done.stderr
