"""Tasks in child processes, and how running code is interrupted, with a real broker and real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition

from jobledger import App, ConfigError, Retry, Settings
from jobledger.consumers.isolation import fork_server, pool
from jobledger.consumers.isolation.child_handle import ChildHandle
from jobledger.consumers.isolation.fork_client import ForkClient
from jobledger.consumers.running.placement import UNSEEN_CRASHES
from jobledger.consumers.worker.worker import Worker
from jobledger.kafka.clients import admin
from jobledger.kafka.topics import ensure
from jobledger.log.writer import Outgoing
from jobledger.schemas.codec import encode
from jobledger.schemas.events import (
    JobCancelledFact,
    JobEvent,
    JobFailedFact,
    JobProgressed,
    JobRetried,
    JobSnoozed,
    JobStarted,
    JobSucceeded,
)
from tests.integration import isolated_app as tasks
from tests.integration.worker_app import closings, facts_of, log_of, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def app(broker: str) -> App:
    """Return the app of all tests in this file, with its topics."""
    tasks.app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(tasks.app, tasks.app.settings)
    return tasks.app


@pytest.fixture
def worker(app: App) -> Iterator[Worker]:
    """Yield a worker with two child processes."""
    with working(app, children=2, grace=3.0) as made:
        yield made


def end_of(app: App, job_id: str, timeout: float = 30.0) -> Any:
    """Wait for the job's closing fact and return it."""
    return until(lambda: closings(app).get(job_id), timeout, f"the end of {job_id}")[-1].event.fact


def result_of(app: App, job_id: str) -> Any:
    """Wait for the job's success and return its result."""
    fact = end_of(app, job_id)
    assert isinstance(fact, JobSucceeded), fact
    return None if fact.result is None else msgspec.json.decode(fact.result)


def alive(pid: int) -> bool:
    """Return whether the process runs and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_job_in_a_child_process_has_arguments_context_resources_and_a_client(app: App, worker: Worker) -> None:
    """Arguments, context, progress, resources, results and submissions work in a child process, for functions and for
    coroutines."""
    first = tasks.where.using(tags={"tenant": "a"}).submit(1)
    found = result_of(app, first.job_id)
    assert found["pid"] != os.getpid()
    assert found == {"n": 1, "pid": found["pid"], "opened": found["pid"], "attempt": 1, "tags": {"tenant": "a"}}
    progress = [f for f in facts_of(app, first.job_id) if isinstance(f, JobProgressed)]
    assert [(f.done, f.total, f.message) for f in progress] == [(1, 2, "half")]
    assert result_of(app, tasks.where_async.submit(1).job_id) != os.getpid()
    child = result_of(app, tasks.parent.submit(5).job_id)
    assert result_of(app, child)["n"] == 5
    many = app.submit_many(tasks.where.job(n) for n in range(300))
    until(lambda: closings(app).keys() >= {h.job_id for h in many}, what="300 jobs")
    pids = {result["pid"] for result in (result_of(app, h.job_id) for h in many[::10])}
    assert 1 <= len(pids) <= 2
    assert worker.health()["children"] == {"processes": 2, "died": 0, "killed": 0}


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("unpicklable", "exhausted", "<str() of this exception raised RuntimeError>"),
        ("reject", "rejected", "never"),
        ("result", "bad-result", "cannot be written as JSON"),
        ("exit", "never", "3"),
        ("plain", "exhausted", "plain"),
    ],
)
def test_an_error_in_a_child_process_has_the_same_outcome_as_elsewhere(
    app: App, worker: Worker, how: str, kind: str, says: str
) -> None:
    """Retries, rejections, bad results and exits result in the same facts as in the worker's process, with type, text
    and traceback."""
    handle = tasks.fails.submit(how)
    fact = next(f for f in _until_fact(app, handle.job_id, JobRetried | JobFailedFact))
    if kind == "exhausted":
        assert isinstance(fact, JobRetried)
        assert says in fact.error.message
        assert "isolated_app.py" in (fact.error.traceback or "")
    else:
        assert isinstance(fact, JobFailedFact)
        assert (fact.reason, says in fact.error.message) == (kind, True)


def _until_fact(app: App, job_id: str, kind: Any) -> list[Any]:
    return until(lambda: [f for f in facts_of(app, job_id) if isinstance(f, kind)], what=f"a {kind}")  # type: ignore[no-any-return]


def test_a_job_in_a_child_process_can_snooze(app: App, worker: Worker) -> None:
    """A snooze in a child process is recorded with its delay and its reason."""
    fact = _until_fact(app, tasks.fails.submit("snooze").job_id, JobSnoozed)[0]
    assert (fact.delay_ms, fact.reason) == (9000, "not yet")


def test_a_timeout_is_raised_in_the_code_and_then_kills_the_process(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeout is raised in the function, which may clean up or still return. A function that ignores it is killed,
    together with the processes that it started. A coroutine that blocks its event loop is interrupted as well."""
    path, of_deaf = tmp_path / "noted", tmp_path / "noted by the deaf"
    with working(app, children=6, grace=3.0) as worker:
        deaf = tasks.hangs.submit("deaf", str(of_deaf))
        until(lambda: of_deaf.exists() and of_deaf.read_text(), what="its begin")
        # Jobs that begin from here on are not killed if their end takes long. There is a child process for each of
        # them.
        monkeypatch.setattr(pool, "SOFT_S", 60.0)
        waits = tasks.hangs.submit("waits", str(path))
        cleans = tasks.hangs.submit("cleans up", str(path))
        returns = tasks.hangs.submit("returns", str(path))
        coroutine = tasks.hangs_async.submit("sleeps")
        blocking = tasks.hangs_async.submit("blocks")
        for handle in (waits, cleans, coroutine, blocking):
            fact = end_of(app, handle.job_id)
            assert isinstance(fact, JobFailedFact)
            assert (fact.reason, fact.error.type) == ("timeout", "TimeoutError")
            assert "ran longer than its timeout of 3 s" in fact.error.message
            assert "was killed" not in fact.error.message
            assert fact.duration_us / 1e6 >= 3.0
        assert result_of(app, returns.job_id) == "in time after all"
        assert path.read_text() == "cleaned up\n"
        fact = end_of(app, deaf.job_id)
        assert isinstance(fact, JobFailedFact)
        assert fact.reason == "timeout"
        assert "its process was killed" in fact.error.message
        assert fact.duration_us / 1e6 >= 8.0
        started, told = of_deaf.read_text().split("\n", 1)
        assert told == "TaskTimedOut\n"
        until(lambda: not alive(int(started)), what="the end of what the job had started")
        assert worker.health()["children"]["killed"] == 1
        assert result_of(app, tasks.where.submit(1).job_id)["n"] == 1


