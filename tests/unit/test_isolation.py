"""The parts of child processes that need none: messages, interrupts, who is blamed, how the app is named."""

from __future__ import annotations

import asyncio
import os
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

from jobledger import App, ConfigError, Settings, TaskTimedOut
from jobledger.consumers.isolation.app_target import find_target
from jobledger.consumers.isolation.child_handle import ChildHandle, LastOutput, last_words
from jobledger.consumers.isolation.child_main import has_unread
from jobledger.consumers.isolation.pool import ChildPool, ChildSettings
from jobledger.consumers.isolation.protocol import (
    RunMessage,
    Splitter,
    decode_run,
    decode_said,
    ended,
    frame,
    outcome_of,
)
from jobledger.consumers.partitions.takeover import _started_at
from jobledger.consumers.running.interrupts import Interrupts
from jobledger.consumers.running.placement import CRASHES, UNSEEN_CRASHES, Placement
from jobledger.consumers.state.limiters import Slots
from jobledger.consumers.state.outcome import Failed, Outcome, Retried, Snoozed, Succeeded
from jobledger.consumers.state.work import JobRun
from jobledger.schemas.codec import encode
from jobledger.schemas.events import ErrorInfo, JobEvent, JobStarted
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
    """Found with its app, by the module's name."""
    return n


@given(outcomes)
def test_an_outcome_travels_unchanged(outcome: Outcome) -> None:
    """What a child says is what the worker hears."""
    (body,) = Splitter().feed(frame(ended(outcome)))
    said = decode_said(body)
    assert not hasattr(said, "sequence")
    assert outcome_of(cast(Any, said)) == outcome


@given(st.lists(st.binary(max_size=200), max_size=10), st.lists(st.integers(1, 50), max_size=60))
def test_messages_are_found_however_the_bytes_come(bodies: list[bytes], cuts: list[int]) -> None:
    """Any cut of the stream gives the same messages, in order."""
    runs = [RunMessage("t", body, "id", "q", 1, 1, 1, {"a": "b"}, None, None) for body in bodies]
    stream = b"".join(map(frame, runs))
    splitter, found, at = Splitter(), [], 0
    for cut in [*cuts, len(stream)]:
        found += [decode_run(body).args for body in splitter.feed(stream[at : at + cut])]
        at += cut
    assert found == bodies


def work_of(function: Any) -> JobRun:
    """As much of a `JobRun` as `Interrupts` looks at."""
    found = JobRun(cast(Any, None), 0, None, cast(Any, None))
    found.plan, found.kwargs = cast(Any, SimpleNamespace(fn=function)), {}
    return found


def test_a_time_limit_that_is_over_before_the_code_starts_is_raised_when_it_starts() -> None:
    """On a busy machine a thread may take a job up after its time limit: the job's timer does not fire again."""
    interrupts, ran = Interrupts(), []
    work = work_of(lambda: ran.append(1))
    assert not interrupts.interrupt(work, TaskTimedOut)
    with pytest.raises(TaskTimedOut):
        interrupts.call(work)
    assert ran == []
    assert not interrupts.interrupt(work, TaskTimedOut)
    time.sleep(0.01)  # where one that is still pending would be raised


def test_an_interrupt_is_raised_inside_or_not_at_all() -> None:
    """Told at any moment around its end, a function either raises it or returns; nothing leaks into what follows."""
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

        def tell(work: JobRun = work, inside: threading.Event = inside, n: int = n) -> None:
            inside.wait(5)
            time.sleep((n % 30) * 1e-6)
            interrupts.interrupt(work, TaskTimedOut)

        teller = threading.Thread(target=tell)
        teller.start()
        try:
            assert interrupts.call(work) == "done"
            returned += 1
        except TaskTimedOut:
            raised += 1
        # If one were still pending in this thread, it would come here.
        teller.join()
        sum(range(1000))
    assert raised + returned == 300
    assert not interrupts.interrupt(work_of(lambda: None), TaskTimedOut), "nobody runs it"


def test_a_start_is_read_from_the_end() -> None:
    """The offset and topic of a `JobStarted` that a glance answers for, at every size of number."""
    for offset in (0, 1, 63, 64, 8191, 8192, 1 << 20, (1 << 40) + 7):
        fact = JobStarted("host:1", "ns.jobs.mail.high", offset, 3)
        job = "0192f3a4-0000-7000-8000-000000000001"
        raw = encode(JobEvent(job, job, 1, 1, 1, 1_790_000_000_000_000, "t", "mail", None, None, "w", None, fact))
        assert glance(raw) is not None
        name, found = _started_at(raw)
        assert (found, name.endswith(b"ns.jobs.mail.high"), raw[-1] >> 1) == (offset, True, 3)


