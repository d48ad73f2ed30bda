"""The code of a child process: runs one job at a time and reports each job's outcome to the worker.

The fork server (`fork_server`) has imported the app and forks the child. The child ends when the worker closes the
connection. The worker passes on the child's standard error, and keeps the last part of it to explain the death of a
child.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import fcntl
import gc
import logging
import os
import random
import signal
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from jobledger.consumers.isolation.garbage import Garbage
from jobledger.consumers.isolation.protocol import (
    EndedMessage,
    ProgressMessage,
    RunMessage,
    Splitter,
    decode_run,
    ended,
    frame,
)
from jobledger.consumers.state.outcome import (
    Failed,
    Outcome,
    Succeeded,
    bad_result,
    error_info,
    judge,
    ran_out,
    timeout_error,
)
from jobledger.consumers.state.progress import PROGRESS_INTERVAL_S
from jobledger.definitions import tracing
from jobledger.definitions.context import JobContext, enter
from jobledger.definitions.functions import AWAIT, awaited, runs_inside
from jobledger.definitions.middleware import runner
from jobledger.definitions.retry import Retry
from jobledger.definitions.task import Task
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import BadArguments, TaskCancelled, TaskInterrupted, TaskTimedOut
from jobledger.process import forks
from jobledger.process.logger import get_logger, loop_error
from jobledger.process.signals import SignalHandlers
from jobledger.schemas.events import JobProgressed

LOG = get_logger("jobledger.worker")

#: Minimum seconds between two checks for garbage while jobs arrive; seconds without a job until the idle check.
LOOK_S, IDLE_S = 0.1, 1
#: Maximum number of bytes to read from the connection at once.
RECEIVED = 4_096
#: Signals that tell the job's code to end: `LATE` at its timeout, `STOP` when it is cancelled.
LATE, STOP = signal.SIGUSR1, signal.SIGUSR2
#: Bytes of data (``RLIMIT_DATA``) that a job may allocate beyond its ``max_memory``; then Python raises `MemoryError`.
#: The worker measures memory only every `pool.WATCH_S` seconds, so this limit stops a job that allocates much at once.
HEADROOM = 256 << 20

#: Milliseconds that a child waits, before it ends, until its trace spans are exported.
FLUSH_MS = 1_500


class JobProcess:
    """Runs the jobs that arrive on one connection; see the module's docstring."""

    def __init__(self, registry: TaskRegistry, connection: socket.socket) -> None:
        self._registry, self._connection = registry, connection
        self._depth = forks.depth
        self._functions: dict[str, Callable[..., Any]] = {}
        self._loop_runner: asyncio.Runner | None = None
        self._running: asyncio.Task[Any] | None = None  # the task of the running coroutine
        self._function: Callable[..., Any] | None = None  # the function of that coroutine
        self._clock: asyncio.Timeout | None = None
        self._inside = False  # the code of a plain function is running
        self._late = False  # the running attempt exceeded its timeout
        self._interrupt: type[TaskInterrupted] | None = None  # the error that interrupted the running code
        self._sends = False  # the running code sends a message, which no interrupt may cut
        self._postponed: int | None = None  # the signal that arrived meanwhile
        self._most: int | None = None  # the memory limit now set, in bytes
        self._reported_at = 0.0
        self._unsent: JobProgressed | None = None
        self._garbage = Garbage()
        self._split = Splitter()
        # With `socket.settimeout`, Python would ask the system before each message whether data has arrived.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", IDLE_S, 0))
        self._looked_at = 0.0  # when garbage was checked last
        # Guards reports of progress against the end of the context: a thread of the job may outlive its context.
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Run the jobs that arrive until the connection ends. In the main thread, because signals end a job."""
        # The child ignores SIGINT and SIGTERM, as its fork server does. The processes that a job forks must not ignore
        # these signals.
        with SignalHandlers((LATE, STOP), self._interrupted), SignalHandlers((signal.SIGINT, signal.SIGTERM), _ignore):
            self._serve()
            self._close()

    def _serve(self) -> None:
        AWAIT.set(self._awaited)
        while (body := self._receive()) is not None:
            run = decode_run(body)
            try:
                message = self._run(run)
            except BaseException as broken:  # noqa: BLE001  # the last guard: no error ends the process
                message = ended(Failed("never", error_info(broken)))
            message.unread = has_unread(2)
            self._connection.sendall(frame(message))
            # Between two jobs, check for garbage at most every `LOOK_S` seconds. `_receive` checks if no job arrives.
            now = time.monotonic()
            if now - self._looked_at >= LOOK_S:
                self._looked_at = now
                self._garbage.look(idle=False)

    def _receive(self) -> bytes | None:
        """Return the next message; None if the connection has ended. The worker sends one message at a time.

        After each `IDLE_S` seconds without data, check for garbage.
        """
        while True:
            try:
                data = self._connection.recv(RECEIVED)
            except BlockingIOError:  # no data within `IDLE_S`, or a job made the connection non-blocking
                self._connection.setblocking(True)
                self._garbage.look(idle=True)
                continue
            if not data:
                return None
            bodies = list(self._split.feed(data))
            if bodies:
                (body,) = bodies
                return body

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _run(self, run: RunMessage) -> EndedMessage:
        self._late, self._interrupt, self._postponed = False, None, None
        task = self._registry.tasks.get(run.task)
        if task is None:  # the code on disk differs from the code that the worker runs
            missing = LookupError(f"the child process has no task {run.task!r}: was the app changed under its worker?")
            return ended(judge(Retry(), run.attempt, missing, random.random()))
        try:
            kwargs = task.decode_args(run.args)
        except BadArguments as exc:
            return ended(Failed("bad-arguments", error_info(exc)))
        context = JobContext(
            job_id=run.job_id,
            task=run.task,
            queue=run.queue,
            run=run.run,
            attempt=run.attempt,
            release=run.release,
            tags=run.tags,
            parent=run.parent,
            trace=run.trace,
            report=self._report,
        )
        self._reported_at, self._unsent = 0.0, None
        try:
            value, error = self._call(task, context, kwargs)
        except BaseException as raised:  # noqa: BLE001  # SystemExit ends the job only, as in a thread
            value, error = None, raised
        if forks.depth != self._depth:  # the job forked, and this is the new process: the parent owns the connection
            forks.left(error)
        self._end(context)
        try:
            return ended(self._returned(task, value) if error is None else self._judge(task, run, error))
        finally:
            error = None  # breaks a reference cycle: the error's traceback holds this frame

    def _call(
        self, task: Task[Any, Any], context: JobContext, kwargs: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """Run the task's code. Return (value, None), or (None, exception) for a coroutine function that raised. Raises
        the exception that a plain function raises."""
        function = self._functions.get(task.name)
        if function is None:
            function = self._functions[task.name] = runner(task, self._registry.hooks)
        if task.policy.max_memory != self._most:
            self._most = task.policy.max_memory
            limit_memory(self._most)
        if task.is_async:
            results: list[tuple[Any, BaseException | None]] = []
            self._runner().run(
                self._await(function, context, kwargs, task.timeout, results), context=contextvars.copy_context()
            )
            return results.pop()
        return contextvars.copy_context().run(self._plainly, function, context, kwargs), None

    def _runner(self) -> asyncio.Runner:
        if self._loop_runner is None:
            self._loop_runner = asyncio.Runner()
            self._loop_runner.get_loop().set_exception_handler(loop_error)
        return self._loop_runner

    async def _await(
        self,
        function: Callable[..., Any],
        context: JobContext,
        kwargs: dict[str, Any],
        limit: float | None,
        results: list[tuple[Any, BaseException | None]],
    ) -> None:
        """Run the coroutine function and append its value and error to ``results``.

        Neither is returned or raised, because asyncio inspects what a task returns or raises: an object that raises
        when it is inspected would stop the loop.
        """
        enter(context)
        self._running, self._function = asyncio.current_task(), function
        clock = self._clock = asyncio.timeout(limit)
        try:
            if self._interrupt is TaskCancelled:  # the job was cancelled before its code started
                raise asyncio.CancelledError
            async with clock:
                value = await function(**kwargs)
            results.append((value, None))
        except BaseException as error:  # noqa: BLE001  # judged by the caller
            results.append((None, error))
        finally:
            self._running = self._clock = None
            self._late = self._late or clock.expired()

    def _plainly(self, function: Callable[..., Any], context: JobContext, kwargs: dict[str, Any]) -> Any:
        """Run a plain function, which `_interrupted` may interrupt. Raises what the function raises."""
        enter(context)
        value: Any = None
        returned = False
        try:
            self._inside = True
            if self._interrupt is not None:  # the signal arrived before the code started
                raise self._interrupt
            value = awaited(function(**kwargs))
            returned = True
            self._inside = False
        except TaskInterrupted:
            # At most one interrupt is raised for an attempt, so none follows. An interrupt after the code's return is
            # dropped.
            if not returned:
                raise
        finally:
            self._inside = False
        return value

    def _awaited(self, value: Awaitable[Any]) -> Any:
        """Run the awaitable that a plain function returned, and return its value. `_interrupted` may cancel the
        awaitable.

        Raises what the awaitable raises; after an interrupt, the `TaskInterrupted` for it.
        """
        results: list[tuple[Any, BaseException | None]] = []

        async def run() -> None:
            self._running = asyncio.current_task()
            try:
                if self._interrupt is not None:
                    raise asyncio.CancelledError
                results.append((await value, None))
            except BaseException as error:  # noqa: BLE001  # raised again below
                results.append((None, error))
            finally:
                self._running = None

        self._inside = False
        self._runner().run(run(), context=contextvars.copy_context())
        result, error = results.pop()
        try:
            if isinstance(error, asyncio.CancelledError) and self._interrupt is not None:
                raise self._interrupt
            if error is not None:
                raise error
        finally:
            error = None  # breaks a reference cycle, as in `_run`
        self._inside = True
        return result

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._sends:
            self._postponed = number
            return
        self._interrupt = TaskTimedOut if number == LATE else TaskCancelled
        self._late = number == LATE
        if self._running is not None and self._loop_runner is not None:
            if number == LATE and self._clock is not None:
                self._tell_blocked(frame)
                return
            self._loop_runner.get_loop().call_soon_threadsafe(self._running.cancel)
        elif self._inside:
            self._inside = False
            raise self._interrupt

    def _tell_blocked(self, frame: FrameType | None) -> None:
        """Raise `TaskTimedOut` in a coroutine that is past its timeout, and that blocks the event loop so that
        `asyncio.timeout` could not end the coroutine."""
        clock, function = self._clock, self._function
        if clock is None or function is None or clock.expired():
            return
        if runs_inside(frame, JobProcess._await.__code__, function):
            self._late = True
            raise TaskTimedOut

    # -- the outcome --------------------------------------------------------------------------------------------------

    def _returned(self, task: Task[Any, Any], value: Any) -> Outcome:
        try:
            return Succeeded(task.encode_result(value))
        except BaseException as error:  # noqa: BLE001  # encoding calls the result's own code, which may raise anything
            return bad_result(task.name, error)

    def _judge(self, task: Task[Any, Any], run: RunMessage, error: BaseException) -> Outcome:
        late = self._late and ran_out(error)
        error = timeout_error(task.name, task.timeout, error) if late else error
        return judge(task.retry, run.attempt, error, random.random(), timed_out=late)

    def _report(self, context: JobContext, progressed: JobProgressed) -> None:
        with self._sending:
            if context.ended:  # the attempt ended after the context checked: this would count for the next job
                return
            now = time.monotonic()
            if now - self._reported_at < PROGRESS_INTERVAL_S:
                self._unsent = progressed
                return
            self._reported_at = now
            self._send_progress(progressed)

    def _end(self, context: JobContext) -> None:
        """Stop reports from an attempt whose code has ended, and send the report that is still held back."""
        with self._sending:
            context.ended = True
            if self._unsent is not None:
                self._send_progress(self._unsent)

    def _send_progress(self, progress: JobProgressed) -> None:
        self._unsent = None
        message = frame(ProgressMessage(progress.sequence, progress.done, progress.total, progress.message))
        if threading.current_thread() is not threading.main_thread():  # signals do not interrupt this thread
            self._connection.sendall(message)
            return
        self._sends = True
        try:
            # After a part of a message, the worker could not read any of the following messages.
            self._connection.sendall(message)
        finally:
            self._sends = False
            number, self._postponed = self._postponed, None
            if number is not None:
                signal.raise_signal(number)

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # `close` logs errors, and the process ends in any case
            loop_runner = self._runner()
            loop_runner.run(self._registry.resources.close())
            loop_runner.close()
        with contextlib.suppress(Exception):  # no `atexit` runs here, so batched spans would be lost
            tracing.flush(FLUSH_MS)


def run_child(registry: TaskRegistry, connection: socket.socket, errors: int) -> None:
    """Run as a child in a newly forked process. Does not return. ``errors``: file descriptor for standard error."""
    status = 1
    try:
        os.dup2(errors, 2)
        os.close(errors)
        faulthandler.enable(file=2)
        _die_with_the_fork_server()
        gc.enable()
        random.seed()
        connection.setblocking(True)
        JobProcess(registry, connection).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the worker has ended, so there is nothing to report
    except BaseException:
        LOG.exception("a child process failed")
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def has_unread(fd: int) -> bool:
    """Return whether a pipe, given by its write end, may hold bytes that the reader has not read. Only Linux can answer
    this at the write end; elsewhere the result is True."""
    if sys.platform != "linux":
        return True
    count = bytearray(4)
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return True
    return any(count)


def limit_memory(most: int | None) -> None:
    """Make allocations of this process fail with `MemoryError` at `HEADROOM` above ``most`` bytes, where the system
    supports ``RLIMIT_DATA``. None: remove the limit."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = hard if most is None else most + HEADROOM
        if most is not None and hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _die_with_the_fork_server() -> None:
    """Let Linux kill this process when its parent ends. On other systems this process ends after the current job, when
    its connection has ended."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(Exception):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
