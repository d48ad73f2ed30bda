"""Objects that belong to one process: Kafka clients, pools of database connections, their locks, and how they are
closed.

A fork copies a process's memory, but not its threads. A Kafka client that is closed, flushed or merely freed in such a
copy waits forever for threads that do not exist there, and a copied database connection still belongs to the parent. So
this module creates every client and registers every pool. In a forked child the parent's clients are inert: closing
them does nothing, any other use raises `ConnectionUnusable`, and they are never freed. Pools start without connections,
and locks are free.

A thread of the parent's clients may hold a lock of the C library at the moment of the fork: see `resolver_lock`.

A fork that Python does not notice (uWSGI, a C extension) is detected when an object is used next: `notice`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar
from weakref import WeakSet

from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from jobledger.errors import ConnectionUnusable
from jobledger.process import greenlets, resolver_lock
from jobledger.process.logger import get_logger

if TYPE_CHECKING:
    from sqlalchemy import Engine

LOG = get_logger("jobledger.client")

#: Seconds for which a fork waits while another thread creates a client. librdkafka has internal locks, which would stay
#: locked in the child.
CREATING_S = 5.0
#: Seconds for which a fork waits while another thread queries the status table, and for which a new query waits for a
#: fork. SQLite has internal locks, too, and a query may last long.
QUIET_S = 1.0
#: Seconds between two looks while a fork and queries wait for each other.
_LOOK_S = 0.001
#: Seconds that sending the remaining records may take when the process ends.
EXIT_S = 5.0

K = TypeVar("K", Producer, Consumer, AdminClient)


class Owner(Protocol):
    """Holds objects that belong to one process."""

    def after_fork(self) -> None:
        """Forget the parent's objects; called in the child."""


class Closable(Protocol):
    """Must be closed when the process ends."""

    def at_exit(self, timeout: float) -> None:
        """Close it within ``timeout`` seconds."""


#: Number of forks between the process that imported this module and this process. Compared at the points where the
#: user's code may have forked and returned in the child.
depth = 0
#: Whether the process is ending and open connections have been closed. Connections opened afterwards must not start a
#: thread.
ending = False

_pid = os.getpid()
_clients: WeakSet[Any] = WeakSet()
_pools: WeakSet[Engine] = WeakSet()
_owners: WeakSet[Owner] = WeakSet()
_closables: dict[int, Closable] = {}
_sections: WeakSet[Alone] = WeakSet()
_creation_lock = greenlets.native_lock()  # native, because the thread that watches an outage creates clients, too
_held: dict[int, bool] = {}
_queries: set[object] = set()  # a token for each query that runs now
_forking: set[int] = set()  # the threads that are about to fork


# -- clients and pools ------------------------------------------------------------------------------------------------


def client(kind: type[K], conf: Mapping[str, Any]) -> K:
    """Create a Kafka client that is inert in a forked child and does not block other greenlets. Raises what the
    client's constructor raises, and `ConfigError` under eventlet."""
    own = (greenlets.GREEN if greenlets.patched() else _OWN)[kind]
    with _creation_lock:
        created = own(dict(conf))
    _clients.add(created)
    return created  # type: ignore[no-any-return]  # the table has a class for each kind


def pool(engine: Engine) -> Engine:
    """Register an engine, so that a forked child does not use the parent's connections."""
    _pools.add(engine)
    return engine


def keep(*objects: object) -> None:
    """Never free these objects and the objects that they hold in this process, not even when the interpreter exits."""
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


#: The methods of a parent's client that may be called in a child, for closing and cleaning up, with their results.
_QUIET: Mapping[str, object] = {"close": None, "flush": 0, "purge": None, "unassign": None, "unsubscribe": None}


def _inert(kind: type[Any]) -> type[Any]:
    def refused(self: object, *args: object, **more: object) -> NoReturn:
        raise ConnectionUnusable(
            f"this connection to Kafka was opened in another process, and this one (pid {os.getpid()}) is a fork of it: "
            "open a new connection after the fork"
        )

    def quiet(result: object) -> Callable[..., object]:
        return lambda self, *args, **more: result

    names = [name for name in dir(kind) if not name.startswith("_")]
    methods: dict[str, Any] = {name: quiet(_QUIET[name]) if name in _QUIET else refused for name in names}
    if hasattr(kind, "__len__"):
        methods["__len__"] = quiet(0)
    return type(f"Inert{kind.__name__}", (kind,), methods)


# The classes have the same layout, so that the class of an object can be changed to the inert class.
_OWN: dict[type[Any], type[Any]] = {k: type(k.__name__, (k,), {}) for k in (Producer, Consumer, AdminClient)}
_INERT = {own: _inert(kind) for owns in (_OWN, greenlets.GREEN) for kind, own in owns.items()}


# -- locks ----------------------------------------------------------------------------------------------------------


