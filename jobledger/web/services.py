"""What the routes of one app share: the app, the guard of its routes, and bounded access to the status table and the log.

No blocking call runs on the event loop: queries and reads run in a limited number of threads, and their callers wait for
a limited time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from fastapi import Request

from jobledger.app import App
from jobledger.errors import JobledgerError, StatusTimeout, text_of
from jobledger.job import JobStatus
from jobledger.kafka.auth import check_connection
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import Position, Recorded
from jobledger.views.records import ANSWER_S, facts_of, submitted, unknown
from jobledger.web.access import Guard
from jobledger.web.feed import Feed
from jobledger.web.problems import Problem

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Number of queries of the status table that run at a time, of reads of the log, and of requests that change something
#: by a blocking call.
TABLE_THREADS, LOG_THREADS, CHANGE_THREADS = 8, 4, 8
#: Seconds that a caller waits for each of them. A plan lists all of its jobs first, which may take minutes.
TABLE_S, LOG_S, CHANGE_S = 20.0, 30.0, 300.0
#: Seconds for which the log is not read for arguments again, after it could not be read.
AWAY_S = 3.0
#: Bytes of records after which the arguments of further jobs, and further events of a timeline, are left out.
RECORDS_BYTES = 8 * 1024 * 1024
#: Seconds for which requests share an answer that needs a read of the log.
SHARED_S = 1.0
#: Seconds that a request with ``at_least`` waits, and seconds between two checks of the status table.
AT_LEAST_S, LOOK_S = 10.0, 0.02


class Threads:
    """Runs blocking calls, ``count`` at a time. A caller waits up to ``seconds``; ``what``: for the error.

    A call that nobody waits for any more still counts until it ends.
    """

    def __init__(self, count: int, seconds: float, what: str) -> None:
        self._count, self._seconds, self._what = count, seconds, what
        self._calls: anyio.CapacityLimiter | None = None
        self._threads: anyio.CapacityLimiter | None = None

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return the function's result. Raises `Problem` 503 when the time is over; the call itself then continues."""
        try:
            with anyio.fail_after(self._seconds):
                return await self._run(partial(function, *args))
        except TimeoutError:
            raise Problem(
                503, f"{self._what} did not answer within {self._seconds:g} s", headers={"Retry-After": "5"}
            ) from None

    async def _run(self, function: Callable[[], T]) -> T:
        if self._calls is None or self._threads is None:
            # The library returns a token when the caller stops waiting, so its own limiter limits nothing here.
            self._calls, self._threads = anyio.CapacityLimiter(self._count), anyio.CapacityLimiter(math.inf)
        calls, token, loop = self._calls, object(), asyncio.get_running_loop()
        first = threading.Lock()  # taken by the thread when it begins the call, or by the caller who leaves before that

        def call() -> T:
            if not first.acquire(blocking=False):
                raise TimeoutError  # nobody gets this error: the caller has left
            try:
                return function()
            finally:
                with suppress(RuntimeError):  # the loop is closed: the process ends
                    loop.call_soon_threadsafe(calls.release_on_behalf_of, token)

        await calls.acquire_on_behalf_of(token)
        try:
            return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
        except BaseException:
            if first.acquire(blocking=False):
                calls.release_on_behalf_of(token)
            raise


