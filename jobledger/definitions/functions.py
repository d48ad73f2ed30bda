"""Checks which functions may be declared, and awaits an awaitable that a plain function returns. Everything except
`awaited` is pure.

Calling a generator function does not run its body, and neither does calling an ``async def`` whose coroutine is not
awaited. A task made of such a function would succeed without having done anything.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any

from jobledger.errors import ConfigError


def _on_a_loop_of_its_own(value: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


#: Awaits an awaitable that a plain function returned. The worker sets it in the threads and processes where jobs run.
AWAIT: ContextVar[Callable[[Awaitable[Any]], Any]] = ContextVar("jobledger_await", default=_on_a_loop_of_its_own)


def check_function(fn: Any, what: str = "@app.task") -> None:
    """Raise `ConfigError` for an object that is not a function, or a function whose body does not run when it is
    called."""
    problem = _no_function(fn)
    if problem is not None:
        raise ConfigError(f"{what}: {problem}")
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise ConfigError(
            f"{what}: {_named(fn)} is a generator: calling it would run none of its code. Collect the yielded values and "
            "return them, or submit a job for each"
        )


def check_plain(fn: Any, what: str) -> None:
    """Raise `ConfigError` if a call of ``fn`` would return a coroutine or a generator. Used for functions whose return
    value is needed."""
    if inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise ConfigError(f"{what}: {_named(fn)} is async or a generator, and must be a plain function")


def awaited(value: Any) -> Any:
    """Return the result of a plain function that returned ``value``: the awaited result if ``value`` is an awaitable,
    else ``value``. A decorator without ``async`` around a coroutine function returns an awaitable."""
    if value is None or not hasattr(type(value), "__await__"):
        return value
    return AWAIT.get()(value)


def _no_function(fn: Any) -> str | None:
    """Return why ``fn`` cannot be a task's function, and what to write instead; None if it can."""
    named = _named(fn)
    if isinstance(fn, type):
        return f"{named} is a class: write a function that creates an instance"
    if hasattr(fn, "submit") and hasattr(fn, "registry"):
        return f"{fn!r} is a task already: to run its function in another app, register the function: app.task(task.fn)"
    if isinstance(fn, functools.partial | functools.partialmethod):
        return f"{named} is a partial, which has no name and no annotations of its own: write a function that calls it"
    if isinstance(fn, staticmethod | classmethod):
        return f"{named} is a {type(fn).__name__}: declare a module-level function that calls it"
    if inspect.ismethod(fn):
        return (
            f"{named} is a method, and a worker does not have the object that it is bound to: write a function that gets "
            "the object, for example as a resource with Depends, and calls the method"
        )
    if not callable(fn):
        return f"{fn!r} is not a function"
    if inspect.isbuiltin(fn):
        return f"{named} is a builtin, which has no annotations: write a function that calls it"
    if not hasattr(fn, "__code__") and not inspect.isfunction(inspect.unwrap(fn)):
        return f"{fn!r} is a callable object: write a function that calls it"
    first = next(iter(inspect.signature(fn).parameters), "") if hasattr(fn, "__code__") else ""
    inside = getattr(fn, "__qualname__", "").rpartition(".")[0]
    if first in ("self", "cls") and inside and not inside.endswith("<locals>"):
        return (
            f"{named} is a method, and a job has no {first}: declare a module-level function that gets the object, for "
            "example as a resource with Depends, and calls the method"
        )
    return None


def _named(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return f"partial({_named(fn.func)}, …)"
    inner = getattr(fn, "__func__", fn)
    return str(getattr(inner, "__qualname__", None) or repr(fn))


def runs_inside(frame: FrameType | None, caller: CodeType, function: Callable[..., Any]) -> bool:
    """Return whether ``frame`` is inside a call of ``function`` made by ``caller``, not in ``caller``'s own code."""
    inner: FrameType | None = None
    while frame is not None and frame.f_code is not caller:
        inner, frame = frame, frame.f_back
    return frame is not None and inner is not None and inner.f_code is getattr(function, "__code__", None)