class Alone:
    """A section that a thread must not enter again while it is inside. Only a signal handler or a finalizer can try
    that."""

    def __init__(self) -> None:
        self._inside: set[int] = set()
        _sections.add(self)

    def busy(self) -> bool:
        """Return whether this thread is inside."""
        return threading.get_ident() in self._inside

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Enter the section; ``what`` describes it. Raises `ConnectionUnusable` if this thread is inside already."""
        me = threading.get_ident()
        if me in self._inside:
            raise ConnectionUnusable(
                f"a signal handler, or a finalizer, interrupted this thread while it was {what}, and called Jobledger "
                "again: nothing was done. Set a flag in the handler and call Jobledger outside the handler"
            )
        self._inside.add(me)
        try:
            yield
        finally:
            self._inside.discard(me)

    def after_fork(self) -> None:
        """Forget the other threads: they do not exist here, and their ids may be reused."""
        self._inside &= {threading.get_ident()}


class Lock(Alone):
    """A lock for objects that are opened once. In a forked child the lock is free. A thread that already holds the lock
    gets an error instead of a deadlock."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Hold the lock; ``what`` describes the reason. Raises `ConnectionUnusable` if this thread holds it already."""
        with self._lock, super().__call__(what):
            yield

    def after_fork(self) -> None:
        """Free the lock, unless the thread that forked holds it."""
        super().after_fork()
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


def inside() -> bool:
    """Return whether this thread is inside any `Alone` section: then a signal handler has interrupted the thread
    there."""
    try:
        return any(each.busy() for each in list(_sections))
    except RuntimeError:  # another thread creates a section at this moment
        return True


# -- forks ------------------------------------------------------------------------------------------------------------


def in_child(owner: Owner) -> None:
    """Call ``owner.after_fork`` in every forked child."""
    _owners.add(owner)


def notice() -> None:
    """Check whether this process is a fork that Python did not notice. If it is, treat the objects as in any child."""
    if os.getpid() != _pid:
        _in_child()


def begin_query() -> object:
    """Call this before a query takes its connection, and `end_query` with the returned token when the connection is
    back in its pool. A fork waits for queries that run, and new queries wait until the fork is done, so that the fork
    finds a moment without a query however many threads query. Both wait at most `QUIET_S` seconds."""
    token = object()
    deadline = time.monotonic() + QUIET_S
    while True:
        _queries.add(token)
        if not _forking or threading.get_ident() in _forking or time.monotonic() >= deadline:
            return token
        _queries.discard(token)
        time.sleep(_LOOK_S)


def end_query(token: object) -> None:
    """Say that the query with this token has ended. In a fork that began during the query this does nothing."""
    _queries.discard(token)


def _before() -> None:
    _held[threading.get_ident()] = _creation_lock.acquire(timeout=CREATING_S)
    _forking.add(threading.get_ident())
    deadline = time.monotonic() + QUIET_S
    while _queries and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    for engine in list(_pools):
        with contextlib.suppress(Exception):  # no error of a driver may stop the fork
            engine.dispose()  # a fork must not have even unused SQLite connections; idle ones are reopened


def _in_parent() -> None:
    _forking.discard(threading.get_ident())
    if _held.pop(threading.get_ident(), False):
        _creation_lock.release()


def _after_in_child() -> None:
    if _held.pop(threading.get_ident(), False):
        _creation_lock.release()
    if _clients and not resolver_lock.free():
        LOG.warning("names cannot be looked up in this fork (pid %d): it may not reach Kafka", os.getpid())
    _in_child()


def _in_child() -> None:
    global _creation_lock, _pid, depth
    _pid = os.getpid()
    depth += 1
    if _creation_lock.acquire(blocking=False):
        _creation_lock.release()
    else:
        _creation_lock = greenlets.native_lock()
    _forking.clear()
    _queries.clear()
    for inherited in list(_clients):
        keep(inherited)
        inherited.__class__ = _INERT[type(inherited)]
    _clients.clear()
    _closables.clear()
    for engine in list(_pools):
        keep(engine.pool)
        engine.dispose(close=False)
    for lock in list(_sections):
        lock.after_fork()
    for owner in list(_owners):
        owner.after_fork()


def left(error: BaseException | None) -> NoReturn:
    """End this process, a fork in which the user's code returned or raised ``error``. The fork must not continue as if
    it were the worker."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        code = 1
    try:
        if error is not None and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_after_in_child)


# -- the end of the process -------------------------------------------------------------------------------------------


def at_exit(closable: Closable) -> None:
    """Close this object when the process ends, unless it has been `closed`. A fork that ends does not close its
    parent's objects."""
    _closables[id(closable)] = closable


def closed(closable: Closable) -> None:
    """Forget this object, because it has been closed."""
    _closables.pop(id(closable), None)


def close_all(timeout: float) -> None:
    """Close all registered objects that are open, each within ``timeout`` seconds."""
    for closable in list(_closables.values()):
        try:
            closable.at_exit(timeout)
        except Exception:
            LOG.exception("a connection could not be closed at the end of the process")


def _exit() -> None:
    # Registered at import: handlers that were registered later run first, while all connections are open.
    global ending
    notice()
    ending = True
    close_all(EXIT_S)


atexit.register(_exit)
