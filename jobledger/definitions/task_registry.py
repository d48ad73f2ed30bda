"""The tasks, queues, events, handlers and projections of one app, used by workers and clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Unpack

from jobledger.definitions.durations import in_seconds
from jobledger.definitions.event_types import EventType, Handler, HandlerTags
from jobledger.definitions.functions import check_function
from jobledger.definitions.middleware import Hooks
from jobledger.definitions.options import TaskOptions
from jobledger.definitions.origins import Origin, is_nameless, origin_of
from jobledger.definitions.policy import policy_of
from jobledger.definitions.projection import Projection
from jobledger.definitions.queues import DEFAULT_PARTITIONS, DEFAULT_QUEUE, Queue, check_partitions, check_shares
from jobledger.definitions.resources import Resources
from jobledger.definitions.retry import Retry
from jobledger.definitions.task import AsyncTask, PlainTask, Submitter, Task
from jobledger.errors import BadEvent, ConfigError, UnknownQueue, UnknownTask
from jobledger.kafka.topic_names import Names, check_name, check_text, colliding

#: Maximum characters of a task's name.
TASK_NAME_MOST = 200
MAX_TIMEOUT_S = 24 * 3600.0


class TaskRegistry:
    """The tasks, queues, events, handlers and projections of one namespace. ``submitter()`` returns the client; it is
    called when a task submits a job."""

    def __init__(
        self,
        namespace: str,
        *,
        queues: Iterable[Queue | str] | None = None,
        partitions: int = DEFAULT_PARTITIONS,
        default_queue: str | None = DEFAULT_QUEUE,
        submitter: Callable[[], Submitter],
    ) -> None:
        self.names = Names(namespace)
        self.partitions = check_partitions(partitions, "App(): partitions")
        self.submitter = submitter
        self.hooks, self.resources = Hooks(), Resources()
        self.tasks: dict[str, Task[Any, Any]] = {}
        #: Event types by name, and the handlers of each.
        self.events: dict[str, EventType] = {}
        self.handlers: dict[str, list[Handler]] = {}
        self.projections: dict[str, Projection] = {}
        #: Where each task, event and projection was declared, by kind and name.
        self._origins: dict[tuple[str, str], Origin] = {}
        #: The queue of tasks that name no queue. It exists as soon as such a task is registered.
        self.default_queue = None if default_queue is None else check_name("App(default_queue=…)", default_queue)
        self._declared: dict[str, Queue] | None = None
        if queues is not None:
            declared = [q if isinstance(q, Queue) else Queue(q) for q in queues]
            self._declared = {q.name: q for q in declared}
            if len(self._declared) != len(declared):
                raise ConfigError(f"App(queues=…) names a queue twice: {[q.name for q in declared]}")

    @property
    def queues(self) -> dict[str, Queue]:
        """Every queue by name, with its partition count filled in: the declared queues and those that tasks name."""
        named = {t.queue: Queue(t.queue) for t in self.tasks.values()}
        for task in self.tasks.values():  # the queue of a task with a priority needs priorities
            if task.policy.priority is not None:
                named[task.queue] = Queue(task.queue, priorities=True)
        queues = named | (self._declared or {})
        if not queues and self._declared is None and self.default_queue is not None:
            queues = {self.default_queue: Queue(self.default_queue)}
        return {n: replace(q, partitions=q.partitions or self.partitions) for n, q in sorted(queues.items())}

    @property
    def lanes(self) -> dict[str, int]:
        """The partition count of every work topic, by lane: a queue, or a queue and priority."""
        return {name: queue.partitions or self.partitions for queue in self.queues.values() for name in queue.lanes}

    def check_queue(self, queue: str) -> str:
        """Return ``queue`` if the app has this queue. Raises `UnknownQueue` that lists the app's queues if not."""
        queue = check_name("queue", queue)
        if self._declared is not None and queue in self._declared:
            return queue
        known = self.queues
        if queue not in known:
            raise UnknownQueue(
                f"queue {queue!r} is not declared by app {self.names.namespace!r}: the app has {sorted(known)}; "
                "declare it in App(queues=…)"
            )
        return queue

    def _queue_of(self, task: str, queue: str | None) -> str:
        """Return the queue of a task that names ``queue``; None: the task names no queue. Raises `UnknownQueue`."""
        if queue is None:
            if self.default_queue is None:
                choices = f", one of {sorted(self.queues)}" if self.queues else ""
                raise UnknownQueue(
                    f"task {task!r} names no queue, and app {self.names.namespace!r} has default_queue=None: "
                    f"give the task queue=…{choices}"
                )
            return self.default_queue
        if self._declared is None or queue == self.default_queue:
            return check_name("queue", queue)
        return self.check_queue(queue)

    def check_level(self, queue: str, priority: str) -> None:
        """Raise `ConfigError` unless the queue has priorities."""
        if queue not in (known := self.queues) or not known[queue].priorities:
            raise ConfigError(
                f"priority={priority!r}: queue {queue!r} has no priorities; declare it as Queue({queue!r}, priorities=True)"
            )

    def add(self, fn: Callable[..., Any], **options: Unpack[TaskOptions]) -> Task[Any, Any]:
        """Register a function, and return its task. Raises `ConfigError` or `UnknownQueue` if an option is not
        possible."""
        check_function(fn)
        name, retry, fallback = options.get("name"), options.get("retry"), options.get("fallback")
        task_name = name if name is not None else getattr(fn, "__name__", "")
        task_name = check_text("task name", task_name, TASK_NAME_MOST)
        origin = self._origin("task", task_name, fn, task_name in self.tasks, nameless=name is None and is_nameless(fn))
        queue = self._queue_of(task_name, options.get("queue"))
        if isinstance(retry, int) and not isinstance(retry, bool):
            retry = Retry(max_attempts=retry)
        if retry is not None and not isinstance(retry, Retry):
            raise ConfigError(f"task {task_name!r}: retry={retry!r} is neither a Retry nor a number of attempts")
        limit = _check_timeout(task_name, options.get("timeout"))
        if isinstance(fallback, Task) and fallback.registry is not self:
            raise ConfigError(
                f"task {task_name!r}: fallback={fallback!r} is a task of app {fallback.registry.names.namespace!r}; "
                f"a fallback must be a task of the same app, {self.names.namespace!r}"
            )
        task_policy = policy_of(task_name, options, timeout=limit, is_async=asyncio.iscoroutinefunction(fn))
        if task_policy.priority is not None and self._declared is not None:
            self.check_level(queue, task_policy.priority)
        task_class: type[Task[Any, Any]] = AsyncTask if asyncio.iscoroutinefunction(fn) else PlainTask
        task = task_class(
            self,
            fn,
            name=task_name,
            queue=queue,
            retry=retry or Retry(),
            timeout=limit,
            fallback=fallback.name if isinstance(fallback, Task) else fallback,
            policy=task_policy,
        )
        self.tasks[task_name] = task
        self._origins["task", task_name] = origin
        return task

    def _origin(
        self, kind: str, name: str, declared: Callable[..., Any], known: bool, *, nameless: bool = False
    ) -> Origin:
        """Return where ``declared`` comes from. Raises `ConfigError` if another object of this name is in use. An
        object that is declared again, because its module is executed again, replaces the first object."""
        origin = origin_of(declared)
        first = self._origins.get((kind, name)) if known else None
        if first is None or first.declared is declared:
            return origin
        # All lambdas of a module have the same name, so a lambda is declared again only if both are from one file.
        if first.replaced_by(origin) and (not nameless or first.shares_file(origin)):
            return origin
        raise ConfigError(
            f"{kind} {name!r} is already registered: {first} and {origin} would share this name; give one of them a name "
            f"of its own with name=…. If a function declares the {kind} at each call, create the App in the same function"
        )

    def task(self, name: str) -> Task[Any, Any]:
        """Return the task of this name. Raises `UnknownTask` that lists the app's tasks."""
        try:
            return self.tasks[name]
        except KeyError:
            raise UnknownTask(
                f"task {name!r} is not registered with app {self.names.namespace!r}: the app has {sorted(self.tasks)}"
            ) from None

    def add_event(self, cls: type[Any], **options: Any) -> EventType:
        """Register a class of events, and return its event type. Raises `ConfigError` if its name or topic is in
        use."""
        event_type = EventType(cls, names=self.names, **options)
        origin = self._origin("event", event_type.name, cls, event_type.name in self.events)
        same = [e for e in self.events.values() if e.topic == event_type.topic and e.name != event_type.name]
        if same:
            raise ConfigError(
                f"event {event_type.name!r}: topic {event_type.topic!r} is already the topic of event {same[0].name!r}"
            )
        self.events[event_type.name] = event_type
        self._origins["event", event_type.name] = origin
        return event_type

    def event_of(self, cls: type[Any]) -> EventType:
        """Return the event type of a class. Raises `BadEvent` that lists the app's events."""
        for event_type in self.events.values():
            if event_type.cls is cls:
                return event_type
        raise BadEvent(
            f"{getattr(cls, '__qualname__', cls)!r} is not an event of app {self.names.namespace!r}: the app has "
            f"{sorted(self.events)}; decorate the class with @app.event"
        )

    def add_handler(self, cls: type[Any], task: Task[Any, Any], tags: HandlerTags = None) -> Handler:
        """Register ``task`` as a handler of events of ``cls``. A module that is loaded again replaces its own
        handlers."""
        handler = Handler(self.event_of(cls), task, tags)
        known = self.handlers.setdefault(handler.event.name, [])
        known[:] = [*(h for h in known if h.task.name != task.name), handler]
        return handler

    def add_projection(self, fold: Callable[..., Any], **options: Any) -> Projection:
        """Register a fold, and return its projection. Raises `ConfigError` if its name or table is in use."""
        projection = Projection(fold, **options)
        origin = self._origin("projection", projection.name, fold, projection.name in self.projections)
        for other in self.projections.values():
            if other.table.name == projection.table.name and other.name != projection.name:
                raise ConfigError(
                    f"projection {projection.name!r}: table {projection.table.name!r} is already used by "
                    f"{other!r}; use another table"
                )
        self.projections[projection.name] = projection
        self._origins["projection", projection.name] = origin
        return projection

    def handler(self, name: str) -> Handler:
        """Return the handler of this name. Raises `UnknownTask` that lists the app's handlers."""
        known = [handler for handlers in self.handlers.values() for handler in handlers]
        for handler in known:
            if handler.task.name == name:
                return handler
        raise UnknownTask(f"no handler is called {name!r}: the handlers are {sorted(h.task.name for h in known)}")

    def _check_topics(self) -> None:
        """Raise `ConfigError` if two topics have names that Kafka refuses as too similar. Each queue, priority and
        event has a topic."""
        topics = [*map(self.names.jobs, self.lanes), *(e.topic for e in self.events.values())]
        standing = self.names.standing
        for topic, other in colliding(topics, standing).items():
            raise ConfigError(
                f"the topics {topic!r} and {other!r} collide: Kafka's metrics do not distinguish '.' and '_', so Kafka "
                f"refuses two topics whose names differ only in these. Rename the queue, event or topic; a queue "
                f"with priorities has the topics {self.names.jobs('<queue>')}, .high and .low"
            )

    def _check_limits(self) -> None:
        """Raise `ConfigError` if a concurrency limit is less than the number of partitions: each partition gets a share
        of the limit."""
        queues = self.queues
        owners = [(f"queue {q.name!r}", q, q.limits) for q in queues.values()]
        owners += [(f"task {t.name!r}", queues[t.queue], t.policy.limits) for t in self.tasks.values()]
        for what, queue, limits in owners:
            check_shares(what, queue, limits, self.partitions)

    def check(self) -> None:
        """Check what can be checked only when everything is registered: fallbacks, limits, topics, hooks. Raises
        `ConfigError`. Called when an app is loaded."""
        self._check_limits()
        self._check_topics()
        for task in self.tasks.values():
            self.hooks.of(task)
            if task.fallback is None:
                continue
            if task.fallback not in self.tasks:
                raise UnknownTask(f"task {task.name!r}: fallback={task.fallback!r} is not registered")
            seen = [task.name]
            following: str | None = task.fallback
            while following is not None:
                if following in seen:
                    raise ConfigError(
                        f"task {task.name!r}: its fallbacks form a cycle: {' → '.join([*seen, following])}"
                    )
                seen.append(following)
                following = self.tasks[following].fallback if following in self.tasks else None
            theirs = self.tasks[task.fallback]
            ours, others = task.arguments.positional, theirs.arguments.positional
            if ours != others:
                raise ConfigError(
                    f"task {task.name!r}: fallback {theirs.name!r} must take the same parameters "
                    f"({', '.join(ours)}), but takes ({', '.join(others)})"
                )


def _check_timeout(task: str, timeout: object) -> float | None:
    if timeout is None:
        return None
    duration = in_seconds(timeout)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"task {task!r}: timeout={timeout!r} is not a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        )
    return float(duration)
