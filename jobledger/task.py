"""Tasks: a function, its name and its policies; and the registry workers and clients share.

Arguments travel as one JSON object by parameter name. They are checked against the signature's annotations twice, with
the same decoder: in the caller, before anything is sent, and in the worker.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar

import msgspec

from jobledger.domain import EventType, Handler
from jobledger.errors import BadArguments, BadEvent, ConfigError, UnknownQueue, UnknownTask
from jobledger.middleware import Hooks
from jobledger.names import Names, check_name, lane
from jobledger.policy import (
    KEY_HOLD_MAX_S,
    LEASE_S,
    Limits,
    Policy,
    Priority,
    check_expiry,
    check_keyed,
    check_priority,
    policy_of,
)
from jobledger.projection import Projection
from jobledger.resources import Dependency, Resources, dependencies
from jobledger.retry import Retry, check_delay

if TYPE_CHECKING:
    from jobledger.client import JobHandle

#: `policy_of`'s arguments, where a task says nothing.
POLICY_DEFAULTS: dict[str, Any] = {
    "key": None,
    "key_hold_max": KEY_HOLD_MAX_S,
    "priority": None,
    "rate": None,
    "concurrency": None,
    "isolation": None,
    "max_memory": None,
    "long": None,
    "lease": LEASE_S,
    "expires_in": None,
    "adaptive": None,
    "breaker": None,
}

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_QUEUE = "default"
DEFAULT_PARTITIONS = 6
MAX_TIMEOUT_S = 24 * 3600.0
#: Characters a key may have.
KEY_MOST = 500


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of the app.

    ``partitions``: of each of its work topics; None takes the app's default. ``priorities``: whether jobs may be of high
    or low priority; each level is a topic of its own. ``fair_by``: a tag; its values take turns, so that no tenant waits
    behind another's backlog. ``rate`` (``"100/s"``) and ``concurrency``: limits for all of the queue's workers together.
    Raises `ConfigError`.
    """

    name: str
    partitions: int | None = None
    priorities: bool = False
    fair_by: str | None = None
    rate: str | float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        check_name("queue", self.name)
        if self.partitions is not None:
            check_partitions(self.partitions, f"Queue({self.name!r}, partitions=…)")
        if self.fair_by is not None and (not isinstance(self.fair_by, str) or not self.fair_by):
            raise ConfigError(f"Queue({self.name!r}): fair_by={self.fair_by!r} is not the name of a tag")
        Limits.of(self.rate, self.concurrency, f"Queue({self.name!r})")

    @property
    def limits(self) -> Limits:
        """Its limits for the whole group."""
        return Limits.of(self.rate, self.concurrency, f"Queue({self.name!r})")

    @property
    def levels(self) -> tuple[Priority | None, ...]:
        """The priorities its jobs may have, the highest first."""
        return ("high", None, "low") if self.priorities else (None,)

    @property
    def lanes(self) -> tuple[str, ...]:
        """What stands for it in the names of work topics and groups, a lane a priority, the highest first."""
        return tuple(lane(self.name, level) for level in self.levels)


