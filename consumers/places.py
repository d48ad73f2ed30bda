"""Where a job's code runs: the event loop, a thread, a child process; and what is done with jobs that may kill.

A job that may have taken a process down with it is a *suspect*: its next start stands in the log, acknowledged, before
its code runs, and the code runs in a child process, whose end this worker sees. `CRASHES` ends without a word and it is
failed as ``crashed``; jobs beside it are in other processes, and suffer nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from functools import partial

from jobledger.consumers.children import Children
from jobledger.consumers.execute import Executor, context_of
from jobledger.consumers.gates import Room
from jobledger.consumers.outcome import Failed, Outcome, Succeeded
from jobledger.consumers.work import Plan, Work
from jobledger.logger import get_logger
from jobledger.schemas.events import ErrorInfo

LOG = get_logger("jobledger.worker")

#: Starts without an end after which a job is failed as ``crashed``, if the last of them was in
#: a process whose end was seen.
CRASHES = 3
#: The same, if nobody saw the ends: the workers themselves died, perhaps of something else.
UNSEEN_CRASHES = 10
#: Starts without an end from which on a suspect is run when no other is: what ends a worker and its children together
#: (the system, for their memory) would be blamed on all that ran.
ALONE_FROM = 3
#: Suspects that are run at once, in as many children more.
SUSPECTS = 16
#: Seconds until it is asked again whether a job is still ours.
AGAIN_S = 0.1


class Places:
    """Sends begun jobs to where they run. On the event loop.

    ``begin_again(work)``: says that it starts once more. ``done(work)``: its room and slot are free. ``ours(work)``:
    this worker is to run it; ``certain(work)``: and no other can have taken it over, as far as is known at this moment.
    ``call``: runs a function on the loop; what it raises ends the worker.

    A suspect is *waiting* until its code is given to a child: its partition can be handed over meanwhile, and then the
    next owner runs it.
    """

    def __init__(
        self,
        executor: Executor,
        threads: Room,
        processes: Room,
        children: Children | None,
        *,
        begin_again: Callable[[Work], None],
        done: Callable[[Work], None],
        ours: Callable[[Work], bool],
        certain: Callable[[Work], bool],
        call: Callable[..., None],
    ) -> None:
        self.executor, self.threads, self.processes = executor, threads, processes
        self.alone = Room("alone", 1)  # see `ALONE_FROM`
        self.suspects = Room("suspects", SUSPECTS)
        self.children = children
        self._begin_again, self._done, self._ours, self._certain = begin_again, done, ours, certain
        self._call = call
        self._base = contextvars.copy_context()  # as of `Starter.base`
        self.loop: asyncio.AbstractEventLoop

    @property
    def _usable(self) -> bool:
        """Whether there are child processes to be had."""
        return self.children is not None and self.children.broken is None

    @property
    def rooms(self) -> list[Room]:
        """All of them."""
        return [self.threads, self.processes, self.alone, self.suspects]

    def room_of(self, work: Work, plan: Plan) -> Room | None:
        """Where the job is to run; None: on the event loop."""
        if work.suspect and self._usable:
            return self.alone if work.takeover >= ALONE_FROM else self.suspects
        return plan.room

    def crashed(self, starts: int) -> Failed | None:
        """What becomes of a job whose code was started so often without an end, as the log tells; None: it is run."""
        most = UNSEEN_CRASHES if self._usable else CRASHES
        if starts < most:
            return None
        said = (
            f"its code was started {starts} times and never came to an end: each time the worker process died, or stood "
            "still; what it said last is in that process's log"
        )
        return Failed("crashed", ErrorInfo("ProcessDied", said))

    def go(self, work: Work) -> None:
        """Run the code of a job that was begun; of a suspect, and in a child, only if it is still ours."""
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

    def take(self, work: Work) -> bool:
        """Whether a job's code may be run now that has waited for a child, or for its start to be acknowledged."""
        if not self._may_start(work, self.go):
            return False
        if work.suspect:
            work.waiting = work.partition.taking = False
        return True

    def _may_start(self, work: Work, again: Callable[[Work], None]) -> bool:
        """Whether a job that waited may be started now. If it may not, its room and slot are free; if that is not known,
        because the worker was paused or has lost the broker, ``again(work)`` is called later. Of a suspect's partition the
        right to take up is claimed (`Partition.begin_taking`): it may be handed over at any time."""
        if work.abandoned or not self._ours(work):
            self._done(work)
        elif not self._certain(work):
            self.loop.call_later(AGAIN_S, self._call, again, work)
        elif work.stop_outcome is not None:  # cancelled while it waited
            self.executor.close_with(work, work.stop_outcome)
            self._done(work)
        elif work.suspect and work.lease is None and not work.partition.begin_taking():
            self._done(work)
        else:
            return True
        return False

    def sweep(self) -> None:
        """Partitions were given up, or the worker takes nothing more: let go of what waits for a child."""
        if self.children is not None:
            for work in self.children.forget(lambda work: not self._ours(work)):
                self._done(work)

    # -- what children tell -------------------------------------------------------------------------------------------

    def said(self, work: Work, outcome: Outcome) -> None:
        """The code came to an end in a child."""
        if not work.abandoned:
            if isinstance(outcome, Succeeded):
                self.executor.succeeded(work, outcome.result)
            else:
                self.executor.close_with(work, work.stop_outcome or outcome)
        self._done(work)

    def ended(self, work: Work, why: str, error: BaseException) -> None:
        """Its process was ended by this worker."""
        if not work.abandoned:
            if work.stop_outcome is not None:
                self.executor.close_with(work, work.stop_outcome)
            elif why != "stop":
                self.executor.raised(work, error, why == "timeout")
        self._done(work)

    def died(self, work: Work, error: ErrorInfo, blamed: bool) -> None:
        """Its process ended by itself: it is run again, until it has done so for the third time. Not ``blamed``: the
        process ended of something else, or there was none to be had."""
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
            self._done(work)  # not done: whoever owns it next finds its starts
        else:
            if not self._usable:
                self._move(work, plan.room)  # where it would have run at first; an isolated task ends the worker
            work.suspect = work.waiting = True
            starts = work.takeover + (not blamed)
            said = f"job {event.job_id} ({event.task}), started {starts} times, is started again: {error.message}"
            self._start_again(said, work)

    def _start_again(self, said: str, work: Work) -> None:
        """Start a job again whose process died, if it is still ours; else whoever owns it next finds its starts."""
        if self._may_start(work, partial(self._start_again, said)):
            LOG.warning("%s", said)
            work.began = time.monotonic()
            work.context = context_of(work)
            try:
                self._begin_again(work)
            finally:
                work.partition.taking = False

    @staticmethod
    def _move(work: Work, room: Room | None) -> None:
        if work.room is not None:
            work.room.running -= 1
        work.room = room
        if room is not None:
            room.running += 1

    def give_up(self, work: Work) -> None:
        """Let running code end whose outcome nobody wants any more."""
        if self.children is not None and self.children.holds(work):
            self.children.abandoned(work)
        else:
            self.executor.end(work)

    def stop(self, work: Work) -> None:
        """Let a job in a child end."""
        if self.children is not None:
            self.children.stop(work)
