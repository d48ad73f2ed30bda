"""Resources that the tasks of a process share: connections, pools, clients. A resource is opened once, passed to the
tasks that need it, and closed at the end.

A resource is a function, plain or ``async``; a generator function yields the value and closes the value afterwards. A
task, or another resource, declares that it needs a resource with a parameter whose default is `Depends`. Such a
parameter is not an argument of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, overload

from jobledger.errors import ConfigError, ResourceFailed, is_a, text_of, type_of
from jobledger.process import forks
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

T = TypeVar("T")
_NONE: Any = object()


class Resource(Generic[T]):
    """A declared resource, created by ``@app.resource``. ``needs``: the resources that its own parameters declare."""

    def __init__(self, fn: Callable[..., Any], name: str | None = None) -> None:
        self.name = name or getattr(fn, "__name__", "")
        self.fn = fn
        self.__doc__ = fn.__doc__
        raw = inspect.unwrap(fn)
        self.is_async = inspect.iscoroutinefunction(raw) or inspect.isasyncgenfunction(raw)
        self._open: Callable[..., Any] = fn
        self._managed = inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw)
        if self._managed and raw is fn:  # else the function is a context manager already
            self._open = contextlib.asynccontextmanager(fn) if self.is_async else contextlib.contextmanager(fn)
        self.needs = dependencies(fn)
        wrong = [n.name for n in self.needs.values() if n.is_async and not self.is_async]
        if wrong:
            raise ConfigError(
                f"resource {self.name!r} is a plain function, and {wrong[0]!r}, which it needs, is async: "
                f"make {self.name!r} async, too"
            )
        without_default = [p.name for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
        if without_default:
            raise ConfigError(
                f"resource {self.name!r}: parameter {without_default[0]!r} has no default: give it one, or "
                "Depends(…) if it is a resource"
            )

    def __repr__(self) -> str:
        return f"<resource {self.name}>"


class Dependency:
    """The value that `Depends` returns, as the default of a parameter."""

    __slots__ = ("resource",)

    def __init__(self, resource: Resource[Any]) -> None:
        self.resource = resource

    def __repr__(self) -> str:
        return f"Depends({self.resource.name})"


def Depends(resource: Resource[T]) -> T:  # the name that users know
    """Return the default of a parameter to which the worker passes the value of ``resource``. Raises `ConfigError` if
    ``resource`` is not a resource. ::

        @app.task
        async def charge(order_id: str, *, pool: Pool = Depends(pool)) -> None: ...
    """
    if not isinstance(resource, Resource):
        raise ConfigError(f"Depends({resource!r}): that is not a resource; decorate the function with @app.resource")
    return Dependency(resource)  # type: ignore[return-value]  # a default that stands for the value


def dependencies(fn: Callable[..., Any]) -> dict[str, Resource[Any]]:
    """Return the resources of the parameters of ``fn`` whose default is `Depends`, by parameter name."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default.resource for p in parameters if isinstance(p.default, Dependency)}


