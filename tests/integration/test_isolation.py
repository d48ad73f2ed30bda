"""Tasks in child processes, and how running code is made to end, with a real broker and real processes."""

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
    JobCancelled,
    JobEvent,
    JobFailed,
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
    """The app of all tests here, with its topics."""
    tasks.app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(tasks.app, tasks.app.settings)
    return tasks.app


@pytest.fixture
def worker(app: App) -> Iterator[Worker]:
    """A worker with two children."""
    with working(app, children=2, grace=3.0) as made:
        yield made


def end_of(app: App, job_id: str, timeout: float = 30.0) -> Any:
    """The fact that ended a job."""
    return until(lambda: closings(app).get(job_id), timeout, f"the end of {job_id}")[-1].event.fact


def result_of(app: App, job_id: str) -> Any:
    """What a job returned."""
    fact = end_of(app, job_id)
    assert isinstance(fact, JobSucceeded), fact
    return None if fact.result is None else msgspec.json.decode(fact.result)


def alive(pid: int) -> bool:
    """Whether a process is there, and no mere zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_is_a_job_s_whole_world(app: App, worker: Worker) -> None:
    """Arguments, context, progress, resources, results and jobs of its own, plain and async."""
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
        ("unpicklable", "exhausted", "<its str() raised RuntimeError>"),
        ("reject", "rejected", "never"),
        ("result", "bad-result", "cannot be written as JSON"),
        ("exit", "never", "3"),
        ("plain", "exhausted", "plain"),
    ],
)
def test_what_is_raised_in_a_child_is_judged_as_elsewhere(
    app: App, worker: Worker, how: str, kind: str, says: str
) -> None:
    """Retries, rejections, bad results and exits come to the same facts, with type, text and traceback."""
    handle = tasks.fails.submit(how)
    fact = next(f for f in _until_fact(app, handle.job_id, JobRetried | JobFailed))
    if kind == "exhausted":
        assert isinstance(fact, JobRetried)
        assert says in fact.error.message
        assert "isolated_app.py" in (fact.error.traceback or "")
    else:
        assert isinstance(fact, JobFailed)
        assert (fact.reason, says in fact.error.message) == (kind, True)


def _until_fact(app: App, job_id: str, kind: Any) -> list[Any]:
    return until(lambda: [f for f in facts_of(app, job_id) if isinstance(f, kind)], what=f"a {kind}")  # type: ignore[no-any-return]


def test_a_child_snoozes(app: App, worker: Worker) -> None:
    """A snooze is one."""
    fact = _until_fact(app, tasks.fails.submit("snooze").job_id, JobSnoozed)[0]
    assert (fact.delay_ms, fact.reason) == (9000, "not yet")


def test_a_timeout_is_told_then_enforced(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is told, may clean up or still return; who is deaf is killed, with what it started. A coroutine that
    blocks its loop is told as well."""
    path, of_deaf = tmp_path / "noted", tmp_path / "noted by the deaf"
    with working(app, children=6, grace=3.0) as worker:
        deaf = tasks.hangs.submit("deaf", str(of_deaf))
        until(lambda: of_deaf.exists() and of_deaf.read_text(), what="its begin")
        # Those that begin from here on are not killed if they need long to end. There is a child for each.
        monkeypatch.setattr(pool, "SOFT_S", 60.0)
        waits = tasks.hangs.submit("waits", str(path))
        cleans = tasks.hangs.submit("cleans up", str(path))
        returns = tasks.hangs.submit("returns", str(path))
        coroutine = tasks.hangs_async.submit("sleeps")
        blocking = tasks.hangs_async.submit("blocks")
        for handle in (waits, cleans, coroutine, blocking):
            fact = end_of(app, handle.job_id)
            assert isinstance(fact, JobFailed)
            assert (fact.reason, fact.error.type) == ("timeout", "TimeoutError")
            assert "ran longer than its timeout of 3 s" in fact.error.message
            assert "was killed" not in fact.error.message
            assert fact.duration_us / 1e6 >= 3.0
        assert result_of(app, returns.job_id) == "in time after all"
        assert path.read_text() == "cleaned up\n"
        fact = end_of(app, deaf.job_id)
        assert isinstance(fact, JobFailed)
        assert fact.reason == "timeout"
        assert "its process was killed" in fact.error.message
        assert fact.duration_us / 1e6 >= 8.0
        started, told = of_deaf.read_text().split("\n", 1)
        assert told == "TaskTimedOut\n"
        until(lambda: not alive(int(started)), what="the end of what the job had started")
        assert worker.health()["children"]["killed"] == 1
        assert result_of(app, tasks.where.submit(1).job_id)["n"] == 1


