"""A child process: runs one job after the other, each alone, and says what became of it.

It is forked, with the app imported, by the nursery (`jobledger.consumers.nursery`), and ends when the worker closes the
connection. What it writes to standard error goes to the worker, which passes it on and keeps the last of it: of a child
that dies these are the last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import gc
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from jobledger import forks, tracing
from jobledger.consumers.frames import LENGTH, Ended, Progress, Run, decode_run, ended, frame
from jobledger.consumers.garbage import Garbage
from jobledger.consumers.interrupts import runs_inside
from jobledger.consumers.outcome import Failed, Outcome, Succeeded, bad_result, error_info, judge, ran_out, timed_out
from jobledger.context import JobContext, enter
from jobledger.errors import BadArguments, TaskCancelled, TaskInterrupted, TaskTimedOut
from jobledger.functions import AWAIT, settled
from jobledger.logger import get_logger, loop_error
from jobledger.middleware import runner
from jobledger.retry import Retry
from jobledger.schemas.events import JobProgressed
from jobledger.task import Task
from jobledger.task_registry import Registry

LOG = get_logger("jobledger.worker")

#: Seconds between two looks at the memory in use while jobs come, and without a job until it is looked at.
LOOK_S, IDLE_S = 0.1, 1.0
#: The signals that tell code to end: its time is over, or its job was cancelled.
LATE, STOP = signal.SIGUSR1, signal.SIGUSR2
#: Seconds between two progress messages of one job.
PROGRESS_INTERVAL_S = 0.1
#: What address space a job with ``max_memory`` may have beyond it: past that, Python says `MemoryError`. The worker
#: looks at the memory in use a few times a second; this is for a job that takes much at once.
HEADROOM = 256 << 20

#: Milliseconds that a child which ends gives its spans to leave.
FLUSH_MS = 1_500


class Child:
    """Serves one connection; see the module."""

    def __init__(self, registry: Registry, connection: socket.socket) -> None:
        self._registry, self._connection = registry, connection
        self._depth = forks.depth
        self._functions: dict[str, Callable[..., Any]] = {}
        self._loop: asyncio.Runner | None = None
        self._running: asyncio.Task[Any] | None = None  # a coroutine task's
        self._function: Callable[..., Any] | None = None  # that it runs
        self._clock: asyncio.Timeout | None = None
        self._inside = False  # a plain function's code runs
        self._late = False  # the time of what runs was over
        self._told: type[TaskInterrupted] | None = None  # what the code at hand was told
        self._most: int | None = None  # the limit of memory that is set
        self._reported_at = 0.0
        self._unsent: JobProgressed | None = None
        self._garbage = Garbage()
        self._comes = select.poll()
        self._comes.register(connection, select.POLLIN)
        self._looked_at = 0.0  # at the memory in use
        self._sending = threading.Lock()  # held to report, and to end a context: a job's thread may outlive the job

    def serve(self) -> None:
        """Run what comes until the connection ends."""
        for number in (LATE, STOP):
            signal.signal(number, self._interrupted)
        AWAIT.set(self._awaited)
        while (body := self._receive()) is not None:
            run = decode_run(body)
            try:
                said = self._run(run)
            except BaseException as broken:  # noqa: BLE001  # the last guard: a process is never lost
                said = ended(Failed("never", error_info(broken)))
            self._connection.sendall(frame(said))
            self._rest()
        self._close()

    def _rest(self) -> None:
        """Between two jobs: see what garbage there is, now and then, and when no job comes."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._garbage.look(idle=False)
        if not self._comes.poll(IDLE_S * 1000):
            self._garbage.look(idle=True)

    def _receive(self) -> bytes | None:
        head = self._exactly(LENGTH.size)
        return None if head is None else self._exactly(LENGTH.unpack(head)[0])

    def _exactly(self, count: int) -> bytes | None:
        found = self._connection.recv(count)
        if len(found) == count:
            return found
        parts = bytearray(found)
        while len(parts) < count:
            if not found:
                return None
            found = self._connection.recv(count - len(parts))
            parts += found
        return bytes(parts)

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _run(self, run: Run) -> Ended:
        task = self._registry.tasks.get(run.task)
        if task is None:  # the code on disk is not what the worker runs
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
        self._reported_at, self._unsent, self._late, self._told = 0.0, None, False, None
        try:
            value, error = self._call(task, context, kwargs)
        except BaseException as raised:  # noqa: BLE001  # SystemExit is the job's, as in a thread
            value, error = None, raised
        if forks.depth != self._depth:  # the code forked, and this is the child: the connection is its parent's
            forks.left(error)
        self._end(context)
        try:
            return ended(self._returned(task, value) if error is None else self._judge(task, run, error))
        finally:
            error = None  # or its frame would hold it, and it the frame

    def _call(
        self, task: Task[Any, Any], context: JobContext, kwargs: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """What the code returned; or what it raised, if that is not raised here."""
        function = self._functions.get(task.name)
        if function is None:
            function = self._functions[task.name] = runner(task)
        if task.policy.max_memory != self._most:
            self._most = task.policy.max_memory
            limit_memory(self._most)
        if task.is_async:
            said: list[tuple[Any, BaseException | None]] = []
            self._runner().run(
                self._await(function, context, kwargs, task.timeout, said), context=contextvars.copy_context()
            )
            return said.pop()
        return contextvars.copy_context().run(self._plainly, function, context, kwargs), None

    def _runner(self) -> asyncio.Runner:
        if self._loop is None:
            self._loop = asyncio.Runner()
            self._loop.get_loop().set_exception_handler(loop_error)
        return self._loop

    async def _await(
        self,
        function: Callable[..., Any],
        context: JobContext,
        kwargs: dict[str, Any],
        limit: float | None,
        said: list[tuple[Any, BaseException | None]],
    ) -> None:
        """Put what comes of it into ``said``: asyncio looks at what a task returns or raises, which may break then, and
        stop the loop."""
        enter(context)
        self._running, self._function = asyncio.current_task(), function
        clock = self._clock = asyncio.timeout(limit)
        try:
            async with clock:
                value = await function(**kwargs)
            said.append((value, None))
        except BaseException as error:  # noqa: BLE001  # judged by the caller
            said.append((None, error))
        finally:
            self._running = self._clock = None
            self._late = self._late or clock.expired()

    def _plainly(self, function: Callable[..., Any], context: JobContext, kwargs: dict[str, Any]) -> Any:
        """Run a function that `_interrupted` may end."""
        enter(context)
        value: Any = None
        returned = False
        try:
            self._inside = True
            value = settled(function(**kwargs))
            returned = True
            self._inside = False
        except TaskInterrupted:
            # One is raised at most, so what follows is undisturbed. It may have come when the code was through.
            if not returned:
                raise
        finally:
            self._inside = False
        return value

    def _awaited(self, value: Awaitable[Any]) -> Any:
        """Run what a function returned without awaiting it; `_interrupted` cancels it."""
        said: list[tuple[Any, BaseException | None]] = []

        async def run() -> None:
            self._running = asyncio.current_task()
            try:
                if self._told is not None:
                    raise asyncio.CancelledError
                said.append((await value, None))
            except BaseException as error:  # noqa: BLE001  # raised again below
                said.append((None, error))
            finally:
                self._running = None

        self._inside = False
        self._runner().run(run(), context=contextvars.copy_context())
        found, error = said.pop()
        try:
            if isinstance(error, asyncio.CancelledError) and self._told is not None:
                raise self._told
            if error is not None:
                raise error
        finally:
            error = None  # or its frame would hold it, and it the frame
        self._inside = True
        return found

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._told = TaskTimedOut if number == LATE else TaskCancelled
        self._late = number == LATE
        if self._running is not None and self._loop is not None:
            if number == LATE and self._clock is not None:
                self._tell_blocked(frame)
                return
            self._loop.get_loop().call_soon_threadsafe(self._running.cancel)
        elif self._inside:
            self._inside = False
            raise self._told

    def _tell_blocked(self, frame: FrameType | None) -> None:
        """The time of a coroutine has been over for a while: if its clock has not said so, its code blocks the loop."""
        clock, function = self._clock, self._function
        if clock is None or function is None or clock.expired():
            return
        if runs_inside(frame, Child._await.__code__, function):
            self._late = True
            raise TaskTimedOut

    # -- its end ------------------------------------------------------------------------------------------------------

    def _returned(self, task: Task[Any, Any], value: Any) -> Outcome:
        try:
            return Succeeded(task.encode_result(value))
        except BaseException as error:  # noqa: BLE001  # a result's own hooks may raise anything
            return bad_result(task.name, error)

    def _judge(self, task: Task[Any, Any], run: Run, error: BaseException) -> Outcome:
        late = self._late and ran_out(error)
        error = timed_out(task.name, task.timeout, error) if late else error
        return judge(task.retry, run.attempt, error, random.random(), timed_out=late)

    def _report(self, context: JobContext, progressed: JobProgressed) -> None:
        with self._sending:
            if context.ended:  # since the context let it pass: what is sent now would count as the next job's
                return
            now = time.monotonic()
            if now - self._reported_at < PROGRESS_INTERVAL_S:
                self._unsent = progressed
                return
            self._reported_at = now
            self._send_progress(progressed)

    def _end(self, context: JobContext) -> None:
        """The attempt's code has returned or raised: from now on its context takes no reports."""
        with self._sending:
            context.ended = True
            if self._unsent is not None:
                self._send_progress(self._unsent)

    def _send_progress(self, said: JobProgressed) -> None:
        self._unsent = None
        self._connection.sendall(frame(Progress(said.sequence, said.done, said.total, said.message)))

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # logged there; and the process ends anyway
            if self._loop is None:
                self._loop = asyncio.Runner()
            self._loop.run(self._registry.resources.close())
            self._loop.close()
        with contextlib.suppress(Exception):  # no `atexit` runs here, so what is batched would be lost
            tracing.flush(FLUSH_MS)


def run_child(registry: Registry, connection: socket.socket, errors: int) -> None:
    """Be a child, in a process that was just forked for it; does not return. ``errors``:
    what standard error shall be."""
    status = 1
    try:
        os.dup2(errors, 2)
        os.close(errors)
        faulthandler.enable(file=2)
        _die_with_the_nursery()
        gc.enable()
        random.seed()
        connection.setblocking(True)
        Child(registry, connection).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the worker is gone, and nobody is left to be told
    except BaseException:
        LOG.exception("a child process failed")
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def limit_memory(most: int | None) -> None:
    """Let allocations of this process fail, as `MemoryError`, well above ``most`` bytes; as far as the system has that.
    None: no more."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = hard if most is None else most + HEADROOM
        if most is not None and hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _die_with_the_nursery() -> None:
    """Linux ends this process with its parent. Elsewhere the end of the connection does,
    once the job at hand is over."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(Exception):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