def check_partitions(count: object, what: str) -> int:
    """``count`` if it is a whole number from 1 to 10,000, else `ConfigError`."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000:
        raise ConfigError(f"{what}={count!r} is not a whole number between 1 and 10,000")
    return count


@dataclass(frozen=True, slots=True)
class JobRequest(Generic[R]):
    """A job that was described but not submitted: what `Task.job` returns and `App.submit_many` takes."""

    task: Task[Any, R]
    args: bytes
    queue: str
    tags: dict[str, str] = field(default_factory=dict)
    delay_ms: int | None = None
    key: str | None = None
    priority: Priority | None = None
    expires_in_ms: int | None = None


class Submitter(Protocol):
    """What a task needs of a client."""

    def submit(self, request: JobRequest[R]) -> JobHandle[R]: ...

    def submit_async(self, request: JobRequest[R]) -> Awaitable[JobHandle[R]]: ...


def check_tags(tags: object) -> dict[str, str]:
    """``tags`` as a dict of short strings, else `ConfigError` naming the one that is not."""
    if tags is None:
        return {}
    if not isinstance(tags, Mapping):
        raise ConfigError(f"tags={tags!r} is not a mapping of text to text")
    for name, value in tags.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name:
            raise ConfigError(f"tag {name!r}={value!r}: names and values are text, and a name is not empty")
        if len(name) > 100 or len(value) > 1_000:
            raise ConfigError(f"tag {name[:100]!r}: a name has at most 100 characters, a value at most 1,000")
    return dict(tags)


class Task(Generic[P, R]):
    """A function that can be run as a job. Made by ``@app.task``; calling it runs the function here and now."""

    def __init__(
        self,
        registry: Registry,
        fn: Callable[P, R] | Callable[P, Awaitable[R]],
        *,
        name: str,
        queue: str,
        retry: Retry,
        timeout: float | None,
        fallback: str | None,
        policy: Policy,
    ) -> None:
        self.registry, self.fn, self.name, self.queue = registry, fn, name, queue
        self.retry, self.timeout, self.fallback, self.policy = retry, timeout, fallback, policy
        self.is_async = asyncio.iscoroutinefunction(fn)
        self.__doc__ = fn.__doc__
        self.__name__ = getattr(fn, "__name__", name)
        self.__wrapped__ = fn
        #: Parameters that the worker fills with resources.
        self.dependencies = dependencies(fn)
        wrong = [r.name for r in self.dependencies.values() if r.is_async and not self.is_async]
        if wrong:
            raise ConfigError(
                f"task {name!r} is a plain function, and resource {wrong[0]!r}, which it asks for, is async"
            )
        self._names, self._struct = _arguments_struct(fn, name)
        self._decoder = msgspec.json.Decoder(self._struct, dec_hook=_dec_hook)
        self._fields = self._struct.__struct_fields__
        if isinstance(policy.key, str) and policy.key not in self._fields:
            raise ConfigError(
                f"task {name!r}: key={policy.key!r} is none of its parameters ({', '.join(self._fields) or 'it has none'})"
            )
        #: Jobs of it are described without options: what `job` makes is the same for all but the arguments.
        self._simple = policy.key is None and policy.expires_in is None and policy.priority is None
        #: The signature as text, for error messages.
        signature = inspect.signature(fn, eval_str=True)
        kept = [p for p in signature.parameters.values() if p.name not in self.dependencies]
        self.signature = str(signature.replace(parameters=kept))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run the function itself, without Jobledger: its result, or the coroutine of an ``async`` one.

        Resources it asks for must be given, by name: nobody opens them. Raises `BadArguments` if they are not.
        """
        if self.dependencies:
            given = inspect.signature(self.fn).bind_partial(*args, **kwargs).arguments
            if missing := [name for name in self.dependencies if name not in given]:
                raise BadArguments(f"{self.name}() is called here and now: give it {missing[0]}=… yourself")
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name} of queue {self.queue}>"

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R]:
        """Describe a job without submitting it. Raises `BadArguments` if the arguments do not fit."""
        if self._simple:
            return JobRequest(self, self.encode_args(args, kwargs), self.queue)
        return self.using().job(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Submit a job; returns once the log has acknowledged it.

        Raises `BadArguments`, `PayloadTooLarge`, `TopicMissing` or `BrokerUnavailable`; then nothing was accepted,
        except that after `BrokerUnavailable` the job may have arrived all the same.
        """
        request = self.job(*args, **kwargs)  # judged before anything connects
        return self.registry.submitter().submit(request)

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """`submit` for asyncio: the event loop goes on while the log acknowledges."""
        request = self.job(*args, **kwargs)
        return await self.registry.submitter().submit_async(request)

    def using(
        self,
        *,
        delay: float | None = None,
        tags: Mapping[str, str] | None = None,
        queue: str | None = None,
        key: str | None = None,
        priority: Literal["high", "normal", "low"] | None = None,
        expires_in: float | None = None,
    ) -> BoundTask[P, R]:
        """The task with options for one submission.

        ``delay``: seconds, counted on the broker's clock from the append. ``tags``: text to find the job by.
        ``queue``: another queue of the app. ``key``: jobs of one key run one at a time, in the order of submission.
        ``priority``: on a queue with priorities. ``expires_in``: seconds after which the job is not started any more,
        counted as the delay is. Raises `ConfigError` or `UnknownQueue` at once.
        """
        what = f"task {self.name!r}"
        policy = self.policy
        if queue is not None:
            self.registry.check_queue(queue)
            if queue != self.queue and policy.limits:
                raise ConfigError(
                    f"{what} has limits, which count the partitions of its queue {self.queue!r}: it cannot go to {queue!r}"
                )
        level = policy.priority if priority is None else check_priority(priority, f"{what}: priority")
        if key is not None:
            if not isinstance(key, str) or not 0 < len(key) <= KEY_MOST:
                raise ConfigError(f"{what}: key={key!r} is not a text of 1 to {KEY_MOST} characters")
            bounded = self.is_async or policy.isolation is not None
            check_keyed(what, self.timeout, policy.long, level, bounded=bounded)
        elif policy.key is not None:
            check_keyed(what, self.timeout, policy.long, level, bounded=True)
        if level is not None:
            self.registry.check_level(queue or self.queue, level)
        return BoundTask(
            self,
            queue or self.queue,
            check_tags(tags),
            None if delay is None else round(check_delay(delay, "delay") * 1000),
            key,
            level,
            _ms(policy.expires_in if expires_in is None else check_expiry(expires_in)),
        )

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The ordering key of a job with these arguments; None if the task has none. Raises `BadArguments`."""
        key = self.policy.key
        if key is None:
            return None
        if isinstance(key, str):
            bound = {**dict(zip(self._names, args, strict=False)), **kwargs}
            if key not in bound:
                raise BadArguments(f"{self.name}{self.signature} is keyed by {key!r}, which was not given")
            found = bound[key]
        else:
            found = key(*args, **kwargs)
        text = str(found) if isinstance(found, str | int) else ""
        if not 0 < len(text) <= KEY_MOST:
            raise BadArguments(
                f"the key of {self.name}() is {found!r}: it must be a whole number, or a text of 1 to {KEY_MOST} characters"
            )
        return text

    def encode_args(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Arguments as a JSON object by parameter name; `BadArguments` names what does not fit."""
        names = self._names
        if len(args) > len(names):
            raise BadArguments(
                f"{self.name}() takes {len(names)} positional arguments ({', '.join(names)}): got {len(args)}"
            )
        named = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key in named:
                raise BadArguments(f"{self.name}() got argument {key!r} twice, by position and by name")
            named[key] = value
        try:
            raw = msgspec.json.encode(named, enc_hook=_enc_hook)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise BadArguments(f"an argument of {self.name}() cannot be written as JSON: {exc}") from exc
        try:
            self._decoder.decode(raw)
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as exc:
            raise BadArguments(f"arguments do not fit {self.name}{self.signature}: {exc}") from exc
        return raw

    def decode_args(self, raw: bytes) -> dict[str, Any]:
        """The worker's side of `encode_args`: keyword arguments for the function. Raises `BadArguments`."""
        try:
            struct = self._decoder.decode(raw)
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as exc:
            shown = raw[:500].decode(errors="replace")
            raise BadArguments(f"arguments {shown} do not fit {self.name}{self.signature}: {exc}") from exc
        unset = msgspec.UNSET
        return {n: v for n in self._fields if (v := getattr(struct, n)) is not unset}

    def encode_result(self, value: Any) -> bytes | None:
        """A return value as JSON; None for None. Raises `TypeError` or `ValueError` naming what cannot be written."""
        return None if value is None else msgspec.json.encode(value, enc_hook=_enc_hook)


class BoundTask(Generic[P, R]):
    """A task with options of one submission; see `Task.using`."""

    def __init__(
        self,
        task: Task[P, R],
        queue: str,
        tags: dict[str, str],
        delay_ms: int | None,
        key: str | None,
        priority: Priority | None,
        expires_in_ms: int | None,
    ) -> None:
        self.task, self.queue, self.tags, self.delay_ms = task, queue, tags, delay_ms
        self.key, self.priority, self.expires_in_ms = key, priority, expires_in_ms

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R]:
        """As `Task.job`."""
        task = self.task
        encoded = task.encode_args(args, kwargs)
        key = task.key_of(args, kwargs) if self.key is None else self.key
        return JobRequest(task, encoded, self.queue, self.tags, self.delay_ms, key, self.priority, self.expires_in_ms)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """As `Task.submit`."""
        request = self.job(*args, **kwargs)
        return self.task.registry.submitter().submit(request)

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """As `Task.submit_async`."""
        request = self.job(*args, **kwargs)
        return await self.task.registry.submitter().submit_async(request)


class Registry:
    """The tasks and queues of one namespace. ``submitter`` gives the client when a task wants to submit."""

    def __init__(
        self,
        namespace: str,
        *,
        queues: Iterable[Queue | str] | None = None,
        partitions: int = DEFAULT_PARTITIONS,
        submitter: Callable[[], Submitter],
    ) -> None:
        self.names = Names(namespace)
        self.partitions = check_partitions(partitions, "App(partitions=…)")
        self.submitter = submitter
        self.hooks, self.resources = Hooks(), Resources()
        self.tasks: dict[str, Task[Any, Any]] = {}
        #: Event types by name, and the handlers of each.
        self.events: dict[str, EventType] = {}
        self.handlers: dict[str, list[Handler]] = {}
        self.projections: dict[str, Projection] = {}
        self._declared: dict[str, Queue] | None = None
        if queues is not None:
            declared = [q if isinstance(q, Queue) else Queue(q) for q in queues]
            self._declared = {q.name: q for q in declared}
            if len(self._declared) != len(declared):
                raise ConfigError(f"App(queues=…) names a queue twice: {[q.name for q in declared]}")

    @property
    def queues(self) -> dict[str, Queue]:
        """Every queue by name, with its partition count filled in: the declared ones, else those the tasks name."""
        found = self._declared
        if found is None:
            found = {t.queue: Queue(t.queue) for t in self.tasks.values()} or {DEFAULT_QUEUE: Queue(DEFAULT_QUEUE)}
            for task in self.tasks.values():  # who names a priority wants the levels
                if task.policy.priority is not None:
                    found[task.queue] = Queue(task.queue, priorities=True)
        return {n: replace(q, partitions=q.partitions or self.partitions) for n, q in sorted(found.items())}

    @property
    def lanes(self) -> dict[str, int]:
        """The partition count of every work topic, by what stands for it in its name: the queue, or queue and priority."""
        return {name: queue.partitions or self.partitions for queue in self.queues.values() for name in queue.lanes}

    def check_queue(self, queue: str) -> str:
        """``queue`` if the app has it, else `UnknownQueue` naming those it has."""
        check_name("queue", queue)
        known = self._declared if self._declared is not None else self.queues
        if queue not in known:
            raise UnknownQueue(
                f"queue {queue!r} is not declared by app {self.names.namespace!r}: it has {sorted(known)}"
            )
        return queue

    def check_level(self, queue: str, priority: str) -> None:
        """Raise `ConfigError` unless the queue has priorities."""
        if not self.queues[queue].priorities:
            raise ConfigError(
                f"priority={priority!r}: queue {queue!r} has no priorities; declare it as Queue({queue!r}, priorities=True)"
            )

    def add(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None,
        queue: str,
        retry: Retry | int | None,
        timeout: float | None,
        fallback: Task[Any, Any] | str | None,
        **policy: Any,
    ) -> Task[Any, Any]:
        """Register a function; `ConfigError`, `UnknownQueue` if an option cannot hold."""
        task_name = name if name is not None else getattr(fn, "__name__", "")
        if not task_name or not isinstance(task_name, str) or len(task_name) > 200:
            raise ConfigError(f"task name {task_name!r} is not a text of 1 to 200 characters; give @app.task(name=…)")
        if task_name in self.tasks and _origin(self.tasks[task_name].fn) != _origin(fn):
            raise ConfigError(f"task {task_name!r} is already registered; give one of the two @app.task(name=…)")
        if self._declared is not None:
            self.check_queue(queue)
        else:
            check_name("queue", queue)
        if isinstance(retry, int) and not isinstance(retry, bool):
            retry = Retry(max_attempts=retry)
        if retry is not None and not isinstance(retry, Retry):
            raise ConfigError(f"task {task_name!r}: retry={retry!r} is neither a Retry nor a number of attempts")
        if timeout is not None:
            _check_timeout(task_name, timeout)
        judged = policy_of(
            task_name, timeout=timeout, is_async=asyncio.iscoroutinefunction(fn), **{**POLICY_DEFAULTS, **policy}
        )
        if judged.priority is not None and self._declared is not None:
            self.check_level(queue, judged.priority)
        task: Task[Any, Any] = Task(
            self,
            fn,
            name=task_name,
            queue=queue,
            retry=retry or Retry(),
            timeout=None if timeout is None else float(timeout),
            fallback=fallback.name if isinstance(fallback, Task) else fallback,
            policy=judged,
        )
        self.tasks[task_name] = task
        return task

    def task(self, name: str) -> Task[Any, Any]:
        """The task of this name, or `UnknownTask` naming those there are."""
        try:
            return self.tasks[name]
        except KeyError:
            raise UnknownTask(
                f"task {name!r} is not registered with app {self.names.namespace!r}: it has {sorted(self.tasks)}"
            ) from None

    def add_event(self, cls: type[Any], **options: Any) -> EventType:
        """Register a class of events; `ConfigError` for a name or topic that is taken."""
        made = EventType(cls, names=self.names, **options)
        other = self.events.get(made.name)
        if other is not None and _origin(other.cls) != _origin(cls):
            raise ConfigError(f"event {made.name!r} is already registered; give one of the two @app.event(name=…)")
        same = [e for e in self.events.values() if e.topic == made.topic and e.name != made.name]
        if same:
            raise ConfigError(f"event {made.name!r}: topic {made.topic!r} is that of event {same[0].name!r} already")
        self.events[made.name] = made
        return made

    def event_of(self, cls: type[Any]) -> EventType:
        """The event type of a class, or `BadEvent` naming those there are."""
        for found in self.events.values():
            if found.cls is cls:
                return found
        raise BadEvent(
            f"{getattr(cls, '__qualname__', cls)!r} is no event of app {self.names.namespace!r}: it has "
            f"{sorted(self.events)}; decorate the class with @app.event"
        )

    def add_handler(self, cls: type[Any], task: Task[Any, Any]) -> Handler:
        """Let ``task`` handle events of ``cls``. A module that is loaded again replaces its own handlers."""
        made = Handler(self.event_of(cls), task)
        known = self.handlers.setdefault(made.event.name, [])
        known[:] = [*(h for h in known if h.task.name != task.name), made]
        return made

    def add_projection(self, fold: Callable[..., Any], **options: Any) -> Projection:
        """Register a fold; `ConfigError` for a name or a table that is taken."""
        made = Projection(fold, **options)
        for other in self.projections.values():
            taken = other.name == made.name or other.table.name == made.table.name
            if taken and _origin(other.fold) != _origin(fold):
                raise ConfigError(
                    f"projection {made.name!r}: {other!r} is registered already; give another name and table"
                )
        self.projections[made.name] = made
        return made

    def handler(self, name: str) -> Handler:
        """The handler of this name, or `UnknownTask` naming those there are."""
        found = [handler for handlers in self.handlers.values() for handler in handlers]
        for handler in found:
            if handler.task.name == name:
                return handler
        raise UnknownTask(f"no handler is called {name!r}: there are {sorted(h.task.name for h in found)}")

    def _check_limits(self) -> None:
        """Each partition carries a share of a limit, so there must be one for each of them."""
        queues = self.queues
        owners = [(f"queue {q.name!r}", q, q.limits) for q in queues.values()]
        owners += [(f"task {t.name!r}", queues[t.queue], t.policy.limits) for t in self.tasks.values()]
        for what, queue, limits in owners:
            check_shares(what, queue, limits, self.partitions)

    def check(self) -> None:
        """What can be judged only when all is there: fallbacks, limits, hooks. Raises `ConfigError`; run when an app is loaded."""
        self._check_limits()
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
                        f"task {task.name!r}: its fallbacks form a circle: {' → '.join([*seen, following])}"
                    )
                seen.append(following)
                following = self.tasks[following].fallback if following in self.tasks else None
            theirs = self.tasks[task.fallback]
            if task._names != theirs._names:
                raise ConfigError(
                    f"task {task.name!r}: fallback {theirs.name!r} must take the same parameters "
                    f"({', '.join(task._names)}), it takes ({', '.join(theirs._names)})"
                )


