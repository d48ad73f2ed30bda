"""Waiting for jobs: one thread polls the status table for all threads and coroutines of this process that wait.

`Follower` takes a `Question` and answers it; the blocking and the asyncio methods are in `Client`. This module opens no
connection itself, and does not depend on Kafka or a database.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from jobledger.definitions.durations import Seconds, check_patience
from jobledger.errors import ConnectionUnusable, JobledgerError, JobNotFound, StatusTimeout, StoreNotFound
from jobledger.job import JobStatus, State
from jobledger.kafka.topic_names import check_utf8
from jobledger.schemas.events import Position

#: Seconds between two polls for one question: the first interval and the longest. The interval doubles until it is the
#: longest. Polls happen at whole multiples of the interval, so that questions of different ages share a poll.
FIRST_S, MOST_S = 1 / 64, 1 / 4
#: Number of polls at each interval.
LOOKS_A_PACE = 3
#: Maximum number of questions in one poll, and of whole rows read at once (a row may hold a large result).
QUESTIONS_A_LOOK, ROWS_AT_ONCE = 1_000, 100
#: The pause after a poll is REST times the poll's duration, at most REST_MOST_S seconds. So polling uses at most a
#: fifth of a core, unless a poll takes longer than REST_MOST_S / REST seconds.
REST, REST_MOST_S = 4.0, 1.0
#: Seconds after which rows are read again although the table's offsets have not changed, because a rebuild may have
#: replaced the rows.
REREAD_S = 5.0
#: Seconds without questions after which the thread ends; the next question starts another.
IDLE_S = 5.0
#: Seconds for which a wait accepts that there is no status table yet.
START_PATIENCE_S = 30.0
#: Seconds beyond its own timeout for which a caller waits if the table does not answer.
TABLE_PATIENCE_S = 10.0


class StatusSource(Protocol):
    """The interface through which the client queries jobs; the status table's read side implements it."""

    def states(self, job_ids: Sequence[str]) -> Mapping[str, State]:
        """Return the states of the given jobs, without jobs that the table does not know."""

    def statuses(self, job_ids: Sequence[str]) -> Mapping[str, JobStatus]:
        """Return the statuses of the given jobs, without jobs that the table does not know."""

    def offsets(self) -> Mapping[tuple[str, int], int]:
        """Return the table's next offset of every partition."""

    def unknown(self, job_id: str) -> JobNotFound:
        """Return the error for a job that the table does not know."""


