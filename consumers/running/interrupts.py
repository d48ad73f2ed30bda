"""Interrupts a job's function that runs in a thread, by raising an exception inside the function.

Python raises the exception at the next bytecode that the thread executes. Code that waits in a call outside of Python
(a `time.sleep`, a socket, a C library) receives the exception when that call returns. Only `isolation="process"` can
end such a call.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import inspect
import threading
from collections.abc import Awaitable
from types import CodeType
from typing import Any

from jobledger.consumers.state.work import JobRun
from jobledger.definitions.functions import awaited
from jobledger.errors import TaskCancelled, TaskInterrupted, TaskTimedOut
from jobledger.process import forks

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class _Awaited:
    """Runs on the event loop an awaitable that a function in a thread returned."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.task: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()  # the job's context
        self.stopped = False
        self.ended = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the awaitable. On the event loop."""
        self.task = loop.create_task(self._run(), context=self._context)

    def stop(self) -> None:
        """Cancel the awaitable. On the event loop."""
        self.stopped = True
        if self.task is not None:
            self.task.cancel()

    async def _run(self) -> None:
        # The value and the error are stored here, because asyncio inspects what a task returns or raises. An object of
        # a job's code may raise when asyncio inspects it.
        try:
            if self.stopped:
                if inspect.iscoroutine(self._awaitable):
                    self._awaitable.close()
                raise asyncio.CancelledError
            self.value = await self._awaitable
        except BaseException as error:  # noqa: BLE001  # raised again in the thread
            self.error = error
        finally:
            self.ended.set()


#: The code object that awaits what a function in a thread returned.
AWAITED: CodeType = _Awaited._run.__code__


class Interrupts:
    """Tracks which thread runs which job's code, and interrupts that code. An attempt is interrupted at most once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: dict[JobRun, int] = {}
        self._waiting: dict[JobRun, _Awaited] = {}
        #: The worker's event loop. Awaitables that functions return run on this loop. Set before the first `call`.
        self.loop: asyncio.AbstractEventLoop | None = None
        self._depth = forks.depth

    def call(self, work: JobRun) -> Any:
        """Run the job's code in this thread and return its value. Nothing interrupts the thread after this call.

        Raises what the code raises. An interrupt that arrives after the code has returned is dropped.
        """
        assert work.runtime is not None
        value: Any = None
        returned = False
        error: BaseException | None = None
        try:
            try:
                with self._lock:
                    self._inside[work] = threading.get_ident()
                if work.stop_outcome is not None:  # cancelled before its code started
                    raise TaskCancelled
                if work.interrupted is not None:  # its time limit was over before its code started
                    raise work.interrupted
                value = awaited(work.runtime.fn(**work.kwargs))
                returned = True
            except BaseException as raised:  # noqa: BLE001  # raised again below
                error = raised
            if forks.depth != self._depth:  # the job forked and this is the new process
                forks.left(error)
            self._leave(work)
        except TaskInterrupted as late:  # at most one interrupt is raised, so none follows
            self._leave(work)
            if not returned and error is None:
                error = late
        if error is None:
            return value
        try:
            raise error
        finally:
            error = None  # breaks a reference cycle: the error's traceback holds this frame

    def wait(self, value: Awaitable[Any]) -> Any:
        """Run, on the worker's event loop, an awaitable that a job's function returned, and return the awaitable's
        value. Called in the job's thread, which waits until the awaitable has ended.

        An interrupt cancels the awaitable. Raises the interrupt's error in that case, else what the awaitable raises.
        """
        loop = self.loop
        assert loop is not None
        ident = threading.get_ident()
        awaited = _Awaited(value)
        with self._lock:
            work = next((each for each, thread in self._inside.items() if thread == ident), None)
            if work is not None:
                if work.interrupted is not None:
                    awaited.stopped = True
                self._waiting[work] = awaited
        try:
            loop.call_soon_threadsafe(awaited.start, loop)
            awaited.ended.wait()
        finally:
            if work is not None:
                with self._lock:
                    self._waiting.pop(work, None)
        error, awaited.error = awaited.error, None
        if error is None:
            return awaited.value
        try:
            if isinstance(error, asyncio.CancelledError) and work is not None and work.interrupted is not None:
                raise work.interrupted
            raise error
        finally:
            error = None  # as in `call`

    def work_of(self, task: asyncio.Task[Any]) -> JobRun | None:
        """Return the job whose returned awaitable runs as this task of the event loop, or None. Any thread."""
        with self._lock:
            return next((work for work, awaited in self._waiting.items() if awaited.task is task), None)

    def _leave(self, work: JobRun) -> None:
        with self._lock:
            if self._inside.pop(work, None) is not None and work.interrupted is not None:
                # The exception was requested and may not have been raised yet: withdraw it.
                _raise_in(ctypes.c_ulong(threading.get_ident()), None)

    def interrupt(self, work: JobRun, error: type[TaskInterrupted]) -> bool:
        """Raise ``error`` inside the job's code. Return False if no thread runs that code, or if the attempt was
        interrupted already. Any thread.

        A `TaskTimedOut` for code that has not started yet is raised when the code starts, because the timer of the time
        limit does not fire again.
        """
        with self._lock:
            thread = self._inside.get(work)
            if work.interrupted is not None or (thread is None and error is not TaskTimedOut):
                return False
            work.interrupted = error
            if thread is None:
                return False
            awaited = self._waiting.get(work)
            if awaited is not None and self.loop is not None:
                self.loop.call_soon_threadsafe(awaited.stop)
                return True
            return bool(_raise_in(ctypes.c_ulong(thread), ctypes.py_object(error)))
