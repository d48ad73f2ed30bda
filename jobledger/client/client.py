"""The client: submits jobs, emits events, and queries the status table about jobs.

A submission returns once the log has acknowledged it; nothing is buffered for later. The client does not know workers
or the stream processor. It writes to the log, and reads through the small interface `StatusSource`, which the status
table's read side implements (see `jobledger.client.waiting`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, ParamSpec, TypeVar, Unpack

import uuid_utils
from confluent_kafka import KafkaError, Message

from jobledger.client import copies
from jobledger.client.acknowledgements import Ack, BulkAck
from jobledger.client.commands import Commands, Job
from jobledger.client.explaining import Explainer
from jobledger.client.plans import Plans
from jobledger.client.waiting import Follower, Question, StatusSource
from jobledger.config import Settings
from jobledger.definitions import tracing
from jobledger.definitions.context import JobContext, maybe_current_job
from jobledger.definitions.copy_options import CopyOptions
from jobledger.definitions.durations import Seconds
from jobledger.definitions.event_types import EVENT_HEADER, EventType, earlier_of
from jobledger.definitions.handles import EventHandle, JobHandle, Plan, refuse_inside_job, result_of
from jobledger.definitions.options import check_options
from jobledger.definitions.task import JobRequest, Task
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import (
    BadEvent,
    BrokerUnavailable,
    ConfigError,
    ConnectionUnusable,
    JobledgerError,
    StoreError,
)
from jobledger.explain import Explanation
from jobledger.job import JobStatus
from jobledger.kafka.auth import write
from jobledger.kafka.clients import Headers, position_of
from jobledger.kafka.topic_names import Names, lane
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.log.schema_registry import SchemaRegistry, id_key
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process import forks
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.schemas import codec, confluent_frame
from jobledger.schemas.derive import check_evolution
from jobledger.schemas.event_factory import submission
from jobledger.schemas.events import JobSpec, Position

LOG = get_logger("jobledger.client")

R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")

#: Number of records in the send queue from which `submit_async` waits in a thread for free space (librdkafka's queue
#: holds 100,000).
NEAR_FULL = 90_000

#: Seconds for which the status table is not asked again for a job's run, after it could not be read.
NO_TABLE_S = 60.0

_SINGLE_OBJECT = 10  # bytes before the datum in the single-object encoding


class Client:
    """Submits jobs of one namespace. Thread-safe; opens its connection at the first submission. ``registry``: the app's
    code, for the limits that an explanation names; None: they are not known.

    Single submissions and `submit_many` use separate producers: the first sends records at once, the second in large
    batches.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names,
        status: Callable[[], StatusSource],
        registry: TaskRegistry | None = None,
    ) -> None:
        self.settings, self.names = settings, names
        self._status, self._follower = status, Follower(status)
        self._no_table_until = 0.0
        self._opening = forks.Lock()
        self._pid = os.getpid()
        self._single: LogWriter | None = None
        self._bulk: LogWriter | None = None
        self._source = source("client")
        #: Control commands for jobs, queues and tasks.
        self.commands = Commands(settings, names, self.writer)
        #: Actions on many jobs.
        self.plans = Plans(names, self.writer, status)
        self._explainer = Explainer(settings, names, status, registry)
        #: The fingerprints of event schemas that are published and compatible with those on the log, each with the head
        #: of its Schema Registry frame, or b"" for single-object encoding.
        self._event_schemas: dict[bytes, bytes] = {}
        forks.in_child(self)

    def after_fork(self) -> None:
        """Drop the parent's producers. Do not wait for the thread that polls the status table: a forked child has no
        copy of that thread."""
        self._pid, self._single, self._bulk = os.getpid(), None, None
        self._source = source("client")
        self._follower.after_fork()

    def at_exit(self, timeout: float) -> None:
        """Flush and close the connections at the end of the process."""
        self.close(timeout)

    def _writer(self, bulk: bool) -> LogWriter:
        if self._pid != os.getpid():
            forks.notice()
        single = self._writer(bulk=False) if bulk else None  # publishes the schema
        writer = (self._bulk if bulk else self._single) or self._open(single)
        writer.ensure_schema()
        return writer

    def _open(self, single: LogWriter | None) -> LogWriter:
        """Open the writer that sends at once, or, if ``single`` is that writer, the writer that sends in batches."""
        with self._opening("opening the connection to Kafka"):
            if sys.is_finalizing():
                raise ConnectionUnusable("the interpreter is shutting down: nothing can be sent any more")
            forks.at_exit(self)
            if single is None:
                self._single = self._single or LogWriter(self.settings, self.names)
                return self._single
            self._bulk = self._bulk or LogWriter(
                self.settings, None, linger_ms=5.0, serve=False, framing=single.framing, batch=single.batch
            )
            return self._bulk

    def _ready(self) -> LogWriter | None:
        """Return the writer that sends at once, if it can be used without blocking; else None."""
        writer = self._single
        return writer if writer is not None and writer.ready and self._pid == os.getpid() else None

    def _bulk_writer(self) -> LogWriter:
        """Return the writer that sends in batches. If the caller is a signal handler that interrupted a poll of that
        writer in this thread, return the writer that sends at once."""
        writer = self._writer(bulk=True)
        return self._writer(bulk=False) if writer.polled_here() else writer

    def writer(self) -> LogWriter:
        """Return the writer that sends at once, connected and with the schema published."""
        return self._writer(bulk=False)

    def cancel(self, job_id: str, reason: str | None = None, run: int | None = None, by: str | None = None) -> None:
        """Request that a job be cancelled; see `App.cancel`."""
        self.commands.cancel([Job(job_id, self._run_of(job_id) if run is None else run)], reason, by)

    def _run_of(self, job_id: str) -> int:
        """Return the number of a job's present run: 1 if the status table does not know the job, or cannot be read."""
        if time.monotonic() < self._no_table_until:
            return 1
        try:
            status = self._status().statuses([job_id]).get(job_id)
        except (ConfigError, StoreError) as exc:
            LOG.debug("the run of job %s is not known: %s", job_id, exc)
            self._no_table_until = time.monotonic() + NO_TABLE_S
            return 1
        return 1 if status is None else status.run

    def redrive(self, job_id: str, reason: str | None = None, by: str | None = None) -> Plan:
        """Make a plan that runs a job again which has ended; see `App.redrive`. Raises `JobNotFound`."""
        table = self._status()
        known = table.statuses([job_id])
        if job_id not in known:
            raise table.unknown(job_id)
        return self.plans.make("redrive", [(job_id, known[job_id].run)], {}, by=by, reason=reason)

    def copy(
        self, job_id: str, task_of: Callable[[str], Task[Any, Any]], **options: Unpack[CopyOptions]
    ) -> JobHandle[Any]:
        """Submit a copy of a job with changed arguments; see `App.copy`. ``task_of``: returns the task of a name."""
        check_options("copy()", options, CopyOptions)
        whole = copies.original(self.settings, self.names, self._status(), job_id)
        return self.submit(copies.copy_of(whole, task_of, **options))

    async def cancel_async(
        self, job_id: str, reason: str | None = None, run: int | None = None, by: str | None = None
    ) -> None:
        """Request that a job be cancelled as `cancel` does, without blocking the event loop."""
        if run is None:
            run = await _in_thread(self._run_of, job_id)
        for records in self.commands.cancels([Job(job_id, run)], reason, by):
            writer = await _in_thread(self.writer)
            what = f"cancelling job {job_id}"
            await asyncio.gather(*(self._acknowledged(writer, record, what) for record in records))

    def close(self, timeout: float = 10.0) -> None:
        """Flush within ``timeout`` seconds and close the connections; the next submission opens new ones. Callers that
        wait for a job get an error."""
        forks.notice()
        self._follower.close()
        with self._opening("opening or closing the connection to Kafka"):
            for writer in (self._single, self._bulk):
                if writer is not None:
                    writer.close(timeout)
            self._single = self._bulk = None
            forks.closed(self)

    def _outgoing(self, request: JobRequest[Any], inside: JobContext | None) -> tuple[str, Outgoing]:
        """Return the job's id and the record that submits the job."""
        task = request.task
        if task.registry.names is not self.names:
            self._check_app(task)
        if inside is None:
            job_id, parent, trace = request.job_id or str(uuid_utils.uuid7()), None, tracing.current()
        else:
            derived = inside.child_id(task.name, request.args)
            job_id = request.job_id or derived
            parent, trace = inside.job_id, tracing.current() or inside.trace
        spec = JobSpec(request.args, request.tags, parent, request.expires_in_ms, None, request.priority, request.links)
        event = submission(
            job_id, task.name, request.queue, request.key, spec, now_us(), self._source, trace, request.delay_ms
        )
        if request.delay_ms is not None:
            return job_id, Outgoing(self.names.coordination, codec.encode(event), job_id)
        topic = self.names.jobs(lane(request.queue, request.priority))
        return job_id, Outgoing(topic, codec.encode(event), request.key or job_id)

    def _check_app(self, task: Task[Any, Any]) -> None:
        """Raise `ConfigError` for a task of another namespace: this namespace's workers would run their own task of
        that name."""
        names = task.registry.names
        if names != self.names:
            raise ConfigError(
                f"{task!r} belongs to app {names.namespace!r}, so app {self.names.namespace!r} cannot submit its jobs: "
                f"submit them with app {names.namespace!r}"
            )

    def submit(self, request: JobRequest[R]) -> JobHandle[R]:
        """Submit one job and wait for its acknowledgement; see `Task.submit` for the errors."""
        writer = self._writer(bulk=False)
        with tracing.submitting(request.task.name, request.queue):
            job_id, record = self._outgoing(request, maybe_current_job())
            return JobHandle(self, request.task, job_id, self._sent(writer, record, f"submitting job {job_id}"))

    def _sent(self, writer: LogWriter, record: Outgoing, what: str) -> Position:
        """Send one record and wait for its acknowledgement."""
        ack = Ack(writer, record.headers)
        writer.post(record, ack)
        # librdkafka reports a failure after submit_timeout; the margin is for the delivery callback.
        patience = self.settings.submit_timeout + 5.0
        if not (ack.event.wait(patience) if writer.served else writer.wait(ack.event, patience)):
            raise BrokerUnavailable(f"{what}: no acknowledgement within {self.settings.submit_timeout:g} s")
        return ack.position(what, record.topic)

    async def submit_async(self, request: JobRequest[R]) -> JobHandle[R]:
        """Submit one job as `submit` does, without blocking the event loop."""
        writer = self._ready()
        if writer is None:  # connecting and publishing the schema block, but only once
            writer = await _in_thread(self._writer, False)
        with tracing.submitting(request.task.name, request.queue):
            job_id, record = self._outgoing(request, maybe_current_job())
            position = await self._acknowledged(writer, record, f"submitting job {job_id}")
            return JobHandle(self, request.task, job_id, position)

    async def _acknowledged(self, writer: LogWriter, record: Outgoing, what: str) -> Position:
        """Send one record and wait for its acknowledgement without blocking the event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Position] = loop.create_future()

        def resolve(error: KafkaError | None, position: Position) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(position)
            else:
                future.set_exception(writer.failed(error, what, write(record.topic)))

        def delivered(error: KafkaError | None, message: Message, *, alone: bool = False) -> None:
            if error is not None and writer.resend(error, message, record.headers, delivered, alone):
                return
            with contextlib.suppress(RuntimeError):  # the loop has been closed: no caller waits
                loop.call_soon_threadsafe(resolve, error, position_of(message))

        await _post_async(writer, record, delivered)
        while not writer.served and not future.done():
            writer.poll(0)
            await asyncio.sleep(0.005)
        return await future

    def submit_many(self, requests: Iterable[JobRequest[R]]) -> list[JobHandle[R]]:
        """Submit jobs in large batches and wait for every acknowledgement. Returns the handles in order.

        If some submissions fail, the error of the first is raised after all submissions are acknowledged or have
        failed. The error says how many jobs were accepted; `JobledgerError.failed` holds the indexes, from 0, of the
        others.
        """
        jobs = iter(requests)
        first = next(jobs, None)
        if first is None:
            return []
        self._check_app(first.task)  # before a connection is opened
        many = BulkAck(self.settings, self._bulk_writer(), "jobs")
        inside = maybe_current_job()
        tasks: list[Task[Any, R]] = []
        with tracing.submitting("", ""):  # one span for all: a span for each job would cost more than a submission
            for request in chain((first,), jobs):
                many.add(*self._outgoing(request, inside))
                tasks.append(request.task)
            accepted = zip(tasks, many.finish(), strict=True)
            return [JobHandle(self, task, job_id, position) for task, (job_id, position) in accepted]

    # -- events ---------------------------------------------------------------------------------------------------

    def _event(self, kind: EventType, event: Any, inside: JobContext | None) -> tuple[str, Outgoing]:
        """Return the event's id and its record. Inside a job the id is derived from the job, so a rerun emits no new
        event."""
        value, key = kind.encode(event)
        if inside is None:
            event_id, trace = str(uuid_utils.uuid7()), tracing.current()
        else:
            event_id, trace = inside.child_id(f"event {kind.name}", value), tracing.current() or inside.trace
        headers: Headers = [(EVENT_HEADER, event_id.encode()), ("jl-source", self._source.encode())]
        if trace is not None:
            headers.append(("traceparent", trace.encode()))
        return event_id, Outgoing(kind.topic, value, key or event_id, None, headers)

    def _published(self, kind: EventType) -> None:
        """Ensure that the event's schema is published; only the first call for a schema reads the log. Raises
        `IncompatibleEvent` if the schema cannot read what earlier schemas on the log wrote, `BadEvent` for an event of
        another program's topic, and the errors of the broker or the Schema Registry."""
        if kind.fingerprint in self._event_schemas:
            return
        if kind.foreign:
            raise BadEvent(
                f"event {kind.name!r} is read from {kind.topic}, another program's topic: it can be handled, not emitted"
            )
        head = b""
        lookup = SchemaLookup(self.settings, self.names, timeout=self.settings.submit_timeout)
        try:
            known = lookup.all()
            check_evolution(kind.name, kind.schema, earlier_of(kind, known))
            keys = [] if kind.fingerprint in known else [kind.fingerprint.hex()]
            if self.settings.schema_registry is not None:
                registry = SchemaRegistry(self.settings.schema_registry)
                number = registry.register(f"{kind.topic}-value", kind.schema)
                head = confluent_frame.head(number)
                if not lookup.check(number, kind.schema, registry.shown):
                    keys.append(id_key(number))  # so that the log can be read without the registry
        finally:
            lookup.close()
        self._writer(bulk=False).send([Outgoing(self.names.schemas, kind.schema.encode(), key) for key in keys])
        self._event_schemas[kind.fingerprint] = head

    def _framed(self, kind: EventType, record: Outgoing) -> Outgoing:
        """Return the record as it is sent: in the Schema Registry's frame if a registry is configured."""
        head = self._event_schemas[kind.fingerprint]
        assert record.value is not None
        return record._replace(value=head + record.value[_SINGLE_OBJECT:]) if head else record

    def emit(self, kind: EventType, event: Any) -> EventHandle:
        """Send one event and wait for its acknowledgement; see `App.emit` for the errors."""
        event_id, record = self._event(kind, event, maybe_current_job())
        self._published(kind)
        record = self._framed(kind, record)
        return EventHandle(event_id, self._sent(self._writer(bulk=False), record, f"emitting {kind.name} {event_id}"))

    async def emit_async(self, kind: EventType, event: Any) -> EventHandle:
        """Send one event as `emit` does, without blocking the event loop."""
        event_id, record = self._event(kind, event, maybe_current_job())
        writer = self._ready()
        if writer is None or kind.fingerprint not in self._event_schemas:
            await _in_thread(self._published, kind)
            writer = await _in_thread(self._writer, False)
        record = self._framed(kind, record)
        position = await self._acknowledged(writer, record, f"emitting {kind.name} {event_id}")
        return EventHandle(event_id, position)

    def emit_many(self, events: Iterable[tuple[EventType, Any]]) -> list[EventHandle]:
        """Send events in large batches and wait for every acknowledgement. Returns the handles in order. Failures are
        reported as by `submit_many`."""
        many = BulkAck(self.settings, self._bulk_writer(), "events")
        inside = maybe_current_job()
        for kind, event in events:
            self._published(kind)
            event_id, record = self._event(kind, event, inside)
            many.add(event_id, self._framed(kind, record))
        return [EventHandle(event_id, position) for event_id, position in many.finish()]

    # -- queries --------------------------------------------------------------------------------------------------

    def status(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0) -> JobStatus:
        """Return the job's status, at least as new as ``at_least``.

        Raises `JobNotFound` for an id that the table does not know, and `StatusTimeout` if the table has not read
        ``at_least`` within ``timeout`` seconds.
        """
        return self._answer(Question(job_id, at_least, ended=False, timeout=timeout))

    async def status_async(
        self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0
    ) -> JobStatus:
        """Return the job's status as `status` does, without blocking the event loop."""
        return await self._answer_async(Question(job_id, at_least, ended=False, timeout=timeout))

    def wait(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds | None = None) -> JobStatus:
        """Wait until the job has ended. Returns its final status, at least as new as ``at_least``."""
        return self._answer(_ending(job_id, at_least, timeout))

    async def wait_async(
        self, job_id: str, *, at_least: Position | None = None, timeout: Seconds | None = None
    ) -> JobStatus:
        """Wait until the job has ended as `wait` does, without blocking the event loop."""
        return await self._answer_async(_ending(job_id, at_least, timeout))

    def explain(self, job_id: str, *, at_least: Position | None = None) -> Explanation:
        """Return why a job is where it is; see `App.explain`."""
        forks.notice()
        return self._explainer.explain(job_id, at_least)

    async def explain_async(self, job_id: str, *, at_least: Position | None = None) -> Explanation:
        """Explain a job as `explain` does, without blocking the event loop."""
        return await _in_thread(partial(self.explain, job_id, at_least=at_least))

    def _answer(self, question: Question) -> JobStatus:
        try:
            forks.notice()
            self._follower.ask(question)
            return question.answer.result(question.patience)
        except TimeoutError:
            raise question.late() from None
        finally:
            question.answer.cancel()

    async def _answer_async(self, question: Question) -> JobStatus:
        try:
            forks.notice()
            self._follower.ask(question)
            async with asyncio.timeout(question.patience):
                return await asyncio.wrap_future(question.answer)
        except TimeoutError:
            raise question.late() from None
        finally:
            question.answer.cancel()


def _ending(job_id: str, at_least: Position | None, timeout: Seconds | None) -> Question:
    """Return the question for the status of a job that has ended. Raises `ResultInsideJob` inside a job."""
    refuse_inside_job(job_id)
    return Question(job_id, at_least, ended=True, timeout=timeout)


async def _post_async(
    writer: LogWriter, record: Outgoing, delivered: Callable[[KafkaError | None, Message], None]
) -> None:
    """Call `LogWriter.post`. If the queue is nearly full, or if a schema must be registered first, the call runs in
    another thread, so that the event loop is not blocked."""
    if len(writer.producer) < NEAR_FULL and not writer.waits_for(record):
        writer.post(record, delivered)
    else:
        await _in_thread(writer.post, record, delivered)


async def _in_thread(function: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """Call a blocking function in another thread. The function is called in this thread if no thread can be started any
    more (the process is ending), or if a signal handler has interrupted code here for which the other thread would
    wait."""
    if forks.inside():
        return function(*args, **more)
    try:
        waiting = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **more))
    except RuntimeError:
        return function(*args, **more)
    return await waiting


__all__ = ["Client", "EventHandle", "JobHandle", "JobledgerError", "StatusSource", "result_of"]
