"""Support for gevent. After gevent's monkey patches threads are greenlets, and a call into librdkafka would block all
of them.

So the code that serves Kafka clients runs in native threads, and blocking calls run in gevent's pool of native threads
while other greenlets run. This module never imports gevent; it uses gevent only if the process has patched itself with
gevent. eventlet has no such pool, so eventlet is refused. A worker under gevent is refused as well, because a worker
needs many native threads.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from jobledger.errors import ConfigError

T = TypeVar("T")

#: Seconds between two checks of a future that a native thread completes.
LOOK_S = 0.005


class Flag(Protocol):
    """The object that `event` returns."""

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Joinable(Protocol):
    """The object that `start_thread` returns."""

    def join(self, timeout: float) -> None: ...


def patched() -> bool:
    """Return whether threads are gevent's greenlets. Raises `ConfigError` if they are eventlet's."""
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        raise ConfigError(
            "eventlet has patched this process (eventlet.monkey_patch()): all of its green threads would be blocked while Jobledger's "
            "client waits for Kafka. Use gevent, threads or asyncio, or leave threads unpatched: "
            "eventlet.monkey_patch(thread=False)"
        )
    return _green_threads()


def _green_threads() -> bool:
    gevent = sys.modules.get("gevent.monkey")
    return gevent is not None and bool(gevent.is_module_patched("threading"))


def refuse(what: str) -> None:
    """Raise `ConfigError` if ``what`` would run in a process whose threads are greenlets."""
    if patched():
        raise ConfigError(
            f"gevent has patched this process (gevent.monkey.patch_all()), and {what} needs native threads: do not patch "
            "in the module that contains the app, but in the one that starts the server"
        )


# -- threads and events -----------------------------------------------------------------------------------------------


def start_thread(target: Callable[[], None], name: str) -> Joinable:
    """Start a daemon thread that is always a native thread. Raises `RuntimeError` if no thread can be started."""
    if patched():
        return _Native(target)
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


class _Native:
    def __init__(self, target: Callable[[], None]) -> None:
        self._target, self._ended = target, False
        _original("_thread", "start_new_thread")(self._run, ())

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._ended = True

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._ended and time.monotonic() < deadline:
            time.sleep(0.01)


def native_lock() -> Any:
    """Return a reentrant lock between native threads. Code that holds the lock must not wait for a greenlet."""
    return _original("_thread", "RLock")() if _green_threads() else threading.RLock()


def native_sleep(seconds: float) -> None:
    """Sleep in a thread that `start_thread` has started."""
    (_original("time", "sleep") if patched() else time.sleep)(seconds)


def event() -> Callable[[], Flag]:
    """Return the class of events that a native thread sets and for which the caller's threads or greenlets wait."""
    return _Event if patched() else threading.Event


class _Event:
    """An event that a native thread sets and for which a greenlet waits."""

    def __init__(self) -> None:
        gevent = sys.modules["gevent"]
        self._set = False
        self._event = sys.modules["gevent.event"].Event()
        self._hub = gevent.get_hub()
        if self._hub not in _bells:
            _bells[self._hub] = _Bell(self._hub)
        self._bell = _bells[self._hub]

    def set(self) -> None:
        self._set = True
        self._bell.ring(self._event)

    def clear(self) -> None:
        self._event.clear()
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        if not self._set:
            self._event.wait(timeout)
        return self._set


class _Bell:
    """Wakes the greenlets of one hub, from any thread."""

    def __init__(self, hub: Any) -> None:
        self._events: deque[Any] = deque()
        self._watcher = hub.loop.async_(ref=False)
        self._watcher.start(self._drain)

    def ring(self, event: Any) -> None:
        self._events.append(event)
        with contextlib.suppress(ValueError):  # the hub has ended meanwhile: no greenlet waits
            self._watcher.send()

    def _drain(self) -> None:
        while self._events:
            self._events.popleft().set()


_bells: WeakKeyDictionary[Any, _Bell] = WeakKeyDictionary()


# -- futures ----------------------------------------------------------------------------------------------------------


def finished(future: Future[Any]) -> bool:
    """Return whether a future that a native thread completes is done. The answers of an `AdminClient` are such futures.

    Under gevent the future's lock works between greenlets. If a greenlet waits for this lock while the native thread
    holds it, and the process has nothing else to do, the greenlet fails with ``LoopExit``. So this function does not
    take the lock. That is safe because `Future` stores the result before it changes its state.
    """
    return future._state == "FINISHED" if _green_threads() else future.done()


def outcome(future: Future[T], timeout: float) -> T:
    """Return the result of a future that a native thread completes. Raises the future's exception, or `TimeoutError`
    after ``timeout`` seconds."""
    if not _green_threads():
        return future.result(timeout)
    deadline = time.monotonic() + timeout
    while not finished(future):
        if time.monotonic() >= deadline:
            raise TimeoutError
        (native_sleep if _hub() is None else time.sleep)(LOOK_S)
    error: BaseException | None = future._exception
    if error is not None:
        raise error
    result: T = future._result  # type: ignore[assignment]  # there is a result if there is no exception
    return result


# -- clients ----------------------------------------------------------------------------------------------------------

#: Methods of a client that may wait for a broker, or run Jobledger's callbacks.
_BLOCKING = (
    "close", "commit", "committed", "consume", "flush", "get_watermark_offsets", "list_topics", "offsets_for_times", "poll",
)  # fmt: skip


def _green(kind: type[Any]) -> type[Any]:
    def in_pool(name: str) -> Callable[..., Any]:
        blocking = getattr(kind, name)

        def call(self: Any, *args: Any, **more: Any) -> Any:
            return _in_native_thread(blocking, self, *args, **more)

        return call

    return type(kind.__name__, (kind,), {name: in_pool(name) for name in _BLOCKING if hasattr(kind, name)})


#: For each client class the subclass whose calls do not block the other greenlets.
GREEN: dict[type[Any], type[Any]] = {kind: _green(kind) for kind in (Producer, Consumer, AdminClient)}


def _in_native_thread(blocking: Callable[..., Any], *args: Any, **more: Any) -> Any:
    hub = _hub()
    if hub is None:  # this thread is a native thread
        return blocking(*args, **more)
    result, error = hub.threadpool.apply(_caught, (blocking, args, more))
    if error is not None:
        raise error
    return result


def _hub() -> Any:
    """Return this thread's hub of greenlets; None if the thread has no greenlets."""
    return sys.modules["gevent._hub_local"].get_hub_if_exists()


def _caught(blocking: Callable[..., Any], args: Any, more: Any) -> tuple[Any, BaseException | None]:
    """Return the result or the exception of a call. The exception is not raised here, because gevent prints every
    exception that is raised in its pool."""
    try:
        return blocking(*args, **more), None
    except BaseException as error:  # noqa: BLE001  # raised again by the caller
        return None, error


def _original(module: str, name: str) -> Any:
    return sys.modules["gevent.monkey"].get_original(module, name)
