"""The parts of isolation that need no child process: messages, interrupts, the limits of crashes, the name of the
app."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, ConfigError, Retry, Settings, TaskTimedOut
from jobledger.consumers.isolation.app_target import find_target
from jobledger.consumers.isolation.child_handle import ChildHandle, LastOutput, process_died
from jobledger.consumers.isolation.child_main import LATE, JobProcess, has_unread
from jobledger.consumers.isolation.pool import ChildPool, ChildSettings
from jobledger.consumers.isolation.protocol import (
    RunMessage,
    Splitter,
    decode_child_message,
    decode_run,
    ended,
    frame,
    outcome_of,
)
from jobledger.consumers.partitions.takeover import _started_at
from jobledger.consumers.running.interrupts import Interrupts
from jobledger.consumers.running.placement import CRASHES, UNSEEN_CRASHES, Placement
from jobledger.consumers.state.event_loop import LoopCalls
from jobledger.consumers.state.outcome import Failed, Outcome, Retried, Snoozed, Succeeded
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun
from jobledger.schemas.codec import encode
from jobledger.schemas.events import ErrorInfo, JobEvent, JobProgressed, JobStarted
from jobledger.schemas.fast_path import glance

texts = st.text(max_size=30)
errors = st.builds(ErrorInfo, texts, texts, st.none() | texts)
delays = st.integers(0, 1 << 40)
outcomes = st.one_of(
    st.builds(Succeeded, st.none() | st.binary(max_size=50)),
    st.builds(Retried, errors, delays),
    st.builds(Snoozed, delays, st.none() | texts),
    st.builds(Failed, st.sampled_from(["exhausted", "never", "bad-result"]), errors),
)

module_app = App("unit-isolation", settings=Settings(bootstrap="127.0.0.1:1"))


@module_app.task(isolation="process")
def task_of_module(n: int) -> int:
    """A task of this module, for `find_target`."""
    return n


@given(outcomes)
def test_an_outcome_reaches_the_worker_unchanged(outcome: Outcome) -> None:
    """A child sends an outcome as a message, and the worker decodes the same outcome."""
    (body,) = Splitter().feed(frame(ended(outcome)))
    message = decode_child_message(body)
    assert not hasattr(message, "sequence")
    assert outcome_of(cast(Any, message)) == outcome


@given(st.lists(st.binary(max_size=200), max_size=10), st.lists(st.integers(1, 50), max_size=60))
def test_messages_are_split_correctly_for_any_chunks_of_bytes(bodies: list[bytes], cuts: list[int]) -> None:
    """The messages are the same, in order, for any cuts of the stream."""
    runs = [RunMessage("t", body, "id", "q", 1, 1, 1, {"a": "b"}, None, None) for body in bodies]
    stream = b"".join(map(frame, runs))
    splitter, received, at = Splitter(), [], 0
    for cut in [*cuts, len(stream)]:
        received += [decode_run(body).args for body in splitter.feed(stream[at : at + cut])]
        at += cut
    assert received == bodies


def work_of(function: Any) -> JobRun:
    """Return a `JobRun` with the fields that `Interrupts` needs."""
    work = JobRun(cast(Any, None), 0, None, cast(Any, None))
    work.runtime, work.kwargs = cast(Any, SimpleNamespace(fn=function)), {}
    return work


def test_a_time_limit_that_is_over_before_the_code_starts_is_raised_when_it_starts() -> None:
    """On a busy machine a thread may take a job after the job's time limit. The job's timer does not fire again."""
    interrupts, ran = Interrupts(), []
    work = work_of(lambda: ran.append(1))
    assert not interrupts.interrupt(work, TaskTimedOut)
    with pytest.raises(TaskTimedOut):
        interrupts.call(work)
    assert ran == []
    assert not interrupts.interrupt(work, TaskTimedOut)
    time.sleep(0.01)  # a pending interrupt would be raised here


def test_an_interrupt_is_raised_in_the_jobs_function_or_not_at_all() -> None:
    """The interrupt comes at any moment around the end of the function. The function raises the interrupt or returns,
    and the code after it is never interrupted."""
    interrupts = Interrupts()
    raised = returned = 0
    for n in range(300):
        inside = threading.Event()

        def function(inside: threading.Event = inside) -> str:
            inside.set()
            for _ in range(200):
                pass
            return "done"

        work = work_of(function)

        def interrupt(work: JobRun = work, inside: threading.Event = inside, n: int = n) -> None:
            inside.wait(5)
            time.sleep((n % 30) * 1e-6)
            interrupts.interrupt(work, TaskTimedOut)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        try:
            assert interrupts.call(work) == "done"
            returned += 1
        except TaskTimedOut:
            raised += 1
        # A pending interrupt of this thread would be raised here.
        interrupter.join()
        sum(range(1000))
    assert raised + returned == 300
    assert not interrupts.interrupt(work_of(lambda: None), TaskTimedOut), "nobody runs it"


def test_an_interrupt_does_not_cut_a_message_to_the_worker() -> None:
    """A time limit that is over while the job sends its progress is raised as soon as the whole message is sent."""
    assert threading.current_thread() is threading.main_thread()  # only this thread is interrupted by signals
    ours, theirs = socket.socketpair()
    process = JobProcess(module_app.registry, ours)
    received: list[bytes] = []

    def worker() -> None:
        splitter = Splitter()
        received.append(theirs.recv(1_000))
        assert theirs.recv(1, socket.MSG_PEEK)  # the rest is larger than all buffers, so it is being sent
        os.kill(os.getpid(), LATE)
        bodies = list(splitter.feed(received[0]))
        while not bodies:
            bodies = list(splitter.feed(theirs.recv(1 << 20)))
        received[:] = bodies

    reader = threading.Thread(target=worker, daemon=True)
    previous = signal.signal(LATE, process._interrupted)
    try:
        process._inside = True  # as while the code of a plain function runs
        reader.start()
        with pytest.raises(TaskTimedOut):
            process._send_progress(JobProgressed(1, 1, None, "x" * 8_000_000))
        reader.join(60)
    finally:
        signal.signal(LATE, previous)
        ours.close()
        theirs.close()
    assert not reader.is_alive()
    (body,) = received
    message = decode_child_message(body)
    assert cast(Any, message).message == "x" * 8_000_000


def test_a_takeover_reads_offset_and_topic_from_the_end_of_a_start() -> None:
    """The offset and the topic of a plain `JobStarted` are read from its last bytes, for every size of the number."""
    for offset in (0, 1, 63, 64, 8191, 8192, 1 << 20, (1 << 40) + 7):
        fact = JobStarted("host:1", None, {}, "ns.jobs.mail.high", offset, 3)
        job = "0192f3a4-0000-7000-8000-000000000001"
        raw = encode(JobEvent(job, job, 1, 1, 1, 1_790_000_000_000_000, "t", "mail", None, None, "w", None, fact))
        assert glance(raw) is not None
        name, read_offset = _started_at(raw)
        assert (read_offset, name.endswith(b"ns.jobs.mail.high"), raw[-1] >> 1) == (offset, True, 3)


def places(children: object | None) -> Placement:
    """Return a placement, with or without child processes."""
    nothing = cast(Any, None)
    reports = Reports(LoopCalls(nothing))
    placement = Placement(nothing, nothing, nothing, TaskTable(App("shop").registry, 1, 1, Retry()), None, reports)
    placement.children = cast(Any, children)
    return placement


def test_a_job_fails_after_3_crashes_or_after_10_if_child_processes_are_available() -> None:
    """Without child processes a job fails after three starts without an outcome. If child processes are available, a
    job fails after ten starts whose end no worker saw: the workers themselves died, perhaps of another cause."""
    alone, witnessed = places(None), places(SimpleNamespace(start_error=None))
    assert alone.crashed(CRASHES - 1) is None
    failed = alone.crashed(CRASHES)
    assert failed is not None
    assert (failed.reason, "started 3 times" in failed.error.message) == ("crashed", True)
    assert witnessed.crashed(UNSEEN_CRASHES - 1) is None
    assert witnessed.crashed(UNSEEN_CRASHES) is not None
    assert places(SimpleNamespace(start_error=ConfigError("x"))).crashed(CRASHES) is not None, "broken ones see nothing"


def test_a_child_that_is_announced_twice_gets_one_job() -> None:
    """The pid and the connection of a child may come in either order, and the second of them may be reported twice. A
    child gets one job at a time; otherwise the result of one job could be taken for another's."""
    given: list[tuple[ChildHandle, JobRun]] = []
    pool = ChildPool(
        ChildSettings(2, 0, 10, "m:a", Settings()),
        cast(Any, SimpleNamespace(may_run_now=lambda work: True)),
    )
    pool._give = lambda child, work: given.append((child, work))  # type: ignore[method-assign]
    fork_client = pool._fork_client
    fork_client._process = cast(Any, object())
    child = ChildHandle(pool)
    pool._all.add(child)
    fork_client._requested.append(child)
    child.transport = cast(Any, object())  # connected, but not reported yet
    fork_client._was_forked(os.getpid())
    fork_client._arrived(child)
    works = [JobRun(cast(Any, None), offset, None, deque()) for offset in range(2)]
    for work in works:
        pool.run(work)
    os.close(child.pidfd)
    assert given == [(child, works[0])]