def check_shares(what: str, queue: Queue, limits: Limits, partitions: int) -> None:
    """Raise `ConfigError` if a limit of concurrency is less than the partitions of the queue's work topics."""
    count = (queue.partitions or partitions) * len(queue.levels)
    if limits.concurrency is not None and limits.concurrency < count:
        of = "partitions" if not queue.priorities else "partitions, those of all priorities counted,"
        raise ConfigError(
            f"{what}: concurrency={limits.concurrency} is less than the {count} {of} of queue {queue.name!r}, each of which "
            f"carries a share of it: declare Queue({queue.name!r}, partitions={max(1, limits.concurrency // len(queue.levels))}) "
            "or less for it alone"
        )


def _check_timeout(task: str, timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"task {task!r}: timeout={timeout!r} is not a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        )


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))


def _origin(fn: Callable[..., Any]) -> tuple[str, str]:
    """Where a function comes from: a reloaded module registers the same one again."""
    return getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "")


def _arguments_struct(fn: Callable[..., Any], name: str) -> tuple[tuple[str, ...], type[msgspec.Struct]]:
    """Parameter names that may be given by position, and the struct that a JSON object of arguments must fit."""
    try:
        hints = typing.get_type_hints(fn)
        parameters = inspect.signature(fn, eval_str=True).parameters.values()
    except Exception as exc:
        raise ConfigError(f"task {name!r}: its signature cannot be read: {exc}") from exc
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    positional: list[str] = []
    filled = ""
    for parameter in parameters:
        if isinstance(parameter.default, Dependency):
            filled = parameter.name
            continue
        if filled and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise ConfigError(
                f"task {name!r}: {parameter.name} comes after {filled}, which the worker fills; put resources last, "
                "or behind a *"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"task {name!r}: parameter {parameter} cannot travel by name; write every parameter out, "
                "or take one list or dict"
            )
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(parameter.name)
        hint = hints.get(parameter.name, Any)
        if parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            # Unset, not the default itself: the default that counts is the worker's, as in any call.
            fields.append((parameter.name, hint | msgspec.UnsetType if hint is not Any else Any, msgspec.UNSET))
    try:
        struct = msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, forbid_unknown_fields=True)
        _check_types(name, msgspec.inspect.type_info(struct))
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"task {name!r}: a parameter's annotation cannot be read from JSON: {exc}") from exc
    return tuple(positional), struct


def _check_types(name: str, info: msgspec.inspect.Type) -> None:
    assert isinstance(info, msgspec.inspect.StructType)
    for each in info.fields:
        kinds = each.type.types if isinstance(each.type, msgspec.inspect.UnionType) else (each.type,)
        for kind in kinds:
            if isinstance(kind, msgspec.inspect.CustomType) and not hasattr(kind.cls, "model_validate"):
                raise ConfigError(
                    f"task {name!r}: parameter {each.name}: {kind.cls.__qualname__} cannot be read from JSON; "
                    "use JSON types, a dataclass, a TypedDict, a msgspec Struct or a pydantic model"
                )


def _enc_hook(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # pydantic, where users have it
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__qualname__} is no JSON type, dataclass, msgspec Struct or pydantic model")


def _dec_hook(kind: type[Any], value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise TypeError(f"{kind.__qualname__} cannot be read from JSON")
