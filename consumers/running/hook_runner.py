"""Calls the middleware hooks `retry` and `failure` after an attempt's outcome was sent to the log.

Plain hooks run in one separate thread, so that a slow hook delays no job. Coroutine hooks run on the worker's event
loop. An error that a hook raises is logged and does not change the outcome. A worker that stops waits for
hooks until the grace time is over, at least 1 s.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from jobledger.consumers.state.outcome import Failed, Outcome, Retried
from jobledger.consumers.state.work import JobRun
from jobledger.definitions.context import JobContext, enter
from jobledger.definitions.middleware import Hook
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import JobFailed
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

#: Number of waiting hook calls above which further calls are dropped, with one log message. The limit exists because
#: waiting calls keep the errors' frames in memory.
MOST = 10_000


class HookRunner(threading.Thread):
    """Calls the hooks ``retry(job, error, delay)`` and ``failure(job, error)``.

    ``error`` is the exception of the attempt. If only the text of an error is known (the job ran in a child process,
    was never started, or its result cannot be written), ``error`` is a `JobFailed` with that text. ``delay``: seconds
    until the next attempt.
    """

    def __init__(
        self, registry: TaskRegistry, loop: asyncio.AbstractEventLoop, context_of: Callable[..., JobContext]
    ) -> None:
        super().__init__(name="jobledger-hooks", daemon=True)
        self._loop, self._context_of = loop, context_of
        self._hooks: dict[str, list[Hook]] = {
            task.name: [hook for hook in registry.hooks.of(task) if hook.name in ("retry", "failure")]
            for task in registry.tasks.values()
        }
        self.needed = any(self._hooks.values())
        self._errors: dict[JobRun, BaseException] = {}
        self._todo: queue.SimpleQueue[tuple[Hook, JobContext, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._running: set[Future[None]] = set()
        self.dropped = 0

    def note(self, work: JobRun, error: BaseException) -> None:
        """Store the exception of an attempt until `tell` is called. Any thread."""
        self._errors[work] = error

    def tell(self, work: JobRun, outcome: Outcome) -> None:
        """Queue the hook calls for an attempt's outcome, if the outcome is a retry or a failure. Any thread."""
        error = self._errors.pop(work, None)
        if work.runtime is None or not isinstance(outcome, Retried | Failed):
            return
        wanted = "retry" if isinstance(outcome, Retried) else "failure"
        hooks = [hook for hook in self._hooks.get(work.runtime.name, ()) if hook.name == wanted]
        if not hooks:
            return
        if self._todo.qsize() > MOST:
            if not self.dropped:
                LOG.error(
                    "more than %d hook calls are waiting: calls are dropped until fewer wait (the first dropped call: %s)",
                    MOST,
                    hooks[0].description,
                )
            self.dropped += len(hooks)
            return
        job = self._context_of(work, reports=False)
        info = outcome.error
        passed = JobFailed(job.job_id, info.type, info.message, info.traceback) if error is None else error
        more = (outcome.delay_ms / 1000,) if isinstance(outcome, Retried) else ()
        for hook in hooks:
            self._todo.put((hook, job, (passed, *more)))

    def run(self) -> None:
        """Call queued hooks until `close`."""
        while (item := self._todo.get()) is not None:
            contextvars.copy_context().run(self._call, *item)

    def _call(self, hook: Hook, job: JobContext, more: tuple[Any, ...]) -> None:
        enter(job)
        try:
            # A coroutine function under a decorator without `async` looks like a plain function. The call here then
            # returns a coroutine.
            returned = None if hook.is_async else hook.fn(job, *more)
            if hook.is_async or isinstance(returned, Awaitable):
                running = asyncio.run_coroutine_threadsafe(self._await(hook, job, more, returned), self._loop)
                self._running.add(running)
                running.add_done_callback(self._running.discard)
        except BaseException:  # noqa: BLE001  # `_failed` logs it; sys.exit() in a hook must not end this thread
            _failed(hook, job)

    async def _await(
        self, hook: Hook, job: JobContext, more: tuple[Any, ...], returned: Awaitable[object] | None = None
    ) -> None:
        """Call and await a coroutine hook, or await ``returned``, the awaitable that a plain hook returned. On the
        event loop."""
        enter(job)
        try:
            await (hook.fn(job, *more) if returned is None else returned)
        except asyncio.CancelledError:
            raise
        except BaseException:  # noqa: BLE001  # `_failed` logs it; sys.exit() in a hook must not end the event loop
            _failed(hook, job)

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` seconds until the queued and running hooks have ended. Do not call this on the event
        loop."""
        if not self.is_alive():
            return
        deadline = time.monotonic() + seconds
        self._todo.put(None)
        self.join(max(0.0, deadline - time.monotonic()))
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        left = self._todo.qsize() + len(self._running)
        if left or self.dropped:
            LOG.warning(
                "hooks that did not end within the grace time: %d; hooks that were not called: %d", left, self.dropped
            )


def _failed(hook: Hook, job: JobContext) -> None:
    LOG.exception("%s failed for job %s (%s); the job's outcome is unchanged", hook.description, job.job_id, job.task)