def test_a_job_cannot_use_more_than_max_memory(app: App, worker: Worker) -> None:
    """A job that allocates too much memory step by step is killed. A job that allocates too much at once gets a
    `MemoryError`. A job that allocates less is not affected."""
    slow, fast, fine = tasks.takes.submit(400, False), tasks.takes.submit(4000, True), tasks.takes.submit(100, False)
    fact = end_of(app, slow.job_id)
    assert isinstance(fact, JobFailedFact)
    assert fact.error.type == "MemoryError"
    assert "may use max_memory=200 MiB" in fact.error.message
    fact = end_of(app, fast.job_id)
    assert isinstance(fact, JobFailedFact)
    assert fact.error.type == "MemoryError"
    assert result_of(app, fine.job_id) == 10


def test_a_job_that_kills_its_process_fails_with_the_last_output(
    app: App, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job starts three times, and the failure contains the last output of its process. The other jobs run once."""
    monkeypatch.setattr(pool, "STATUS_S", 60.0)  # long enough to learn how each process ended
    before = app.submit_many(tasks.good.job(n) for n in range(50))
    ways = {how: tasks.dies.submit(how) for how in ("exit", "kill", "segfault")}
    once = tasks.dies_once.submit(str(tmp_path / "once"))
    after = app.submit_many(tasks.good.job(n) for n in range(50))
    said = {
        "exit": ("exit code 7", "about to die: exit"),
        "kill": ("signal 9 (SIGKILL)", "about to die: kill"),
        "segfault": ("signal 11 (SIGSEGV)", "Fatal Python error: Segmentation fault"),
    }
    for how, (ended, words) in said.items():
        fact = end_of(app, ways[how].job_id)
        assert isinstance(fact, JobFailedFact)
        assert (fact.reason, fact.error.type) == ("crashed", "ProcessDied")
        assert ended in fact.error.message
        assert words in (fact.error.traceback or "")
        starts = [f for f in facts_of(app, ways[how].job_id) if isinstance(f, JobStarted)]
        assert [f.takeover for f in starts] == [0, 1, 2]
    assert result_of(app, once.job_id) == "alive"
    until(lambda: closings(app).keys() >= {h.job_id for h in (*before, *after)}, what="the good ones")
    facts = facts_by_job(app)
    for handle in (*before, *after):
        assert [type(f) for f in facts[handle.job_id]] == [JobStarted, JobSucceeded]
    assert worker.health()["children"]["died"] == 10


def facts_by_job(app: App) -> dict[str, list[Any]]:
    """Return the facts of the lifecycle topic by job, in the order of the log."""
    found: dict[str, list[Any]] = {}
    for record in log_of(app, app.names.lifecycle):
        found.setdefault(record.event.job_id, []).append(record.event.fact)
    return found


@pytest.mark.parametrize("task", ["waits", "waits_in_thread"])
def test_a_cancel_reaches_running_code(
    app: App, worker: Worker, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child process and in a thread, the cancel is raised in the code, and the job ends as cancelled."""
    monkeypatch.setattr(pool, "SOFT_S", 60.0)  # else the job is killed if its end takes long
    path = tmp_path / "noted"
    handle = app.tasks[task].submit(str(path))
    until(path.exists, what="its begin")
    handle.cancel("changed my mind")
    fact = end_of(app, handle.job_id, 10.0)
    assert isinstance(fact, JobCancelledFact)
    assert fact.reason == "changed my mind"
    assert path.read_text().endswith("told\n")


def test_a_timeout_is_raised_in_a_job_thread(app: App, worker: Worker) -> None:
    """A thread that executes Python code gets the timeout soon. A function that returns nevertheless has succeeded. The
    thread then runs other jobs."""
    raises, returns = tasks.hangs_in_thread.submit("raises"), tasks.hangs_in_thread.submit("returns")
    fact = end_of(app, raises.job_id)
    assert isinstance(fact, JobFailedFact)
    assert (fact.reason, fact.error.type) == ("timeout", "TimeoutError")
    assert fact.duration_us / 1e6 >= 3.0
    assert result_of(app, returns.job_id) == "in time after all"
    many = app.submit_many(tasks.quick.job(n) for n in range(200))
    until(lambda: closings(app).keys() >= {h.job_id for h in many}, what="200 jobs")


def test_child_processes_are_replaced(app: App) -> None:
    """A child process is replaced after a number of jobs, and when the fork server dies."""
    with working(app, children=1, jobs_per_child=5) as worker:
        many = app.submit_many(tasks.where.job(n) for n in range(20))
        pids = {result_of(app, h.job_id)["pid"] for h in many}
        assert len(pids) == 4
        me = psutil.Process()
        server = next(p for p in me.children() if "jobledger.cli.fork_server_program" in p.cmdline())
        server.send_signal(signal.SIGKILL)
        assert result_of(app, tasks.where.submit(1).job_id)["pid"] not in pids
        until(lambda: worker.health()["status"] == "ok", what="its good health")


def test_a_job_that_waits_for_a_starting_child_process_starts_no_other(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds also while the process exists and its connection does not yet."""
    fork, connect, forks = ForkClient.fork, ForkClient._connect, 0

    def counted(self: ForkClient, child: ChildHandle) -> None:
        nonlocal forks
        forks += 1
        fork(self, child)

    async def late(self: ForkClient, child: ChildHandle, ours: socket.socket) -> None:
        await asyncio.sleep(0.3)
        await connect(self, child, ours)

    monkeypatch.setattr(ForkClient, "fork", counted)
    monkeypatch.setattr(ForkClient, "_connect", late)
    with working(app, children=1, jobs_per_child=5):
        many = app.submit_many(tasks.where.job(n) for n in range(20))
        assert len({result_of(app, h.job_id)["pid"] for h in many}) == 4
        until(lambda: forks == 5, what="a child for the next jobs")
    assert forks == 5


def test_a_worker_leaves_no_process_behind(app: App, tmp_path: Path) -> None:
    """Jobs that run longer than the grace time are killed. Child processes and the fork server end together with the
    worker."""
    path = tmp_path / "noted"
    with working(app, children=2, grace=0.5):
        handle = tasks.waits.submit(str(path))
        until(lambda: path.exists() and path.read_text(), what="its begin")
        pid = int(path.read_text())
        server = next(p for p in psutil.Process().children() if "jobledger.cli.fork_server_program" in p.cmdline())
        family = [server, *server.children(recursive=True)]
        assert pid in {p.pid for p in family}
        began = time.monotonic()
    assert time.monotonic() - began < PATIENCE * 30  # the job would take ten minutes
    until(lambda: not any(alive(p.pid) for p in family), 10.0, "the end of those that were killed")
    assert handle.job_id not in closings(app)
    with working(app, children=2, grace=0.5):
        until(lambda: len(path.read_text().split()) > 1, what="its second run")
        handle.cancel("enough")
        assert isinstance(end_of(app, handle.job_id), JobCancelledFact)


def test_an_app_that_cannot_be_imported_is_refused(broker: str, namespace: str) -> None:
    """The error says what to do. Without tasks in child processes, such an app works."""
    hidden = App(namespace, settings=Settings(bootstrap=broker), partitions=2)
    hidden.task(name="plain")(_plain)
    Worker(hidden.registry, hidden.settings)
    hidden.task(name="isolated", isolation="process", retry=Retry())(_plain)
    with pytest.raises(ConfigError, match=r"isolation='process' of task 'isolated'.*top level"):
        Worker(hidden.registry, hidden.settings)


def _plain(n: int) -> int:
    return n


def test_a_failed_import_in_a_child_process_ends_the_worker_with_its_text(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker cannot run tasks in child processes then, and its error contains the text of the import error."""
    monkeypatch.setenv("ISOLATED_BREAK", "1")
    with working(app, children=1) as worker:
        until(worker.ended.is_set, what="the worker's end")
    assert isinstance(worker.error, ConfigError)
    assert "this cannot be imported here" in str(worker.error)


def test_without_child_processes_a_suspect_runs_in_the_worker(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suspect starts after its `JobStarted` is acknowledged. After ten starts without an outcome it is not started
    again, whether or not the worker already knows that child processes are unusable. Once the worker knows it, fewer
    starts suffice (tests/unit/test_isolation.py)."""
    monkeypatch.setenv("ISOLATED_BREAK", "1")
    jobs = {count: tasks.quick.submit(count) for count in (1, UNSEEN_CRASHES)}
    records: list[Outgoing] = []
    for count, handle in jobs.items():
        for takeover in range(count):
            fact = JobStarted("other:1", None, {}, handle.position.topic, handle.position.offset, takeover)
            event = JobEvent(
                f"{handle.job_id[:-1]}{takeover}",
                handle.job_id,
                1,
                1,
                1,
                0,
                "quick",
                "threads",
                None,
                None,
                "t",
                None,
                fact,
            )
            records.append(Outgoing(app.names.lifecycle, encode(event), handle.job_id, handle.position.partition))
    app.client.writer().send(records)
    # The commits of the group do not say that the last owner left cleanly.
    where = [h.position for h in jobs.values()]
    lowest = [
        TopicPartition(p.topic, p.partition, min(q.offset for q in where if q.partition == p.partition)) for p in where
    ]
    group = ConsumerGroupTopicPartitions(
        app.names.worker_group("threads"), list({p.partition: p for p in lowest}.values())
    )
    client = admin(app.settings)  # a reference: without the client, its answers are lost

    def altered() -> bool:
        with contextlib.suppress(KafkaException):  # the group accepts offsets only after its last member has left
            answers = [each.result(PATIENCE * 10) for each in client.alter_consumer_group_offsets([group]).values()]
            return all(place.error is None for answer in answers for place in answer.topic_partitions)
        return False

    until(altered, what="the group's offsets")
    with working(app, queues=["threads"]) as worker:
        assert result_of(app, jobs[1].job_id) == 1
        failed = end_of(app, jobs[UNSEEN_CRASHES].job_id)
        assert worker.error is None
    starts = [f.takeover for f in facts_of(app, jobs[1].job_id) if isinstance(f, JobStarted)]
    assert starts == [0, 1, 1], "said for a child that there was not to be, and again; it counts as one"
    assert isinstance(failed, JobFailedFact)
    assert failed.reason == "crashed"


def test_a_worker_cannot_be_created_in_the_fork_server(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that starts its worker without checking ``__name__`` would start a worker in each child process."""
    monkeypatch.setattr(fork_server, "IMPORTING", True)
    with pytest.raises(ConfigError, match="under `if __name__ == '__main__':`"):
        Worker(app.registry, app.settings)


def test_a_process_forked_by_a_dead_child_process_delays_nothing(app: App, worker: Worker, tmp_path: Path) -> None:
    """A job forks and is killed by a signal. The job fails as crashed, the processes that it forked are ended, and its
    slot is free for other jobs."""
    path = tmp_path / "forks"
    handle = tasks.leaves_a_fork.submit(str(path))
    failed = end_of(app, handle.job_id)
    assert isinstance(failed, JobFailedFact)
    assert failed.reason == "crashed"
    until(lambda: not any(alive(int(pid)) for pid in path.read_text().split()), 10.0, "the forks' end")
    assert result_of(app, tasks.where.submit(1).job_id)["n"] == 1


def test_an_invalid_progress_report_fails_the_job(app: App, worker: Worker) -> None:
    """A progress message that is not text fails the attempt, and the error says what is wrong. The process is not
    regarded as dead."""
    failed = end_of(app, tasks.reports_nonsense.submit().job_id)
    assert isinstance(failed, JobFailedFact)
    assert failed.reason == "exhausted"
    assert "progress(message=3) is not a text" in failed.error.message


def reports_of(app: App, job_id: str) -> list[str | None]:
    """Return the messages of a job's progress facts."""
    return [fact.message for fact in facts_of(app, job_id) if isinstance(fact, JobProgressed)]


def test_a_thread_left_by_a_job_cannot_report_for_the_next_job(app: App, tmp_path: Path) -> None:
    """A report of a thread that outlives its job in a child process is refused, and the next job in that process has no
    progress from this thread."""
    path = str(tmp_path / "refused")
    with working(app, children=1, grace=3.0):
        first = tasks.leaves_a_reporter.submit(path)
        until(lambda: facts_of(app, first.job_id), what="its begin, so that it is the first in the one child")
        second = tasks.comes_after.submit(path)
        assert result_of(app, first.job_id) == result_of(app, second.job_id), "not the same child: nothing was tried"
    assert tasks.noted(path) == ["refused"]
    assert reports_of(app, second.job_id) == []
    assert isinstance(facts_of(app, first.job_id)[-1], JobSucceeded), "a report after the end"


@pytest.mark.parametrize("task", ["leaves_a_reporter_in_a_thread", "leaves_a_reporter_on_the_loop"])
def test_an_ended_job_cannot_report_progress(app: App, worker: Worker, tmp_path: Path, task: str) -> None:
    """A report of a thread that outlives its job is refused in the worker's own process, too."""
    path = str(tmp_path / "refused")
    handle = app.tasks[task].submit(path)
    until(lambda: tasks.noted(path), 60, "the refusal")
    assert isinstance(end_of(app, handle.job_id), JobSucceeded)


@pytest.mark.parametrize("task", ["wrapped", "wrapped_in_child"])
def test_a_coroutine_that_a_plain_function_returns_is_awaited(
    app: App, worker: Worker, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decorator without ``async`` hides that the task is a coroutine. In threads and in child processes, the
    coroutine's result, error, time limit and cancel are those of the job, and its cleanup runs."""
    monkeypatch.setattr(pool, "SOFT_S", 60.0)  # else the job is killed if its end takes long
    run, briefly, path = app.tasks[task], app.tasks[f"{task}_briefly"], tmp_path / "said"
    handle = run.submit("returns", str(path))
    found = result_of(app, handle.job_id)
    assert found["job"] == handle.job_id
    assert (found["here"] == os.getpid()) == (task == "wrapped")
    failed = end_of(app, run.submit("raises", str(path)).job_id)
    assert isinstance(failed, JobFailedFact)
    assert (failed.error.type, failed.error.message) == ("ValueError", "in the coroutine")
    late = end_of(app, briefly.submit("waits", str(path)).job_id)
    assert isinstance(late, JobFailedFact)
    assert (late.reason, late.error.type) == ("timeout", "TimeoutError")
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]
    path.unlink()
    handle = run.submit("waits", str(path))
    until(path.exists, what="its first line")
    handle.cancel("changed my mind")
    assert isinstance(end_of(app, handle.job_id), JobCancelledFact)
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]


def test_a_returned_coroutine_that_blocks_the_event_loop_is_logged(
    app: App, worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coroutine runs on the worker's event loop, so the block is logged with the task's name and counted, as for an
    async task."""
    path = tmp_path / "seen"
    handle = tasks.wrapped.submit("blocks", str(path))
    named = f"task wrapped blocks the event loop: job {handle.job_id}"
    until(lambda: named in caplog.text, what="its name in the log")
    path.touch()
    assert result_of(app, handle.job_id)["job"] == handle.job_id
    assert "in _coroutine\n    blocks_until(path)" in caplog.text
    assert worker.dispatcher is not None
    assert worker.dispatcher.pipe.tasks.runtimes["wrapped"].blocked == 1


def test_hooks_surround_a_coroutine_that_a_plain_function_returns(app: App, worker: Worker, tmp_path: Path) -> None:
    """What a hook does after the task's code happens after the coroutine has ended."""
    path = tmp_path / "said"
    handle = tasks.hooked.using(tags={"path": str(path)}).submit("returns", str(path))
    assert result_of(app, handle.job_id)["job"] == handle.job_id
    assert path.read_text().split("\n") == ["inside", "behind", ""]