class Question:
    """A caller's question: a job's status, or with ``ended`` the status once the job has ended.

    ``at_least``: answer only after the table has read this position. ``timeout``: seconds; None: wait forever.
    ``answer``: the status, or `JobNotFound`, `StatusTimeout` or `StoreError`. A caller that stops waiting cancels
    ``answer``.
    """

    __slots__ = (
        "answer",
        "at_least",
        "began",
        "deadline",
        "ended",
        "job_id",
        "looks",
        "reached",
        "seen",
        "state",
        "timeout",
    )

    def __init__(self, job_id: str, at_least: Position | None, *, ended: bool, timeout: Seconds | None) -> None:
        check_utf8("job id", job_id)
        self.job_id, self.at_least, self.ended = job_id, at_least, ended
        self.timeout = check_patience(timeout)
        self.answer: Future[JobStatus] = Future()
        self.began = time.monotonic()
        self.deadline = None if self.timeout is None else self.began + self.timeout
        self.reached = at_least is None
        self.state: State | None = None
        #: The table's offsets at the last poll for this question.
        self.seen: Mapping[tuple[str, int], int] | None = None
        self.looks = 0

    @property
    def patience(self) -> float | None:
        """Seconds for which a caller waits for the answer: the timeout plus a margin for a table that does not
        answer."""
        return None if self.timeout is None else self.timeout + TABLE_PATIENCE_S

    def next_look(self, now: float) -> float:
        """Return the time of the next poll (monotonic clock)."""
        pace: float = min(FIRST_S * 2 ** (self.looks // LOOKS_A_PACE), MOST_S)
        self.looks += 1
        due = (now // pace + 1) * pace
        return due if self.deadline is None else min(due, max(now, self.deadline))

    def resolve(self, answer: JobStatus | Exception) -> None:
        """Set the answer, unless the caller has stopped waiting."""
        with suppress(InvalidStateError):
            if isinstance(answer, JobStatus):
                self.answer.set_result(answer)
            else:
                self.answer.set_exception(answer)

    def late(self) -> StatusTimeout:
        """Return the error for a question whose timeout is over."""
        seconds = f"within {self.timeout or 0:g} s"
        if self.ended:
            state = "not in the status table yet" if self.state is None else self.state.value
            return StatusTimeout(
                f"job {self.job_id} did not end {seconds}: it is {state}. "
                "Are a worker and `jobledger streams MODULE:APP` running?"
            )
        if self.reached:
            return StatusTimeout(f"the status table did not answer {seconds}: is its database reachable?")
        return StatusTimeout(
            f"the status table did not reach {self.at_least} {seconds}: is `jobledger streams MODULE:APP` running?"
        )


class Follower:
    """Answers questions in one thread. The thread starts with the first question and ends when there are no questions.

    ``table``: a function that opens the status table's read side, or returns the read side that is open.
    """

    def __init__(self, table: Callable[[], StatusSource]) -> None:
        self._table = table
        self.after_fork()

    def after_fork(self) -> None:
        """Start without questions and without a thread: a forked child has no copy of the parent's thread."""
        self._changed = threading.Condition()
        #: Open questions, by the time of their next poll.
        self._due: list[tuple[float, int, Question]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False
        #: The table's offsets at the last poll. Rows change together with the offsets.
        self._offsets: Mapping[tuple[str, int], int] = {}
        self._reread = 0.0

    def ask(self, question: Question) -> None:
        """Queue the question and return at once. Raises `ConnectionUnusable` if no thread can be started any more, late
        in the end of a process."""
        with self._changed:
            self._closed = False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="jobledger-waiting", daemon=True)
                try:
                    thread.start()
                except RuntimeError as exc:
                    raise ConnectionUnusable(
                        f"job {question.job_id} cannot be waited for: the thread that asks the status table cannot be "
                        f"started ({exc})"
                    ) from exc
                self._thread = thread
            self._push(question, time.monotonic())
            self._changed.notify()

    def close(self) -> None:
        """Answer open questions with an error, and end the thread; the next question starts another."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._give_up()
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(TABLE_PATIENCE_S)

    def _give_up(self) -> None:
        for _, _, question in self._due:
            question.resolve(JobledgerError(f"the app was closed while a caller waited for job {question.job_id}"))
        self._due.clear()

    def _push(self, question: Question, due: float) -> None:
        heapq.heappush(self._due, (due, next(self._numbers), question))

    def _run(self) -> None:
        rested: float | None = 0.0
        while rested is not None:
            rested = self._serve(rested)

    def _serve(self, rested: float) -> float | None:
        """Poll once, when a question is due and the pause, which lasts until ``rested``, is over. Returns the end of
        the next pause, or None if the thread must end."""
        some = self._next(rested)
        if not some:
            return None
        began = time.monotonic()
        try:
            self._look(some)
        except BaseException as exc:  # noqa: BLE001  # after any error the callers must get an answer
            for question in some:
                self._missed(question, exc, began)
        now = time.monotonic()
        with self._changed:
            for question in some:
                if not question.answer.done():
                    self._push(question, question.next_look(now))
        return now + min(REST * (now - began), REST_MOST_S)

    def _next(self, rested: float) -> list[Question]:
        """Wait at least until ``rested`` and return the questions that are due; empty if the thread must end."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if not self._due:
                    if not self._changed.wait(IDLE_S) and not self._due:
                        break
                    continue
                due = max(self._due[0][0], rested)
                if due > now:
                    self._changed.wait(due - now)
                    continue
                some: list[Question] = []
                while self._due and self._due[0][0] <= now and len(some) < QUESTIONS_A_LOOK:
                    _, _, question = heapq.heappop(self._due)
                    if not question.answer.done():
                        some.append(question)
                if some:
                    return some
            self._thread = None
            self._give_up()  # questions that were being polled when `close` was called
            return []

    def _look(self, some: list[Question]) -> None:
        """Query the table once for all of these questions."""
        now = time.monotonic()  # before the poll: a late question is polled once after its deadline
        table = self._table()
        offsets = table.offsets()
        if offsets != self._offsets or now >= self._reread:
            self._offsets, self._reread = offsets, now + REREAD_S
        changed = [question for question in some if question.seen is not self._offsets]
        for question in changed:
            question.seen = self._offsets
            if (at := question.at_least) is not None and not question.reached:
                question.reached = offsets.get((at.topic, at.partition), 0) > at.offset
        self._read(table, changed)
        for question in some:
            if question.deadline is not None and now >= question.deadline and not question.answer.done():
                question.resolve(question.late())

    def _read(self, table: StatusSource, some: list[Question]) -> None:
        """Answer those of these questions to which the table has an answer."""
        if ids := list({question.job_id for question in some if question.ended}):
            states = table.states(ids)
            for question in some:
                question.state = states.get(question.job_id)
        # The table may read a job's outcome before its submission: the records are on different topics.
        ready: dict[str, list[Question]] = {}
        for question in some:
            open_still = question.ended and question.state is not None and not question.state.ended
            if question.reached and not open_still:
                ready.setdefault(question.job_id, []).append(question)
        ids = list(ready)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            part = ids[start : start + ROWS_AT_ONCE]
            statuses = table.statuses(part)
            for job_id in part:
                status = statuses.get(job_id)
                for question in ready[job_id]:
                    if status is None:
                        question.resolve(table.unknown(job_id))
                    elif status.state.ended or not question.ended:
                        question.resolve(status)

    def _missed(self, question: Question, error: BaseException, now: float) -> None:
        """Handle a failed poll. If the stream processor may just be starting, the question stays open; else the error
        is its answer."""
        if isinstance(error, StoreNotFound) and question.ended:
            patience = START_PATIENCE_S if question.timeout is None else min(START_PATIENCE_S, question.timeout)
            if now - question.began < patience:
                return
        if not isinstance(error, Exception):
            error = RuntimeError(f"the query for job {question.job_id} was aborted: {error!r}")
        question.resolve(_own(error))


def _own(error: Exception) -> Exception:
    """Return a copy of the error for one waiting caller: an error that is raised in several places would collect all
    their tracebacks."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001  # an error that cannot be copied from its args
        return error
    copied.__cause__ = error
    return copied
