"""Where a job's code runs: the event loop, a thread, a child process; and what is done with jobs that may kill.

A job that may have taken a process down with it is a *suspect*: its next start stands in the log, acknowledged, before
its code runs, and the code runs in a child process, whose end this worker sees. `CRASHES` ends without a word and it is
failed as ``crashed``; jobs beside it are in other processes, and suffer nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from confluent_kafka import KafkaError, Message

from jobledger.consumers.children import Children
from jobledger.consumers.execute import Executor, context_of
from jobledger.consumers.gates import Room
from jobledger.consumers.outcome import Failed, Outcome, Succeeded
from jobledger.consumers.work import Plan, Work
from jobledger.errors import BrokerUnavailable, JobledgerError
from jobledger.schemas.events import ErrorInfo

LOG = logging.getLogger("jobledger.worker")

#: Starts without an end after which a job is failed as ``crashed``, if the last of them was in a process whose end was seen.
CRASHES = 3
#: The same, if nobody saw the ends: the workers themselves died, perhaps of something else.
UNSEEN_CRASHES = 10
#: Suspects that are begun at once.
SUSPECTS = 64
#: Seconds until it is asked again whether a job is still ours.
AGAIN_S = 0.1


class Places:
    """Sends begun jobs to where they run. On the event loop.

    ``begin_again(work)``: says that it starts once more. ``done(work)``: its room and slot are free. ``ours(work)``: this
    worker is to run it; ``certain(work)``: and no other can have taken it over, as far as is known at this moment.
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
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self.executor, self.threads, self.processes = executor, threads, processes
        #: Those that were there when a process died for the second time or more: one at a time.
        self.alone = Room("alone", 1)
        #: The others. More than there are children: while the starts of some are on their way to the log, others run.
        self.suspects = Room("suspects", SUSPECTS)
        self.children = children
        self._begin_again, self._done, self._ours, self._certain = begin_again, done, ours, certain
        self._call, self._fail = call, fail
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
            return self.alone if work.takeover >= 2 else self.suspects
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
        """Run the code of a job that was begun; of a suspect only if it is still ours."""
        plan, room = work.plan, work.room
        assert plan is not None
        if work.suspect and (work.abandoned or not self._ours(work)):
            self._done(work)
        elif work.suspect and not self._certain(work):
            self.loop.call_later(AGAIN_S, self.go, work)
        elif work.stop_outcome is not None and work.suspect:  # cancelled while its start was written
            self.executor.close_with(work, work.stop_outcome)
            self._done(work)
        elif room is None:
            work.handle = self.loop.create_task(self.executor.run(work))
        elif room is self.threads:
            if plan.task.timeout is not None:
                work.timer = self.loop.call_later(plan.task.timeout, self.executor.late, work)
            self.executor.submit(work)
        else:
            assert self.children is not None
            self.children.run(work)

    def start_noted(self, work: Work, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a suspect's `JobStarted`, in any thread."""
        if error is None:
            self._call(self._noted, work, message.offset() or 0)
        else:
            self._fail(
                BrokerUnavailable(
                    f"the start of job {work.event.job_id if work.event else '?'} could not be written ({error.str()}), and "
                    "it may not run without: it may have taken a process down before"
                )
            )

    def _noted(self, work: Work, lifecycle_offset: int) -> None:
        partition = work.partition
        if partition.offsets is not None:
            with partition.lock:  # the next owner shall find how often it was started
                partition.offsets.note(work.offset, lifecycle_offset)
        self.go(work)

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
        """Its process ended by itself: it is run again, until it has done so for the third time. Not ``blamed``: the process
        ended of something else, or there was none to be had."""
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
        elif not self._ours(work) or (plan.room is self.processes and not self._usable):
            self._done(work)  # not done: whoever owns it next finds its starts
        else:
            if not self._usable:
                self._move(work, plan.room)  # where it would have run at first; an isolated task ends the worker
            LOG.warning(
                "job %s (%s), started %d times, is started again: %s",
                event.job_id,
                event.task,
                work.takeover + (not blamed),
                error.message,
            )
            work.suspect = True
            work.began = time.monotonic()
            work.context = context_of(work)
            self._begin_again(work)

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

    def close_with_stop(self, work: Work) -> None:
        """A job that was to be begun, and was cancelled before, ends as that."""
        assert work.stop_outcome is not None
        self.executor.close_with(work, work.stop_outcome)

    def stop(self, work: Work) -> None:
        """Let a job in a child end."""
        if self.children is not None:
            self.children.stop(work)
