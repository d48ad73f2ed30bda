"""Tasks, which are functions with a name and policies, and job requests, which describe jobs of a task."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar

import msgspec

from jobledger.definitions.arguments import Arguments, Results, encode_result
from jobledger.definitions.durations import Seconds
from jobledger.definitions.policy import Policy, Priority, check_expiry, check_keyed, check_priority
from jobledger.definitions.resources import Resources, dependencies
from jobledger.definitions.retry import Retry, check_delay
from jobledger.errors import BadArguments, ConfigError
from jobledger.kafka.topic_names import TAG_NAME_MOST, TAG_VALUE_MOST, Names, check_text
from jobledger.schemas.events import JobLinks

if TYPE_CHECKING:
    from jobledger.definitions.handles import JobHandle

P = ParamSpec("P")
R = TypeVar("R")
#: The result type of a task's jobs. Covariant: a handle with a `bool` result is also a handle with an `int` result.
R_co = TypeVar("R_co", covariant=True)

#: Maximum characters of a key.
KEY_MOST = 500


class JobRequest(msgspec.Struct, Generic[R_co], frozen=True):
    """A job that was described but not submitted. `Task.job` returns job requests, and `App.submit_many` takes them."""

    task: Task[Any, R_co]
    args: bytes
    queue: str
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    delay_ms: int | None = None
    key: str | None = None
    priority: Priority | None = None
    expires_in_ms: int | None = None
    job_id: str | None = None
    links: JobLinks | None = None


class Submitter(Protocol):
    """The methods of a client that a task uses."""

    def submit(self, request: JobRequest[R]) -> JobHandle[R]: ...

    def submit_async(self, request: JobRequest[R]) -> Awaitable[JobHandle[R]]: ...


class Owner(Protocol):
    """The members of its registry that a task uses."""

    @property
    def names(self) -> Names:
        """The names of the app's topics and groups."""

    @property
    def resources(self) -> Resources:
        """The open resources of this process."""

    def submitter(self) -> Submitter:
        """Return the client that submits the task's jobs."""

    def check_queue(self, queue: str) -> str:
        """Return ``queue`` if the app has this queue. Raises `UnknownQueue` if not."""

    def check_level(self, queue: str, priority: str) -> None:
        """Raise `ConfigError` unless the queue has priorities."""


def check_tags(tags: object) -> dict[str, str]:
    """Return ``tags`` as a dict of short strings; empty for None. Raises `ConfigError` that names the invalid tag."""
    if tags is None:
        return {}
    if not isinstance(tags, Mapping):
        raise ConfigError(f"tags={tags!r} is not a mapping of text to text")
    return {
        check_text("tag name", name, TAG_NAME_MOST): check_text(f"tag {name!r}", value, TAG_VALUE_MOST, least=0)
        for name, value in tags.items()
    }


def check_job_id(job_id: object, what: str) -> str:
    """Return ``job_id`` as the canonical text of a UUID of any version. Raises `ConfigError` that begins with
    ``what``."""
    if isinstance(job_id, uuid.UUID):
        return str(job_id)
    try:
        return str(uuid.UUID(job_id if isinstance(job_id, str) else ""))
    except ValueError:
        raise ConfigError(
            f"{what}={job_id!r} is not a UUID: uuid.uuid5(uuid.NAMESPACE_URL, name) derives one from a name of your own"
        ) from None


