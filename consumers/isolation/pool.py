"""The pool of a worker's child processes. A child runs one job at a time, and is killed if its job does not end after a
signal. Children of isolated tasks are started before a job needs them, children for suspects when a job waits.

Everything in this module runs on the worker's event loop. Whatever happens to a child, the worker survives. If the
job timed out, used too much memory or was cancelled, its outcome is recorded by the usual rules (a retry, a failure or
a cancel). If the child died by itself, `Placement` starts the job again, and fails it after `CRASHES` starts.
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
from typing import Protocol

from jobledger.config import Settings
from jobledger.consumers.isolation.child_handle import ChildHandle, exit_status_text, process_died
from jobledger.consumers.isolation.child_main import LATE, STOP
from jobledger.consumers.isolation.fork_client import AGAIN_S, ForkCallbacks, ForkClient
from jobledger.consumers.isolation.protocol import RunMessage, frame
from jobledger.consumers.state.outcome import Outcome
from jobledger.consumers.state.work import JobRun
from jobledger.errors import ConfigError, JobledgerError
from jobledger.process.logger import get_logger
from jobledger.schemas.events import ErrorInfo

LOG = get_logger("jobledger.worker")

#: Seconds that a job has to clean up after the signal to end. Then its process is killed.
SOFT_S = 5.0
#: Seconds after the timeout. If the `asyncio.timeout` of a coroutine has not expired by then, the coroutine blocks its
#: event loop.
BLOCKED_S = 0.25
#: Seconds between two measurements of the memory of children whose jobs have a memory limit.
WATCH_S = 0.05
#: Seconds to wait for a child's exit status after its connection ended, or for the connection's end after its exit.
STATUS_S = 2.0
#: A child that holds more than this share of ``max_memory`` after its job is replaced, because this memory would count
#: against the next job.
REPLACE_AT = 0.8


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """The settings of the pool.

    ``most``: children at once. ``spare``: additional children while jobs wait for a child. ``jobs_each``: a child is
    replaced after so many jobs. ``target``: see `app_target.find_target`. ``needed``: tasks of the worker run only in
    children.
    """

    most: int
    spare: int
    jobs_each: int
    target: str
    settings: Settings
    needed: bool = False


class ChildJobs(Protocol):
    """Decides about the jobs that run in a pool, and records their outcomes.

    For each job that `ChildPool.run` is given, one of `outcome_reported`, `died` and `ended` is called once, when no
    child has the job any more. No call follows for a job that `may_run_now` refuses or that `ChildPool.forget` removes.
    """

    def may_run_now(self, work: JobRun) -> bool:
        """A child is free: return whether the job may still run. If not, nothing else is called for the job."""

    def outcome_reported(self, work: JobRun, outcome: Outcome) -> None:
        """Handle the outcome with which the job's code ended."""

    def died(self, work: JobRun, error: ErrorInfo, blamed: bool) -> None:
        """Handle the end of the job's process by itself, or that no child can be started. ``blamed``: the job may be
        the cause."""

    def ended(self, work: JobRun, why: str, error: BaseException) -> None:
        """Handle the end of a job that the pool ended. ``why``: ``timeout``, ``memory`` or ``stop``."""

    def unusable(self, error: JobledgerError, needed: bool) -> None:
        """Note that no child can ever be started. ``needed``: see `ChildSettings`."""


