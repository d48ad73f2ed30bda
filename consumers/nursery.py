"""The process that child processes are forked from: the app is imported once, and no thread runs.

A worker itself cannot fork: its threads, the Kafka client's among them, would be cut off in the middle of whatever they
hold. So it starts this process at first, over a socket asks it for children, and is told of their ends.

Worker → nursery: the byte ``F``, with two file descriptors: the child's connection and its standard error.
Nursery → worker: lines of JSON, ``{"ready": threads}``, ``{"born": pid}`` in the order asked for, ``{"died": pid,
"status": waitpid's}``. The end of the socket ends the nursery, and with it all children.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys

from jobledger.consumers.child import run_child
from jobledger.task_registry import Registry

#: Whether this process imports an app to fork children from it.
IMPORTING = False


class Nursery:
    """Serves one worker; see the module."""

    def __init__(self, registry: Registry, control: socket.socket) -> None:
        self._registry, self._control = registry, control
        self._children: set[int] = set()

    def serve(self) -> None:
        """Fork children until the worker is gone."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # Told to a whole group, these are for the worker, who lets us end. No SIG_IGN: that would outlive an exec.
            signal.signal(number, lambda number, frame: None)
        woken, wakes = socket.socketpair()
        for end in (woken, wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # pages that are shared stay so
        self._say({"ready": _threads()})
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is woken:
                        with contextlib.suppress(BlockingIOError):
                            woken.recv(4096)
                    elif not self._ask():
                        return
                self._reap()
        finally:
            for pid in self._children:
                _kill(pid)

    def _say(self, said: dict[str, int]) -> None:
        self._control.sendall(json.dumps(said).encode() + b"\n")

    def _ask(self) -> bool:
        """Take one request; False at the end of the socket."""
        wanted, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        if not wanted:
            return False
        connection, errors = descriptors
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_child(connection, errors)
        os.close(connection)
        os.close(errors)
        self._children.add(pid)
        self._say({"born": pid})
        return True

    def _become_child(self, connection: int, errors: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)  # what the job starts ends with it
        self._control.close()
        run_child(self._registry, socket.socket(fileno=connection), errors)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._children.discard(pid)
            _kill(pid, ended=True)  # what the job started, and what may hold the connection open
            self._say({"died": pid, "status": status})


def _kill(pid: int, *, ended: bool = False) -> None:
    """End a child and what it started; if it has ``ended``, only the latter: its number may be another's by now."""
    for kill in (os.killpg,) if ended else (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _threads() -> int:
    """Threads of this process."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        import threading

        return threading.active_count()
