"""The app: tasks, queues and settings of one namespace, with methods to submit jobs and to query them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import chain
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    dataclass_transform,
    overload,
)

from jobledger.client.client import Client
from jobledger.client.commands import Commands, Kind
from jobledger.config import Settings
from jobledger.definitions.copy_options import CopyOptions
from jobledger.definitions.durations import Seconds
from jobledger.definitions.event_types import EventType, Format, Start, as_event_class
from jobledger.definitions.handles import EventHandle, JobHandle, Plan, warn_on_loop
from jobledger.definitions.middleware import Around, Which
from jobledger.definitions.options import TaskOptions, check_options, spelled_out
from jobledger.definitions.policy import KEY_HOLD_MAX_S, LEASE_S, Adaptive, Breaker, HandlerOptions, Limits
from jobledger.definitions.queues import DEFAULT_PARTITIONS, DEFAULT_QUEUE, Queue, check_shares
from jobledger.definitions.resources import Resource, ResourceDecorator
from jobledger.definitions.retry import Retry, check_delay
from jobledger.definitions.task import AsyncTask, JobRequest, PlainTask, Task
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import ConfigError
from jobledger.explain import Explanation
from jobledger.job import JobStatus, State
from jobledger.kafka.topic_names import Names, check_utf8
from jobledger.plan import SCOPES, PlanStatus
from jobledger.process import forks
from jobledger.process.wording import counted
from jobledger.schemas.events import Position
from jobledger.worker_status import WorkerStatus

if TYPE_CHECKING:
    import datetime as dt

    from sqlalchemy import Table

    from jobledger.client.lifecycle import LifecycleStream

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])
A = TypeVar("A", bound=Around)
M = TypeVar("M")
T = TypeVar("T")


class JobFilter(TypedDict, total=False):
    """The filters of `App.jobs`, `App.redrive` and `App.cancel_many`."""

    state: State | str | Iterable[State | str] | None
    task: str | Iterable[str] | None
    queue: str | Iterable[str] | None
    tag: tuple[str, str] | Mapping[str, str] | None
    since: dt.datetime | None
    late: Seconds | None
    key: str | Iterable[str] | None
    version: str | Iterable[str] | None
    error: str | Iterable[str] | None
    fingerprint: str | Iterable[str] | None
    until: dt.datetime | None
    id_prefix: str | None
    attempts_least: int | None
    error_text: str | None


#: The filters of `JobFilter` that are texts, of which a job must have one.
_TEXTS = ("state", "task", "queue", "key", "version", "error", "fingerprint")


def filters_of(**wanted: Unpack[JobFilter]) -> dict[str, Any]:
    """Return filters as the status table's read side takes them. Raises `ConfigError`."""
    late, tag, least = wanted.get("late"), wanted.get("tag"), wanted.get("attempts_least")
    prefix, error_text = wanted.get("id_prefix"), wanted.get("error_text")
    if unknown := wanted.keys() - JobFilter.__annotations__.keys():
        raise ConfigError(f"{min(unknown)!r} is not a filter; the filters are {', '.join(JobFilter.__annotations__)}")
    if prefix is not None:
        check_utf8("id_prefix", prefix)
    if error_text is not None:
        check_utf8("error_text", error_text)
    if least is not None and (not isinstance(least, int) or not 0 < least < 1 << 31):
        raise ConfigError(f"attempts_least={least!r} is not a whole number above 0: the first attempt has number 1")
    filters: dict[str, Any] = {
        "tag": tag,
        "id_prefix": prefix,
        "error_text": error_text,
        "attempts_least": least,
        "since_ms": _milliseconds("since", wanted.get("since")),
        "until_ms": _milliseconds("until", wanted.get("until")),
        "late_ms": None if late is None else round((time.time() - check_delay(late, "late")) * 1000),
    }
    for what in _TEXTS:
        given: Any = wanted.get(what)
        filters[what] = given if isinstance(given, str | None) else list(given)
        for text in [given] if isinstance(given, str) else filters[what] or ():
            check_utf8(what, text)
    for name, value in [tag] if isinstance(tag, tuple) else (tag or {}).items():
        check_utf8("tag", name)
        check_utf8(f"tag {name!r}", value)
    return filters