class ChildPool:
    """Runs jobs in child processes. ``jobs`` decides about the jobs and records their outcomes."""

    def __init__(self, settings: ChildSettings, jobs: ChildJobs) -> None:
        self._settings, self._jobs = settings, jobs
        self._loop: asyncio.AbstractEventLoop
        callbacks = ForkCallbacks(
            self._use, self._has_died, self._fork_server_gone, self._fork_server_again, self._on_unusable
        )
        self._fork_client = ForkClient(settings.target, settings.settings, callbacks)
        self._all: set[ChildHandle] = set()
        self._idle: list[ChildHandle] = []
        self._waiting: deque[JobRun] = deque()
        self._of: dict[JobRun, ChildHandle] = {}
        self._watched: set[ChildHandle] = set()
        self._closing = False
        self.deaths = self.killed = 0
        self.start_error: JobledgerError | None = None

    # -- called by the worker -----------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Start the fork server and all ``most`` children, so that the first jobs need not wait."""
        self._loop = asyncio.get_running_loop()
        self._fork_client.start()
        for _ in range(self._settings.most):
            self._request_child()

    @property
    def count(self) -> int:
        """The number of children, including those that are still being started."""
        return len(self._all)

    def run(self, work: JobRun) -> None:
        """Run the attempt in a child as soon as a child is free. Returns at once."""
        if self.start_error is not None:
            self._jobs.died(work, ErrorInfo("ChildProcessError", str(self.start_error)), False)
            return
        if not self._fork_client.running:
            self._loop = asyncio.get_running_loop()
            self._fork_client.start()
        if self._idle:
            if self._jobs.may_run_now(work):
                self._give(self._idle.pop(), work)
            return
        self._waiting.append(work)
        self._request_if_needed()

    def forget(self, gone: Callable[[JobRun], bool]) -> list[JobRun]:
        """Remove and return the jobs that wait for a child and for which ``gone(work)`` is true. No callback is called
        for these jobs any more."""
        removed = [work for work in self._waiting if gone(work)]
        for work in removed:
            self._waiting.remove(work)
        return removed

    def stop(self, work: JobRun) -> None:
        """Signal the job to end, and kill its process if the job still runs after `SOFT_S` seconds. If the job waits
        for a child, remove the job and call ``ended``."""
        child = self._of.get(work)
        if child is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(work)
                self._jobs.ended(work, "stop", ChildProcessError("it was cancelled before a child was free"))
            return
        child.signal(STOP)
        child.timers.append(self._loop.call_later(SOFT_S, self._kill, child, "stop"))

    def holds(self, work: JobRun) -> bool:
        """Return whether the job runs in a child or waits for one."""
        return work in self._of or work in self._waiting

    def kill_job(self, work: JobRun) -> None:
        """Kill the job's process at once, because the job's outcome is no longer wanted. ``ended`` is called for the
        job."""
        child = self._of.get(work)
        if child is not None:
            self._kill(child, "stop")
        else:
            self.stop(work)

    async def close(self, seconds: float = 2.0) -> None:
        """End idle children now, and busy children after their job. Kill the children that remain after ``seconds``,
        and end the fork server."""
        self._closing = True
        for child in list(self._all):
            child.leaving = True
            if child.work is None and child.transport is not None:
                child.transport.close()
        self._fork_client.closing()
        until = time.monotonic() + seconds
        while self._all and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for child in list(self._all):
            child.kill()
        await self._fork_client.close(2.0)
        for child in list(self._all):
            self._forget(child)

    def kill_all(self) -> None:
        """Kill every child and the fork server at once. For use after the event loop has ended."""
        self._closing = True
        for child in list(self._all):
            child.kill()
        self._fork_client.abandon()

    # -- children -----------------------------------------------------------------------------------------------------

    def _fork_server_gone(self, requested: list[ChildHandle]) -> None:
        for child in requested:
            child.leaving = True
            self._forget(child)
        for child in list(self._all):
            if child.status is None:
                child.kill()
                child.status = signal.SIGKILL
                child.orphan = True

    def _fork_server_again(self) -> None:
        for _ in range(self._settings.most - len(self._all)):
            self._request_child()

    def _on_unusable(self, error: ConfigError) -> None:
        self.start_error = error
        self._jobs.unusable(error, self._settings.needed)
        waiting, self._waiting = self._waiting, deque()
        for work in waiting:
            self._jobs.died(work, ErrorInfo("ChildProcessError", str(error)), False)

    def _request_if_needed(self) -> None:
        """Start one more child if there are fewer children than ``most``. While more jobs wait than children are being
        started, the limit is ``most + spare``."""
        staying = [child for child in self._all if not child.leaving]
        starting = sum(not child.there for child in staying)
        spare = self._settings.spare if len(self._waiting) > starting else 0
        if len(staying) < self._settings.most + spare:
            self._request_child()

    def _next(self) -> JobRun | None:
        """Remove and return the first waiting job that may still run; None if there is no such job."""
        while self._waiting:
            work = self._waiting.popleft()
            if self._jobs.may_run_now(work):
                return work
        return None

    def _request_child(self) -> None:
        """Ask the fork server for one more child. Ask again later if the system allows no more open files."""
        if self._closing or not self._fork_client.listens:
            return
        child = ChildHandle(self)
        try:
            self._fork_client.fork(child)
        except OSError as exc:
            LOG.warning("a child process could not be requested: %s; retrying", exc)
            self._loop.call_later(AGAIN_S, self._request_if_needed)
            return
        self._all.add(child)

    def _use(self, child: ChildHandle) -> None:
        """Give a free child the next waiting job. If no job waits, end the child if there are too many children, else
        keep the child idle.

        A child has one job at a time, so the child's next message is about that job.
        """
        assert child.work is None
        if child.gone:
            return
        work = self._next()
        if work is not None:
            self._give(child, work)
        elif self._closing or sum(not each.leaving for each in self._all) > self._settings.most:
            self._dismiss(child)
        else:
            self._idle.append(child)

    def _dismiss(self, child: ChildHandle) -> None:
        child.leaving = True
        if child.transport is not None:
            child.transport.close()

    # -- one job ------------------------------------------------------------------------------------------------------

    def _give(self, child: ChildHandle, work: JobRun) -> None:
        event, runtime, context = work.event, work.runtime, work.context
        assert event is not None
        assert runtime is not None
        assert context is not None
        work.context = None
        child.work, child.why, child.peak = work, None, 0
        self._of[work] = child
        child.last_output.forget(child.unread)  # what earlier jobs wrote does not explain this job's end
        spec = event.fact.spec  # type: ignore[union-attr]  # a work topic holds only such facts
        child.send(
            frame(
                RunMessage(
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
        limit = runtime.task.timeout
        if limit is not None:
            # A coroutine has its own `asyncio.timeout`. The signal is sent later, and has an effect only if the
            # coroutine blocks the child's event loop.
            soft_limit = limit + BLOCKED_S if runtime.is_async else limit
            child.timers.append(self._loop.call_later(soft_limit, child.signal, LATE))
            child.timers.append(self._loop.call_later(limit + SOFT_S, self._kill, child, "timeout"))
        if runtime.task.policy.max_memory is not None:
            if not self._watched:
                self._loop.call_later(WATCH_S, self._watch)
            self._watched.add(child)

    def _watch(self) -> None:
        for child in list(self._watched):
            work = child.work
            if work is None or work.runtime is None or (most := work.runtime.task.policy.max_memory) is None:
                self._watched.discard(child)
                continue
            child.peak = child.memory()
            if child.peak > most:
                self._kill(child, "memory")
        if self._watched:
            self._loop.call_later(WATCH_S, self._watch)

    def _kill(self, child: ChildHandle, why: str) -> None:
        if child.work is None or child.why is not None:
            return
        child.why = why
        self.killed += 1
        child.kill()

    def _release(self, child: ChildHandle) -> JobRun | None:
        work, child.work = child.work, None
        for timer in child.timers:
            timer.cancel()
        child.timers.clear()
        self._watched.discard(child)
        if work is not None:
            self._of.pop(work, None)
        return work

    def outcome_reported(self, child: ChildHandle, outcome: Outcome) -> None:
        if child.why is not None:  # the job ended just before the kill, but the kill ends the child
            child.leaving = True
        most = None
        if child.work is not None and child.work.runtime is not None:
            most = child.work.runtime.task.policy.max_memory
        work = self._release(child)
        child.jobs += 1
        full = most is not None and child.memory() > most * REPLACE_AT
        if child.leaving or self._closing or full or child.jobs >= self._settings.jobs_each:
            self._dismiss(child)
            self._request_if_needed()
        else:
            self._use(child)
        if work is not None:
            self._jobs.outcome_reported(work, outcome)

    def lost(self, child: ChildHandle) -> None:
        """Handle the end of the child's connection: the child has exited, or is about to."""
        child.gone = True
        if child in self._idle:
            self._idle.remove(child)
        if child.status is None and self._fork_client.listens:
            child.timers.append(self._loop.call_later(STATUS_S, self._remove_ended, child))
        else:
            self._loop.call_later(0.01, self._remove_ended, child)

    def _has_died(self, child: ChildHandle) -> None:
        # The child's last messages may still arrive. The wait for the end of the child's connection is bounded, because
        # a process that the child started may hold the connection open.
        self._loop.call_later(0.01 if child.gone else STATUS_S, self._remove_ended, child)

    def _remove_ended(self, child: ChildHandle) -> None:
        if child not in self._all:
            return
        if child.status is None and self._fork_client.listens:
            child.kill()
        expected = child.leaving
        work = self._release(child)
        self._forget(child)
        if not self._closing:
            self._request_if_needed()
        if work is None:
            if not expected and not self._closing:
                LOG.warning("an idle child process ended by itself: %s", exit_status_text(child.status))
            return
        runtime = work.runtime
        assert runtime is not None
        if child.why == "timeout":
            limit = runtime.task.timeout
            error: BaseException = TimeoutError(
                f"{runtime.name}() ran longer than its timeout of {limit:g} s and continued for {SOFT_S:g} s after it was told "
                "to end; its process was killed"
            )
            self._jobs.ended(work, "timeout", error)
        elif child.why == "memory":
            most = runtime.task.policy.max_memory or 0
            error = MemoryError(
                f"{runtime.name}() used {child.peak / 2**20:,.0f} MiB and may use max_memory={most / 2**20:,.0f} MiB; its "
                "process was killed"
            )
            self._jobs.ended(work, "memory", error)
        elif child.why is not None:
            self._jobs.ended(work, "stop", ChildProcessError("its process was killed"))
        else:
            self.deaths += not child.orphan
            self._jobs.died(work, process_died(child.status, child.last_output.kept), not child.orphan)

    def _forget(self, child: ChildHandle) -> None:
        self._all.discard(child)
        self._fork_client.forget(child)
        for timer in child.timers:
            timer.cancel()
        if child.pidfd >= 0:
            os.close(child.pidfd)
            child.pidfd = -1
        if child.transport is not None and not child.gone:
            child.transport.abort()
