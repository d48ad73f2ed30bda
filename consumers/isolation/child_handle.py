"""The worker's handle of one child process: the child's connection, its last output, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Protocol

from jobledger.consumers.isolation.protocol import ProgressMessage, Splitter, decode_child_message, outcome_of
from jobledger.consumers.isolation.resident_memory import resident_memory
from jobledger.consumers.state.outcome import MESSAGE_LIMIT, TRACEBACK_LIMIT, Outcome, printable
from jobledger.consumers.state.work import JobRun
from jobledger.schemas.events import ErrorInfo, JobProgressed

#: Number of the last bytes of standard error that are kept.
LAST_OUTPUT_BYTES = 4_000


class ChildReceiver(Protocol):
    """The pool to which a child reports. Both methods run on the event loop."""

    def outcome_reported(self, child: ChildHandle, outcome: Outcome) -> None:
        """Take the outcome of the child's job."""

    def lost(self, child: ChildHandle) -> None:
        """Handle the end of the child's connection: the child has exited, or is about to."""


class LastOutput:
    """Passes on the standard error of a process when it arrives, and keeps its last `LAST_OUTPUT_BYTES` bytes.

    The pipe is not read through a transport, because uvloop's transport of a pipe closes its descriptor twice. At the
    second time the descriptor's number may belong to another file, for example one of a job in another thread
    (github.com/MagicStack/uvloop/issues/763).
    """

    def __init__(self) -> None:
        self.kept = b""
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop

    def listen(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """Read ``fd`` until its end, then close it."""
        os.set_blocking(fd, False)
        self._loop, self._fd = loop, fd
        loop.add_reader(fd, self._read)

    def close(self) -> None:
        """Stop reading and close the descriptor. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)

    def forget(self, unread: bool) -> None:
        """Pass on up to 64 KiB that the process has written until now, and clear the kept output.

        ``unread``: whether there may be output to read. If not, the read is skipped, because each read lets other
        threads run first.
        """
        if unread and self._fd >= 0:
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
        self.kept = (self.kept + data)[-LAST_OUTPUT_BYTES:]
        with contextlib.suppress(Exception):  # a closed standard error of the worker must not fail the job
            sys.stderr.write(data.decode("utf-8", "replace"))
            sys.stderr.flush()


class ChildHandle(asyncio.Protocol):
    """The worker's handle of one child, and the asyncio protocol of the child's connection. On the event loop."""

    def __init__(self, receiver: ChildReceiver) -> None:
        self._receiver = receiver
        self._split = Splitter()
        self.last_output = LastOutput()
        self.transport: asyncio.Transport | None = None
        self.pid = 0
        self.pidfd = -1
        self.status: int | None = None  # as `waitpid` returns it, once the child has ended
        self.work: JobRun | None = None
        self.jobs = 0
        self.there = False  # both its pid and its connection are known
        self.unread = True  # its standard error may hold output of earlier jobs
        self.leaving = False  # the child is to end, after its job if it has one
        self.gone = False  # its connection has ended
        self.orphan = False  # killed because the fork server ended
        self.why: str | None = None  # why the pool killed the child: timeout, memory, stop
        self.timers: list[asyncio.TimerHandle] = []
        self.peak = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # of a socket, so it is a Transport

    def data_received(self, data: bytes) -> None:
        for body in self._split.feed(data):
            try:
                message = decode_child_message(body)
            except Exception as exc:  # noqa: BLE001  # for example if the job's code writes to the connection
                # The error that the worker records for the job shows this text.
                self.last_output.kept = f"what the process said to its worker cannot be read: {exc!r}".encode()
                self.kill()
                return
            if isinstance(message, ProgressMessage):
                progress = JobProgressed(message.sequence, message.done, message.total, message.message)
                if self.work is not None:
                    self.work.report(None, progress)
            else:
                self.unread = message.unread
                self._receiver.outcome_reported(self, outcome_of(message))

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.lost(self)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def signal(self, number: int) -> None:
        """Send a signal to the process, if the process still exists."""
        with contextlib.suppress(ProcessLookupError, OSError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.pid and self.status is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and the processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pid and self.status is None:
                os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def memory(self) -> int:
        """Return the resident memory in bytes; 0 where the system has no ``/proc``, or the process has ended."""
        try:
            return resident_memory(self.pid)
        except (OSError, IndexError, ValueError):
            return 0


def exit_status_text(status: int | None) -> str:
    """Describe a status of ``waitpid`` in words."""
    if status is None:
        return "it left no exit status"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def process_died(status: int | None, errors: bytes) -> ErrorInfo:
    """Build the error of a child that ended by itself, from its exit status and its last standard error."""
    text = errors.decode("utf-8", "replace").strip()
    summary = f"the process that ran it ended by itself: {exit_status_text(status)}"
    if text:
        summary += f"; its last output: {text.splitlines()[-1]}"
    return ErrorInfo("ProcessDied", printable(summary, MESSAGE_LIMIT), printable(text, TRACEBACK_LIMIT) or None)
