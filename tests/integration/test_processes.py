"""Real processes that fork, get signals and exit: nothing waits forever, and every acknowledged job is in the log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobledger import App, Settings
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import JobSucceeded
from jobledger.streams.status.store import open_store
from tests.integration.worker_app import closings, facts_of, until
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

APP = Path(__file__).with_name("processes_app.py")
TIMEOUT_S = 250.0

Run = Callable[[str], list[str]]


@pytest.fixture
def environ(broker: str, namespace: str, tmp_path: Path) -> dict[str, str]:
    """Return the environment of the processes in these tests. The status table exists, and no materializer fills it."""
    url = f"sqlite:///{tmp_path}/status.db"
    open_store(url, namespace).close()
    return {
        **os.environ,
        "NAMESPACE": namespace,
        "JOBLEDGER_BOOTSTRAP": broker,
        "JOBLEDGER_STATUS_URL": url,
        "PYTHONWARNINGS": "ignore:This process:DeprecationWarning",  # a fork beside threads, from Python 3.12 on
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    """Return a function that calls a function of `processes_app` in a separate process, which must exit with code 0,
    and returns the printed lines."""

    def call(name: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, str(APP), name],
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.splitlines()

    call("topics")
    return call


def submitted(environ: dict[str, str]) -> set[str]:
    """Return the ids of all jobs in the log."""
    settings, names = Settings(bootstrap=environ["JOBLEDGER_BOOTSTRAP"]), Names(environ["NAMESPACE"])
    topic, decode = names.jobs("default"), decoder(settings, names).decode
    with LogReader(settings) as reader:
        return {
            recorded(message, decode).event.job_id
            for partition in range(partitions_of(settings, topic))
            for message in reader.read(topic, partition, 0)
        }


# -- forks --------------------------------------------------------------------------------------------------------------


def test_a_forked_process_can_use_the_parents_app_and_exits(run: Run) -> None:
    """Each of twenty forked processes submits, queries, emits, cancels, closes or does nothing, and exits by itself.
    After each of them the parent submits and queries again."""
    run("forks")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_fork_inherits_no_connection_of_sqlite(run: Run) -> None:
    """A forked process has no open file of the status table, and the parent can still query."""
    run("inherits_no_database")


@pytest.mark.extended
def test_a_fork_beside_busy_threads_is_usable(run: Run) -> None:
    """Four threads submit, emit and query without a pause. Each of twenty forked processes can do the same, and exits."""
    run("busy")


def test_a_fork_while_the_first_connection_is_being_opened_is_usable(run: Run) -> None:
    """Another thread holds the locks at the moment of the fork. The forked process submits and exits."""
    run("first")


def test_acknowledged_jobs_of_preforked_processes_are_in_the_log(run: Run, environ: dict[str, str]) -> None:
    """Four forked processes submit 100 jobs each and exit, another one is killed while it submits, and the parent
    submits before and after. Every acknowledged job is in the log."""
    ids = run("prefork")
    assert len(set(ids)) == 402
    assert set(ids) <= submitted(environ)


def test_processes_of_multiprocessing_can_submit(run: Run, environ: dict[str, str]) -> None:
    """A pool and a single process submit, both forked after the parent has submitted."""
    ids = run("pool")
    assert len(set(ids)) == 100
    assert set(ids) <= submitted(environ)


def test_a_lifecycle_stream_opened_before_a_fork_raises_an_error_in_the_child(run: Run) -> None:
    """Reading from a lifecycle stream after a fork raises `ConnectionUnusable`. Leaving the stream's block raises
    nothing."""
    run("stream")


@pytest.mark.parametrize("kind", ["sync", pytest.param("gevent", marks=pytest.mark.extended)])
def test_a_preloading_web_server_submits_in_its_workers(run: Run, environ: dict[str, str], kind: str) -> None:
    """gunicorn runs with ``--preload`` and an app that submits while it is loaded. Three workers submit, one is killed,
    its successor submits, and all exit soon after SIGTERM. The test runs with both kinds of gunicorn workers."""
    run("topics")
    with gunicorn(environ, "--worker-class", kind) as (process, url):
        ids = [job for _ in range(20) for job in get(url)] + get(url + "many")
        with pytest.raises(OSError, match=r"."):
            get(url + "die")
        ids += [job for _ in range(10) for job in get(url)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert len(set(ids)) == 50
    assert set(ids) <= submitted(environ)


def test_a_job_that_forks_does_not_disturb_its_worker(run: Run, environ: dict[str, str]) -> None:
    """A job forks in a thread, on the event loop or in a child process. The forked process ends with the exit code of
    the job's code, and only the parent continues as the worker."""
    run("topics")
    wanted = {job: int(code) for code, job in (line.split() for line in run("jobs_that_fork"))}
    app = App(environ["NAMESPACE"], settings=Settings(bootstrap=environ["JOBLEDGER_BOOTSTRAP"]))
    with subprocess.Popen([sys.executable, "-m", "jobledger", "worker", f"{APP}:app"], env=environ) as worker:
        try:
            until(lambda: set(wanted) <= set(closings(app)), 120.0)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0
        finally:
            worker.kill()
    assert {job: result_of(app, job) for job in wanted} == wanted


def result_of(app: App, job_id: str) -> int | None:
    """Return the job's result; None unless the job has exactly one success."""
    results = [fact.result for fact in facts_of(app, job_id) if isinstance(fact, JobSucceeded)]
    return int(results[0] or b"") if len(results) == 1 else None


@contextmanager
def gunicorn(environ: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server of `processes_app.wsgi` with three workers. Yield its process and its address."""
    pytest.importorskip("gunicorn")
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--bind", f"127.0.0.1:{port}"]
    quiet = ["--no-control-socket", "--log-level", "warning", "--graceful-timeout", "10", "--timeout", "90"]
    process = subprocess.Popen(
        [*command, *quiet, *options, "processes_app:wsgi"], cwd=APP.parent, env={**environ, "PRELOADED": "1"}
    )
    try:
        deadline = time.monotonic() + PATIENCE * 60
        while True:
            try:
                get(f"http://127.0.0.1:{port}/")
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()


def get(url: str) -> list[str]:
    """Return the lines of a page."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode()).splitlines()


# -- signals and exit -----------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_signal_handler_may_use_everything(run: Run) -> None:
    """A signal handler uses the app at any moment of a first submission, query or batch. Each call works, or raises an
    error of Jobledger, within twenty seconds."""
    run("signals")


@pytest.mark.parametrize("use", ["exits", "exits_unused"])
def test_exit_handlers_can_submit(run: Run, use: str) -> None:
    """Exit handlers can submit, also one that was registered before Jobledger was imported and therefore runs last, and
    also if the process has not submitted before."""
    assert run(use) == ["said", "said"]


def test_a_finalizer_at_exit_can_submit_or_gets_an_error(run: Run) -> None:
    """A submission in a finalizer works, or raises an error of Jobledger."""
    assert run("freed") in (["done"], ["ConnectionUnusable"])


def test_a_thread_that_outlives_the_main_thread_can_submit(run: Run) -> None:
    """The thread submits for the first time after the main thread has ended."""
    assert run("threads_end") == ["said"]
