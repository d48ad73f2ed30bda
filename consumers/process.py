"""One child process as its worker sees it: its connection, its last words, how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Protocol

from jobledger.consumers.frames import Progress, Splitter, decode_said, outcome_of
from jobledger.consumers.outcome import MESSAGE_LIMIT, TRACEBACK_LIMIT, Outcome, printable
from jobledger.consumers.work import Work
from jobledger.schemas.events import ErrorInfo, JobProgressed

#: Characters of standard error that are kept as last words.
LAST_WORDS = 4_000

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Owner(Protocol):
    """Who is told of a child."""

    def said(self, child: Child, outcome: Outcome) -> None:
        """The code of its job came to an end."""

    def lost(self, child: Child) -> None:
        """Its connection ended: it has ended, or is about to."""


class Words:
    """A process's standard error: passed on as it comes, and the last of it kept.

    Read by hand, because uvloop's transport of a pipe closes its descriptor twice, the second time perhaps somebody
    else's: a job's file, in another thread (github.com/MagicStack/uvloop/issues/763).
    """

    def __init__(self) -> None:
        self.kept = b""
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop

    def listen(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """Read ``fd``, which is ours from now on, until its end."""
        os.set_blocking(fd, False)
        self._loop, self._fd = loop, fd
        loop.add_reader(fd, self._read)

    def close(self) -> None:
        """Read no more. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)

    def forget(self) -> None:
        """Pass on what has been written until now, and keep none of it."""
        if self._fd >= 0:
            self._read()
        self.kept = b""

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.kept = (self.kept + data)[-LAST_WORDS:]
        with contextlib.suppress(Exception):  # nobody reads ours: that is not the job's fault
            sys.stderr.write(data.decode("utf-8", "replace"))
            sys.stderr.flush()


class Child(asyncio.Protocol):
    """One child, as the worker sees it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._split = Splitter()
        self.words = Words()
        self.transport: asyncio.Transport | None = None
        self.pid = 0
        self.pidfd = -1
        self.status: int | None = None  # waitpid's, once it has ended
        self.work: Work | None = None
        self.jobs = 0
        self.there = False  # it lives, and it is connected
        self.leaving = False  # told to end, when its job is over
        self.gone = False
        self.orphan = False  # ended because the nursery did
        self.why: str | None = None  # why we killed it: timeout, memory, stop
        self.timers: list[asyncio.TimerHandle] = []
        self.peak = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a socket's

    def data_received(self, data: bytes) -> None:
        for body in self._split.feed(data):
            try:
                said = decode_said(body)
            except Exception as exc:  # noqa: BLE001  # a job's code that writes there, say
                # Its last words shall tell why it is not believed any more.
                self.words.kept = f"what the process said to its worker cannot be read: {exc!r}".encode()
                self.kill()
                return
            if isinstance(said, Progress):
                if self.work is not None:
                    self.work.report(None, JobProgressed(said.sequence, said.done, said.total, said.message))
            else:
                self._owner.said(self, outcome_of(said))

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def signal(self, number: int) -> None:
        """A signal to the process, if it is still there."""
        with contextlib.suppress(ProcessLookupError, OSError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.pid and self.status is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process, and those it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pid and self.status is None:
                os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def memory(self) -> int:
        """Bytes in use; 0 where the system does not tell."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * PAGE
        except (OSError, IndexError, ValueError):
            return 0


def end_of(status: int | None) -> str:
    """``waitpid``'s status in words."""
    if status is None:
        return "it left no exit status"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def last_words(status: int | None, errors: bytes) -> ErrorInfo:
    """How a child ended, and what it wrote to standard error last, as an error."""
    text = errors.decode("utf-8", "replace").strip()
    said = f"the process that ran it ended by itself: {end_of(status)}"
    if text:
        said += f"; it said last: {text.splitlines()[-1]}"
    return ErrorInfo("ProcessDied", printable(said, MESSAGE_LIMIT), printable(text, TRACEBACK_LIMIT) or None)
