"""The child processes of a worker: kept warm, one job at a time in each, ended when a job will not end by itself.

Everything here runs on the worker's event loop. Whatever happens to a child, its worker lives and says what became of
the job: it timed out, took too much memory, was cancelled; or the process died of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from jobledger.config import Settings
from jobledger.consumers.child import LATE, STOP
from jobledger.consumers.frames import Run, frame
from jobledger.consumers.nursery_link import AGAIN_S, NurseryLink, Told
from jobledger.consumers.outcome import Outcome
from jobledger.consumers.process import Child, end_of, last_words
from jobledger.consumers.work import Work
from jobledger.errors import ConfigError, JobledgerError
from jobledger.logger import get_logger
from jobledger.schemas.events import ErrorInfo

LOG = get_logger("jobledger.worker")

#: Seconds that a job gets to clean up after it was told to end; then its process is killed.
SOFT_S = 5.0
#: Seconds after which a coroutine whose time is over, and that has not noticed, must be blocking its loop.
BLOCKED_S = 0.25
#: Seconds between two looks at the memory of children whose jobs have a limit.
WATCH_S = 0.05
#: Seconds to wait for how a child ended, once its connection has.
STATUS_S = 2.0
#: Share of ``max_memory`` from which on a child is replaced after its job: what it keeps would be the next one's.
REPLACE_AT = 0.8


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """``most``: children at once, and ``spare`` more while jobs wait for one. ``jobs_each``: after so many jobs a child
    is replaced. ``target``: see `target.find_target`."""

    most: int
    spare: int
    jobs_each: int
    target: str
    settings: Settings


class Children:
    """The pool. ``said(work, outcome)``: a job's code came to that. ``died(work, error, blamed)``: its process
    did, of it unless it is not ``blamed``. ``ended(work, why, error)``: we ended it, ``why``: ``timeout``,
    ``memory`` or ``stop``. Each of these three frees the child and is told once for each `run`. ``take(work)`` is
    asked when a child is free for it: False if it is not to be run, and then none of the three is told.
    ``unusable(error)``: there can be no children.
    """

    def __init__(
        self,
        about: ChildSettings,
        *,
        take: Callable[[Work], bool],
        said: Callable[[Work, Outcome], None],
        died: Callable[[Work, ErrorInfo, bool], None],
        ended: Callable[[Work, str, BaseException], None],
        unusable: Callable[[JobledgerError], None],
    ) -> None:
        self._about = about
        self._take, self._on_said, self._on_died, self._on_ended, self._unusable = take, said, died, ended, unusable
        self._loop: asyncio.AbstractEventLoop
        tell = Told(self._use, self._has_died, self._nursery_gone, self._nursery_again, self._none)
        self._nursery = NurseryLink(about.target, about.settings, tell)
        self._all: set[Child] = set()
        self._idle: list[Child] = []
        self._waiting: deque[Work] = deque()
        self._of: dict[Work, Child] = {}
        self._watched: set[Child] = set()
        self._closing = False
        self.deaths = self.killed = 0
        self.broken: JobledgerError | None = None

    # -- from outside -------------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Start the nursery and all children now, so that the first jobs need not wait."""
        self._loop = asyncio.get_running_loop()
        self._nursery.start()
        for _ in range(self._about.most):
            self._hatch()

    @property
    def count(self) -> int:
        """Children there are."""
        return len(self._all)

    def run(self, work: Work) -> None:
        """Run the attempt in a child, as soon as one is free."""
        if self.broken is not None:
            self._on_died(work, ErrorInfo("ChildProcessError", str(self.broken)), False)
            return
        if not self._nursery.running:
            self._loop = asyncio.get_running_loop()
            self._nursery.start()
        if self._idle:
            if self._take(work):
                self._give(self._idle.pop(), work)
            return
        self._waiting.append(work)
        self._more()

    def forget(self, gone: Callable[[Work], bool]) -> list[Work]:
        """Take those that wait for a child, and are ``gone``, out of here; none of them is told of any more."""
        found = [work for work in self._waiting if gone(work)]
        for work in found:
            self._waiting.remove(work)
        return found

    def stop(self, work: Work) -> None:
        """Tell the job to end; it is killed if it does not."""
        child = self._of.get(work)
        if child is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(work)
                self._on_ended(work, "stop", ChildProcessError("it was cancelled before a child was free"))
            return
        child.signal(STOP)
        child.timers.append(self._loop.call_later(SOFT_S, self._kill, child, "stop"))

    def holds(self, work: Work) -> bool:
        """Whether it runs here, or waits here for a child."""
        return work in self._of or work in self._waiting

    def abandoned(self, work: Work) -> None:
        """Nobody wants to know any more what it comes to: kill it. It is told as ended."""
        child = self._of.get(work)
        if child is not None:
            self._kill(child, "stop")
        else:
            self.stop(work)

    async def close(self, seconds: float = 2.0) -> None:
        """Let idle children end, and everything after ``seconds``."""
        self._closing = True
        for child in list(self._all):
            child.leaving = True
            if child.work is None and child.transport is not None:
                child.transport.close()
        self._nursery.closing()
        until = time.monotonic() + seconds
        while self._all and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for child in list(self._all):
            child.kill()
        await self._nursery.close(2.0)
        for child in list(self._all):
            self._forget(child)

    def abandon(self) -> None:
        """End every child and the nursery at once, without the loop: it has ended."""
        self._closing = True
        for child in list(self._all):
            child.kill()
        self._nursery.abandon()

    # -- children -----------------------------------------------------------------------------------------------------

    def _nursery_gone(self, unborn: list[Child]) -> None:
        for child in unborn:
            child.leaving = True
            self._forget(child)
        for child in list(self._all):
            if child.status is None:
                child.kill()
                child.status = signal.SIGKILL
                child.orphan = True

    def _nursery_again(self) -> None:
        for _ in range(self._about.most - len(self._all)):
            self._hatch()

    def _none(self, error: ConfigError) -> None:
        self.broken = error
        self._unusable(error)
        waiting, self._waiting = self._waiting, deque()
        for work in waiting:
            self._on_died(work, ErrorInfo("ChildProcessError", str(error)), False)

    def _more(self) -> None:
        """As many children as there are to be, and as many more as are waited for."""
        staying = sum(not child.leaving for child in self._all)
        spare = self._about.spare if len(self._waiting) > self._nursery.expected else 0
        if staying < self._about.most + spare:
            self._hatch()

    def _next(self) -> Work | None:
        """What a child that is free runs now."""
        while self._waiting:
            work = self._waiting.popleft()
            if self._take(work):
                return work
        return None

    def _hatch(self) -> None:
        """Ask for one more child."""
        if self._closing or not self._nursery.listens:
            return
        child = Child(self)
        try:
            self._nursery.fork(child)
        except OSError as exc:
            LOG.warning("a child process could not be requested: %s; retrying", exc)
            self._loop.call_later(AGAIN_S, self._more)
            return
        self._all.add(child)

    def _use(self, child: Child) -> None:
        """It is free: give it what waits. One job at a time: what it says next is of that."""
        assert child.work is None
        if child.gone:
            return
        work = self._next()
        if work is not None:
            self._give(child, work)
        elif self._closing or sum(not each.leaving for each in self._all) > self._about.most:
            self._dismiss(child)
        else:
            self._idle.append(child)

    def _dismiss(self, child: Child) -> None:
        child.leaving = True
        if child.transport is not None:
            child.transport.close()

    # -- one job ------------------------------------------------------------------------------------------------------

    def _give(self, child: Child, work: Work) -> None:
        event, plan, context = work.event, work.plan, work.context
        assert event is not None
        assert plan is not None
        assert context is not None
        work.context = None
        child.work, child.why, child.peak = work, None, 0
        self._of[work] = child
        child.words.forget()  # what former jobs wrote explains nothing of this one
        spec = event.fact.spec  # type: ignore[union-attr]  # it stood on a work topic
        child.send(
            frame(
                Run(
                    event.task,
                    spec.args,
                    event.job_id,
                    event.queue,
                    event.run,
                    event.attempt,
                    event.release,
                    dict(context.tags),
                    spec.parent,
                    event.trace,
                )
            )
        )
        limit = plan.task.timeout
        if limit is not None:
            # A coroutine sees to that itself, unless it blocks its loop.
            told = limit + BLOCKED_S if plan.is_async else limit
            child.timers.append(self._loop.call_later(told, child.signal, LATE))
            child.timers.append(self._loop.call_later(limit + SOFT_S, self._kill, child, "timeout"))
        if plan.task.policy.max_memory is not None:
            if not self._watched:
                self._loop.call_later(WATCH_S, self._watch)
            self._watched.add(child)

    def _watch(self) -> None:
        for child in list(self._watched):
            work = child.work
            if work is None or work.plan is None or (most := work.plan.task.policy.max_memory) is None:
                self._watched.discard(child)
                continue
            child.peak = child.memory()
            if child.peak > most:
                self._kill(child, "memory")
        if self._watched:
            self._loop.call_later(WATCH_S, self._watch)

    def _kill(self, child: Child, why: str) -> None:
        if child.work is None or child.why is not None:
            return
        child.why = why
        self.killed += 1
        child.kill()

    def _release(self, child: Child) -> Work | None:
        work, child.work = child.work, None
        for timer in child.timers:
            timer.cancel()
        child.timers.clear()
        self._watched.discard(child)
        if work is not None:
            self._of.pop(work, None)
        return work

    def said(self, child: Child, outcome: Outcome) -> None:
        if child.why is not None:  # it was through at the last moment, and dies all the same
            child.leaving = True
        most = None
        if child.work is not None and child.work.plan is not None:
            most = child.work.plan.task.policy.max_memory
        work = self._release(child)
        child.jobs += 1
        full = most is not None and child.memory() > most * REPLACE_AT
        if child.leaving or self._closing or full or child.jobs >= self._about.jobs_each:
            self._dismiss(child)
            self._more()
        else:
            self._use(child)
        if work is not None:
            self._on_said(work, outcome)

    def lost(self, child: Child) -> None:
        """Its connection ended: it has ended, or is about to."""
        child.gone = True
        if child in self._idle:
            self._idle.remove(child)
        if child.status is None and self._nursery.listens:
            child.timers.append(self._loop.call_later(STATUS_S, self._bury, child))
        else:
            self._loop.call_later(0.01, self._bury, child)

    def _has_died(self, child: Child) -> None:
        # What it said last may still be on its way. That its connection ends is not waited for: what it has started may
        # hold that open.
        self._loop.call_later(0.01 if child.gone else STATUS_S, self._bury, child)

    def _bury(self, child: Child) -> None:
        if child not in self._all:
            return
        if child.status is None and self._nursery.listens:
            child.kill()
        expected = child.leaving
        work = self._release(child)
        self._forget(child)
        if not self._closing:
            self._more()
        if work is None:
            if not expected and not self._closing:
                LOG.warning("an idle child process ended by itself: %s", end_of(child.status))
            return
        plan = work.plan
        assert plan is not None
        if child.why == "timeout":
            limit = plan.task.timeout
            error: BaseException = TimeoutError(
                f"{plan.name}() ran longer than its timeout of {limit:g} s and continued for {SOFT_S:g} s after it was told "
                "to end; its process was killed"
            )
            self._on_ended(work, "timeout", error)
        elif child.why == "memory":
            most = plan.task.policy.max_memory or 0
            error = MemoryError(
                f"{plan.name}() used {child.peak / 2**20:,.0f} MiB and may use max_memory={most / 2**20:,.0f} MiB; its "
                "process was killed"
            )
            self._on_ended(work, "memory", error)
        elif child.why is not None:
            self._on_ended(work, "stop", ChildProcessError("its process was killed"))
        else:
            self.deaths += not child.orphan
            self._on_died(work, last_words(child.status, child.words.kept), not child.orphan)

    def _forget(self, child: Child) -> None:
        self._all.discard(child)
        self._nursery.forget(child)
        for timer in child.timers:
            timer.cancel()
        if child.pidfd >= 0:
            os.close(child.pidfd)
            child.pidfd = -1
        if child.transport is not None and not child.gone:
            child.transport.abort()
