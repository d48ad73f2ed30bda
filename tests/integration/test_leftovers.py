"""What jobs leave running in a worker, tested with real processes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from jobledger import NO_RETRY, App, JobHandle, Settings
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.process.process_exit import EXIT_S, HARD_S
from jobledger.schemas.events import CLOSING, JobFailedFact
from tests.acceptance.fleet import Fleet
from tests.integration import leftover_app
from tests.integration.leftover_app import LEFT_S
from tests.integration.worker_app import closings, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

GRACE_S = 2.0
MIB = 1 << 20
#: Seconds that the machine, which may be busy, may need for the worker's work.
SLACK_S = PATIENCE * 20


@pytest.fixture
def fleet(broker: str, namespace: str, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace without any process."""
    with Fleet(tmp_path, broker, namespace, target="tests/integration/leftover_app.py:app") as made:
        yield made


@pytest.fixture
def client(fleet: Fleet) -> Iterator[App]:
    """Yield the app of the submitter, with its topics."""
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap, submit_timeout=20.0), partitions=2)
    for name, task in leftover_app.app.tasks.items():
        app.task(name=name, timeout=task.timeout, retry=task.retry, isolation=task.policy.isolation)(task.fn)
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
        pytest.param(("leave_a_handler",), ("a handler of atexit",), marks=pytest.mark.extended),
        pytest.param(("leave_a_process",), ("child process left-process",), marks=pytest.mark.extended),
        pytest.param(("leave_a_thread_of_the_loop",), ("thread uvloop_0",), marks=pytest.mark.extended),
        (("leave_a_task_that_will_not_end",), ("the main thread, in ",)),
    ],
)
def test_a_stopped_worker_exits_in_time_whatever_its_jobs_left_running(
    fleet: Fleet, client: App, tasks: tuple[str, ...], left: tuple[str, ...]
) -> None:
    """Whatever its jobs left running, a stopped worker exits within the limit, with the code of a clean stop, and logs
    what still ran. Child processes for which Python would wait have ended too."""
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
    assert not psutil.wait_procs(children, timeout=SLACK_S)[1], "its child processes live on"


#: What each part logs when it is ready.
READY = {
    "coordinator": (" started, local copy in ",),
    "materializer": ("writing the status table",),
    "streams": (" started, local copy in ", "writing the status table"),
    "worker": (" serves default ",),
}


@pytest.mark.extended
@pytest.mark.parametrize("role", READY)
def test_every_part_exits_in_time_although_importing_the_app_left_a_thread(
    fleet: Fleet, client: App, role: str
) -> None:
    """Each part exits within its limit after a stop, with the code of a clean stop. So does a supervisor with several
    processes."""
    fleet.environ["LEFT_AT_IMPORT"] = "1"
    part = fleet.start(role, *(["--processes", "2"] if role == "worker" else []))
    fleet.until(lambda: all(said in part.output() for said in READY[role]), 90, f"the {role}")
    code = fleet.stop(part, timeout=2 * (EXIT_S + HARD_S) + 2 * SLACK_S)
    output = part.output()
    assert code == 0, output
    assert "left behind: thread left-at-import" in output


def test_a_process_that_a_job_forked_can_be_terminated(fleet: Fleet, client: App) -> None:
    """A forked process has the default handlers of SIGTERM and SIGINT, because a handler in Python could be called
    late."""
    worker = fleet.start("worker", "--grace", str(GRACE_S), "--children", "1")
    for forked_in in ("coroutine", "thread", "child"):
        fact = end_of(client, client.tasks[f"end_what_a_{forked_in}_forked"].submit())
        assert json.loads(fact.result) == [True, -signal.SIGTERM], forked_in
    assert fleet.stop(worker) == 0


def end_of(app: App, handle: JobHandle[Any], timeout: float = 90.0) -> Any:
    """Wait for the job's closing fact and return it."""
    return until(lambda: closings(app).get(handle.job_id), timeout, "the job's end")[-1].event.fact


@pytest.mark.extended
@pytest.mark.parametrize(("task", "mib", "count"), [("make_a_cycle", 5, 300), ("make_a_cycle_in_a_child", 40, 40)])
def test_memory_in_reference_cycles_of_failed_jobs_is_freed(
    fleet: Fleet, client: App, say: Callable[[str], None], task: str, mib: int, count: int
) -> None:
    """Errors hold about 1.5 GiB in reference cycles. The worker frees this memory while jobs run, and keeps none of it
    while it is idle."""
    worker = fleet.start("worker", "--grace", str(GRACE_S), "--concurrency", "4", "--children", "1")
    end_of(client, client.tasks[task].submit(mib))
    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    most = 0

    def used() -> int:
        nonlocal most
        now = int(sum(process.memory_info().rss for process in family))
        most = max(most, now)
        return now

    before = used()
    client.submit_many(client.tasks[task].job(mib) for _ in range(count))
    ended = counter_of_closing_facts(client)
    fleet.until(lambda: used() > 0 and ended() == count + 1, 240, "the jobs' ends")
    assert most < before + 600 * MIB, f"{before:,} bytes became {most:,}"
    fleet.until(lambda: used() < before + 150 * MIB, 60, f"an idle worker's memory: {before:,}, now {used():,}")
    say(f"memory: {task}, {count * mib:,} MiB in cycles: {before / MIB:.0f}, at most {most / MIB:.0f} MiB")
    assert fleet.stop(worker) == 0


