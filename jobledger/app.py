"""The app: tasks, queues and settings under one namespace, and the two faces a service uses: submit and ask."""

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

from jobledger import forks
from jobledger.client import Client, EventHandle, JobHandle
from jobledger.config import Settings
from jobledger.domain import EventType, Format, Start, as_event_class
from jobledger.durations import Seconds
from jobledger.errors import ConfigError
from jobledger.job import JobStatus, State
from jobledger.middleware import Around, Which
from jobledger.names import Names, check_utf8
from jobledger.orders import Kind, Orders
from jobledger.policy import KEY_HOLD_MAX_S, LEASE_S, Adaptive, Breaker, Limits
from jobledger.queues import DEFAULT_PARTITIONS, DEFAULT_QUEUE, Queue, check_shares
from jobledger.resources import Resource, ResourceDecorator
from jobledger.retry import Retry, check_delay
from jobledger.schemas.events import Position
from jobledger.task import AsyncTask, JobRequest, PlainTask, Task
from jobledger.task_registry import Registry
from jobledger.waiting import warn_on_loop

if TYPE_CHECKING:
    import datetime as dt

    from sqlalchemy import Table

    from jobledger.lifecycle import LifecycleStream

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])
A = TypeVar("A", bound=Around)
M = TypeVar("M")
T = TypeVar("T")


class HandlerOptions(TypedDict, total=False):
    """What `App.on` takes beside what it names; see `App.task`."""

    priority: Literal["high", "normal", "low"] | None
    rate: str | float | None
    concurrency: int | None
    isolation: Literal["process"] | None
    max_memory: str | int | None
    long: bool | None
    lease: Seconds
    expires_in: Seconds | None
    adaptive: Adaptive | bool | None
    breaker: Breaker | bool | None


class JobFilter(TypedDict, total=False):
    """What `App.jobs` takes beside ``limit`` and ``page``."""

    state: State | str | Iterable[State | str] | None
    task: str | Iterable[str] | None
    queue: str | Iterable[str] | None
    tag: tuple[str, str] | Mapping[str, str] | None
    since: dt.datetime | None
    late: Seconds | None


