"""Waiting for jobs, with a real status table and without a broker: one thread asks the table for all waiting
callers."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobledger import App, JobHandle, JobledgerError, JobNotFound, ResultInsideJob, Settings, StatusTimeout, job
from jobledger.client import waiting
from jobledger.client.waiting import Follower, Question
from jobledger.definitions.context import enter
from jobledger.errors import StoreError, StoreNotFound
from jobledger.job import JobStatus, State
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Position
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import StatusReader, Store, open_reader, open_store
from tests.patience import PATIENCE, wait_until
from tests.running_job import running_job

WORK, LIFECYCLE = "shop.jobs.default", "shop.lifecycle"
SUBMITTED = Position(WORK, 0, 5)
#: Seconds for which a test waits for an answer that must come.
ANSWER_S = 30 * PATIENCE


class Table:
    """A status table in a file that counts the questions to it."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'status.db'}"
        self.store: Store = open_store(self.url, "shop")
        assert self.store.acquire()
        self.reader: StatusReader = open_reader(self.url, "shop")
        self.asked: Counter[str] = Counter()
        self.writes = 0
        self.most = 0
        self.broken: BaseException | None = None

    def write(self, facts: Mapping[str, Sequence[ev.Fact]], read: int | None = None) -> None:
        """Write jobs with these facts. ``read``: the next offset of the work topic."""
        lives = {}
        for job_id, each in facts.items():
            life: job.Life | None = None
            for number, fact in enumerate(each):
                life = job.join(life, job.of(1, 1, 1, "double", "default", None, fact, (1, LIFECYCLE, 0, number)))
            assert life is not None
            lives[job_id] = life
        projector = RowFolder(self.store, Decoder())
        folded = projector.merge(lives.items())
        self.writes += 1
        folded.changes.offsets[LIFECYCLE, 0] = self.writes
        if read is not None:
            folded.changes.offsets[WORK, 0] = read
        self.store.write(folded.changes)
        projector.committed(folded)

    def _ask(self, what: str, ids: Sequence[str] = ()) -> StatusReader:
        self.asked[what] += 1
        self.most = max(self.most, len(ids))
        if self.broken is not None:
            raise self.broken
        return self.reader

    def states(self, job_ids: Sequence[str]) -> Mapping[str, State]:
        return self._ask("states", job_ids).states(job_ids)

    def statuses(self, job_ids: Sequence[str]) -> Mapping[str, JobStatus]:
        return self._ask("statuses", job_ids).statuses(job_ids)

    def offsets(self) -> Mapping[tuple[str, int], int]:
        return self._ask("offsets").offsets()

    def unknown(self, job_id: str) -> JobNotFound:
        return self.reader.unknown(job_id)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    made = Table(tmp_path)
    with closing(made.store), closing(made.reader):
        yield made


@pytest.fixture
def follower(table: Table) -> Iterator[Follower]:
    made = Follower(lambda: table)
    yield made
    made.close()


@pytest.fixture
def app(table: Table) -> Iterator[App]:
    """An app with the status table of the test, without submissions."""
    made = App("shop", settings=Settings(bootstrap="127.0.0.1:1", submit_timeout=1.0, status_url=table.url))
    made.task(double)
    yield made
    made.close()


def double(n: int) -> int:
    """The function of the task."""
    return 2 * n


def handle(app: App, job_id: str) -> JobHandle[int]:
    """Return a handle as after a submission of the job."""
    return JobHandle(app.client, app.tasks["double"], job_id, SUBMITTED)


RUNNING: list[ev.Fact] = [ev.JobSubmitted(ev.JobSpec(b"{}")), ev.JobStarted("h:1", None, {}, WORK, 0)]
ENDED: list[ev.Fact] = [*RUNNING, ev.JobSucceeded(b"4", 5)]


def asked(follower: Follower, job_id: str, **options: Any) -> Question:
    """Ask the follower for the end of a job; return the question."""
    question = Question(job_id, SUBMITTED, **{"ended": True, "timeout": 600.0, **options})
    follower.ask(question)
    return question