class Records:
    """Reads single records of the log. It keeps its connections, because opening one takes longer than a read."""

    def __init__(self, app: App) -> None:
        self._settings, self._names = app.settings.acting_as("reader"), app.names
        self._lock = threading.Lock()
        self._idle: list[LogReader] = []
        self._decode = decoder(self._settings, self._names).decode
        self._away_until, self._away = 0.0, ""

    def arguments(self, jobs: Sequence[JobStatus]) -> dict[str, bytes | str]:
        """Return arguments by job id, or the reason why they are not known."""
        if time.monotonic() < self._away_until:
            return dict.fromkeys((job.job_id for job in jobs), self._away)
        try:
            return self._with_reader(lambda reader, decode: self._read(jobs, reader, decode))
        except JobledgerError as exc:
            self._away, self._away_until = unknown(exc), time.monotonic() + AWAY_S
            return dict.fromkeys((job.job_id for job in jobs), self._away)

    def facts(self, job: JobStatus) -> tuple[list[Recorded], list[tuple[Position, str]]]:
        """Return a job's events; see `facts_of`. Raises `BrokerUnavailable` and other errors of the log."""
        return self._with_reader(lambda reader, decode: facts_of(job, reader, decode, RECORDS_BYTES))

    def close(self) -> None:
        """Close the connections; the next read opens new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def _read(self, jobs: Sequence[JobStatus], reader: LogReader, decode: Any) -> dict[str, bytes | str]:
        args: dict[str, bytes | str] = {}
        size = 0
        for job in jobs:
            if size > RECORDS_BYTES:
                args[job.job_id] = f"left out: those before have more than {RECORDS_BYTES:,} bytes"
                continue
            args[job.job_id] = submitted(self._names, job, reader, decode)
            size += len(args[job.job_id])
        return args

    def _with_reader(self, read: Callable[[LogReader, Any], T]) -> T:
        with self._lock:
            reader = self._idle.pop() if self._idle else None
        if reader is None:
            check_connection(self._settings, ANSWER_S)
            reader = LogReader(self._settings)
        try:
            result = read(reader, self._decode)
        except BaseException:
            reader.close()  # it may have lost its broker
            raise
        with self._lock:
            self._idle.append(reader)
        return result


class Remembered:
    """A result that is computed at most once in ``seconds``. Callers that wait at the same time share one
    computation, also if it fails: otherwise, without a broker, each caller would wait for all callers before it."""

    def __init__(self, seconds: float, compute: Callable[[], Awaitable[Any]]) -> None:
        self._seconds, self._compute = seconds, compute
        self._lock: anyio.Lock | None = None
        self._until, self._value = 0.0, None
        self._error: JobledgerError | Problem | None = None

    async def get(self) -> Any:
        """Return the result. Raises what the computation raises."""
        if self._lock is None:
            self._lock = anyio.Lock()
        async with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._value, self._error = await self._compute(), None
                except (JobledgerError, Problem) as exc:
                    self._value, self._error = None, exc
                self._until = time.monotonic() + self._seconds
            if self._error is not None:
                raise self._error.with_traceback(None)
            return self._value

    def forget(self) -> None:
        """Compute the result again at the next call."""
        self._until = 0.0


class Services:
    """What the routes of one app share."""

    def __init__(self, app: App, guard: Guard) -> None:
        self.app, self.guard = app, guard
        self.records, self.feed = Records(app), Feed(app)
        self._table = Threads(TABLE_THREADS, TABLE_S, "the status table")
        self._log = Threads(LOG_THREADS, LOG_S, "the log")
        self._changes = Threads(CHANGE_THREADS, CHANGE_S, "Kafka")
        #: The commands in force on queues and tasks (`Commands.standing`), and whether table and broker answer.
        self.standing = Remembered(SHARED_S, lambda: self.log(app.commands.standing))
        self.ready = Remembered(SHARED_S, self._checked)

    async def table(self, ask: Callable[[Any], T]) -> T:
        """Return the answer of the status table's read side. Raises `StoreError` and what ``ask`` raises."""
        return await self._table.run(lambda: ask(self.app.status_table()))

    async def log(self, read: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return the result of a function that reads the log."""
        return await self._log.run(read, *args)

    async def change(self, function: Callable[[], T]) -> T:
        """Return the result of a function that changes something, and blocks until the log has acknowledged it."""
        return await self._changes.run(function)

    async def reached(self, position: Position | None) -> None:
        """Wait until the status table has read a position. Raises `StatusTimeout` after `AT_LEAST_S`."""
        if position is None:
            return
        deadline = time.monotonic() + AT_LEAST_S
        while not await self.table(lambda table: table.reached(position)):
            if time.monotonic() >= deadline:
                raise StatusTimeout(
                    f"the status table did not reach {position} within {AT_LEAST_S:g} s: is `jobledger streams "
                    "MODULE:APP` running?"
                )
            await anyio.sleep(LOOK_S)

    async def _checked(self) -> tuple[str | None, str | None]:
        """Return why the status table cannot be read, and why Kafka does not answer; None for each that can be reached."""
        table: str | None = None
        try:
            await self.table(lambda reader: reader.offsets())
        except (JobledgerError, Problem) as exc:
            table = text_of(exc)
        return table, await self.log(self._broker)

    def _broker(self) -> str | None:
        try:
            check_connection(self.app.settings, ANSWER_S)
        except JobledgerError as exc:
            return text_of(exc)
        return None


def services(request: Request) -> Services:
    """Return what the routes of the request's app share."""
    found: Services = request.app.state.services
    return found
