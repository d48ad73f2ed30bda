"""Watches the event loop: logs code that blocks the loop, ends blocking jobs at their time limit, and collects garbage.

`LoopWatch` describes how it watches; `jobledger.consumers.isolation.garbage` describes when garbage is collected.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
import traceback
from types import CodeType, FrameType

from jobledger.consumers.isolation.garbage import Garbage
from jobledger.consumers.running.executor import Executor
from jobledger.consumers.running.interrupts import AWAITED
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.work import JobRun
from jobledger.definitions.functions import runs_inside
from jobledger.errors import TaskTimedOut
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

#: Seconds between two beats of the loop, and between two checks of the count of beats.
BEAT_S, LOOK_S = 0.1, 0.25
#: Seconds without a beat after which the blocking code is logged. A job whose time limit is over is logged at once.
WARN_S = 1.0
#: Number of beats in a row, without a running or new job, after which a worker counts as idle.
IDLE_BEATS = 10

#: This signal has no effect while no handler is set, so a signal that arrives late does no harm.
SIGNAL: signal.Signals | None = getattr(signal, "SIGURG", None)


class LoopWatch(threading.Thread):
    """Watches the loop on which `begin` is called.

    A timer on the loop counts beats, and this thread reads the count. If the count stays the same, code on the loop
    does not return control. The thread logs the stack of that code, once for each job in a blocked period. If the code
    belongs to a job whose time limit is over, the thread sends a signal to the loop's thread. The signal handler raises
    `TaskTimedOut` if, and only if, it interrupts that job's code. Where this is not possible (the loop is not in the
    main thread, there is no such signal, C code does not return), the job times out when its code returns control.
    """

    def __init__(self, executor: Executor, running_jobs: RunningJobs) -> None:
        super().__init__(name="jobledger-loop-watch", daemon=True)
        self._executor, self._running_jobs = executor, running_jobs
        self._garbage = Garbage()
        self._beats = self._quiet = self._begun = 0
        self._closed = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle | None = None
        self._thread_id = 0
        self._signals = False
        #: Times that code other than a task's blocked the loop: hooks, resources, asyncio tasks that a job started.
        self.blocked_by_others = 0

    # -- on the loop --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start watching the running loop of this thread."""
        self._loop, self._thread_id = asyncio.get_running_loop(), threading.get_ident()
        if (
            SIGNAL is not None
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(SIGNAL) is signal.SIG_DFL  # otherwise the app uses the signal
        ):
            signal.signal(SIGNAL, self._interrupt)
            self._signals = True
        self._beat()
        self.start()

    def close(self) -> None:
        """Stop watching. Call this in the thread that called `begin`; the loop may have ended by then."""
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._signals:
            assert SIGNAL is not None
            self._signals = False
            signal.signal(SIGNAL, signal.SIG_DFL)

    def _beat(self) -> None:
        self._beats += 1
        self._executor.overdue_on_loop = None  # the code returned control
        begun = self._running_jobs.begun
        self._quiet = self._quiet + 1 if begun == self._begun and not self._running_jobs.jobs else 0
        self._begun = begun
        self._garbage.look(idle=self._quiet >= IDLE_BEATS)
        if not self._closed.is_set():
            self._timer = self._loop.call_later(BEAT_S, self._beat)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle `SIGNAL`, between two bytecodes of the loop's thread. Raises `TaskTimedOut` in the code of the job
        whose time limit is over."""
        work = self._executor.overdue_on_loop
        if work is None or work.runtime is None or asyncio.current_task(self._loop) is not work.handle:
            return
        # The job's code may have returned just before the thread chose the job: then this may be its next attempt.
        if self._overdue(work) and runs_inside(frame, RUN, work.runtime.fn):
            self._executor.overdue_on_loop = None
            work.interrupted = TaskTimedOut
            raise TaskTimedOut

    # -- in the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Check the beats until closed."""
        # Count checks without a beat, not seconds of a clock: the whole process may have been suspended.
        seen, late, own = 0, 0.0, 0.0
        blocker: JobRun | None = None
        logged: set[JobRun | None] = set()
        while not self._closed.wait(LOOK_S):
            beats = self._beats
            if beats != seen:
                seen, late, own, blocker = beats, 0.0, 0.0, None
                logged.clear()
                continue
            work = self._work()
            late, own, blocker = late + LOOK_S, own + LOOK_S if work is blocker else LOOK_S, work
            overdue = work is not None and self._overdue(work)
            # Several jobs may run in the time without a beat. Log the job that runs when `WARN_S` is over, and each
            # further job that blocks the loop for `WARN_S` by itself.
            if overdue or (own if logged else late) >= WARN_S:
                self._tell_once(work, late if work is None else own, logged)
            if overdue:
                self._end(work)

    def _work(self) -> JobRun | None:
        """Return the job whose code runs on the loop now; None for other code."""
        task = asyncio.current_task(self._loop)
        if task is None:
            return None
        job_run = next((work for work in list(self._running_jobs.jobs) if work.handle is task), None)
        return job_run or self._executor.interrupts.work_of(task)

    @staticmethod
    def _overdue(work: JobRun) -> bool:
        # Without a handle, it is the coroutine of a plain function: its thread is interrupted instead.
        if work.runtime is None or work.handle is None:
            return False
        limit = work.runtime.task.timeout
        return limit is not None and work.interrupted is None and time.monotonic() - work.began >= limit

    def _end(self, work: JobRun | None) -> None:
        self._executor.overdue_on_loop = work
        if self._signals:
            assert SIGNAL is not None
            signal.pthread_kill(self._thread_id, SIGNAL)

    def _tell_once(self, work: JobRun | None, seconds: float, logged: set[JobRun | None]) -> None:
        if work in logged:
            return
        try:
            if self._tell(work, seconds):
                logged.add(work)
        except Exception:
            LOG.exception("the code that blocks the event loop could not be determined")
            logged.add(work)

    def _tell(self, work: JobRun | None, seconds: float) -> bool:
        """Log the code that blocks the loop, and return True; return False if there is no such code now. ``seconds``:
        for how long the job ``work`` has blocked the loop; None: for how long there was no beat."""
        frame = sys._current_frames().get(self._thread_id)
        caller = None if work is None else AWAITED if work.handle is None else RUN
        stack = [] if frame is None else _above(frame, caller)
        if not stack:
            return False  # no Python code runs there, or no longer this job's code: the loop may wait for the CPU
        where = "".join(traceback.format_list(stack)).rstrip()
        if work is None or work.runtime is None or work.event is None:
            self.blocked_by_others += 1
            LOG.warning(
                "the event loop is blocked for %.1f s: no coroutine of this worker continues until this returns\n%s",
                seconds,
                where,
            )
            return True
        work.runtime.blocked += 1
        LOG.warning(
            "task %s blocks the event loop: job %s has not awaited anything for %.1f s, and no other coroutine of this worker "
            "can run. Await what takes time, or make it a plain function (def), which runs in a thread\n%s",
            work.runtime.name,
            work.event.job_id,
            seconds,
            where,
            extra={"job_id": work.event.job_id, "task": work.runtime.name},
        )
        return True


#: The code object that calls the function of a coroutine task, and the code object that calls all code on the loop.
RUN: CodeType = Executor.run.__code__
RUNNER: CodeType = asyncio.Runner.run.__code__


def _above(frame: FrameType, caller: CodeType | None) -> list[traceback.FrameSummary]:
    """Return the stack from the function that ``caller`` (None: the loop's runner) calls up to ``frame``. Return an
    empty list if ``caller`` is not among the callers of ``frame``."""
    frames: list[tuple[FrameType, int]] = []
    at: FrameType | None = frame
    while at is not None and at.f_code is not (caller or RUNNER):
        frames.append((at, at.f_lineno))
        at = at.f_back
    return [] if at is None else list(traceback.StackSummary.extract(reversed(frames)))
