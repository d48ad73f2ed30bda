"""Runs the code of jobs, coroutines on the event loop and plain functions in a pool of threads.

`Placement` decides where and when a job's code runs. Each call here is about one job. What its code returned or raised
is passed to `Recorder`.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.interrupts import Interrupts
from jobledger.consumers.state.outcome import Failed, error_info
from jobledger.consumers.state.reports import Asked, Reports
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.work import JobRun
from jobledger.definitions.context import JobContext, enter
from jobledger.definitions.functions import AWAIT
from jobledger.errors import TaskTimedOut
from jobledger.process import forks
from jobledger.schemas.events import CRASHES_TAG, UNKNOWN_TASK_TAG, JobSpec, users_tags

_monotonic = time.monotonic


class Executor:
    """Runs the code of a `JobRun`, records what it returns or raises, and reports that the job has ended."""

    def __init__(self, recorder: Recorder, running_jobs: RunningJobs, reports: Reports) -> None:
        self._recorder, self._running_jobs, self._reports = recorder, running_jobs, reports
        self.interrupts = Interrupts()
        self.overdue_on_loop: JobRun | None = None  # the job whose coroutine blocks the loop beyond its time limit
        self._queue: queue.SimpleQueue[JobRun | None] = queue.SimpleQueue()
        self._depth = forks.depth
        self._threads: list[threading.Thread] = []

    # -- running --------------------------------------------------------------------------------------------------

    async def run(self, work: JobRun) -> None:
        """Run a job's coroutine on the loop, within its time limit, and record the outcome.

        The worker may have been paused since it created the `asyncio` task, and another worker may have taken the job
        over. So ownership is checked here, too. If the code may not begin, the dispatcher drops the job or begins it
        later.
        """
        partition = work.partition
        lease = work.lease or partition.lease
        if (work.abandoned or partition.gone or _monotonic() > lease.until) and not self._may_begin(work):
            return
        context = _enter(work)
        runtime = work.runtime
        assert runtime is not None
        limit = runtime.task.timeout
        clock: asyncio.Timeout | None = None
        try:
            try:
                if limit is None:
                    value = await runtime.fn(**work.kwargs)
                else:
                    async with asyncio.timeout(limit) as clock:
                        value = await runtime.fn(**work.kwargs)
                        # The timer of a blocked loop is late.
                        if self.overdue_on_loop is work and _monotonic() - work.began >= limit:
                            work.interrupted = TaskTimedOut
                            raise TaskTimedOut
            except BaseException as error:  # noqa: BLE001  # SystemExit and cancellations end only the job
                if forks.depth != self._depth:  # the code has forked, and this is the child
                    forks.left(error)
                context.ended = True
                if not work.abandoned:
                    self._recorder.raised(
                        work, error, clock is not None and (clock.expired() or work.interrupted is TaskTimedOut)
                    )
            else:
                if forks.depth != self._depth:
                    forks.left(None)
                context.ended = True
                self._recorder.returned(work, value)
        except BaseException as broken:  # noqa: BLE001  # whatever fails, the slot must become free
            self._unjudged(work, broken)
        work.handle = None
        self._reports.ended(work)

    def start_threads(self, count: int) -> None:
        """Start the pool of ``count`` threads. The threads are daemons, because a function that never ends must not
        keep the process alive. On the event loop."""
        self.interrupts.loop = asyncio.get_running_loop()
        for n in range(count):
            thread = threading.Thread(target=self._serve, name=f"jobledger-job-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, work: JobRun) -> None:
        """Queue a job's plain function for the next free thread."""
        self._queue.put(work)

    def close(self) -> None:
        """Tell the threads to end, after the jobs that they were given."""
        for _ in self._threads:
            self._queue.put(None)

    def _may_begin(self, work: JobRun) -> bool:
        if self._running_jobs.may_begin(work):
            return True
        work.handle = None
        self._reports.ask(Asked.UNCERTAIN, work)
        return False

    def _serve(self) -> None:
        AWAIT.set(self.interrupts.wait)
        while (work := self._queue.get()) is not None:
            partition = work.partition
            lease = work.lease or partition.lease
            if (work.abandoned or partition.gone or _monotonic() > lease.until) and not self._may_begin(work):
                continue  # as in `run`
            contextvars.copy_context().run(self._run_here, work)
            self._reports.ended_in_thread(work)

    def _run_here(self, work: JobRun) -> None:
        context = _enter(work)
        assert work.runtime is not None
        try:
            try:
                value = self.interrupts.call(work)
            except BaseException as error:  # noqa: BLE001  # as for coroutines
                context.ended = True
                if not work.abandoned:
                    self._recorder.raised(work, error, work.interrupted is TaskTimedOut)
            else:
                context.ended = True
                self._recorder.returned(work, value)
        except BaseException as broken:  # noqa: BLE001  # whatever fails, the thread must continue
            self._unjudged(work, broken)

    def _unjudged(self, work: JobRun, broken: BaseException) -> None:
        """Fail a job whose result or exception could not be turned into an outcome."""
        try:
            self._recorder.close_with(work, Failed("never", error_info(broken)))
        except BaseException as exc:  # noqa: BLE001  # as in `close_with`
            self._recorder.fail_unwritten(work, exc)

    def late(self, work: JobRun) -> None:
        """Interrupt a function in a thread, because the function's time limit is over."""
        self.interrupts.interrupt(work, TaskTimedOut)


def _enter(work: JobRun) -> JobContext:
    """Make the job the current one, and return its context. Also remove the context from the `JobRun`, because the
    context refers to the `JobRun`. Python frees such a reference cycle only when its garbage collector runs, so memory
    would grow without limit at tens of thousands of jobs a second."""
    context, work.context = work.context, None
    assert context is not None
    enter(context)
    return context


def context_of(work: JobRun, *, reports: bool = True) -> JobContext:
    """Return the context through which the task's code sees its job. Without ``reports``: the context for hooks, which
    cannot report progress."""
    event = work.event
    assert event is not None
    spec: JobSpec = event.fact.spec  # type: ignore[union-attr]  # a record of a work topic
    tags = spec.tags
    if UNKNOWN_TASK_TAG in tags or CRASHES_TAG in tags:
        tags = users_tags(tags)
    return JobContext(
        job_id=event.job_id,
        task=event.task,
        queue=event.queue,
        run=event.run,
        attempt=event.attempt,
        release=event.release,
        tags=tags,
        parent=spec.parent,
        trace=event.trace,
        report=work.report if reports else None,
    )
