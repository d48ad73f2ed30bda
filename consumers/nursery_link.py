"""A worker's end of its nursery (`nursery`, which children are forked from): started, heard, and started again when it died.

It knows children as processes; what runs in them is `children.Children`'s.
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
from jobledger.consumers.process import Child, Words
from jobledger.errors import ConfigError
from jobledger.logger import get_logger

LOG = get_logger("jobledger.worker")

#: Seconds until a nursery that died is started anew, and the longest such wait.
AGAIN_S, AGAIN_MOST_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Told:
    """Whom a nursery tells, always on the loop. ``there(child)``: it lives and is connected; once for each. ``died(child)``:
    its ``status`` is known. ``gone(unborn)``: the nursery has ended, and with it every child; these were asked for in vain.
    ``again()``: it has been started again. ``unusable(error)``: there can be no children; after that it is told nothing."""

    there: Callable[[Child], None]
    died: Callable[[Child], None]
    gone: Callable[[list[Child]], None]
    again: Callable[[], None]
    unusable: Callable[[ConfigError], None]


class NurseryLink:
    """``target``: what it imports, see `target.find_target`. Everything but `abandon` belongs to the loop."""

    def __init__(self, target: str, settings: Settings, tell: Told) -> None:
        self._target, self._settings, self._tell = target, settings, tell
        self._loop: asyncio.AbstractEventLoop
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = self._closing = False
        self._again_s = AGAIN_S
        self._lines = b""
        self._born: deque[Child] = deque()  # asked for, the oldest first
        self._by_pid: dict[int, Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard: weakref.WeakSet[Words] = weakref.WeakSet()  # also what a child's own children write

    @property
    def running(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._process is not None

    @property
    def listens(self) -> bool:
        """Whether it can be asked for children, and tells of their ends."""
        return self._control is not None

    @property
    def expected(self) -> int:
        """Children asked for that are not there yet."""
        return len(self._born)

    def start(self) -> None:
        """Start it. Errors: `OSError`, if the system has no process or no file left."""
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        rest = {
            "bootstrap": self._settings.bootstrap,
            "status_url": self._settings.status_url,
            "path": [entry or str(Path.cwd()) for entry in sys.path],
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobledger.cli.nursery", self._target, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        # Not as an argument: a URL may hold a password, and arguments are seen by all who list the machine's processes.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as told:
            told.write(json.dumps(rest).encode())
        ours.setblocking(False)
        self._control, self._ready, self._lines = ours, False, b""
        self._loop.add_reader(ours, self._told)
        self._words = Words()
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            self._words.listen(self._loop, os.dup(errors.fileno()))

    def fork(self, child: Child) -> None:
        """Ask for this one; it `listens`. Errors: `OSError`, among others if no more files may be opened; then nothing
        has been asked for."""
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
        # Only now: children are told of in the order in which they were asked for.
        self._born.append(child)
        ours.setblocking(False)
        child.words.listen(self._loop, read)
        self._heard.add(child.words)
        task = self._loop.create_task(self._connect(child, ours))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, child: Child) -> None:
        """Nothing more is told of it."""
        self._by_pid.pop(child.pid, None)

    def closing(self) -> None:
        """Its end is meant from now on: what has not connected never will."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()

    async def close(self, seconds: float) -> None:
        """End it, after ``seconds`` by force, and read no more of what children, and what they started, still write."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        for words in self._heard:
            words.close()

    def abandon(self) -> None:
        """End it at once, without the loop: that has ended."""
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

    def _told(self) -> None:
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
            told = json.loads(line)
            if "born" in told:
                self._is_born(told["born"])
            elif "died" in told:
                child = self._by_pid.pop(told["died"], None)
                if child is not None:
                    child.status = told["status"]
                    self._tell.died(child)
            else:
                self._ready, self._again_s = True, AGAIN_S
                if told["ready"] > 1:
                    LOG.warning(
                        "importing %s started %d threads; child processes are forked without them: start threads when a "
                        "job or a resource needs them",
                        self._target,
                        told["ready"] - 1,
                    )

    def _has_ended(self) -> None:
        """With it died all children: they are its children, and the system sees to it."""
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
        unborn = list(self._born)
        self._born.clear()
        self._tell.gone(unborn)
        code = process.returncode
        if not self._ready:
            self._loop.call_later(0.2, self._give_up, code)  # its last words may still be on their way
            return
        LOG.error("the process from which children are forked ended with %s; it is restarted", code)
        self._loop.call_later(self._again_s, self._start_again)
        self._again_s = min(AGAIN_MOST_S, self._again_s * 2)

    def _give_up(self, code: int) -> None:
        words = self._words.kept.decode("utf-8", "replace").strip()
        self._tell.unusable(
            ConfigError(f"no child processes: importing {self._target} in one failed with exit code {code}:\n{words}")
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
        self._tell.again()

    def _is_born(self, pid: int) -> None:
        if not self._born:
            return
        child = self._born.popleft()
        child.pid = pid
        self._by_pid[pid] = child
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                child.pidfd = os.pidfd_open(pid)
        self._arrived(child)

    async def _connect(self, child: Child, ours: socket.socket) -> None:
        await self._loop.create_connection(lambda: child, sock=ours)
        self._arrived(child)

    def _arrived(self, child: Child) -> None:
        """Its pid or its connection came; with the second of the two it is there, once."""
        if child.pid and child.transport is not None and not child.there:
            child.there = True
            self._tell.there(child)