def counter_of_closing_facts(app: App) -> Callable[[], int]:
    """Return a function that counts the closing facts on the lifecycle topic. Each call reads only the new records."""
    read = decoder(app.settings, app.names)
    places = dict.fromkeys(range(partitions_of(app.settings, app.names.lifecycle)), 0)
    count = 0

    def ended() -> int:
        nonlocal count
        with LogReader(app.settings) as reader:
            for number, start in places.items():
                for message in reader.read(app.names.lifecycle, number, start):
                    found = recorded(message, read.decode)
                    places[number] = found.position.offset + 1
                    count += isinstance(found.event.fact, CLOSING)
        return count

    return ended


def test_a_coroutine_that_blocks_the_loop_is_named_and_ended_at_its_timeout(fleet: Fleet, client: App) -> None:
    """A coroutine that sleeps without an await is logged with its task's name and its stack, is counted, and is
    interrupted at its time limit. The other jobs continue, and a coroutine that catches the interrupt may still return.
    """
    port, seen = free_port(), fleet.folder / "seen"
    worker = fleet.start("worker", "--grace", str(GRACE_S), "--metrics-port", str(port))
    began = time.monotonic()
    blocking = client.tasks["block_the_loop"].submit(LEFT_S)
    beside = client.tasks["wait"].submit(0.1)
    cleans = client.tasks["clean_up_after_blocking"].submit(LEFT_S)
    endless = client.tasks["block_without_a_limit"].submit(str(seen))
    # This job may run before the others, which then wait for it.
    named = "in block_without_a_limit\n    blocks_until(path)"
    fleet.until(lambda: named in worker.output(), 90, "the name of what blocks without a limit")
    seen.touch()
    fact = end_of(client, blocking)
    assert isinstance(fact, JobFailedFact), fact
    assert fact.reason == "timeout"
    assert "block_the_loop() ran longer than its timeout of 1 s" in fact.error.message
    assert "time.sleep(seconds)" in (fact.error.traceback or "")
    assert end_of(client, beside).result == b'"succeeded"'
    assert end_of(client, cleans).result == b'"cleaned up"'
    assert end_of(client, endless).result == b'"succeeded"'
    assert time.monotonic() - began < LEFT_S, "it was not interrupted"
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE * 10).text
    counts = {
        line.split('task="')[1].split('"')[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("jobledger_worker_loop_blocked_total{")
    }
    assert counts["block_the_loop"] == 1
    assert counts["block_without_a_limit"] == 1
    assert counts["wait"] == 0
    assert fleet.stop(worker) == 0
    output = worker.output()
    assert f"task block_the_loop blocks the event loop: job {blocking.job_id} has not awaited anything" in output


def test_a_blocking_coroutine_that_cannot_be_interrupted_times_out_when_it_returns(broker: str, namespace: str) -> None:
    """No signal reaches an event loop outside the main thread. There, a coroutine that blocked the loop beyond its time
    limit has timed out, although it returned."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=20.0), partitions=2)
    begun, noticed = threading.Event(), threading.Event()

    @app.task(timeout=1.0, retry=NO_RETRY)
    async def block_the_loop() -> str:
        begun.set()
        noticed.wait(LEFT_S)
        return "succeeded"

    ensure(app, app.settings)
    with working(app, grace=GRACE_S) as worker:
        handle = block_the_loop.submit()
        try:
            until(begun.is_set, what="its begin")
            assert worker.dispatcher is not None
            executor = worker.dispatcher.pipe.executor
            until(lambda: executor.overdue_on_loop, what="the notice that its time is over")
        finally:
            noticed.set()
        fact = end_of(app, handle)
    app.close()
    assert isinstance(fact, JobFailedFact), fact
    assert fact.reason == "timeout"


def test_a_coroutine_that_blocks_the_loop_of_its_child_process_is_interrupted(fleet: Fleet, client: App) -> None:
    """The coroutine is interrupted at its time limit, long before its process would be killed."""
    worker = fleet.start("worker", "--grace", str(GRACE_S), "--children", "1")
    blocks = client.tasks["block_the_loop_of_a_child"]
    assert end_of(client, blocks.submit(0.0)).result == b'"succeeded"'  # starts the child's event loop
    fact = end_of(client, blocks.submit(LEFT_S))
    assert isinstance(fact, JobFailedFact), fact
    assert fact.reason == "timeout"
    assert "ran longer than its timeout of 3 s" in fact.error.message
    assert "was killed" not in fact.error.message
    assert fleet.stop(worker) == 0