def _milliseconds(name: str, moment: dt.datetime | None) -> int | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise ConfigError(
            f"{name}={moment!r} has no time zone: give an aware datetime, for example datetime(…, tzinfo=UTC)"
        )
    return round(moment.timestamp() * 1000)


class TaskDecorator(Protocol):
    """The decorator that ``@app.task(…)`` returns. It turns a function, plain or ``async``, into a `Task` with the
    function's result type."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # an async function must match the first overload

    @overload
    def __call__(self, fn: Callable[P, R], /) -> PlainTask[P, R]: ...


class EventDecorator(Protocol):
    """The decorator that ``@app.event(…)`` returns."""

    @dataclass_transform(frozen_default=True)
    def __call__(self, cls: type[E], /) -> type[E]: ...


class App:
    """Background jobs of one namespace.

    ``name``: the namespace; the names of topics and groups begin with it. ``settings``: read from ``JOBLEDGER_*`` by
    default. ``queues``: if given, only these queues and the default queue may be used, and registering a task of any
    other queue is an error; if not given, the queues are those that the tasks name. ``default_queue``: the queue of
    tasks that name no queue; it exists as soon as the first such task is registered. With None each task must name its
    queue. ``partitions``: the partition count of the topics of queues and events that set no count, of the coordination
    and dead-letter topics, and the minimum for the lifecycle topic. No connection is opened before the first use.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings | None = None,
        queues: Iterable[Queue | str] | None = None,
        partitions: int = DEFAULT_PARTITIONS,
        default_queue: str | None = DEFAULT_QUEUE,
    ) -> None:
        self.settings = settings or Settings.from_env()
        self.registry = TaskRegistry(
            name, queues=queues, partitions=partitions, default_queue=default_queue, submitter=lambda: self.client
        )
        self._client: Client | None = None
        self._reader: Any = None
        self._lock = forks.Lock()

    def __repr__(self) -> str:
        return f"<App {self.names.namespace}: {counted(len(self.tasks), 'task')}, queues {sorted(self.queues)}>"

    @property
    def names(self) -> Names:
        """Topic and group names."""
        return self.registry.names

    @property
    def tasks(self) -> Mapping[str, Task[Any, Any]]:
        """Registered tasks by name."""
        return self.registry.tasks

    @property
    def queues(self) -> Mapping[str, Queue]:
        """Queues by name, each with its partition count."""
        return self.registry.queues

    @property
    def lanes(self) -> Mapping[str, int]:
        """Partition count of every work topic, by queue, or by queue and priority (``mail.high``)."""
        return self.registry.lanes

    @property
    def events(self) -> Mapping[str, EventType]:
        """Event types by name."""
        return self.registry.events

    @property
    def partitions(self) -> int:
        """Partition count of the coordination topic, and the minimum for the lifecycle topic."""
        return self.registry.partitions

    @property
    def client(self) -> Client:
        """The client, created at the first use."""
        if self._client is None:
            with self._lock("creating the client"):
                if self._client is None:
                    self._client = Client(self.settings, self.names, self.status_table, self.registry)
        return self._client

    @property
    def commands(self) -> Commands:
        """The control commands: cancel, pause, resume, limit. See also `cancel`, `pause`, `resume` and `limit`."""
        return self.client.commands

    def check(self) -> None:
        """Check what can be checked only when every task is registered; workers and the CLI call this method. Raises
        `ConfigError`."""
        self.registry.check()

    # -- declaring ------------------------------------------------------------------------------------------------

    @overload
    def task(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # an async function must match the first overload

    @overload
    def task(self, fn: Callable[P, R], /) -> PlainTask[P, R]: ...

    # These options are spelled out, and not `TaskOptions`, because not every editor completes the keys of a TypedDict.
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        retry: Retry | int | None = None,
        timeout: Seconds | None = None,
        fallback: Task[Any, Any] | str | None = None,
        key: str | Callable[..., Any] | None = None,
        key_hold_max: Seconds = KEY_HOLD_MAX_S,
        priority: Literal["high", "normal", "low"] | None = None,
        rate: str | float | None = None,
        concurrency: int | None = None,
        isolation: Literal["process"] | None = None,
        max_memory: str | int | None = None,
        long: bool | None = None,
        lease: Seconds = LEASE_S,
        expires_in: Seconds | None = None,
        adaptive: Adaptive | bool | None = None,
        breaker: Breaker | bool | None = None,
    ) -> TaskDecorator: ...

    @spelled_out
    def task(self, fn: Callable[..., Any] | None = None, /, **options: Unpack[TaskOptions]) -> Any:
        """Register a function as a task. Use it as ``@app.task``, or with options as ``@app.task(…)``.

        Durations are seconds or a `timedelta`. ``name``: the task's name in the log, by default the function's name. A
        second function of the same name is refused, but the same function of a reloaded module replaces the first.
        ``queue``: the queue of the task's jobs, by default the app's default queue. ``retry``: a `Retry`, or the number
        of attempts. ``timeout``: the seconds that an attempt may take. After that a coroutine is cancelled, and a plain
        function gets `TaskTimedOut`: in a thread when the thread next executes Python code. With
        ``isolation="process"`` the process is killed if it is still running 5 s later. ``fallback``: a task with the
        same parameters, which runs as a separate job when a job of this task has failed and is not retried.

        ``key``: a parameter, or a function of the arguments, whose value is the ordering key. Jobs with the same key
        run one at a time, in the order of submission. A job that is retried holds its key. A delay that would end later
        than ``key_hold_max`` seconds after the job's first start in its worker fails the job instead. ``priority``:
        ``high`` or ``low``, on a queue with priorities: these jobs get a larger or smaller share of the starts.
        ``rate`` (``"100/s"``) and ``concurrency``: limits for all workers together. ``isolation="process"``: run each
        job in a child process, one job at a time per process. Use this for code that keeps a CPU busy, that must be
        stopped at its timeout, or that may crash. ``max_memory`` (``"512MiB"``): the memory limit of such a process; an
        attempt that exceeds it fails. ``long``: for jobs that may run for hours. Such a job runs under a lease that its
        worker renews, and does not delay other jobs of its partition. This is on by default for a ``timeout`` above
        60 s. ``lease``: the seconds without a renewal after which the job is given to another worker. ``expires_in``:
        the seconds after submission from which the job is no longer started. ``adaptive``: adapt the task's concurrency
        to the latency and the errors of its attempts (`Adaptive`). ``breaker``: hold the task's jobs back while its
        attempts keep failing (`Breaker`). Raises `ConfigError` or `UnknownQueue`.
        """
        check_options("App.task()", options, TaskOptions)

        def register(function: Callable[..., Any]) -> Task[Any, Any]:
            return self.registry.add(function, **options)

        return register if fn is None else register(fn)

    @overload
    def event(self, cls: type[E], /) -> type[E]: ...

    @overload
    def event(
        self,
        /,
        *,
        name: str | None = None,
        key: str | None = None,
        topic: str | None = None,
        format: Format = "jobledger",
        partitions: int | None = None,
        retention_days: float | dt.timedelta | None = None,
        start: Start | None = None,
    ) -> EventDecorator: ...

    @dataclass_transform(frozen_default=True)
    def event(
        self,
        cls: type[Any] | None = None,
        /,
        *,
        name: str | None = None,
        key: str | None = None,
        topic: str | None = None,
        format: Format = "jobledger",
        partitions: int | None = None,
        retention_days: float | dt.timedelta | None = None,
        start: Start | None = None,
    ) -> Any:
        """Register a class of domain events. Use it as ``@app.event``, or with options as ``@app.event(…)``. A plain
        class becomes a frozen dataclass; dataclasses, msgspec Structs and pydantic models are left unchanged. The Avro
        schema is derived from the fields.

        ``name``: the event's name in the log, by default the class's name. ``key``: the field that becomes the record's
        key: events with the same value stay in the order in which they were emitted. ``partitions``: the partition
        count of the event's topic, by default the app's. ``retention_days``: how long events are kept, in days or as a
        `timedelta`, by default forever. ``topic``, ``format``: a topic of another program to read from, and its format
        (``"jobledger"``, ``"json"`` or ``"avro"``); such events cannot be emitted.

        ``start``: where the router begins when it reads the topic for the first time. ``"earliest"``: with the oldest
        event kept. This is the default for the app's own topics, so that no event emitted before the router's first
        start is lost. ``"latest"``: with events appended from then on. This is the default for topics of other
        programs. Later starts continue from the committed offsets, and added partitions are read from their beginning.
        Raises `ConfigError`.
        """

        def register(given_class: type[Any]) -> type[Any]:
            event_class = as_event_class(given_class)
            self.registry.add_event(
                event_class,
                name=name or event_class.__name__,
                key=key,
                topic=topic,
                format=format,
                partitions=partitions,
                retention_days=retention_days,
                start=start,
            )
            return event_class

        return register if cls is None else register(cls)

    def on(
        self,
        event: type[E],
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        retry: Retry | int | None = None,
        timeout: Seconds | None = None,
        fallback: Task[Any, Any] | str | None = None,
        tags: Mapping[str, str] | Callable[[E], Mapping[str, str] | None] | None = None,
        **policy: Unpack[HandlerOptions],
    ) -> TaskDecorator:
        """Register a function as a handler of an event class: the router submits one job for every event that it reads,
        and the job calls the function with the event.

        The first handler of a class gets events from the point that the ``start`` of `event` sets: for the app's own
        topics, all events that the topic keeps, as fast as possible. A further handler gets the events that the router
        has not read yet; for earlier events use ``jobledger backfill``. Options are those of `task`, except that there
        is no ``key``: an event's key orders the events on their topic, but the handler's jobs run in any order, several
        at once. If the order of events matters, fold the events (`projection`). If only one job at a time may run,
        submit a keyed task from the handler. ``tags``: the tags of the jobs, or a pure function that returns them for
        an event. If this function fails for an event, the event goes to the dead letters, and the other handlers of the
        event still get their jobs. Raises `ConfigError`, `BadEvent` or `UnknownQueue`.
        """
        if keyed := sorted(policy.keys() & {"key", "key_hold_max"}):
            raise ConfigError(
                f"App.on({event.__name__}) takes no {keyed[0]}=: the jobs of events are not ordered. Submit a keyed task "
                "from the handler, or fold the events with @app.projection"
            )
        check_options("App.on()", policy, HandlerOptions)
        self.registry.event_of(event)

        def register(function: Callable[..., Any]) -> Any:
            task = self.registry.add(
                function, name=name, queue=queue, retry=retry, timeout=timeout, fallback=fallback, **policy
            )
            try:
                self.registry.add_handler(event, task, tags)
            except ConfigError:
                del self.registry.tasks[task.name]
                raise
            return task

        return register

    # -- resources and hooks ------------------------------------------------------------------------------------------

    #: Declare a resource: ``@app.resource`` on a function that returns its value, or on a generator that yields the
    #: value and closes it afterwards. A process opens the resource once, when a worker starts whose tasks declare it
    #: with `Depends`, and closes it when that worker stops.
    resource = ResourceDecorator()

    def use(self, resource: Resource[T]) -> T:
        """Return a resource's value in this process, for code that cannot get the value as a parameter. Opens the
        resource if necessary.

        Raises `ResourceFailed`, or `ConfigError` for an ``async`` resource that is not open. A resource opened here is
        closed when a worker of this process stops, if there is one.
        """
        return self.registry.resources.get(resource)

    def around(self, fn: A | None = None, /, *, tasks: Which = None) -> Any:
        """Register a generator function that wraps every attempt. The function takes the job and yields once; the task
        runs at the ``yield``.

        The function runs where the task's code runs, and the task's exception is raised at the ``yield``. If the
        function itself raises an exception, this is the attempt's error; if it suppresses the task's exception, that
        exception is raised again after it. An ``async`` function wraps only ``async`` tasks. The function that is
        registered first is the outermost. ``tasks``: the tasks to wrap, or a function that takes a task and returns
        whether to wrap it. Raises `ConfigError`.
        """

        def register(function: A) -> A:
            self.registry.hooks.add_around(function, tasks)
            return function

        return register if fn is None else register(fn)

    def middleware(self, declared: M | None = None, /, *, tasks: Which = None) -> Any:
        """Register an object, or a class that takes no arguments, with any of these methods, plain or ``async``:

        ``before(job)`` and ``after(job, result)`` run where the task's code runs; an exception of ``before`` is the
        attempt's error. The worker calls ``retry(job, error, delay)`` and ``failure(job, error)``, in a separate thread
        or on its event loop, after it has sent the fact to the log. ``around(job)``: as for `around`. Exceptions of
        ``after``, ``retry`` and ``failure`` are logged and change nothing. ``tasks``: the tasks to which the methods
        apply, or a function that takes a task and returns whether they apply. Raises `ConfigError`.
        """

        def register(middleware: M) -> M:
            self.registry.hooks.add(middleware, tasks)
            return middleware

        return register if declared is None else register(declared)

    # -- emitting -------------------------------------------------------------------------------------------------

    def emit(self, event: Any) -> EventHandle:
        """Emit a domain event, and return once the log has acknowledged it. The event's handlers then get their jobs.

        Raises `BadEvent`, `IncompatibleEvent`, `PayloadTooLarge`, `TopicMissing`, `AccessDenied`, `BrokerUnavailable`,
        or with a Schema Registry `SchemaRefused` or `RegistryUnavailable` (a `BrokerUnavailable`).
        """
        return self.client.emit(self.registry.event_of(type(event)), event)

    async def emit_async(self, event: Any) -> EventHandle:
        """Emit a domain event as `emit` does, without blocking the event loop."""
        return await self.client.emit_async(self.registry.event_of(type(event)), event)

    def emit_many(self, events: Iterable[Any]) -> list[EventHandle]:
        """Emit events in large batches. Returns their handles, in order, once the log has acknowledged all of them."""
        return self.client.emit_many((self.registry.event_of(type(event)), event) for event in events)

    # -- submitting -----------------------------------------------------------------------------------------------

    def submit_many(self, jobs: Iterable[JobRequest[R]]) -> list[JobHandle[R]]:
        """Submit jobs in large batches. Returns their handles, in order, once the log has acknowledged all of them.

        ``jobs``: requests for tasks of this app, made with `Task.job` or ``task.using(…).job``. They are consumed one
        by one, so a generator can be given. Raises what `Task.submit` raises, and `ConfigError` for a task of another
        app; some jobs may have been accepted then.
        """
        return self.client.submit_many(jobs)

    def projection(
        self,
        *events: type[Any],
        table: Table,
        key: Callable[[Any], Any],
        name: str | None = None,
        facts: Iterable[type[Any]] = (),
        start: dt.datetime | None = None,
    ) -> Callable[[F], F]:
        """Register a function that folds domain events, or job facts, into a table of your own; `jobledger projections
        run` runs it.

        ``table``: a SQLAlchemy `Table` with a primary key; it is created in the status database. ``key(event)``: the
        primary key of the row that an event changes (a tuple for several columns), or None to skip the event. The
        function takes the row as a dict (None if there is no row) and the event, and returns the new row, or None to
        delete it. If the function has a third parameter, this parameter gets the record's position, a `Where`. The
        function must be pure: `verify` and `rebuild` call it again. ``facts``: classes of job facts, from
        `jobledger.schemas.events`, to fold instead of events; the function gets a `Recorded`. ``start``: events before
        this time are skipped.

        Offsets are stored in the same transactions as the rows: each record is folded exactly once. Raises
        `ConfigError`.
        """

        def register(fold: F) -> F:
            kinds = [self.registry.event_of(event) for event in events]
            projection_name = name or getattr(fold, "__name__", "")
            self.registry.add_projection(
                fold, name=projection_name, table=table, key=key, events=kinds, facts=facts, start=start
            )
            return fold

        return register

    # -- control commands -----------------------------------------------------------------------------------------

    def cancel(self, job_id: str, reason: str | None = None, *, run: int | None = None, by: str | None = None) -> None:
        """Request that a job be cancelled, and return once the log has acknowledged the request.

        A job that waits (for a slot, a due time or a retry) is not started. A running job is asked to stop. A job that
        has ended is not changed. ``run``: the run to cancel; None: the present run in the status table, or the first
        one if the table does not know the job or cannot be read. ``by``: the author of the request, by default this
        user and host. Raises `ConfigError`, `TopicMissing`, `AccessDenied` or `BrokerUnavailable`.
        """
        self.client.cancel(job_id, reason, run, by)

    async def cancel_async(
        self, job_id: str, reason: str | None = None, *, run: int | None = None, by: str | None = None
    ) -> None:
        """Request that a job be cancelled as `cancel` does, without blocking the event loop."""
        await self.client.cancel_async(job_id, reason, run, by)

    def redrive(
        self,
        *,
        where: JobFilter | None = None,
        ids: Iterable[str] | None = None,
        queue: str | None = None,
        rate: str | float | None = None,
        dry_run: bool = False,
        by: str | None = None,
        reason: str | None = None,
    ) -> Plan:
        """Run jobs again that have failed, or were cancelled, or have expired: each as the next run of the same id, with
        the same arguments, tags and key.

        ``where``: the filters of `jobs`, for example ``{"task": "send_mail", "error": "TimeoutError"}``; without
        ``state`` only failed jobs are chosen. ``ids``: the jobs themselves, instead of ``where``. ``queue``: the queue
        in which they run; None: the queue of each job. ``rate``: how many are released in a time (``"50/s"``); None: as
        fast as possible. ``dry_run``: only count the jobs. ``by``: who asks, by default this user and host.

        The jobs are those that the status table has now. Their list is written to the log first, and the stream
        processor carries it out (`Plan`), also if this process ends. A job that has changed meanwhile is skipped, so two
        redrives of the same run make one. Jobs that succeeded are never run again. Raises `ConfigError` if neither
        ``where`` nor ``ids`` names a job, `UnknownQueue`, `JobNotFound` for an id that the table does not know, and what
        `cancel` raises.
        """
        chosen, conditions = self._chosen("redrive", where, ids)
        if queue is not None:
            self.registry.check_queue(queue)
        if dry_run:
            return self.client.plans.preview(chosen)
        return self.client.plans.make("redrive", chosen, conditions, queue=queue, rate=rate, by=by, reason=reason)

    def cancel_many(
        self,
        *,
        where: JobFilter | None = None,
        ids: Iterable[str] | None = None,
        rate: str | float | None = None,
        dry_run: bool = False,
        by: str | None = None,
        reason: str | None = None,
    ) -> Plan:
        """Request that many jobs be cancelled, by a plan that is carried out also if this process ends.

        ``where``: the filters of `jobs`, for example ``{"task": "newsletter", "tag": ("tenant", "acme")}``; without
        ``state`` all jobs that have not ended are chosen. ``ids``, ``rate``, ``dry_run``, ``by``: as for `redrive`.

        The jobs are those that the status table has now, each with its present run. A job that has ended meanwhile, or
        that was redriven meanwhile, is skipped. In the plan, ``done`` counts the jobs whose cancel was *requested*, as
        by `cancel`: a waiting job is then not started, and a running job is asked to stop. A running job may need some
        time to stop, or may end in another way. So a plan that is done does not say how its jobs ended; the states of
        the jobs do. Raises what `redrive` raises.
        """
        chosen, conditions = self._chosen("cancel", where, ids)
        if dry_run:
            return self.client.plans.preview(chosen)
        return self.client.plans.make("cancel", chosen, conditions, rate=rate, by=by, reason=reason)

    def copy(self, job_id: str, **options: Unpack[CopyOptions]) -> JobHandle[Any]:
        """Submit a new job with the arguments of another one, some of them changed, and return the handle of the new
        job. The original job is not changed, whatever its state.

        ``args``: the changed arguments by name. ``without``: names of arguments that the copy does not have, for
        example of a parameter that was renamed since. The result must fit the task's parameters, as in a normal
        submission. ``queue``, ``tags``, ``priority``: as in `Task.using`; by default those of the original. ``key``: the
        ordering key. By default it is derived from the arguments of the copy if that of the original was derived from
        its arguments; else it is the original's. ``by``: who asks, by default this user and host; ``reason``: why. Both
        are in the log, in the copy's ``links``, and `JobStatus.copy_of` of the copy names the original.

        The original's arguments are read from the log: from its submission or a release, else from its dead letter. The
        copy runs at once, also if the original had a delay. Raises `JobNotFound` if the status table does not know the
        job, or if the log no longer has its arguments; `UnknownTask`; and what `Task.submit` raises.
        """
        return self.client.copy(job_id, self.registry.task, **options)

    def plan(self, plan_id: str) -> PlanStatus:
        """Return the state of a plan from the status table. Raises `PlanNotFound`."""
        return self.status_table().plan(plan_id)  # type: ignore[no-any-return]  # the table's class is imported late

    def plans(self, limit: int = 100) -> list[PlanStatus]:
        """Return the plans that the status table knows, the last one first."""
        return self.status_table().plans(limit)  # type: ignore[no-any-return]  # as in `plan`

    def workers(self, limit: int = 1_000) -> list[WorkerStatus]:
        """Return the workers as their last reports say, in order of their ids; at most ``limit``, those that reported
        last. A worker that stopped without an error is not in the list, and one that was killed leaves the list ten
        minutes after its last report."""
        return self.status_table().workers(limit)  # type: ignore[no-any-return]  # as in `plan`

    def _chosen(
        self, action: Literal["redrive", "cancel"], where: JobFilter | None, ids: Iterable[str] | None
    ) -> tuple[Iterable[tuple[str, int]], dict[str, Any]]:
        """Return the id and run of each job that was asked for, and the conditions as the plan records them."""
        if where is not None and ids is not None:
            raise ConfigError("give where= or ids=, not both")
        table = self.status_table()
        if ids is not None:
            wanted = list(dict.fromkeys(ids))
            known = table.statuses(wanted)
            for job_id in wanted:
                if job_id not in known:
                    raise table.unknown(job_id)
            return [(job_id, known[job_id].run) for job_id in wanted], {}
        conditions = {name: value for name, value in (where or {}).items() if value is not None}
        if not conditions:
            raise ConfigError(
                f"which jobs? Give where= with at least one filter, or ids=. To {action} all jobs of a queue, name the "
                "queue"
            )
        scope = SCOPES[action]
        filters = filters_of(**{"state": list(scope.default), **conditions})  # type: ignore[arg-type]  # checked by `filters_of`
        states = filters["state"] if isinstance(filters["state"], list) else [filters["state"]]
        for state in states:
            if state not in scope.states:
                raise ConfigError(f"state={str(state)!r}: {scope.refusal}")
        return table.chosen(**filters), {"state": [str(state) for state in states], **conditions}

    def pause(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, by: str | None = None
    ) -> None:
        """Start no more jobs of a queue or a task, on any worker, until `resume`. Running jobs continue. Raises what
        `cancel` raises."""
        self.commands.pause(*self._control_target(queue, task), reason, by)

    def resume(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, by: str | None = None
    ) -> None:
        """End a `pause`. Raises what `cancel` raises."""
        self.commands.resume(*self._control_target(queue, task), reason, by)

    def limit(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        rate: str | float | None = None,
        concurrency: int | None = None,
        reason: str | None = None,
        by: str | None = None,
    ) -> None:
        """Limit a queue or a task for all workers together. These limits replace those in the code; without ``rate``
        and ``concurrency`` the limits in the code apply again. Raises what `cancel` raises."""
        kind, name = self._control_target(queue, task)
        limits = Limits.of(rate, concurrency, f"{kind} {name!r}")
        on = self.queues[name if kind == "queue" else self.registry.task(name).queue]
        check_shares(f"{kind} {name!r}", on, limits, self.partitions)
        self.commands.limit(kind, name, limits or None, reason, by)

    def _control_target(self, queue: str | None, task: str | None) -> tuple[Kind, str]:
        if (queue is None) == (task is None):
            raise ConfigError(f"queue={queue!r}, task={task!r}: give exactly one of the two")
        if queue is not None:
            return "queue", self.registry.check_queue(queue)
        return "task", self.registry.task(task or "").name

    # -- reading the lifecycle ------------------------------------------------------------------------------------

    def lifecycle(
        self,
        group: str,
        *,
        facts: Iterable[type[Any]] | None = None,
        start: Literal["earliest", "latest"] = "earliest",
        timeout: Seconds | None = None,
    ) -> LifecycleStream:
        """Return everything that happens to the app's jobs, and the control commands about them, as a stream of
        `Recorded` events for another service.

        ``group``: the name of the reading service. Processes with the same group share the partitions; each group reads
        all records. ``facts``: return only facts of these classes of `jobledger.schemas.events`, for example
        ``(JobSucceeded, JobFailedFact)``. ``start``: where a new group begins. ``timeout``: stop after this many
        seconds without a record; None: never stop. A record counts as processed when the next one is requested; if the
        reader dies before that, the record is delivered again. Reading raises `UnknownFact` at a fact of a newer
        version. For example::

            with app.lifecycle("billing", facts=(JobSucceeded,)) as stream:
                for record in stream:
                    bill(record.event.job_id, record.event.fact.duration_us)
        """
        from jobledger.client.lifecycle import LifecycleStream

        return LifecycleStream(
            self.settings, self.names, list(self.lanes), group, facts=facts, start=start, timeout=timeout
        )

    # -- querying -------------------------------------------------------------------------------------------------

    def status_table(self) -> Any:
        """Return the status table's read side, opened at the first use. Raises `StoreNotFound` if there is no status
        table yet."""
        forks.notice()
        if self._reader is None:
            with self._lock("opening the status table"):
                if self._reader is None:
                    from jobledger.streams.status.store import (
                        open_reader,  # a service that only submits needs no database
                    )

                    url = self.settings.resolve_status_url(self.names.namespace)
                    self._reader = open_reader(url, self.names.namespace)
        return self._reader

    def job(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0) -> JobStatus:
        """Return one job's status, with its result as plain JSON. ``at_least``: wait up to ``timeout`` seconds until
        the table has read that position.

        Raises `JobNotFound` for an id that the table does not know: an unknown job is never reported as pending. Raises
        `StatusTimeout` if the table has not read ``at_least`` in time.
        """
        if at_least is not None:
            warn_on_loop("app.job(…, at_least=…)", "app.job_async(…)")
        return self.client.status(job_id, at_least=at_least, timeout=timeout)

    async def job_async(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0) -> JobStatus:
        """Return one job's status as `job` does, without blocking the event loop."""
        return await self.client.status_async(job_id, at_least=at_least, timeout=timeout)

    def explain(self, job_id: str) -> Explanation:
        """Return why a job is where it is, and when it is likely to start: from the status table, the log, the consumer
        groups and the limits in the code.

        Takes some seconds at most. A source that cannot be read becomes the cause ``source-unread``. If the status table
        itself cannot be read, the state is ``unknown``. Raises `JobNotFound` as `job` does.
        """
        warn_on_loop("app.explain(…)", "app.explain_async(…)")
        return self.client.explain(job_id)

    async def explain_async(self, job_id: str) -> Explanation:
        """Explain a job as `explain` does, without blocking the event loop."""
        return await self.client.explain_async(job_id)

    def jobs(self, *, limit: int | None = None, page: int = 500, **wanted: Unpack[JobFilter]) -> Iterator[JobStatus]:
        """Return an iterator of the jobs that match every given filter, newest first, fetched a page at a time.
        ``limit`` None: all of them.

        ``state``, ``task``, ``queue``: one value, or several of which any may match. ``tag``: one tag, or several that
        must all match. ``since``: submitted at this time or later; the time needs a time zone. ``late``: jobs that have
        not been started although they could have been started this many seconds ago by this machine's clock, counted
        from the end of their delay or backoff, or from the submission if there was none. ``key``: the ordering key.
        ``version``: the version of the code that started the job last. ``error``: the type of the error.
        ``fingerprint``: that of the error. These four take one value, or several of which any may match. ``until``:
        submitted before this time. ``id_prefix``: the beginning of the id; the jobs are then in descending order of
        ids. ``attempts_least``: the job's attempt has this number or a greater one; without ``state`` only jobs that
        wait for a retry. ``error_text``: the first 500 characters of the error's message contain this text; the case of
        letters does not count.
        """
        return chain.from_iterable(self._pages(limit, page, **wanted))

    async def jobs_async(
        self, *, limit: int | None = None, page: int = 500, **wanted: Unpack[JobFilter]
    ) -> AsyncIterator[JobStatus]:
        """Return the jobs as `jobs` does, for asyncio: ``async for status in app.jobs_async(…)``."""
        pages = self._pages(limit, page, **wanted)
        while (statuses := await asyncio.to_thread(next, pages, None)) is not None:
            for status in statuses:
                yield status

    def _pages(self, limit: int | None, page: int, **wanted: Unpack[JobFilter]) -> Iterator[list[JobStatus]]:
        filters = filters_of(**wanted)
        table = self.status_table()
        after: str | None = None
        left = limit
        while left is None or left > 0:
            size = page if left is None else min(page, left)
            statuses = table.jobs(**filters, after=after, limit=size)
            yield statuses
            if len(statuses) < size:
                return
            after = statuses[-1].job_id
            left = None if left is None else left - len(statuses)

    def close(self) -> None:
        """Flush and close every connection; the next use opens new ones."""
        what = "opening or closing the connections"
        with self._lock(what):
            client, self._client = self._client, None
        if client is not None:
            client.close()  # without the lock, because callers that wait for jobs open the status table
        with self._lock(what):
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
