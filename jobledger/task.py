"""Tasks: a function, its name and its policies; and the registry workers and clients share.

Arguments travel as one JSON object by parameter name. They are checked against the signature's annotations twice, with
the same decoder: in the caller, before anything is sent, and in the worker.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

import msgspec

from jobledger.domain import EventType, Handler
from jobledger.errors import BadArguments, BadEvent, ConfigError, UnknownQueue, UnknownTask
from jobledger.names import Names, check_name
from jobledger.projection import Projection
from jobledger.retry import Retry, check_delay

if TYPE_CHECKING:
    from jobledger.client import JobHandle

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_QUEUE = "default"
DEFAULT_PARTITIONS = 6
#: A task whose timeout is above this many seconds will be leased (a later version); until then it is refused.
MAX_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of the app. ``partitions``: of its work topic; None takes the app's default."""

    name: str
    partitions: int | None = None

    def __post_init__(self) -> None:
        check_name("queue", self.name)
        if self.partitions is not None:
            check_partitions(self.partitions, f"Queue({self.name!r}, partitions=…)")


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
    ) -> None:
        self.registry, self.fn, self.name, self.queue = registry, fn, name, queue
        self.retry, self.timeout, self.fallback = retry, timeout, fallback
        self.is_async = asyncio.iscoroutinefunction(fn)
        self.__doc__ = fn.__doc__
        self.__name__ = getattr(fn, "__name__", name)
        self.__wrapped__ = fn
        self._names, self._struct = _arguments_struct(fn, name)
        self._decoder = msgspec.json.Decoder(self._struct, dec_hook=_dec_hook)
        self._fields = self._struct.__struct_fields__
        #: The signature as text, for error messages.
        self.signature = str(inspect.signature(fn, eval_str=True))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run the function itself, without Jobledger: its result, or the coroutine of an ``async`` one."""
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name} of queue {self.queue}>"

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R]:
        """Describe a job without submitting it. Raises `BadArguments` if the arguments do not fit."""
        return JobRequest(self, self.encode_args(args, kwargs), self.queue)

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
    ) -> BoundTask[P, R]:
        """The task with options for one submission.

        ``delay``: seconds, counted on the broker's clock from the append. ``tags``: text to find the job by.
        ``queue``: another queue of the app. Raises `ConfigError` or `UnknownQueue` at once.
        """
        delay_ms = None if delay is None else round(check_delay(delay, "delay") * 1000)
        if queue is not None:
            self.registry.check_queue(queue)
        return BoundTask(self, queue or self.queue, check_tags(tags), delay_ms)

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

    def __init__(self, task: Task[P, R], queue: str, tags: dict[str, str], delay_ms: int | None) -> None:
        self.task, self.queue, self.tags, self.delay_ms = task, queue, tags, delay_ms

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R]:
        """As `Task.job`."""
        return JobRequest(self.task, self.task.encode_args(args, kwargs), self.queue, self.tags, self.delay_ms)

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
        return {n: Queue(n, q.partitions or self.partitions) for n, q in sorted(found.items())}

    def check_queue(self, queue: str) -> str:
        """``queue`` if the app has it, else `UnknownQueue` naming those it has."""
        check_name("queue", queue)
        known = self._declared if self._declared is not None else self.queues
        if queue not in known:
            raise UnknownQueue(
                f"queue {queue!r} is not declared by app {self.names.namespace!r}: it has {sorted(known)}"
            )
        return queue

    def add(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None,
        queue: str,
        retry: Retry | int | None,
        timeout: float | None,
        fallback: Task[Any, Any] | str | None,
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
            _check_timeout(task_name, timeout, fn)
        task: Task[Any, Any] = Task(
            self,
            fn,
            name=task_name,
            queue=queue,
            retry=retry or Retry(),
            timeout=None if timeout is None else float(timeout),
            fallback=fallback.name if isinstance(fallback, Task) else fallback,
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

    def check(self) -> None:
        """What can be judged only when every task is there: fallbacks. Raises `ConfigError`; run when an app is loaded."""
        for task in self.tasks.values():
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


def _check_timeout(task: str, timeout: object, fn: Callable[..., Any]) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"task {task!r}: timeout={timeout!r} is not a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        )
    if not asyncio.iscoroutinefunction(fn):
        raise ConfigError(
            f"task {task!r}: timeout={timeout!r} needs `async def`: a thread cannot be stopped from outside. "
            "Make the task async, or bound the calls it makes"
        )


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
    for parameter in parameters:
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