class TaskDecorator(Protocol):
    """What ``@app.task(…)`` returns: turns a function, plain or ``async``, into a `Task` of its result."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # a function of a coroutine is meant to be the first

    @overload
    def __call__(self, fn: Callable[P, R], /) -> PlainTask[P, R]: ...


class EventDecorator(Protocol):
    """What ``@app.event(…)`` returns."""

    @dataclass_transform(frozen_default=True)
    def __call__(self, cls: type[E], /) -> type[E]: ...


class App:
    """Background jobs of one namespace.

    ``name``: the namespace; topics and groups begin with it. ``settings``: read from ``JOBLEDGER_*`` unless given.
    ``queues``: if given, a task of any other queue than these and the default one is refused when it is registered; if
    not, the queues are those the tasks name. ``default_queue``: of tasks that name none; it is there as soon as one
    does. None: each must name its queue. ``partitions``: of every topic whose queue sets none. Nothing connects before
    the first use.
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
        self.registry = Registry(
            name, queues=queues, partitions=partitions, default_queue=default_queue, submitter=lambda: self.client
        )
        self._client: Client | None = None
        self._reader: Any = None
        self._lock = forks.Lock()

    def __repr__(self) -> str:
        return f"<App {self.names.namespace}: {len(self.tasks)} tasks, queues {sorted(self.queues)}>"

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
        """Partitions of every work topic, by queue, or by queue and priority (``mail.high``)."""
        return self.registry.lanes

    @property
    def events(self) -> Mapping[str, EventType]:
        """Event types by name."""
        return self.registry.events

    @property
    def partitions(self) -> int:
        """Partitions of coordination, and the least of lifecycle."""
        return self.registry.partitions

    @property
    def client(self) -> Client:
        """The client, made at the first use."""
        if self._client is None:
            with self._lock("making the client"):
                if self._client is None:
                    self._client = Client(self.settings, self.names, self.status_table)
        return self._client

    @property
    def orders(self) -> Orders:
        """What people order: cancel, pause, resume, limit; see also `cancel`, `pause`, `resume` and `limit`."""
        return self.client.orders

    def check(self) -> None:
        """Raise `ConfigError` for what can be judged only when every task is
        registered; workers and the CLI call it."""
        self.registry.check()

    # -- declaring ------------------------------------------------------------------------------------------------

    @overload
    def task(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # a function of a coroutine is meant to be the first

    @overload
    def task(self, fn: Callable[P, R], /) -> PlainTask[P, R]: ...

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

    def task(
        self,
        fn: Callable[..., Any] | None = None,
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
    ) -> Any:
        """Register a function as a task; usable bare or with options.

        Spans of time are seconds, or a `timedelta`. ``name``: what stands in the log, the function's name unless given; a second function of this name is refused, and
        the same one of a reloaded module replaces the first. ``queue``: where its jobs go, the app's default one unless
        given. ``retry``: a `Retry`, or just the number of attempts. ``timeout``: seconds an attempt may take; then a coroutine is
        cancelled, and `TaskTimedOut` is raised in a function: in a thread when it next executes Python code, in a
        process of its own, which is killed 5 s later, whatever it waits for. ``fallback``: a task with the same
        parameters, run as a job of its own when this one has failed for good.

        ``key``: the parameter, or a function of the arguments, whose value keeps jobs in order: those of one key run
        one at a time, in the order of submission; one that is tried again holds its key for at most ``key_hold_max``
        seconds. ``priority``: ``high`` or ``low``, before or after the queue's others. ``rate`` (``"100/s"``),
        ``concurrency``: limits for all workers together. ``isolation="process"``: run it in a child process, one job at
        a time in each: for code that keeps a CPU busy, must end at its timeout, or may crash. ``max_memory``
        (``"512MiB"``): what such a process may use; the attempt that takes more fails. ``long``: its jobs may run for
        hours: a lease, renewed while they run, stands for them, and they hold nothing else up; on by itself for a
        ``timeout`` above 60 s. ``lease``: seconds after which a worker that is not heard of has lost the job to
        another. ``expires_in``: seconds after its submission from which on a job is not started any more. ``adaptive``:
        let the task's concurrency follow what it calls (`Adaptive`). ``breaker``: stop calling what keeps failing
        (`Breaker`). Raises `ConfigError` or `UnknownQueue`.
        """

        def register(function: Callable[..., Any]) -> Task[Any, Any]:
            return self.registry.add(
                function,
                name=name,
                queue=queue,
                retry=retry,
                timeout=timeout,
                fallback=fallback,
                key=key,
                key_hold_max=key_hold_max,
                priority=priority,
                rate=rate,
                concurrency=concurrency,
                isolation=isolation,
                max_memory=max_memory,
                long=long,
                lease=lease,
                expires_in=expires_in,
                adaptive=adaptive,
                breaker=breaker,
            )

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
        """Register a class of domain events; usable bare or with options. A plain class becomes a frozen dataclass;
        dataclasses, msgspec Structs and pydantic models stay what they are. Its Avro schema is derived from its fields.

        ``name``: what stands in the log, the class's name unless given. ``key``: the field whose value keeps events in
        order. ``partitions``: of its topic, the app's unless given. ``retention_days``: how long events are kept, for
        good unless given. ``topic``, ``format``: another program's topic to read from (``"jobledger"``, ``"json"`` or
        ``"avro"``); such events cannot be emitted.

        ``start``: where the router begins when it reads the topic for the first time: ``"earliest"``, with the oldest
        event kept, the default for our own, so that none is lost that was emitted before the router's first start; or
        ``"latest"``, with what comes from then on, the default for topics of others. After that its commits count, and
        partitions that are added are read from their beginning. Raises `ConfigError`.
        """

        def register(found: type[Any]) -> type[Any]:
            made = as_event_class(found)
            self.registry.add_event(
                made,
                name=name or made.__name__,
                key=key,
                topic=topic,
                format=format,
                partitions=partitions,
                retention_days=retention_days,
                start=start,
            )
            return made

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
        """Register a function as a handler of an event class: for every event that the router comes to, one job that
        runs it.

        The first handler of a class gets events from where `event`'s ``start`` says: of our own, all that their topic
        keeps, at full speed. A further one gets those that the router has not passed yet; for the past there is
        ``jobledger backfill``. The function takes the event. Options as for `task`, except that there is no ``key``: an
        event's key orders events on their topic, and their jobs run in any order, several at once. Where the events'
        order counts, fold them (`projection`); where only one at a time may run, submit a keyed task from the handler.
        ``tags``: of its jobs, or a pure function of the event that gives them; an event for which it fails goes to the
        dead letters, and its other handlers get their jobs.
        Raises `ConfigError`, `BadEvent` or `UnknownQueue`.
        """
        if keyed := sorted(policy.keys() & {"key", "key_hold_max"}):
            raise ConfigError(
                f"App.on({event.__name__}) takes no {keyed[0]}=: the jobs of events are not ordered. Submit a keyed task "
                "from the handler, or fold the events with @app.projection"
            )
        if unknown := policy.keys() - HandlerOptions.__annotations__.keys():
            raise TypeError(f"App.on() takes no {min(unknown)}=")
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

    # -- what surrounds tasks -----------------------------------------------------------------------------------------

    #: Declare a resource: ``@app.resource`` on a function that makes it, or on a generator that yields it and closes it
    #: after. Opened once a process, when a worker starts whose tasks ask for it with `Depends`; closed when it ends.
    resource = ResourceDecorator()

    def use(self, resource: Resource[T]) -> T:
        """The value of a resource in this process, opened now if it is not: for code that no parameter reaches.

        Raises `ResourceFailed`, or `ConfigError` for an ``async`` one that is not open. What is opened here is closed
        when a worker of this process ends, if there is one.
        """
        return self.registry.resources.get(resource)

    def around(self, fn: A | None = None, /, *, tasks: Which = None) -> Any:
        """Register a generator function of the job that surrounds every attempt: it
        yields once, and the task runs there.

        It runs where the task's code does, and sees what the task raises. What it raises itself is the attempt's error;
        what it swallows is raised again behind it. An ``async`` one surrounds only ``async`` tasks. The first one
        registered is the outermost. ``tasks``: those it is for, or a function that tells. Raises `ConfigError`.
        """

        def register(function: A) -> A:
            self.registry.hooks.add_around(function, tasks)
            return function

        return register if fn is None else register(fn)

    def middleware(self, made: M | None = None, /, *, tasks: Which = None) -> Any:
        """Register an object, or a class that is made without arguments, with any of these methods, plain or ``async``:

        ``before(job)`` and ``after(job, result)`` run where the task's code does; what ``before`` raises is the
        attempt's error. ``retry(job, error, delay)`` and ``failure(job, error)`` are told by the worker, in a thread of
        their own or on its event loop, once the fact is on its way. ``around(job)``: as for `around`. What the others
        raise is logged and changes nothing. ``tasks``: those it is for, or a function that tells. Raises `ConfigError`.
        """

        def register(middleware: M) -> M:
            self.registry.hooks.add(middleware, tasks)
            return middleware

        return register if made is None else register(made)

    # -- emitting -------------------------------------------------------------------------------------------------

    def emit(self, event: Any) -> EventHandle:
        """Write down that something happened; returns once the log has acknowledged it. What follows from it is the
        handlers' business.

        Raises `BadEvent`, `IncompatibleEvent`, `PayloadTooLarge`, `TopicMissing`, `AccessDenied`, `BrokerUnavailable`,
        or with a Schema Registry `SchemaRefused` or `RegistryUnavailable` (a `BrokerUnavailable`).
        """
        return self.client.emit(self.registry.event_of(type(event)), event)

    async def emit_async(self, event: Any) -> EventHandle:
        """`emit` for asyncio: the event loop runs on while the log acknowledges."""
        return await self.client.emit_async(self.registry.event_of(type(event)), event)

    def emit_many(self, events: Iterable[Any]) -> list[EventHandle]:
        """Emit events in large batches; handles, in order, once the log has acknowledged all."""
        return self.client.emit_many((self.registry.event_of(type(event)), event) for event in events)

    # -- submitting -----------------------------------------------------------------------------------------------

    def submit_many(self, jobs: Iterable[JobRequest[R]]) -> list[JobHandle[R]]:
        """Submit jobs in large batches; returns handles, in order, once the log has acknowledged all.

        ``jobs``: of this app's tasks, from `Task.job` or ``task.using(…).job``; consumed as it goes, so a generator is
        fine. Raises as `Task.submit`, and `ConfigError` for a task of another app; then some may have been accepted.
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
        """Register a fold of domain events, or of job facts, into a table of your own;
        `jobledger projections run` runs it.

        ``table``: a SQLAlchemy `Table` with a primary key; it is made in the status database. ``key(event)``:
        the primary key of the row that an event changes (a tuple for several columns); None passes it over.
        The function takes the row as a dict (None: there is none) and the event, and returns the row after, or
        None to delete it; with a third parameter it is told where the record stands. It must be pure: `verify`
        and `rebuild` call it again. ``facts``: instead of events, what happened to jobs, as `Recorded`.
        ``start``: events before are passed over.

        Offsets are kept in the same transactions: each record is folded exactly once. Raises `ConfigError`.
        """

        def register(fold: F) -> F:
            kinds = [self.registry.event_of(event) for event in events]
            named = name or getattr(fold, "__name__", "")
            self.registry.add_projection(fold, name=named, table=table, key=key, events=kinds, facts=facts, start=start)
            return fold

        return register

    # -- ordering -------------------------------------------------------------------------------------------------

    def cancel(self, job_id: str, reason: str | None = None, *, run: int = 1, by: str | None = None) -> None:
        """Want a job to end; returns once the log has acknowledged that.

        One that waits, for its turn, a time or a retry, is not started any more; one that runs is told to end. One that
        has ended stays what it is. ``by``: who wants it, this user and host unless given. Raises `ConfigError`,
        `TopicMissing`, `AccessDenied` or `BrokerUnavailable`.
        """
        self.client.cancel(job_id, reason, run, by)

    async def cancel_async(
        self, job_id: str, reason: str | None = None, *, run: int = 1, by: str | None = None
    ) -> None:
        """`cancel` for asyncio."""
        await self.client.cancel_async(job_id, reason, run, by)

    def pause(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, by: str | None = None
    ) -> None:
        """Start nothing more of a queue or a task, on any worker, until `resume`. Running
        jobs continue. Raises as `cancel`."""
        self.orders.pause(*self._ordered(queue, task), reason, by)

    def resume(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, by: str | None = None
    ) -> None:
        """End a `pause`. Raises as `cancel`."""
        self.orders.resume(*self._ordered(queue, task), reason, by)

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
        """Limit a queue or task for all workers together, in place of what the code says; without ``rate`` and
        ``concurrency`` the code's limits count again. Raises as `cancel`."""
        kind, name = self._ordered(queue, task)
        limits = Limits.of(rate, concurrency, f"{kind} {name!r}")
        on = self.queues[name if kind == "queue" else self.registry.task(name).queue]
        check_shares(f"{kind} {name!r}", on, limits, self.partitions)
        self.orders.limit(kind, name, limits or None, reason, by)

    def _ordered(self, queue: str | None, task: str | None) -> tuple[Kind, str]:
        if (queue is None) == (task is None):
            raise ConfigError(f"queue={queue!r}, task={task!r}: name one of the two")
        if queue is not None:
            return "queue", self.registry.check_queue(queue)
        return "task", self.registry.task(task or "").name

    # -- following ------------------------------------------------------------------------------------------------

    def lifecycle(
        self,
        group: str,
        *,
        facts: Iterable[type[Any]] | None = None,
        start: Literal["earliest", "latest"] = "earliest",
        timeout: Seconds | None = None,
    ) -> LifecycleStream:
        """Everything that happens to the app's jobs, and what people order of them, as a stream of `Recorded` events for
        another service.

        ``group``: who reads; several processes of one group share the partitions, and each group reads all of it.
        ``facts``: only these, for example ``(JobSucceeded, JobFailed)``. ``start``: where a group begins that was never
        here. ``timeout``: end after so many seconds without a record; None: never. A record is done when the next one
        is asked for; a reader that dies before gets it again.

            with app.lifecycle("billing", facts=(JobSucceeded,)) as stream:
                for record in stream:
                    bill(record.event.job_id, record.event.fact.duration_us)
        """
        from jobledger.lifecycle import LifecycleStream

        return LifecycleStream(
            self.settings, self.names, list(self.lanes), group, facts=facts, start=start, timeout=timeout
        )

    # -- asking ---------------------------------------------------------------------------------------------------

    def status_table(self) -> Any:
        """The status table's read side, opened at the first use. Raises `StoreNotFound` if there is none yet."""
        forks.notice()
        if self._reader is None:
            with self._lock("opening the status table"):
                if self._reader is None:
                    from jobledger.streams.store import open_reader  # a service that only submits needs no database

                    url = self.settings.resolve_status_url(self.names.namespace)
                    self._reader = open_reader(url, self.names.namespace)
        return self._reader

    def job(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0) -> JobStatus:
        """One job's status, its result as plain JSON. ``at_least``: wait up to ``timeout`` seconds until the table has
        read that position.

        Raises `JobNotFound` for an id the table does not know: unknown is never reported as pending.
        """
        if at_least is not None:
            warn_on_loop("app.job(…, at_least=…)", "app.job_async(…)")
        return self.client.status(job_id, at_least=at_least, timeout=timeout)

    async def job_async(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = 10.0) -> JobStatus:
        """`job` for asyncio."""
        return await self.client.status_async(job_id, at_least=at_least, timeout=timeout)

    def jobs(self, *, limit: int | None = None, page: int = 500, **wanted: Unpack[JobFilter]) -> Iterator[JobStatus]:
        """Jobs that match every given filter, newest first, fetched a page at a time. ``limit`` None: all of them.

        ``state``, ``task``, ``queue``: one, or any of several; ``tag``: one, or all of several. ``since``: submitted then
        or later; with a time zone. ``late``: not started though they could have been so many seconds ago, by this
        machine's clock: their delay or backoff was over, or they were queued without one.
        """
        return chain.from_iterable(self._pages(limit, page, **wanted))

    async def jobs_async(
        self, *, limit: int | None = None, page: int = 500, **wanted: Unpack[JobFilter]
    ) -> AsyncIterator[JobStatus]:
        """`jobs` for asyncio: ``async for status in app.jobs_async(…)``."""
        pages = self._pages(limit, page, **wanted)
        while (found := await asyncio.to_thread(next, pages, None)) is not None:
            for status in found:
                yield status

    def _pages(
        self,
        limit: int | None,
        page: int,
        *,
        state: State | str | Iterable[State | str] | None = None,
        task: str | Iterable[str] | None = None,
        queue: str | Iterable[str] | None = None,
        tag: tuple[str, str] | Mapping[str, str] | None = None,
        since: dt.datetime | None = None,
        late: Seconds | None = None,
    ) -> Iterator[list[JobStatus]]:
        if since is not None and since.tzinfo is None:
            raise ConfigError(f"since={since!r} has no time zone: say which moment is meant")
        asked: dict[str, Any] = {
            "state": state if isinstance(state, str | None) else list(state),
            "task": task if isinstance(task, str | None) else list(task),
            "queue": queue if isinstance(queue, str | None) else list(queue),
            "tag": tag,
            "since_ms": None if since is None else round(since.timestamp() * 1000),
            "late_ms": None if late is None else round((time.time() - check_delay(late, "late")) * 1000),
        }
        for what in ("state", "task", "queue"):
            wanted = asked[what]
            for text in [wanted] if isinstance(wanted, str) else wanted or ():
                check_utf8(what, text)
        for name, value in [tag] if isinstance(tag, tuple) else (tag or {}).items():
            check_utf8("tag", name)
            check_utf8(f"tag {name!r}", value)
        table = self.status_table()
        after: str | None = None
        left = limit
        while left is None or left > 0:
            size = page if left is None else min(page, left)
            found = table.jobs(**asked, after=after, limit=size)
            yield found
            if len(found) < size:
                return
            after = found[-1].job_id
            left = None if left is None else left - len(found)

    def close(self) -> None:
        """Flush and close every connection; the next use opens new ones."""
        what = "opening or closing the connections"
        with self._lock(what):
            client, self._client = self._client, None
        if client is not None:
            client.close()  # without the lock: who waits for jobs asks for the table
        with self._lock(what):
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
