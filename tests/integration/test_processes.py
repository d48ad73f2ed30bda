"""Processes that fork, get signals and end, with real ones: whatever they do, nothing waits without end, and what was
acknowledged is in the log."""

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
    """What a process of these tests finds; the status table is there, and nobody fills it."""
    url = f"sqlite:///{tmp_path}/status.db"
    open_store(url, namespace).close()
    return {
        **os.environ,
        "NAMESPACE": namespace,
        "JOBLEDGER_BOOTSTRAP": broker,
        "JOBLEDGER_STATUS_URL": url,
        "PYTHONWARNINGS": "ignore:This process:DeprecationWarning",  # from Python 3.12 on: a fork beside threads
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    """Call a function of `processes_app` in a process of its own, which must end well; the lines it printed."""

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
    """The ids of all jobs in the log."""
    settings, names = Settings(bootstrap=environ["JOBLEDGER_BOOTSTRAP"]), Names(environ["NAMESPACE"])
    topic, decode = names.jobs("default"), decoder(settings, names).decode
    with LogReader(settings) as reader:
        return {
            recorded(message, decode).event.job_id
            for partition in range(partitions_of(settings, topic))
            for message in reader.read(topic, partition, 0)
        }


# -- forks --------------------------------------------------------------------------------------------------------------


def test_a_forked_child_uses_what_its_parent_used_and_ends(run: Run) -> None:
    """Twenty children: each submits, asks, emits, cancels, closes or does nothing, and ends by itself; the parent goes
    on submitting and asking after each."""
    run("forks")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_connection_of_sqlite_goes_along_into_a_fork(run: Run) -> None:
    """A child finds no file of the status table open, and the parent asks on."""
    run("inherits_no_database")


@pytest.mark.extended
def test_a_fork_beside_busy_threads_is_usable(run: Run) -> None:
    """Four threads submit, emit and ask without a pause; each of twenty children can do the same, and ends."""
    run("busy")


def test_a_fork_while_the_first_connection_is_being_opened_is_usable(run: Run) -> None:
    """Another thread holds the locks at that moment; the child submits and ends."""
    run("first")


def test_preforked_workers_submit_and_what_they_submitted_is_in_the_log(run: Run, environ: dict[str, str]) -> None:
    """Four children submit 100 jobs each and end, another is killed while it submits, the parent submits after: all
    that was acknowledged is there."""
    ids = run("prefork")
    assert len(set(ids)) == 402
    assert set(ids) <= submitted(environ)


def test_children_of_multiprocessing_submit(run: Run, environ: dict[str, str]) -> None:
    """A pool and a process, both made by forking after the parent has submitted."""
    ids = run("pool")
    assert len(set(ids)) == 100
    assert set(ids) <= submitted(environ)


def test_a_stream_of_the_parents_says_so_in_the_child(run: Run) -> None:
    """Reading on with a lifecycle stream after a fork raises `ConnectionUnusable`; leaving its block ends well."""
    run("stream")


@pytest.mark.parametrize("kind", ["sync", pytest.param("gevent", marks=pytest.mark.extended)])
def test_a_preloading_web_server_submits_in_its_workers(run: Run, environ: dict[str, str], kind: str) -> None:
    """gunicorn with ``--preload`` and an app that has submitted while it was loaded: three workers submit, one is killed,
    its successor submits, and all of it ends soon after SIGTERM. With workers of both kinds."""
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


def test_a_job_that_forks_leaves_its_worker_alone(run: Run, environ: dict[str, str]) -> None:
    """In a thread, on the event loop, in a child process: what comes back from the job's code in the fork ends with the code
    of what that code did, and only its parent goes on as the worker."""
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
    """What a job has returned."""
    results = [fact.result for fact in facts_of(app, job_id) if isinstance(fact, JobSucceeded)]
    return int(results[0] or b"") if len(results) == 1 else None


@contextmanager
def gunicorn(environ: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of `processes_app.wsgi` with three workers, and its address."""
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
    """The lines of a page."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode()).splitlines()


# -- signals and the end --------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_signal_handler_may_use_everything(run: Run) -> None:
    """At any moment of a first submission, question or batch: what the handler does works, or raises an error of ours,
    within twenty seconds."""
    run("signals")


@pytest.mark.parametrize("use", ["exits", "exits_unused"])
def test_handlers_at_the_end_of_a_process_submit(run: Run, use: str) -> None:
    """Also one that was registered before Jobledger was imported and so runs last, and whether or not something was
    submitted before."""
    assert run(use) == ["said", "said"]


def test_an_object_that_the_ending_interpreter_frees_is_told(run: Run) -> None:
    """Its finalizer's submission works, or raises an error of ours."""
    assert run("freed") in (["done"], ["ConnectionUnusable"])


def test_a_thread_that_the_ending_interpreter_waits_for_submits(run: Run) -> None:
    """For the first time, when the main thread has come to its end."""
    assert run("threads_end") == ["said"]