def test_the_error_of_a_dead_child_has_the_signal_and_the_last_line_of_output() -> None:
    """The cases are signals, exit codes, and a process without an exit status."""
    killed = process_died(9, b"first\nlast \xff line\n")
    assert (
        killed.message
        == "the process that ran it ended by itself: signal 9 (SIGKILL); its last output: last \ufffd line"
    )
    assert killed.traceback == "first\nlast \ufffd line"
    assert process_died(7 << 8, b"").message.endswith("exit code 7")
    assert process_died(None, b"").message.endswith("it left no exit status")


def test_the_target_of_an_app_is_found_by_its_module() -> None:
    """The target is the module of the app's tasks or another module with the app. Otherwise the error has a remedy."""
    assert find_target(module_app.registry) == f"{__name__}:module_app"
    with pytest.raises(ConfigError, match="put the app and its tasks at the top level"):
        find_target(App("nowhere", settings=Settings(bootstrap="127.0.0.1:1")).registry)


def test_reading_the_output_of_children_closes_no_other_file() -> None:
    """While the loop opens and closes pipes, a thread opens files, and none of these files is closed by the loop."""
    stolen: list[OSError] = []
    stop = threading.Event()

    def job() -> None:
        while not stop.is_set():
            try:
                with open(os.devnull, "wb", buffering=0) as file:
                    file.write(b"x")
            except OSError as exc:
                stolen.append(exc)

    async def children() -> list[bytes]:
        loop = asyncio.get_running_loop()
        outputs = []
        for _ in range(300):
            read, write = os.pipe()
            output = LastOutput()
            output.listen(loop, read)
            os.write(write, b"last")
            os.close(write)
            await asyncio.sleep(0.001)
            output.close()
            outputs.append(output.kept)
        return outputs

    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    try:
        outputs = uvloop.run(children())
    finally:
        stop.set()
        thread.join()
    assert outputs == [b"last"] * 300
    assert stolen == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end for writing does not tell")
def test_a_child_knows_whether_its_worker_has_read_all_output() -> None:
    """The worker reads before it gives the child the next job only if output is unread. If the pipe cannot be asked,
    output counts as unread."""
    read, write = os.pipe()
    unread = [has_unread(write)]
    os.write(write, b"of the first")
    unread.append(has_unread(write))
    os.read(read, 100)
    unread.append(has_unread(write))
    os.close(read)
    os.close(write)
    assert unread == [False, True, False]
    assert has_unread(write)


def test_the_last_output_of_a_job_has_no_output_of_earlier_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    """The output of a child's earlier jobs on standard error is passed on, and does not count as the last output of the
    next job."""

    async def two_jobs() -> bytes:
        read, write = os.pipe()
        output = LastOutput()
        output.listen(asyncio.get_running_loop(), read)
        os.write(write, b"of the first\n")
        output.forget(unread=True)  # the loop has not read yet
        os.write(write, b"of the second\n")
        os.close(write)
        while b"second" not in output.kept:
            await asyncio.sleep(0.001)
        return output.kept

    assert uvloop.run(two_jobs()) == b"of the second\n"
    assert capsys.readouterr().err == "of the first\nof the second\n"
