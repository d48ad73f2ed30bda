"""Composes a task's code with its hooks, resources and spans into one function for each task.

A worker, or a child process of it, calls the function that `runner` returns instead of the task. If the task has no
hooks, resources or spans, this is the task's function itself. The hooks ``retry`` and ``failure`` are not in that
function: the worker calls them after an attempt's outcome is decided (`jobledger.consumers.running.hook_runner`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from jobledger.definitions import tracing
from jobledger.definitions.context import JobContext, current_job
from jobledger.definitions.functions import awaited, check_plain
from jobledger.errors import ConfigError
from jobledger.process.logger import get_logger

if TYPE_CHECKING:
    from jobledger.definitions.task import Task

LOG = get_logger("jobledger.worker")

#: The tasks to which a hook applies: a function that takes a task and returns whether the hook applies, or a collection
#: of tasks and names of tasks. None: all tasks.
Which = Callable[["Task[Any, Any]"], bool] | Iterable["Task[Any, Any] | str"] | None
#: The function that runs a job's code: (job, keyword arguments) → result, or an awaitable of it.
Inner = Callable[[JobContext, dict[str, Any]], Any]
Around = Callable[[JobContext], Iterator[None]] | Callable[[JobContext], AsyncIterator[None]]

#: Exceptions that count as the hook's own. The exceptions of a timeout or a cancellation belong to the job.
OWN = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)

NAMES = ("before", "after", "retry", "failure", "around")


class Hook:
    """One registered hook: its name (one of `NAMES`), its function, and the tasks to which the hook applies."""

    __slots__ = ("description", "fn", "given", "is_async", "name", "which")

    def __init__(self, name: str, fn: Callable[..., Any], description: str, which: Which) -> None:
        self.name, self.fn, self.description = name, fn, description
        raw = inspect.unwrap(fn)
        self.is_async = inspect.iscoroutinefunction(raw) or inspect.isasyncgenfunction(raw)
        if name == "around" and raw is fn:
            if not (inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)):
                raise ConfigError(
                    f"{description} is not a generator: write a function that yields once, at the point where the task is to run"
                )
            self.fn = contextlib.asynccontextmanager(fn) if self.is_async else contextlib.contextmanager(fn)
        elif name != "around" and (inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)):
            raise ConfigError(
                f"{description} is a generator: calling it would run none of its code; only `around` yields"
            )
        self.which: Callable[[Task[Any, Any]], bool] | frozenset[str] | None
        if callable(which):
            check_plain(which, f"{description}: tasks=…")
        #: Tasks that were given as `Task` objects, not by name.
        self.given: tuple[Task[Any, Any], ...] = ()
        if which is None or callable(which):
            self.which = which
        else:
            which = list(which)
            self.given = tuple(each for each in which if not isinstance(each, str))
            self.which = frozenset(each if isinstance(each, str) else each.name for each in which)

    def meant(self, task: Task[Any, Any]) -> bool:
        """Return whether the hook applies to this task."""
        if self.which is None:
            return True
        return task.name in self.which if isinstance(self.which, frozenset) else self.which(task)


class Hooks:
    """The hooks of an app, the outermost first."""

    def __init__(self) -> None:
        self.all: list[Hook] = []

    def add(self, middleware: object, which: Which = None) -> None:
        """Register the hooks of an object, or of an instance of a class. Raises `ConfigError` if there is no hook."""
        instance = middleware() if inspect.isclass(middleware) else middleware
        kind = type(instance).__qualname__
        methods = [(n, fn) for n in NAMES if callable(fn := getattr(instance, n, None))]
        if not methods:
            raise ConfigError(f"middleware {kind} has none of the methods {', '.join(NAMES)}")
        # A bound method has the `__wrapped__` of its function, and is a generator function if its function is one.
        self.all += [Hook(name, fn, f"{kind}.{name}", which) for name, fn in methods]

    def add_around(self, fn: Callable[..., Any], which: Which = None) -> None:
        """Register a generator function that takes the job. Raises `ConfigError`."""
        self.all.append(Hook("around", fn, f"around {getattr(fn, '__qualname__', fn)!s}", which))

    def of(self, task: Task[Any, Any]) -> list[Hook]:
        """Return the hooks that apply to a task. Raises `ConfigError` if one of these hooks cannot run where the task's
        code runs, or if a hook names a task of another app."""
        for hook in self.all:
            if foreign := [each for each in hook.given if each.registry is not task.registry]:
                raise ConfigError(
                    f"{hook.description}: tasks=… names {foreign[0]!r} of app {foreign[0].registry.names.namespace!r}; a hook "
                    f"applies only to tasks of its own app, {task.registry.names.namespace!r}"
                )
        hooks = [hook for hook in self.all if hook.meant(task)]
        for hook in hooks:
            if hook.is_async and not task.is_async and hook.name in ("before", "after", "around"):
                raise ConfigError(
                    f"{hook.description} is async, and task {task.name!r} is a plain function, which runs without an event "
                    "loop: write a plain hook, or exclude the task with tasks=lambda task: task.is_async"
                )
        return hooks


def runner(task: Task[Any, Any], hooks: Hooks) -> Callable[..., Any]:
    """Return the function that runs a job's code: a coroutine function for ``async`` tasks. Call the function with the
    job's arguments while `current_job` is that job.

    The function is ``task.fn`` itself if the task has no hooks, resources or spans. Called when a worker or a child
    process starts.
    """
    around = [h for h in hooks.of(task) if h.name in ("around", "before", "after")]
    span = tracing.span_of(task)
    if not around and not task.dependencies and span is None:
        return task.fn
    inner = _code(task)
    for hook in reversed(around):
        wrap = _WRAPS[hook.name, task.is_async]
        inner = wrap(hook, inner)
    if span is not None:
        inner = _WRAPS["around", task.is_async](span, inner)
    if task.is_async:

        async def run_async(**kwargs: Any) -> Any:
            return await inner(current_job(), kwargs)

        return run_async

    def run(**kwargs: Any) -> Any:
        return inner(current_job(), kwargs)

    return run


def _code(task: Task[Any, Any]) -> Inner:
    fn, needs, store = task.fn, tuple(task.dependencies.items()), task.registry.resources
    if task.is_async:

        async def call_async(job: JobContext, kwargs: dict[str, Any]) -> Any:
            for name, resource in needs:
                kwargs[name] = await store.get_async(resource)
            return await fn(**kwargs)

        return call_async

    def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        for name, resource in needs:
            kwargs[name] = store.get(resource)
        return awaited(fn(**kwargs))

    return call


# An error that an `around` hook suppresses still counts: the error is raised again after the hook. The references to
# the error are dropped in the end: otherwise the error's frames would stay in memory until Python's garbage collector
# runs.


def _around(hook: Any, inner: Inner) -> Inner:
    make: Callable[[JobContext], contextlib.AbstractContextManager[None, bool]] = hook.fn

    def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        raised: BaseException | None = None
        try:
            with make(job):
                try:
                    return inner(job, kwargs)
                except BaseException as error:
                    raised = error
                    raise
            assert raised is not None
            raise raised
        finally:
            raised = None

    return call


def _around_async(hook: Any, inner: Inner) -> Inner:
    make: Callable[[JobContext], contextlib.AbstractAsyncContextManager[None, bool]] = hook.fn
    if not hook.is_async:
        make_plain: Callable[[JobContext], contextlib.AbstractContextManager[None, bool]] = hook.fn

        def make(job: JobContext) -> contextlib.AbstractAsyncContextManager[None, bool]:
            return _Async(make_plain(job))

    async def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        raised: BaseException | None = None
        try:
            async with make(job):
                try:
                    return await inner(job, kwargs)
                except BaseException as error:
                    raised = error
                    raise
            assert raised is not None
            raise raised
        finally:
            raised = None

    return call


class _Async(contextlib.AbstractAsyncContextManager[None, bool]):
    """Wraps a plain context manager for use around a coroutine."""

    def __init__(self, inner: contextlib.AbstractContextManager[None, bool]) -> None:
        self._inner = inner

    async def __aenter__(self) -> None:
        self._inner.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        return bool(self._inner.__exit__(kind, error, where))


def _before(hook: Hook, inner: Inner) -> Inner:
    def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        awaited(hook.fn(job))
        return inner(job, kwargs)

    return call


def _before_async(hook: Hook, inner: Inner) -> Inner:
    async def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        returned = hook.fn(job)
        if isinstance(returned, Awaitable):
            await returned
        return await inner(job, kwargs)

    return call


def _after(hook: Hook, inner: Inner) -> Inner:
    def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        result = inner(job, kwargs)
        try:
            awaited(hook.fn(job, result))
        except OWN:
            _failed(hook, job)
        return result

    return call


def _after_async(hook: Hook, inner: Inner) -> Inner:
    async def call(job: JobContext, kwargs: dict[str, Any]) -> Any:
        result = await inner(job, kwargs)
        try:
            returned = hook.fn(job, result)
            if isinstance(returned, Awaitable):
                await returned
        except OWN:
            _failed(hook, job)
        return result

    return call


def _failed(hook: Hook, job: JobContext) -> None:
    LOG.exception("%s failed for job %s (%s); the job's outcome is unchanged", hook.description, job.job_id, job.task)


_WRAPS: dict[tuple[str, bool], Callable[[Any, Inner], Inner]] = {
    ("around", False): _around,
    ("around", True): _around_async,
    ("before", False): _before,
    ("before", True): _before_async,
    ("after", False): _after,
    ("after", True): _after_async,
}
