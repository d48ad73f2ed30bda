"""Run a job's code on the event loop, in a thread or in a child process, and isolate jobs that may end a process.

A job that may have ended a process is a *suspect*. Its next start is acknowledged in the log before its code runs, and
the code runs in a child process whose end this worker sees. After `CRASHES` starts without an outcome, the last one in
such a child, the job fails as ``crashed``. The jobs beside it are in other processes, and do not suffer.
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

#: Starts without an outcome after which a job fails as ``crashed``, if the last of them was in a process whose end was
#: seen, or if child processes are not available.
CRASHES = 3
#: The same, if child processes are available, and no end was seen: the workers themselves died, perhaps of another cause.
UNSEEN_CRASHES = 10
#: Starts without an outcome from which on suspects run one at a time. If the system ends a worker and its children
#: together, to free memory, all jobs that ran would be blamed.
ALONE_FROM = 3
#: Suspects that run at once, each in an additional child.
SUSPECTS = 16
#: Seconds until the worker checks again whether the job is still its own.
AGAIN_S = 0.1

_monotonic = time.monotonic


class Placement:
    """Send begun jobs to where they run. On the event loop.

    ``begin_again(work)``: send the job's start once more, and run it. ``done(work)``: free its room and slot.
    ``ours(work)``: whether this worker is to run it. ``certain(work)``: whether surely no other worker has taken it
    over. ``call``: run a function on the loop; an exception in it ends the worker.

    A suspect is *waiting* until its code is given to a child. If its partition is handed over meanwhile, the next owner
    runs it.
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
        """Return the room where the job is to run; None: on the event loop without a limit."""
        if work.suspect and self._usable:
            return self.alone if work.takeover >= ALONE_FROM else self.suspects
        return plan.room

    def crashed(self, starts: int) -> Failed | None:
        """Return the failure of a job whose code was started ``starts`` times without an outcome; None: it may run."""
        most = UNSEEN_CRASHES if self._usable else CRASHES
        if starts < most:
            return None
        message = (
            f"its code was started {starts} times and never finished: each time the worker process died or stopped "
            "responding; that process's log has its last output"
        )
        return Failed("crashed", ErrorInfo("ProcessDied", message))

    def go(self, work: JobRun) -> None:
        """Run the code of a job that was begun. A suspect, or a job that has waited for a child, runs only if it is
        still this worker's."""
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
        """Return whether the code of a job may run now that has waited for a child, or for its start's
        acknowledgement."""
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
        """Return whether code may begin that was handed to the loop or a thread, and whose job may not be this worker's
        any more: it was abandoned, the partition was lost, or the ownership lease is over. A long job is this worker's
        as long as it holds the job's own lease.

        If it may not, the job is dropped, or started again once the group has confirmed the partition. Any thread.
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
        work.interrupted = None  # of a timer that ran out while the process was paused
        if work.suspect:
            work.waiting = True  # a hand-over need not wait for it
            self.go(work)
        elif self._may_start(work, self._begin_later):
            work.began = _monotonic()  # the pause is no part of its time
            self.go(work)

    def _may_start(self, work: JobRun, again: Callable[[JobRun], None]) -> bool:
        """Return whether a job that waited may start now.

        If it may not, it is dropped, or closed if it was cancelled while it waited. If that is not known, because the
        worker was paused or has lost the broker, ``again(work)`` is called later. For a suspect without a lease this
        claims the right to take records up (`Partition.begin_taking`), because its partition may be handed over at any
        time.
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
        """Leave a job to its next owner: free its room and slot, and give back its own lease."""
        if work.lease is not None:
            work.lease.leases.give_back(work)
        work.abandoned = True  # it has no outcome, and without this mark that would count as a success
        self._done(work)

    def sweep(self) -> None:
        """Drop the jobs that wait for a child and are no longer this worker's: partitions were given up, or the worker
        takes no more jobs."""
        if self.children is not None:
            for work in self.children.forget(lambda work: not self._ours(work)):
                self._drop(work)

    # -- reports from children ----------------------------------------------------------------------------------------

    def said(self, work: JobRun, outcome: Outcome) -> None:
        """Record the outcome of code that ended in a child."""
        if not work.abandoned:
            if isinstance(outcome, Succeeded):
                self.executor.succeeded(work, outcome.result)
            else:
                self.executor.close_with(work, work.stop_outcome or outcome)
        self._done(work)

    def ended(self, work: JobRun, why: str, error: BaseException) -> None:
        """Record the outcome of a job whose process this worker ended."""
        if not work.abandoned:
            if work.stop_outcome is not None:
                self.executor.close_with(work, work.stop_outcome)
            elif why != "stop":
                self.executor.raised(work, error, why == "timeout")
        self._done(work)

    def died(self, work: JobRun, error: ErrorInfo, blamed: bool) -> None:
        """Run a job again whose process ended by itself; after `CRASHES` such ends it fails. Not ``blamed``: the
        process ended of another cause, or no process was available."""
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
            self._drop(work)  # its next owner finds the starts in the log
        else:
            if not self._usable:
                self._move(work, plan.room)  # where it would have run at first; an isolated task ends the worker
            work.suspect = work.waiting = True
            starts = work.takeover + (not blamed)
            said = f"job {event.job_id} ({event.task}), started {starts} times, is started again: {error.message}"
            self._start_again(said, work)

    def _start_again(self, said: str, work: JobRun) -> None:
        """Start a job again whose process died, if it is still this worker's. If not, its next owner finds its starts
        in the log."""
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
        """End running code whose outcome is not wanted any more."""
        if self.children is not None and self.children.holds(work):
            self.children.abandoned(work)
        else:
            self.executor.end(work)

    def stop(self, work: JobRun) -> None:
        """Ask a job in a child to end."""
        if self.children is not None:
            self.children.stop(work)
