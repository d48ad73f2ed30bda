"""Run a job's code on the event loop, in a thread or in a child process, and isolate jobs that may end a process.

A job that may have ended a process is a *suspect*. The next `JobStarted` of a suspect is acknowledged before its code
runs, and the code runs in a child process whose end this worker sees. After `CRASHES` starts without an outcome, the
last of them in such a child process, the job fails as ``crashed``. The other jobs run in other processes and are not
affected.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from functools import partial

from jobledger.consumers.isolation.pool import ChildPool
from jobledger.consumers.running.executor import Executor, context_of
from jobledger.consumers.state.limiters import Slots
from jobledger.consumers.state.outcome import Failed, Outcome, Succeeded
from jobledger.consumers.state.work import JobRun, TaskRuntime
from jobledger.process.logger import get_logger
from jobledger.schemas.events import ErrorInfo

LOG = get_logger("jobledger.worker")

#: Number of starts without an outcome after which a job fails as ``crashed``, if this worker saw the end of the process
#: of the last start, or if child processes are not available.
CRASHES = 3
#: The same number if child processes are available and no worker saw such an end: the workers themselves died, perhaps
#: of another cause.
UNSEEN_CRASHES = 10
#: Number of starts without an outcome from which on suspects run one at a time. If the operating system kills a worker
#: and its child processes together, to free memory, each job that ran there seems to be the cause.
ALONE_FROM = 3
#: Number of suspects that run at once, each in an additional child process.
SUSPECTS = 16
#: Seconds until the worker checks again whether a job is still its own.
AGAIN_S = 0.1

_monotonic = time.monotonic


class Placement:
    """Run begun jobs on the event loop, in threads or in child processes. On the event loop, except `may_begin`.

    ``children``: None if the app cannot have child processes. ``begin_again(work)``: send the job's `JobStarted` again,
    and run the job. ``done(work)``: free the job's slots. ``ours(work)``: whether this worker should run the job.
    ``certain(work)``: whether it is certain that no other worker has taken the job over. ``call``: run a function on
    the loop; an exception in the function stops the worker.

    A suspect is *waiting* until its code is given to a child process. If its partition is handed over before that, the
    next owner runs the suspect.
    """

    def __init__(
        self,
        executor: Executor,
        threads: Slots,
        processes: Slots,
        children: ChildPool | None,
        *,
        begin_again: Callable[[JobRun], None],
        done: Callable[[JobRun], None],
        ours: Callable[[JobRun], bool],
        certain: Callable[[JobRun], bool],
        call: Callable[..., None],
    ) -> None:
        self.executor, self.threads, self.processes = executor, threads, processes
        self.alone = Slots("alone", 1)  # see `ALONE_FROM`
        self.suspects = Slots("suspects", SUSPECTS)
        self.rooms = {room.name: room for room in (threads, processes, self.alone, self.suspects)}
        self.children = children
        self._begin_again, self._done, self._ours, self._certain = begin_again, done, ours, certain
        self._call = call
        self._base = contextvars.copy_context()  # see `Starter.base`
        self.loop: asyncio.AbstractEventLoop

    @property
    def _usable(self) -> bool:
        """Whether child processes are available."""
        return self.children is not None and self.children.broken is None

    def room_of(self, work: JobRun, plan: TaskRuntime) -> Slots | None:
        """Return the slots in which the job's code must run. None: the code runs on the event loop, which has no limit
        of its own."""
        if work.suspect and self._usable:
            return self.alone if work.takeover >= ALONE_FROM else self.suspects
        return plan.room

    def crashed(self, starts: int) -> Failed | None:
        """Return the failure of a job whose code was started ``starts`` times without an outcome. None: the job may
        run."""
        most = UNSEEN_CRASHES if self._usable else CRASHES
        if starts < most:
            return None
        message = (
            f"its code was started {starts} times and never finished: each time the worker process died or stopped "
            "responding; that process's log has its last output"
        )
        return Failed("crashed", ErrorInfo("ProcessDied", message))

    def go(self, work: JobRun) -> None:
        """Run the code of a job that was begun. A suspect, or a job that has waited for a child process, runs only if
        the job is still this worker's."""
        plan, room = work.plan, work.room
        assert plan is not None
        if room is not None and room is not self.threads:
            assert self.children is not None
            self.children.run(work)
        elif work.suspect and not self.take(work):
            return
        elif room is None:
            work.handle = self.loop.create_task(self.executor.run(work), context=self._base.copy())
        elif room is self.threads:
            if plan.task.timeout is not None:
                work.timer = self.loop.call_later(plan.task.timeout, self.executor.late, work)
            self.executor.submit(work)

    def take(self, work: JobRun) -> bool:
        """Return whether the code of a job may run now, after the job has waited for a child process or for the
        acknowledgement of its start."""
        lease = work.lease or work.partition.lease
        if (  # if none of these is true, the job may start; else `_may_start` decides
            work.suspect
            or work.abandoned
            or work.partition.gone
            or work.stop_outcome is not None
            or _monotonic() > lease.until
        ) and not self._may_start(work, self.go):
            return False
        if work.suspect:
            work.waiting = work.partition.taking = False
            work.began = _monotonic()
        return True

    def may_begin(self, work: JobRun) -> bool:
        """Return whether a job's code may begin on the loop or in the thread to which the job was passed. Any thread.

        Call this if the job may no longer be this worker's: the job was abandoned, its partition was lost, or the lease
        is over. A long job is this worker's as long as the worker holds the job lease. If the code may not begin, the
        job is dropped, or is started again when the group has confirmed the partition.
        """
        if not work.abandoned and self._certain(work) and (work.lease is None or self._ours(work)):
            return True
        work.handle = None
        self._call(self._begin_later, work)
        return False

    def _begin_later(self, work: JobRun) -> None:
        if work.timer is not None:
            work.timer.cancel()
            work.timer = None
        work.interrupted = None  # a timer may have fired while the process was paused
        if work.suspect:
            work.waiting = True  # a hand-over need not wait for this job
            self.go(work)
        elif self._may_start(work, self._begin_later):
            work.began = _monotonic()  # the pause does not count as running time
            self.go(work)

    def _may_start(self, work: JobRun, again: Callable[[JobRun], None]) -> bool:
        """Return whether a job that waited may start now.

        A job that this worker may not run any more is dropped. A job that was cancelled while it waited is closed. If it is
        not known whether the job is still this worker's, because the worker was paused or has lost the broker,
        ``again(work)`` is called after `AGAIN_S` seconds. For a suspect without a job lease, True also claims the right
        to take records (`Partition.begin_taking`), because the suspect's partition may be handed over at any time.
        """
        if work.abandoned or not self._ours(work):
            self._drop(work)
        elif not self._certain(work):
            self.loop.call_later(AGAIN_S, self._call, again, work)
        elif work.stop_outcome is not None:  # cancelled while it waited
            self.executor.close_with(work, work.stop_outcome)
            self._done(work)
        elif work.suspect and work.lease is None and not work.partition.begin_taking():
            self._drop(work)
        else:
            return True
        return False

    def _drop(self, work: JobRun) -> None:
        """Leave a job to its next owner: free the job's slots, and give back its job lease."""
        if work.lease is not None:
            work.lease.leases.give_back(work)
        work.abandoned = True  # the job has no outcome; without this mark, that would count as a success
        self._done(work)

    def sweep(self) -> None:
        """Drop the jobs that wait for a child process and are no longer this worker's, because partitions were given up
        or the worker takes no more jobs."""
        if self.children is not None:
            for work in self.children.forget(lambda work: not self._ours(work)):
                self._drop(work)

    # -- reports from children ----------------------------------------------------------------------------------------

    def said(self, work: JobRun, outcome: Outcome) -> None:
        """Record the outcome of code that ended in a child process."""
        if not work.abandoned:
            if isinstance(outcome, Succeeded):
                self.executor.succeeded(work, outcome.result)
            else:
                self.executor.close_with(work, work.stop_outcome or outcome)
        self._done(work)

    def ended(self, work: JobRun, why: str, error: BaseException) -> None:
        """Record the outcome of a job that this worker ended in a child process. ``why``: ``timeout``, ``memory`` or
        ``stop``. A job that was stopped without an outcome gets none."""
        if not work.abandoned:
            if work.stop_outcome is not None:
                self.executor.close_with(work, work.stop_outcome)
            elif why != "stop":
                self.executor.raised(work, error, why == "timeout")
        self._done(work)

    def died(self, work: JobRun, error: ErrorInfo, blamed: bool) -> None:
        """Run a job again whose process ended by itself. After `CRASHES` starts without an outcome the job fails.
        ``blamed`` is False if the process ended for another reason, or no process was available."""
        event, plan = work.event, work.plan
        assert event is not None
        assert plan is not None
        work.takeover += blamed
        if work.abandoned:
            self._done(work)
        elif work.stop_outcome is not None:
            self.executor.close_with(work, work.stop_outcome)
            self._done(work)
        elif blamed and work.takeover >= CRASHES:
            self.executor.close_with(work, Failed("crashed", error))
            self._done(work)
        elif plan.room is self.processes and not self._usable:
            self._drop(work)  # the job's next owner finds the starts in the log
        else:
            if not self._usable:
                self._move(work, plan.room)  # the task's usual slots; a worker with isolated tasks stops
            work.suspect = work.waiting = True
            starts = work.takeover + (not blamed)
            said = f"job {event.job_id} ({event.task}), started {starts} times, is started again: {error.message}"
            self._start_again(said, work)

    def _start_again(self, said: str, work: JobRun) -> None:
        """Start a job again whose process died, if the job is still this worker's. If not, the job's next owner finds
        the starts in the log. ``said``: the message to log."""
        if self._may_start(work, partial(self._start_again, said)):
            LOG.warning("%s", said)
            work.began = _monotonic()
            work.context = context_of(work)
            try:
                self._begin_again(work)
            finally:
                work.partition.taking = False

    @staticmethod
    def _move(work: JobRun, room: Slots | None) -> None:
        if work.room is not None:
            work.room.running -= 1
        work.room = room
        if room is not None:
            room.running += 1

    def give_up(self, work: JobRun) -> None:
        """End running code whose outcome is no longer wanted."""
        if self.children is not None and self.children.holds(work):
            self.children.abandoned(work)
        else:
            self.executor.end(work)

    def stop(self, work: JobRun) -> None:
        """Ask a job in a child process to end."""
        if self.children is not None:
            self.children.stop(work)
