"""What jobs leave behind in a worker, in processes as they are in production."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobledger import App, Settings
from jobledger.kafka.topics import ensure
from jobledger.process_exit import EXIT_S, HARD_S
from tests.acceptance.fleet import Fleet
from tests.integration import leftover_app
from tests.integration.worker_app import closings, until

pytestmark = pytest.mark.kafka

GRACE_S = 2.0
#: How long the machine may take for what a worker does beside waiting; it may be busy.
SLACK_S = 20.0


@pytest.fixture
def fleet(broker: str, namespace: str, tmp_path: Path) -> Iterator[Fleet]:
    """A namespace with no process yet."""
    with Fleet(tmp_path, broker, namespace, target="tests/integration/leftover_app.py:app") as made:
        yield made


@pytest.fixture
def client(fleet: Fleet) -> Iterator[App]:
    """The submitter's side, with its topics."""
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap, submit_timeout=20.0), partitions=2)
    for name, task in leftover_app.app.tasks.items():
        app.task(name=name, timeout=task.timeout)(task.fn)
    ensure(app, app.settings)
    yield app
    app.close()


@pytest.mark.parametrize(
    ("tasks", "left"),
    [
        (
            ("leave_a_pool", "leave_a_thread", "leave_a_handler", "leave_a_process"),
            ("thread left-pool_0", "thread left-thread", "child process left-process"),
        ),
        (("leave_a_handler",), ("a handler of atexit",)),
        (("leave_a_process",), ("child process left-process",)),
        (("leave_a_thread_of_the_loop",), ("thread uvloop_0",)),
        (("leave_a_task_that_will_not_end",), ("the main thread, in ",)),
    ],
)
def test_a_worker_that_has_stopped_is_gone_within_its_bound(
    fleet: Fleet, client: App, tasks: tuple[str, ...], left: tuple[str, ...]
) -> None:
    """Whatever its jobs left behind, a worker that was stopped exits within the bound, with the code of a clean stop, and
    says what was still running; child processes that Python would wait for are gone with it."""
    worker = fleet.start("worker", "--grace", str(GRACE_S))
    for name in tasks:
        client.tasks[name].submit()
    fleet.until(lambda: len(closings(client)) == len(tasks), 60, "the jobs' ends")
    children = psutil.Process(worker.pid).children(recursive=True)
    began = time.monotonic()
    code = fleet.stop(worker, timeout=GRACE_S + EXIT_S + HARD_S + SLACK_S)
    took = time.monotonic() - began
    output = worker.output()
    assert code == 0, output
    assert took > EXIT_S, "nothing was left: this test has tried nothing"
    said = [line for line in output.splitlines() if "left behind" in line]
    assert len(said) == 1, output
    assert all(each in said[0] for each in left), said
    assert not psutil.wait_procs(children, timeout=20)[1], "its child processes live on"


def test_a_process_that_a_job_forked_can_be_terminated(fleet: Fleet, client: App) -> None:
    """A forked process inherits the worker's handler of SIGTERM, and ends of that signal all the same."""
    worker = fleet.start("worker", "--grace", str(GRACE_S))
    handle = client.tasks["end_what_it_forked"].submit()
    fact = until(lambda: closings(client).get(handle.job_id), 60, "the job's end")[-1].event.fact
    assert fact.result == str(-signal.SIGTERM).encode()
    assert fleet.stop(worker) == 0
