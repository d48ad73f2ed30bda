"""With gevent's monkey patches, a client works completely and other greenlets run meanwhile. Parts that cannot work
with them raise an error."""

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
    """Create an app of the worker's tests with its topics. The other process has an app of the same namespace."""
    return made(namespace, broker, status_url=f"sqlite:///{tmp_path}/status.db")


@pytest.fixture
def environ(app: App) -> dict[str, str]:
    """Return the environment of the other process."""
    settings = app.settings
    assert settings.bootstrap is not None
    assert settings.status_url is not None
    found = {"JOBLEDGER_BOOTSTRAP": settings.bootstrap, "JOBLEDGER_STATUS_URL": settings.status_url}
    return {**os.environ, **found, "NAMESPACE": app.names.namespace}


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    """Return a function that calls a function of `gevent_app` in a separate process, which must exit with code 0."""

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
    """The client submits alone and in batches, emits, cancels, reads `app.lifecycle` and closes, also in a hundred
    greenlets at once."""
    run("uses")


def test_greenlets_wait_for_results(run: Run, app: App) -> None:
    """Forty greenlets wait at the same time, each for the result of a job that a worker in another process runs."""
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


def test_an_unreachable_broker_blocks_no_greenlet(run: Run) -> None:
    """Thirty first submissions all fail after one time limit, not one after the other. Other greenlets run meanwhile."""
    run("away")


def test_a_process_forked_by_gevent_can_submit(run: Run) -> None:
    """Each of three forked processes submits alone and in a batch, and exits. The parent continues to submit."""
    run("forks")


def test_answers_of_admin_clients_reach_greenlets(run: Run) -> None:
    """Each request whose answer arrives in librdkafka's own thread is sent thirty times, while the process does nothing
    else."""
    run("asks")


@pytest.mark.skipif(find_spec("eventlet") is None, reason="eventlet is not installed")
def test_eventlet_is_refused(run: Run) -> None:
    """The first submission raises an error within 20 s, which names eventlet, instead of waiting forever."""
    run("refused", GREEN="eventlet")


@pytest.mark.parametrize("command", ["worker", "router", "streams"])
def test_parts_that_need_native_threads_are_refused(run: Run, environ: dict[str, str], command: str) -> None:
    """If the app's module applies gevent's patches, worker, router and stream processor exit with an error that names
    gevent."""
    done = subprocess.run(
        [sys.executable, "-m", "jobledger", command, f"{APP}:app"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, "gevent" in done.stderr) == (Exit.ERROR, True), done.stderr
