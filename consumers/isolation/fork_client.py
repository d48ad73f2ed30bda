"""The worker's client of its fork server (`fork_server`): starts the fork server and restarts it.

This module knows children only as processes. `pool.ChildPool` decides which jobs run in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobledger.config import Settings
from jobledger.consumers.isolation.child_handle import ChildHandle, LastOutput
from jobledger.errors import ConfigError
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted

LOG = get_logger("jobledger.worker")

#: Seconds until a fork server that has ended is restarted: after the first end, and at most after further ends.
AGAIN_S, AGAIN_MOST_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class ForkCallbacks:
    """The callbacks of a `ForkClient`, all called on the event loop.

    ``there(child)``: the child runs and is connected; called once for each child. ``died(child)``: the child has ended
    and its ``status`` is set. ``gone(requested)``: the fork server has ended, and all its children with it; the
    children ``requested`` were not forked. ``again()``: the fork server was restarted. ``unusable(error)``: no child
    can be started; no callback follows.
    """

    there: Callable[[ChildHandle], None]
    died: Callable[[ChildHandle], None]
    gone: Callable[[list[ChildHandle]], None]
    again: Callable[[], None]
    unusable: Callable[[ConfigError], None]


class ForkClient:
    """Starts a fork server and asks it for children.

    ``target``: the app that the fork server imports, see `app_target.find_target`. All methods except `abandon` run on
    the event loop.
    """

    def __init__(self, target: str, settings: Settings, callbacks: ForkCallbacks) -> None:
        self._target, self._settings, self._callbacks = target, settings, callbacks
        self._loop: asyncio.AbstractEventLoop
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = self._closing = False
        self._again_s = AGAIN_S
        self._lines = b""
        self._requested: deque[ChildHandle] = deque()  # whose pids are not reported yet, the oldest first
        self._by_pid: dict[int, ChildHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Also the outputs of ended children, because processes that these children started may still write.
        self._outputs: weakref.WeakSet[LastOutput] = weakref.WeakSet()

    @property
    def running(self) -> bool:
        """Whether the fork server was started and has not ended."""
        return self._process is not None

    @property
    def listens(self) -> bool:
        """Whether the fork server takes requests for children and reports the children that have ended."""
        return self._control is not None

    def start(self) -> None:
        """Start the fork server. Raises `OSError` if the system allows no more processes or open files."""
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        rest = {
            "bootstrap": self._settings.bootstrap,
            "status_url": self._settings.status_url,
            "path": [entry or str(Path.cwd()) for entry in sys.path],
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobledger.cli.fork_server_program", self._target, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        # Sent on standard input, not as an argument, because a URL may hold a password, and every user of the machine
        # can list the arguments of processes.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(rest).encode())
        ours.setblocking(False)
        self._control, self._ready, self._lines = ours, False, b""
        self._loop.add_reader(ours, self._on_message)
        self._last_output = LastOutput()
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            self._last_output.listen(self._loop, os.dup(errors.fileno()))

    def fork(self, child: ChildHandle) -> None:
        """Ask the fork server to fork ``child``. `listens` must be true.

        Raises `OSError`, for example if no more files may be opened. Then nothing was requested.
        """
        assert self._control is not None
        with contextlib.ExitStack() as theirs_of, contextlib.ExitStack() as ours_of:
            ours, theirs = socket.socketpair()
            ours_of.callback(ours.close)
            theirs_of.callback(theirs.close)
            read, write = os.pipe()
            ours_of.callback(os.close, read)
            theirs_of.callback(os.close, write)
            socket.send_fds(self._control, [b"F"], [theirs.fileno(), write])
            ours_of.pop_all()
        # Only after the request was sent, because the fork server answers in the order of the requests.
        self._requested.append(child)
        ours.setblocking(False)
        child.last_output.listen(self._loop, read)
        self._outputs.add(child.last_output)
        task = self._loop.create_task(self._connect(child, ours))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, child: ChildHandle) -> None:
        """Do not call ``died`` for this child any more."""
        self._by_pid.pop(child.pid, None)

    def closing(self) -> None:
        """Expect the end of the fork server from now on, and cancel connections that are still being made."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()

    async def close(self, seconds: float) -> None:
        """End the fork server; kill it if it has not ended after ``seconds``. Then stop reading the standard error of
        all children."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        for output in self._outputs:
            output.close()

    def abandon(self) -> None:
        """Kill the fork server at once. For use after the event loop has ended."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def _hang_up(self) -> None:
        if self._control is not None:
            self._loop.remove_reader(self._control)
            self._control.close()
            self._control = None

    def _on_message(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._has_ended()
            return
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "born" in message:
                self._was_forked(message["born"])
            elif "died" in message:
                child = self._by_pid.pop(message["died"], None)
                if child is not None:
                    child.status = message["status"]
                    self._callbacks.died(child)
            else:
                self._ready, self._again_s = True, AGAIN_S
                if message["ready"] > 1:
                    LOG.warning(
                        "importing %s started %s; child processes are forked without them: start threads when a "
                        "job or a resource needs them",
                        self._target,
                        counted(message["ready"] - 1, "thread"),
                    )

    def _has_ended(self) -> None:
        """Handle and report the end of the fork server. Schedule a restart if the fork server had become ready.

        All children are treated as dead. On Linux the system kills the children when their parent ends.
        """
        self._hang_up()
        process, self._process = self._process, None
        assert process is not None
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._closing:
            return
        requested = list(self._requested)
        self._requested.clear()
        self._callbacks.gone(requested)
        code = process.returncode
        if not self._ready:
            self._loop.call_later(0.2, self._give_up, code)  # the last output may still arrive
            return
        LOG.error("the process from which children are forked ended with %s; it is restarted", code)
        self._loop.call_later(self._again_s, self._start_again)
        self._again_s = min(AGAIN_MOST_S, self._again_s * 2)

    def _give_up(self, code: int) -> None:
        output = self._last_output.kept.decode("utf-8", "replace").strip()
        self._callbacks.unusable(
            ConfigError(
                f"no child processes: importing {self._target} in the fork server failed with exit code {code}:\n{output}"
            )
        )

    def _start_again(self) -> None:
        if self._closing or self.running:
            return
        try:
            self.start()
        except OSError as exc:
            LOG.error("the process from which children are forked could not be started: %s; retrying", exc)
            self._loop.call_later(self._again_s, self._start_again)
            return
        self._callbacks.again()

    def _was_forked(self, pid: int) -> None:
        if not self._requested:
            return
        child = self._requested.popleft()
        child.pid = pid
        self._by_pid[pid] = child
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                child.pidfd = os.pidfd_open(pid)
        self._arrived(child)

    async def _connect(self, child: ChildHandle, ours: socket.socket) -> None:
        await self._loop.create_connection(lambda: child, sock=ours)
        self._arrived(child)

    def _arrived(self, child: ChildHandle) -> None:
        """Call ``there`` for the child, once, when both its pid and its connection are known."""
        if child.pid and child.transport is not None and not child.there:
            child.there = True
            self._callbacks.there(child)
