"""The fork server: the process from which a worker's child processes are forked. The fork server imports the app once
and starts no thread of its own.

A worker cannot fork itself: its threads, including those of the Kafka client, do not exist in the new process, and
locks that these threads held stay locked there. So a worker starts the fork server and asks it for children over a
socket, and the fork server reports when a child has ended.

Worker → fork server: the byte ``F`` with two file descriptors, for the child's connection and its standard error.
Fork server → worker: lines of JSON. ``{"ready": threads}`` once; ``{"born": pid}`` in the order of the requests;
``{"died": pid, "status": status}`` with the status of ``waitpid``. When the socket is closed at the worker's end, the
fork server kills its children and exits.
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

from jobledger.consumers.isolation.child_main import run_child
from jobledger.definitions.task_registry import TaskRegistry

#: Whether this process is a fork server that imports an app.
IMPORTING = False


class ForkServer:
    """Forks and reaps the children of one worker; see the module's docstring."""

    def __init__(self, registry: TaskRegistry, control: socket.socket) -> None:
        self._registry, self._control = registry, control
        self._children: set[int] = set()

    def serve(self) -> None:
        """Fork children until the worker closes the socket. In the main thread, because this sets signal handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # These signals may reach a whole process group, but they are meant for the worker, which ends this process
            # by closing the socket. Not SIG_IGN, because a program that a job starts would inherit that.
            signal.signal(number, lambda number, frame: None)
        woken, wakes = socket.socketpair()
        for end in (woken, wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # the collector then ignores these objects, so children share their pages
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
                    elif not self._answer_request():
                        return
                self._reap()
        finally:
            for pid in self._children:
                _kill(pid)

    def _say(self, message: dict[str, int]) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")

    def _answer_request(self) -> bool:
        """Handle one request. Return False if the worker has closed the socket."""
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
            os.setpgid(0, 0)  # so that processes that a job starts are killed together with the child
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
            _kill(pid, ended=True)  # processes that the child started, which may hold its connection open
            self._say({"died": pid, "status": status})


def _kill(pid: int, *, ended: bool = False) -> None:
    """Kill a child and the processes that the child started. If the child has ``ended``, kill only these processes,
    because the child's pid may be reused."""
    for kill in (os.killpg,) if ended else (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _threads() -> int:
    """Return the number of threads of this process."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        import threading

        return threading.active_count()