def test_a_thousand_waiting_callers_ask_the_table_about_as_often_as_one(
    follower: Follower, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question to the table serves all callers, at most `QUESTIONS_A_LOOK` at a time. Each caller gets its own
    answer."""
    monkeypatch.setattr(waiting, "REREAD_S", 600.0)
    ids = [f"job-{n:04}" for n in range(1_000)]
    table.write(dict.fromkeys(ids, RUNNING), read=6)
    questions = [asked(follower, job_id) for job_id in ids]
    wait_until(lambda: all(q.looks > 3 * waiting.LOOKS_A_PACE for q in questions), 60, "all have been looked for")
    asked_before = table.asked["states"]
    for _ in range(8):
        before = table.asked["states"]
        table.write({"other": RUNNING})  # without a change no rows are read
        wait_until(partial(_asked_again, table, before), 60, "another question")
    assert 8 <= table.asked["states"] - asked_before <= 24  # not 8,000; a few questions have another pace
    assert table.asked["statuses"] == 0
    table.write(dict.fromkeys(ids, ENDED))
    assert {q.answer.result(ANSWER_S).job_id for q in questions} == set(ids)
    assert table.most <= waiting.QUESTIONS_A_LOOK
    assert table.asked["statuses"] <= 2 * len(ids) / waiting.ROWS_AT_ONCE


def _asked_again(table: Table, before: int) -> bool:
    return table.asked["states"] > before


def test_threads_and_coroutines_share_one_thread(app: App, table: Table) -> None:
    """One thread follows any number of waits of both kinds, and all of them get the result."""
    table.write(dict.fromkeys("abcdef", RUNNING), read=6)

    async def coroutines() -> list[int]:
        return await asyncio.gather(*(handle(app, job_id).result_async(ANSWER_S) for job_id in "abcdef" * 20))

    with ThreadPoolExecutor(8) as pool:
        inside = pool.submit(lambda: asyncio.run(coroutines()))
        threads = [pool.submit(handle(app, job_id).result, ANSWER_S) for job_id in "abcdef"]
        wait_until(lambda: len(app.client._follower._due) >= 126, 30, "all wait")
        assert [t.name for t in threading.enumerate()].count("jobledger-waiting") == 1
        table.write(dict.fromkeys("abcdef", ENDED))
        assert [t.result(ANSWER_S) for t in threads] == [4] * 6
        assert inside.result(ANSWER_S) == [4] * 120


def test_an_outcome_counts_only_after_the_table_has_read_the_submission(follower: Follower, table: Table) -> None:
    """If the outcome of a job is in the table before its submission, the wait continues until the submission was
    read."""
    table.write({"a": [ev.JobSucceeded(b"4", 5)]}, read=5)
    question = asked(follower, "a")
    wait_until(lambda: question.looks > 3, 30, "looks")
    assert not question.answer.done()
    table.write({"a": ENDED}, read=6)
    assert question.answer.result(ANSWER_S).state is State.SUCCEEDED


def test_an_unknown_job_is_not_found_after_the_table_has_read_its_position(follower: Follower, table: Table) -> None:
    """Before that, the job may still come. Without a position the answer comes at once."""
    table.write({"a": ENDED}, read=5)
    question = asked(follower, "nobody")
    wait_until(lambda: question.looks > 3, 30, "looks")
    assert not question.answer.done()
    table.write({}, read=6)
    with pytest.raises(JobNotFound, match="no job nobody"):
        question.answer.result(ANSWER_S)
    for ended in (True, False):
        other = Question("nobody", None, ended=ended, timeout=None)
        follower.ask(other)
        with pytest.raises(JobNotFound, match=r"status\.db knows no job nobody"):
            other.answer.result(ANSWER_S)


def test_the_error_of_a_time_limit_says_what_the_caller_waited_for(
    app: App, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a job that has not ended and the error of a table that is behind have the time and a remedy. This
    also holds for a time limit of 0."""
    monkeypatch.setattr(waiting, "TABLE_PATIENCE_S", ANSWER_S)
    table.write({"a": RUNNING}, read=6)
    late = JobHandle(app.client, app.tasks["double"], "a", Position(WORK, 0, 6))
    for timeout in (0, 0.05):
        with pytest.raises(
            StatusTimeout, match=rf"job a did not end within {timeout:g} s: it is running\. Are a worker"
        ):
            handle(app, "a").wait(timeout)
        with pytest.raises(StatusTimeout, match=rf"did not reach {WORK}.* within {timeout:g} s: is `jobledger streams"):
            late.status(timeout)
    with pytest.raises(StatusTimeout, match="job a did not end within 0 s"):
        asyncio.run(handle(app, "a").result_async(0))
    assert handle(app, "a").status(0).state is State.RUNNING  # the table is always asked once


def test_a_caller_does_not_wait_forever_for_a_table_that_does_not_answer(
    app: App, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller waits for its own time limit and a bounded time more."""
    monkeypatch.setattr(waiting, "TABLE_PATIENCE_S", 0.2)
    gate = threading.Event()
    try:
        app.client._follower._table = lambda: gate.wait(600) and table  # type: ignore[assignment,return-value]
        with pytest.raises(StatusTimeout, match=r"job a did not end within 0\.1 s"):
            handle(app, "a").wait(0.1)
        with pytest.raises(StatusTimeout, match=r"did not answer within 0\.1 s"):
            app.job("a", timeout=0.1)
        with pytest.raises(StatusTimeout):
            asyncio.run(handle(app, "a").wait_async(0.1))
    finally:
        gate.set()


def test_an_error_of_the_table_reaches_each_waiting_caller_and_no_later_one(follower: Follower, table: Table) -> None:
    """Each caller gets its own exception object, and the next question gets an answer."""
    table.write({"a": RUNNING}, read=6)
    questions = [asked(follower, "a") for _ in range(5)]
    for broken in (StoreError("away"), SystemExit(3)):
        table.broken = broken
        raised = [q.answer.exception(ANSWER_S) for q in questions]
        assert len({id(each) for each in raised}) == 5
        assert all(isinstance(each, Exception) for each in raised)
        table.broken = None
        questions = [asked(follower, "a") for _ in range(5)]
    table.write({"a": ENDED})
    assert [q.answer.result(ANSWER_S).result for q in questions] == [4] * 5


def test_a_wait_continues_until_the_table_is_made(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """While there is no table, a wait for an outcome asks again, and a question for a status raises an error."""
    monkeypatch.setattr(waiting, "START_PATIENCE_S", 600.0)
    there = threading.Event()

    def source() -> Table:
        if not there.is_set():
            raise StoreNotFound("none yet")
        return table

    follower = Follower(source)
    waits, asks = asked(follower, "a"), asked(follower, "a", ended=False)
    with pytest.raises(StoreNotFound, match="none yet"):
        asks.answer.result(ANSWER_S)
    assert not waits.answer.done()
    table.write({"a": ENDED}, read=6)
    there.set()
    assert waits.answer.result(ANSWER_S).result == 4
    impatient = asked(Follower(lambda: _raise(StoreNotFound("none yet"))), "a", timeout=0.2)
    with pytest.raises(StoreNotFound):
        impatient.answer.result(ANSWER_S)
    follower.close()


def _raise(error: Exception) -> Any:
    raise error


def test_a_cancelled_wait_leaves_nothing_behind(app: App, table: Table) -> None:
    """A cancellation of the waiting coroutine removes its question. Other waits continue."""
    table.write({"a": RUNNING, "b": RUNNING}, read=6)

    async def some() -> int:
        waits = [asyncio.create_task(handle(app, "a").wait_async()) for _ in range(50)]
        other = asyncio.create_task(handle(app, "b").result_async())
        follower = app.client._follower
        while len(follower._due) < 51:
            await asyncio.sleep(0.01)
        for task in waits:
            task.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*waits, return_exceptions=True))
        while len(follower._due) > 1:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(table.write, {"b": ENDED})
        return await other

    assert asyncio.run(some()) == 4


def test_closing_the_app_ends_the_waits_and_the_app_can_be_used_again(app: App, table: Table) -> None:
    """A waiting caller gets the error that the app was closed. After that, the app answers as before."""
    table.write({"a": RUNNING}, read=6)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(handle(app, "a").wait)
        wait_until(lambda: bool(app.client._follower._due), 30, "it waits")
        client = app.client
        app.close()
        with pytest.raises(JobledgerError, match="the app was closed while a caller waited for job a"):
            waits.result(ANSWER_S)
    assert client._follower._thread is None
    assert app.job("a").state is State.RUNNING


def test_the_thread_ends_when_nobody_waits(follower: Follower, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next question starts the thread again."""
    monkeypatch.setattr(waiting, "IDLE_S", 0.05)
    table.write({"a": ENDED}, read=6)
    for _ in range(2):
        assert asked(follower, "a").answer.result(ANSWER_S).result == 4
        wait_until(lambda: follower._thread is None, 30, "the thread has ended")


def test_a_forked_child_waits_with_a_thread_of_its_own(app: App, table: Table) -> None:
    """A fork does not copy the thread. The first question in the child process starts a new one."""
    table.write({"a": RUNNING, "b": ENDED}, read=6)
    question = Question("a", SUBMITTED, ended=True, timeout=None)
    app.client._follower.ask(question)
    wait_until(lambda: question.looks > 0, 30, "the thread runs")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's coverage is not collected
        try:
            os.write(write_end, str(handle(app, "b").result(ANSWER_S)).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == "4"
    os.waitpid(child, 0)
    assert not question.answer.done()


def calls(app: App) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return calls that block a running loop, each with the async form that its warning names."""
    mine = handle(app, "a")
    return {
        "result": (lambda: mine.result(ANSWER_S), "result_async"),
        "wait": (lambda: mine.wait(ANSWER_S), "wait_async"),
        "status": (lambda: mine.status(ANSWER_S), "status_async"),
        "job": (lambda: app.job("a", at_least=SUBMITTED), "job_async"),
    }


@pytest.mark.parametrize("called", ["result", "wait", "status", "job"])
def test_a_call_that_blocks_a_running_loop_works_with_a_warning(app: App, table: Table, called: str) -> None:
    """A notebook always has a running loop, so the call is not refused. The warning has the caller's line and the async
    form. Without a loop there is no warning."""
    table.write({"a": ENDED}, read=6)
    call, instead = calls(app)[called]

    async def inside() -> Any:
        with pytest.warns(RuntimeWarning, match=rf"blocks the event loop.*await \S*{instead}") as caught:
            status = call()
        assert caught[0].filename == __file__
        return status

    status = asyncio.run(inside())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call() == status


def test_inside_a_job_each_wait_is_refused(app: App) -> None:
    """A job must not wait for another job. Both forms of a wait are refused before any other check."""

    async def waits() -> None:
        enter(running_job("01890a5d-ac96-774b-bcce-b302099a8057"))
        mine = handle(app, "a")
        for call in (mine.result, mine.wait):
            with pytest.raises(ResultInsideJob):
                call(1)
        for asynchronous in (mine.result_async, mine.wait_async):
            with pytest.raises(ResultInsideJob):
                await asynchronous(1)

    asyncio.run(waits())


def test_the_async_forms_of_the_app_give_the_same_jobs(app: App, table: Table) -> None:
    """One job, and lists of jobs in pages, are the same as with the blocking forms."""
    table.write({f"job-{n}": ENDED for n in range(7)}, read=6)

    async def asks() -> tuple[JobStatus, list[JobStatus], list[JobStatus]]:
        one = await app.job_async("job-3")
        everything = [status async for status in app.jobs_async(page=3)]
        return one, everything, [status async for status in app.jobs_async(state="succeeded", limit=5, page=2)]

    one, everything, five = asyncio.run(asks())
    assert one == app.job("job-3")
    assert everything == list(app.jobs())
    assert five == everything[:5]


def test_rows_are_read_only_when_the_table_has_read_more(
    follower: Follower, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the table reads nothing, one small question serves any number of waits."""
    monkeypatch.setattr(waiting, "REREAD_S", 600.0)
    table.write(dict.fromkeys("abc", RUNNING), read=6)
    questions = [asked(follower, job_id) for job_id in "abc"]
    wait_until(lambda: all(q.looks > 8 for q in questions), 30, "looks")
    assert table.asked["offsets"] >= 9
    assert table.asked["states"] < 9
    before = table.asked["states"]
    follower._reread = 0.0  # as if a rebuild may have replaced the rows
    wait_until(lambda: table.asked["states"] > before, 30, "rows are read again")


def test_questions_are_asked_less_often_over_time_and_at_the_same_times() -> None:
    """The interval grows from `FIRST_S` to `MOST_S`. Two questions of any age with the same interval are asked
    together. No question is asked after its deadline."""
    one, two = (Question("a", None, ended=True, timeout=timeout) for timeout in (None, 1_000.0))
    now = time.monotonic()
    first = one.next_look(now)
    assert now < first <= now + waiting.FIRST_S
    for question in (one, two):
        for _ in range(20):
            question.next_look(now)
    assert one.next_look(now) == two.next_look(now) <= now + waiting.MOST_S
    assert two.deadline is not None
    assert two.next_look(two.deadline - 1e-6) == two.deadline


def test_an_answered_question_is_freed(follower: Follower, table: Table) -> None:
    """No object refers to the question or to the job's result any more."""
    table.write({"forgotten": ENDED}, read=6)
    question = asked(follower, "forgotten")
    assert question.answer.result(ANSWER_S).result == 4
    del question

    def held() -> bool:
        gc.collect()
        return any(type(each) is Question and each.job_id == "forgotten" for each in gc.get_objects())

    wait_until(lambda: not held(), 30, "it is gone")