class Task(Generic[P, R_co]):
    """A function that can be run as a job. ``@app.task`` creates tasks; each task is a `PlainTask` or an `AsyncTask`.
    Calling a task runs its function directly in the caller."""

    def __init__(
        self,
        registry: Owner,
        fn: Callable[P, R_co] | Callable[P, Awaitable[R_co]],
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
        #: Parameters whose values the worker supplies: resources.
        self.dependencies = dependencies(fn)
        wrong = [r.name for r in self.dependencies.values() if r.is_async and not self.is_async]
        if wrong:
            raise ConfigError(
                f"task {name!r} is a plain function, and resource {wrong[0]!r}, which it needs, is async: "
                "make the task `async def`"
            )
        self.arguments = Arguments(fn, name, self.dependencies)
        #: The signature as text, for error messages.
        self.signature = self.arguments.signature
        #: `Arguments.encode` and `Arguments.decode`, and the same two functions for a result.
        self.encode_args, self.decode_args = self.arguments.encode, self.arguments.decode
        self.encode_result, self.decode_result = encode_result, Results(fn, name).decode
        names = self.arguments.names
        if isinstance(policy.key, str) and policy.key not in names:
            raise ConfigError(
                f"task {name!r}: key={policy.key!r} is not one of its parameters ({', '.join(names) or 'it has none'})"
            )
        #: Whether the task has no key, expiry or priority, so that its job requests differ only in their arguments.
        self._simple = policy.key is None and policy.expires_in is None and policy.priority is None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function itself, without Jobledger. Returns its result, or the coroutine of an ``async`` function.

        Pass the resources that the function needs as keyword arguments: no resource is opened here. Raises
        `BadArguments` if a resource is missing.
        """
        if self.dependencies:
            given = inspect.signature(self.fn).bind_partial(*args, **kwargs).arguments
            if missing := [name for name in self.dependencies if name not in given]:
                raise BadArguments(f"{self.name}() is called directly, without a worker: pass {missing[0]}=… yourself")
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name} of queue {self.queue}>"

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R_co]:
        """Return a request for a job without submitting the job. Raises `BadArguments` if the arguments do not fit."""
        if self._simple:
            return JobRequest(self, self.encode_args(args, kwargs), self.queue)
        return self.using().job(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R_co]:
        """Submit a job, and return its handle once the log has acknowledged the submission.

        Raises `BadArguments`, `PayloadTooLarge`, `TopicMissing`, `AccessDenied`, `BrokerUnavailable`, or with a Schema
        Registry `SchemaRefused` or `RegistryUnavailable` (a `BrokerUnavailable`). After `BrokerUnavailable` the job may
        have been submitted; after any other of these errors the job was not submitted.
        """
        request = self.job(*args, **kwargs)  # checked before any connection is opened
        return self.registry.submitter().submit(request)

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R_co]:
        """Submit a job as `submit` does, without blocking the event loop."""
        request = self.job(*args, **kwargs)
        return await self.registry.submitter().submit_async(request)

    def using(
        self,
        *,
        delay: Seconds | None = None,
        tags: Mapping[str, str] | None = None,
        queue: str | None = None,
        key: str | None = None,
        priority: Literal["high", "normal", "low"] | None = None,
        expires_in: Seconds | None = None,
        job_id: str | uuid.UUID | None = None,
    ) -> BoundTask[P, R_co]:
        """Return the task with options for one submission. Raises `ConfigError` or `UnknownQueue` at once.

        ``delay``: seconds, or a `timedelta`, before which the job does not start, counted on the broker's clock from
        the append. ``tags``: texts by which the job can be found. ``queue``, ``priority`` and ``expires_in``, which
        `App.task` describes, replace the task's; the queue must be one of the app. ``key``: the job's ordering key
        itself. ``job_id``: a UUID that the caller chooses. A second submission with the same UUID to the same queue,
        key and priority is a duplicate: the job runs once, with the arguments of the first submission. Workers drop the
        duplicate for as long as they remember the id: 10 minutes or 100,000 records of a partition, whichever is less.
        """
        what = f"task {self.name!r}"
        policy = self.policy
        if queue is not None:
            queue = self.registry.check_queue(queue)
            if queue != self.queue and policy.limits:
                raise ConfigError(
                    f"{what} has limits, which are shared among the partitions of its queue {self.queue!r}: it cannot use {queue!r}"
                )
        level = policy.priority if priority is None else check_priority(priority, f"{what}: priority")
        if key is not None:
            key = check_text(f"{what}: key", key, KEY_MOST)
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
            None if job_id is None else check_job_id(job_id, f"{what}: job_id"),
        )

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the ordering key of a job with these arguments; None if the task has no key. Raises `BadArguments`."""
        key = self.policy.key
        if key is None:
            return None
        if isinstance(key, str):
            bound = self.arguments.bound(args, kwargs)
            if key not in bound:
                raise BadArguments(f"{self.name}{self.signature} has the ordering key {key!r}, which was not given")
            value = bound[key]
        else:
            value = key(*args, **kwargs)
        if not isinstance(value, str | int):
            raise BadArguments(f"the key of {self.name}() is {value!r}: it must be an int or a str")
        try:
            return check_text(f"the key of {self.name}()", str(value), KEY_MOST)
        except ConfigError as exc:
            raise BadArguments(str(exc)) from None


class PlainTask(Task[P, R_co]):
    """A task with a plain function: calling it returns what the function returns."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class AsyncTask(Task[P, R_co]):
    """A task with an ``async`` function: calling it returns a coroutine."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]: ...


class BoundTask(Generic[P, R_co]):
    """A task with options for one submission; see `Task.using`."""

    def __init__(
        self,
        task: Task[P, R_co],
        queue: str,
        tags: dict[str, str],
        delay_ms: int | None,
        key: str | None,
        priority: Priority | None,
        expires_in_ms: int | None,
        job_id: str | None,
    ) -> None:
        self.task, self.queue, self.tags, self.delay_ms = task, queue, tags, delay_ms
        self.key, self.priority, self.expires_in_ms, self.job_id = key, priority, expires_in_ms, job_id

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R_co]:
        """Return a request for a job, as `Task.job` does."""
        task = self.task
        encoded = task.encode_args(args, kwargs)
        key = task.key_of(args, kwargs) if self.key is None else self.key
        return JobRequest(
            task, encoded, self.queue, self.tags, self.delay_ms, key, self.priority, self.expires_in_ms, self.job_id
        )

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R_co]:
        """Submit a job, as `Task.submit` does."""
        request = self.job(*args, **kwargs)
        return self.task.registry.submitter().submit(request)

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R_co]:
        """Submit a job, as `Task.submit_async` does."""
        request = self.job(*args, **kwargs)
        return await self.task.registry.submitter().submit_async(request)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))
