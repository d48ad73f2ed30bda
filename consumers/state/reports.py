"""Carries reports from the parts of a worker that run jobs and record outcomes to the dispatcher, which acts on them.

So these parts do not know the dispatcher, and the dispatcher acts at one point only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from jobledger.consumers.state.event_loop import LoopCalls
from jobledger.consumers.state.work import Arrived, JobRun


class Asked(Enum):
    """What the dispatcher must decide about a job."""

    LEASED = auto()  # both facts of the job's lease are in the log: begin the job's code
    LEASE_LOST = auto()  # the lease is over: end the job's code
    UNCERTAIN = auto()  # the code was not begun, because the job may be another worker's: drop it, or begin it later


class Reports:
    """Holds reports until the dispatcher's next pass.

    ``calls``: the worker's event loop. The dispatcher sets `on_wake`, its pass over all reports, and `on_drain`, which
    takes the delivery reports that have arrived.
    """

    def __init__(self, calls: LoopCalls) -> None:
        self.calls = calls
        #: Delivery reports that the ack tracker has not taken yet.
        self.arrived = Arrived()
        #: Jobs that ended, or are not begun after all.
        self.finished: deque[JobRun] = deque()
        #: Keyed jobs whose attempt's last fact is acknowledged.
        self.acknowledged: deque[JobRun] = deque()
        #: Jobs about which the dispatcher must decide.
        self.asked: deque[tuple[Asked, JobRun]] = deque()
        #: Whether a pass is scheduled.
        self.awake = False
        self.on_wake: Callable[[], None]
        self.on_drain: Callable[[], None]
        self._alarm: tuple[float, asyncio.TimerHandle] | None = None

    def wake(self) -> None:
        """Schedule a pass of the dispatcher, unless one is scheduled already. Any thread."""
        if not self.awake:
            self.awake = True
            self.calls.call(self.on_wake)

    def wake_soon(self) -> None:
        """Do the same as `wake`, but only on the loop, where no system call is needed."""
        if not self.awake:
            self.awake = True
            self.calls.soon(self.on_wake)

    def wake_in(self, seconds: float | None) -> None:
        """Call `wake` after ``seconds`` seconds, when a gate may have opened. None: do nothing. On the loop."""
        if seconds is None:
            return
        at = self.calls.loop.time() + max(seconds, 0.001)
        if self._alarm is not None:
            if self._alarm[0] <= at:
                return
            self._alarm[1].cancel()
        self._alarm = (at, self.calls.loop.call_at(at, self._alarmed))

    def _alarmed(self) -> None:
        self._alarm = None
        self.wake()

    def ended(self, work: JobRun) -> None:
        """Report that a job has ended, or is not begun after all. On the loop."""
        self.finished.append(work)
        if not self.awake:  # as in `wake_soon`, without a call: this is done for each job
            self.awake = True
            self.calls.soon(self.on_wake)

    def ended_in_thread(self, work: JobRun) -> None:
        """Report that a job has ended in a thread. Any thread."""
        self.finished.append(work)
        self.wake()

    def attempt_acknowledged(self, work: JobRun) -> None:
        """Report that the last fact of a keyed job's attempt is acknowledged. Any thread."""
        self.acknowledged.append(work)
        self.wake()

    def ask(self, what: Asked, work: JobRun) -> None:
        """Let the dispatcher decide about a job. Any thread."""
        self.asked.append((what, work))
        self.wake()

    def drain_soon(self) -> None:
        """Request that the delivery reports that have arrived are taken soon. Any thread."""
        self.calls.call(self.on_drain)