def places(children: object | None) -> Placement:
    """Places with or without children to be witnesses."""
    nothing = cast(Any, None)
    return Placement(
        nothing,
        Slots("threads", 1),
        Slots("processes", 1),
        cast(Any, children),
        begin_again=nothing,
        done=nothing,
        ours=nothing,
        certain=nothing,
        call=nothing,
    )


def test_who_is_blamed() -> None:
    """Three starts without an end, or ten where each end may have been the worker's own."""
    alone, witnessed = places(None), places(SimpleNamespace(broken=None))
    assert alone.crashed(CRASHES - 1) is None
    found = alone.crashed(CRASHES)
    assert found is not None
    assert (found.reason, "started 3 times" in found.error.message) == ("crashed", True)
    assert witnessed.crashed(UNSEEN_CRASHES - 1) is None
    assert witnessed.crashed(UNSEEN_CRASHES) is not None
    assert places(SimpleNamespace(broken=ConfigError("x"))).crashed(CRASHES) is not None, "broken ones see nothing"


def test_a_child_that_is_there_twice_gets_one_job() -> None:
    """Its pid and its connection may come in either order, and the second of them be told again: one job at a time, or
    the result of one would be taken for the other's."""
    given: list[tuple[ChildHandle, JobRun]] = []
    nothing = cast(Any, None)
    pool = ChildPool(
        ChildSettings(2, 0, 10, "m:a", Settings()),
        take=lambda work: True,
        said=nothing,
        died=nothing,
        ended=nothing,
        unusable=nothing,
    )
    pool._give = lambda child, work: given.append((child, work))  # type: ignore[method-assign]
    nursery = pool._nursery
    nursery._process = cast(Any, object())
    child = ChildHandle(pool)
    pool._all.add(child)
    nursery._born.append(child)
    child.transport = cast(Any, object())  # connected, and not told of yet
    nursery._is_born(os.getpid())
    nursery._arrived(child)
    works = [JobRun(cast(Any, None), offset, None, deque()) for offset in range(2)]
    for work in works:
        pool.run(work)
    os.close(child.pidfd)
    assert given == [(child, works[0])]


def test_last_words_name_the_signal_and_the_last_line() -> None:
    """Exit codes, signals, and processes that left no status."""
    killed = last_words(9, b"first\nlast \xff line\n")
    assert (
        killed.message == "the process that ran it ended by itself: signal 9 (SIGKILL); it said last: last \ufffd line"
    )
    assert killed.traceback == "first\nlast \ufffd line"
    assert last_words(7 << 8, b"").message.endswith("exit code 7")
    assert last_words(None, b"").message.endswith("it left no exit status")


def test_an_app_is_named_by_its_module() -> None:
    """The module of its tasks, or any other that holds it; else the error says what to do."""
    assert find_target(module_app.registry) == f"{__name__}:module_app"
    with pytest.raises(ConfigError, match="put it and its tasks at the top level"):
        find_target(App("nowhere", settings=Settings(bootstrap="127.0.0.1:1")).registry)


def test_reading_a_childs_words_closes_nothing_else() -> None:
    """While pipes come and go on the loop, files that a thread opens stay its own."""
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
        said = []
        for _ in range(300):
            read, write = os.pipe()
            words = LastOutput()
            words.listen(loop, read)
            os.write(write, b"last")
            os.close(write)
            await asyncio.sleep(0.001)
            words.close()
            said.append(words.kept)
        return said

    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    try:
        said = uvloop.run(children())
    finally:
        stop.set()
        thread.join()
    assert said == [b"last"] * 300
    assert stolen == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end for writing does not tell")
def test_a_child_knows_whether_its_worker_has_read_what_it_wrote() -> None:
    """Only if something is unread does the worker read before it gives the child its next job. What cannot be asked counts as
    unread."""
    read, write = os.pipe()
    said = [has_unread(write)]
    os.write(write, b"of the first")
    said.append(has_unread(write))
    os.read(read, 100)
    said.append(has_unread(write))
    os.close(read)
    os.close(write)
    assert said == [False, True, False]
    assert has_unread(write)


def test_last_words_are_those_of_the_job_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """What former jobs of a child wrote to standard error is passed on, and not kept as the last words of the next."""

    async def two_jobs() -> bytes:
        read, write = os.pipe()
        words = LastOutput()
        words.listen(asyncio.get_running_loop(), read)
        os.write(write, b"of the first\n")
        words.forget(unread=True)  # the loop has not even looked
        os.write(write, b"of the second\n")
        os.close(write)
        while b"second" not in words.kept:
            await asyncio.sleep(0.001)
        return words.kept

    assert uvloop.run(two_jobs()) == b"of the second\n"
    assert capsys.readouterr().err == "of the first\nof the second\n"