class Resources:
    """The resources of one app that are open in this process. None of them is open in a forked child."""

    def __init__(self) -> None:
        self._forget()
        forks.in_child(self)

    def after_fork(self) -> None:
        """Forget the parent's open resources without closing or freeing them. Called in a forked child."""
        forks.keep(self._values, self._closers)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._values: dict[Resource[Any], Any] = {}
        self._closers: list[tuple[Resource[Any], Any]] = []
        self._async_lock: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._users = 0

    def _here(self) -> dict[Resource[Any], Any]:
        if self._pid != os.getpid():
            forks.notice()
        return self._values

    def get(self, resource: Resource[T]) -> T:
        """Return a resource's value; open the resource if necessary. Raises `ResourceFailed`, and `ConfigError` for an
        ``async`` resource that is not open."""
        value = self._here().get(resource, _NONE)
        if value is not _NONE:
            return value  # type: ignore[no-any-return]  # stored by the key's type
        if resource.is_async:
            raise ConfigError(
                f"resource {resource.name!r} is async and not open: declare it as a parameter of an async task"
            )
        with self._lock:
            if resource not in self._values:
                needs = {name: self.get(other) for name, other in resource.needs.items()}
                with _naming(resource):
                    opened = resource._open(**needs)
                    if inspect.isawaitable(opened):
                        raise TypeError("its function is plain but returned an awaitable: make it `async def`")
                    if resource._managed:
                        self._values[resource] = opened.__enter__()
                        self._closers.append((resource, opened))
                    else:
                        self._values[resource] = opened
                LOG.info("resource %s is open", resource.name)
            return self._values[resource]  # type: ignore[no-any-return]  # as above

    async def get_async(self, resource: Resource[T]) -> T:
        """Return a resource's value as `get` does, for plain and ``async`` resources. On the event loop."""
        value = self._here().get(resource, _NONE)
        if value is not _NONE:
            return value  # type: ignore[no-any-return]  # as above
        if not resource.is_async:
            return self.get(resource)
        needs = {name: await self.get_async(other) for name, other in resource.needs.items()}
        loop = asyncio.get_running_loop()
        if self._async_lock is None or self._async_lock[0] is not loop:
            self._async_lock = (loop, asyncio.Lock())
        async with self._async_lock[1]:
            if resource not in self._values:
                with _naming(resource):
                    opened = resource._open(**needs)
                    if resource._managed:
                        self._values[resource] = await opened.__aenter__()
                        self._closers.append((resource, opened))
                    else:
                        self._values[resource] = await opened
                LOG.info("resource %s is open", resource.name)
        return self._values[resource]  # type: ignore[no-any-return]  # as above

    async def open(self, wanted: Iterable[Resource[Any]]) -> None:
        """Open resources, and the resources that these need, for one more worker. Raises `ResourceFailed`."""
        self._here()
        self._users += 1
        for resource in wanted:
            for each in _with_needs(resource):
                if each.is_async:
                    await self.get_async(each)
                else:  # opening may take long, and must not block the event loop
                    await asyncio.to_thread(self.get, each)

    async def close(self) -> None:
        """Close the open resources when the last worker of this process stops, in the reverse order of opening. Errors
        of any type are logged; only a cancellation of this call itself is raised."""
        if self._pid != os.getpid():
            return
        self._users -= 1
        if self._users > 0:
            return
        # Not in the loop's default threads: jobs may occupy all of them.
        threads = ThreadPoolExecutor(1, "jobledger-resources")
        try:
            while self._closers:
                await self._close(*self._closers.pop(), threads)
        finally:
            threads.shutdown(wait=False)
        self._forget()

    @staticmethod
    async def _close(resource: Resource[Any], manager: Any, threads: ThreadPoolExecutor) -> None:
        try:
            if resource.is_async:
                await manager.__aexit__(None, None, None)
            else:
                inside = contextvars.copy_context()
                # `_closed` returns its exception and does not raise it: an exception that raises another one when
                # asyncio inspects it would never arrive here.
                error = await asyncio.get_running_loop().run_in_executor(threads, inside.run, _closed, manager)
                if error is not None:
                    raise error
            LOG.info("resource %s is closed", resource.name)
        except BaseException as exc:  # logged below
            current = asyncio.current_task()
            if is_a(exc, asyncio.CancelledError) and current is not None and current.cancelling():
                raise
            LOG.exception("resource %s could not be closed", resource.name)


def _closed(manager: Any) -> BaseException | None:
    """Close a resource. Return the exception that closing raised, or None."""
    try:
        manager.__exit__(None, None, None)
    except BaseException as error:  # noqa: BLE001  # raised again by the caller
        return error
    return None


def _with_needs(resource: Resource[Any]) -> Iterator[Resource[Any]]:
    """Yield all resources that a resource needs, and then the resource itself."""
    for other in resource.needs.values():
        yield from _with_needs(other)
    yield resource


@contextlib.contextmanager
def _naming(resource: Resource[Any]) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit) as exc:
        raise ResourceFailed(f"resource {resource.name!r} could not be opened: {type_of(exc)}: {text_of(exc)}") from exc


class ResourceDecorator:
    """``@app.resource``: turns a function into a `Resource` of the value that the function returns or yields."""

    @overload
    def __call__(self, fn: Callable[..., AsyncIterator[T]], /) -> Resource[T]: ...

    @overload
    def __call__(self, fn: Callable[..., Iterator[T]], /) -> Resource[T]: ...

    @overload
    def __call__(self, fn: Callable[..., Awaitable[T]], /) -> Resource[T]: ...

    @overload
    def __call__(self, fn: Callable[..., T], /) -> Resource[T]: ...

    def __call__(self, fn: Callable[..., Any], /) -> Resource[Any]:
        """Declare a resource. Raises `ConfigError`."""
        return Resource(fn)