def test_memory_is_bounded(app: App, worker: Worker) -> None:
    """Who takes too much by and by is killed, who takes it at once gets a `MemoryError`;
    who takes less is left alone."""
    slow, fast, fine = tasks.takes.submit(400, False), tasks.takes.submit(4000, True), tasks.takes.submit(100, False)
    fact = end_of(app, slow.job_id)
    assert isinstance(fact, JobFailed)
    assert fact.error.type == "MemoryError"
    assert "may use max_memory=200 MiB" in fact.error.message
    fact = end_of(app, fast.job_id)
    assert isinstance(fact, JobFailed)
    assert fact.error.type == "MemoryError"
    assert result_of(app, fine.job_id) == 10


def test_what_kills_its_process_is_quarantined_with_its_last_words(
    app: App, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts and no more, the process's own words in the dead letter; the jobs beside it run once."""
    monkeypatch.setattr(pool, "STATUS_S", 60.0)  # what is known of a process's end depends on it
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
        assert isinstance(fact, JobFailed)
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
    """Facts by job, in the log's order."""
    found: dict[str, list[Any]] = {}
    for record in log_of(app, app.names.lifecycle):
        found.setdefault(record.event.job_id, []).append(record.event.fact)
    return found


@pytest.mark.parametrize("task", ["waits", "waits_in_thread"])
def test_a_cancel_reaches_running_code(
    app: App, worker: Worker, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process and in a thread alike it is told, and ends as cancelled."""
    monkeypatch.setattr(pool, "SOFT_S", 60.0)  # else it is killed if it needs long
    path = tmp_path / "noted"
    handle = app.tasks[task].submit(str(path))
    until(path.exists, what="its begin")
    handle.cancel("changed my mind")
    fact = end_of(app, handle.job_id, 10.0)
    assert isinstance(fact, JobCancelled)
    assert fact.reason == "changed my mind"
    assert path.read_text().endswith("told\n")


def test_a_thread_is_told_of_its_timeout(app: App, worker: Worker) -> None:
    """Where it executes Python it ends soon after; what returns all the same has
    succeeded; the thread goes on working."""
    raises, returns = tasks.hangs_in_thread.submit("raises"), tasks.hangs_in_thread.submit("returns")
    fact = end_of(app, raises.job_id)
    assert isinstance(fact, JobFailed)
    assert (fact.reason, fact.error.type) == ("timeout", "TimeoutError")
    assert fact.duration_us / 1e6 >= 3.0
    assert result_of(app, returns.job_id) == "in time after all"
    many = app.submit_many(tasks.quick.job(n) for n in range(200))
    until(lambda: closings(app).keys() >= {h.job_id for h in many}, what="200 jobs")


def test_children_are_replaced(app: App) -> None:
    """After so many jobs, and when the process that forks them dies."""
    with working(app, children=1, jobs_per_child=5) as worker:
        many = app.submit_many(tasks.where.job(n) for n in range(20))
        pids = {result_of(app, h.job_id)["pid"] for h in many}
        assert len(pids) == 4
        me = psutil.Process()
        nursery = next(p for p in me.children() if "jobledger.cli.nursery" in p.cmdline())
        nursery.send_signal(signal.SIGKILL)
        assert result_of(app, tasks.where.submit(1).job_id)["pid"] not in pids
        until(lambda: worker.health()["status"] == "ok", what="its good health")


def test_a_job_that_waits_for_a_child_that_is_being_started_starts_no_other(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the process is there already, and its connection is not."""
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
    """What runs beyond the grace time is killed; children, nursery and all are gone with the worker."""
    path = tmp_path / "noted"
    with working(app, children=2, grace=0.5):
        handle = tasks.waits.submit(str(path))
        until(lambda: path.exists() and path.read_text(), what="its begin")
        pid = int(path.read_text())
        nursery = next(p for p in psutil.Process().children() if "jobledger.cli.nursery" in p.cmdline())
        family = [nursery, *nursery.children(recursive=True)]
        assert pid in {p.pid for p in family}
        began = time.monotonic()
    assert time.monotonic() - began < PATIENCE * 30  # the job would take ten minutes
    until(lambda: not any(alive(p.pid) for p in family), 10.0, "the end of those that were killed")
    assert handle.job_id not in closings(app)
    with working(app, children=2, grace=0.5):
        until(lambda: len(path.read_text().split()) > 1, what="its second run")
        handle.cancel("enough")
        assert isinstance(end_of(app, handle.job_id), JobCancelled)


def test_an_app_that_cannot_be_imported_is_refused(broker: str, namespace: str) -> None:
    """The error says what to do; without isolated tasks such an app works as ever."""
    hidden = App(namespace, settings=Settings(bootstrap=broker), partitions=2)
    hidden.task(name="plain")(_plain)
    Worker(hidden.registry, hidden.settings)
    hidden.task(name="isolated", isolation="process", retry=Retry())(_plain)
    with pytest.raises(ConfigError, match=r"isolation='process' of task 'isolated'.*top level"):
        Worker(hidden.registry, hidden.settings)


def _plain(n: int) -> int:
    return n


def test_an_import_that_fails_in_a_child_ends_the_worker_with_its_words(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Isolated tasks cannot be run then, and the error says why."""
    monkeypatch.setenv("ISOLATED_BREAK", "1")
    with working(app, children=1) as worker:
        until(worker.ended.is_set, what="the worker's end")
    assert isinstance(worker.error, ConfigError)
    assert "this cannot be imported here" in str(worker.error)


def test_without_children_a_suspect_runs_where_it_belongs(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start that stands in the log, acknowledged. With ten starts without an end it runs no more, whether or not it
    is known by then that there are no children; how many it takes once it is known: `test_who_is_blamed`."""
    monkeypatch.setenv("ISOLATED_BREAK", "1")
    jobs = {count: tasks.quick.submit(count) for count in (1, UNSEEN_CRASHES)}
    records: list[Outgoing] = []
    for count, handle in jobs.items():
        for takeover in range(count):
            fact = JobStarted("other:1", handle.position.topic, handle.position.offset, takeover)
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
    # Nobody left cleanly, as far as the group knows.
    where = [h.position for h in jobs.values()]
    lowest = [
        TopicPartition(p.topic, p.partition, min(q.offset for q in where if q.partition == p.partition)) for p in where
    ]
    group = ConsumerGroupTopicPartitions(
        app.names.worker_group("threads"), list({p.partition: p for p in lowest}.values())
    )
    client = admin(app.settings)  # kept: with it goes what it was asked

    def altered() -> bool:
        with contextlib.suppress(KafkaException):  # a group takes them only once it has seen its last member leave
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
    assert isinstance(failed, JobFailed)
    assert failed.reason == "crashed"


def test_no_worker_is_made_in_a_nursery(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that starts its worker without asking whether it is the main module would do so in each child."""
    monkeypatch.setattr(fork_server, "IMPORTING", True)
    with pytest.raises(ConfigError, match="under `if __name__ == '__main__':`"):
        Worker(app.registry, app.settings)


def test_what_a_dead_child_forked_holds_nothing_up(app: App, worker: Worker, tmp_path: Path) -> None:
    """A job forks and is killed by the system: it is quarantined in no time, its descendants are gone, the child's slot is
    free for others."""
    path = tmp_path / "forks"
    handle = tasks.leaves_a_fork.submit(str(path))
    failed = end_of(app, handle.job_id)
    assert isinstance(failed, JobFailed)
    assert failed.reason == "crashed"
    until(lambda: not any(alive(int(pid)) for pid in path.read_text().split()), 10.0, "the forks' end")
    assert result_of(app, tasks.where.submit(1).job_id)["n"] == 1


def test_a_report_that_is_none_is_the_job_s_error(app: App, worker: Worker) -> None:
    """A message that is no text fails the attempt with what is wrong; the process is not blamed."""
    failed = end_of(app, tasks.reports_nonsense.submit().job_id)
    assert isinstance(failed, JobFailed)
    assert failed.reason == "exhausted"
    assert "progress(message=3) is not a text" in failed.error.message


def reports_of(app: App, job_id: str) -> list[str | None]:
    """The messages of a job's progress facts."""
    return [fact.message for fact in facts_of(app, job_id) if isinstance(fact, JobProgressed)]


def test_what_a_job_left_behind_reports_nothing_as_the_next_job(app: App, tmp_path: Path) -> None:
    """A thread that outlives its job in a child is refused, and the job that runs there next shows nothing of it."""
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
def test_a_job_that_has_ended_reports_nothing(app: App, worker: Worker, tmp_path: Path, task: str) -> None:
    """In the worker's own process, too, a thread that outlives its job is refused."""
    path = str(tmp_path / "refused")
    handle = app.tasks[task].submit(path)
    until(lambda: tasks.noted(path), 60, "the refusal")
    assert isinstance(end_of(app, handle.job_id), JobSucceeded)


@pytest.mark.parametrize("task", ["wrapped", "wrapped_in_child"])
def test_a_coroutine_that_a_plain_function_returns_is_awaited(
    app: App, worker: Worker, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decorator without ``async`` hides that the task is a coroutine: in threads and in children alike its result,
    its error, its time limit and its cancel are the job's, and what it does at its end is done."""
    monkeypatch.setattr(pool, "SOFT_S", 60.0)  # else it is killed if it needs long
    run, briefly, path = app.tasks[task], app.tasks[f"{task}_briefly"], tmp_path / "said"
    handle = run.submit("returns", str(path))
    found = result_of(app, handle.job_id)
    assert found["job"] == handle.job_id
    assert (found["here"] == os.getpid()) == (task == "wrapped")
    failed = end_of(app, run.submit("raises", str(path)).job_id)
    assert isinstance(failed, JobFailed)
    assert (failed.error.type, failed.error.message) == ("ValueError", "in the coroutine")
    late = end_of(app, briefly.submit("waits", str(path)).job_id)
    assert isinstance(late, JobFailed)
    assert (late.reason, late.error.type) == ("timeout", "TimeoutError")
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]
    path.unlink()
    handle = run.submit("waits", str(path))
    until(path.exists, what="its first line")
    handle.cancel("changed my mind")
    assert isinstance(end_of(app, handle.job_id), JobCancelled)
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]


def test_a_returned_coroutine_that_blocks_the_loop_is_named(
    app: App, worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs on the worker's event loop, so its task is named and counted as an async one would be."""
    path = tmp_path / "seen"
    handle = tasks.wrapped.submit("blocks", str(path))
    named = f"task wrapped blocks the event loop: job {handle.job_id}"
    until(lambda: named in caplog.text, what="its name in the log")
    path.touch()
    assert result_of(app, handle.job_id)["job"] == handle.job_id
    assert "in _coroutine\n    blocks_until(path)" in caplog.text
    assert worker.dispatcher is not None
    assert worker.dispatcher.plans["wrapped"].blocked == 1


def test_hooks_surround_a_coroutine_that_a_plain_function_returns(app: App, worker: Worker, tmp_path: Path) -> None:
    """What comes after the task's code comes after the coroutine's, too."""
    path = tmp_path / "said"
    handle = tasks.hooked.using(tags={"path": str(path)}).submit("returns", str(path))
    assert result_of(app, handle.job_id)["job"] == handle.job_id
    assert path.read_text().split("\n") == ["inside", "behind", ""]
