"""Ends a function that runs in a thread, as far as Python lets anybody: an exception is raised inside it.

It is raised at the next bytecode the thread executes. Code that waits in a call outside of Python (a `time.sleep`, a
socket, a C library) learns of it when that call returns; nothing can be done about that but `isolation="process"`.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import inspect
import threading
from collections.abc import Awaitable, Callable
from types import CodeType, FrameType
from typing import Any

from jobledger import forks
from jobledger.consumers.work import Work
from jobledger.errors import TaskCancelled, TaskInterrupted
from jobledger.functions import settled

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class _Awaited:
    """An awaitable that a function in a thread returned, as it runs on the event loop."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.task: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()  # the job's
        self.stopped = False
        self.ended = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run it; on the event loop."""
        self.task = loop.create_task(self._run(), context=self._context)

    def stop(self) -> None:
        """Cancel it; on the event loop."""
        self.stopped = True
        if self.task is not None:
            self.task.cancel()

    async def _run(self) -> None:
        # What comes of it is kept here: asyncio looks at what a task returns or raises, and that may break then.
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


#: The code that awaits what a function in a thread returned.
AWAITED: CodeType = _Awaited._run.__code__


def runs_inside(frame: FrameType | None, caller: CodeType, function: Callable[..., Any]) -> bool:
    """Whether ``frame`` runs code of ``function`` that ``caller`` has called, and not ``caller``'s own."""
    inner: FrameType | None = None
    while frame is not None and frame.f_code is not caller:
        inner, frame = frame, frame.f_back
    return frame is not None and inner is not None and inner.f_code is getattr(function, "__code__", None)


class Interrupts:
    """Which thread runs which job's code now. An attempt is interrupted once at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: dict[Work, int] = {}
        self._waiting: dict[Work, _Awaited] = {}
        #: The worker's: where a coroutine runs that a function returned. Set before the first call.
        self.loop: asyncio.AbstractEventLoop | None = None
        self._depth = forks.depth

    def call(self, work: Work) -> Any:
        """Run the job's code in this thread; nothing interrupts it any more when this has returned or raised.

        Raises what the code raises. An interrupt that comes when the code has returned already is dropped.
        """
        assert work.plan is not None
        value: Any = None
        returned = False
        error: BaseException | None = None
        try:
            try:
                with self._lock:
                    self._inside[work] = threading.get_ident()
                if work.stop_outcome is not None:  # cancelled before it was here
                    raise TaskCancelled
                value = settled(work.plan.fn(**work.kwargs))
                returned = True
            except BaseException as raised:  # noqa: BLE001  # whatever it is, it is raised again below
                error = raised
            if forks.depth != self._depth:  # the code forked, and this is the child
                forks.left(error)
            self._leave(work)
        except TaskInterrupted as late:  # there is one at most, so what follows is undisturbed
            self._leave(work)
            if not returned and error is None:
                error = late
        if error is None:
            return value
        try:
            raise error
        finally:
            error = None  # or its frame would hold it, and it the frame

    def wait(self, value: Awaitable[Any]) -> Any:
        """Run on the worker's event loop what a job's function returned without awaiting it. In the job's thread.

        It is cancelled where a function would be interrupted, and the thread waits until it has ended.
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

    def work_of(self, task: asyncio.Task[Any]) -> Work | None:
        """The job whose function returned what runs as this task of the event loop. From any thread."""
        with self._lock:
            return next((work for work, awaited in self._waiting.items() if awaited.task is task), None)

    def _leave(self, work: Work) -> None:
        with self._lock:
            if self._inside.pop(work, None) is not None and work.interrupted is not None:
                # Asked for, and perhaps not raised yet.
                _raise_in(ctypes.c_ulong(threading.get_ident()), None)

    def interrupt(self, work: Work, error: type[TaskInterrupted]) -> bool:
        """Raise ``error`` inside the job's code; False if no thread runs it, or it was
        told already. From any thread."""
        with self._lock:
            thread = self._inside.get(work)
            if thread is None or work.interrupted is not None:
                return False
            work.interrupted = error
            awaited = self._waiting.get(work)
            if awaited is not None and self.loop is not None:
                self.loop.call_soon_threadsafe(awaited.stop)
                return True
            return bool(_raise_in(ctypes.c_ulong(thread), ctypes.py_object(error)))
