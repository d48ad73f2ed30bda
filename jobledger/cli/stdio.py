"""The three standard streams of a command: open, writable in any encoding, and with one error if they fail.

This module handles a stream that was closed before the start (`>&-`), is full, has a limited encoding, or has lost its
reader (`| head -1`). Commands need not handle these cases.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO

#: How each descriptor is opened if it was closed before the start. Writing to a descriptor opened for reading fails like
#: writing to a closed one, so standard output reports it; text written to standard error is dropped.
_IN_PLACE = ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY))


class OutputLost(OSError):
    """Standard output can no longer be written. ``unread``: the reader has closed the pipe, as `head` does when it has
    read enough.

    This class is not a `BrokenPipeError` and does not have that error's number, because some libraries end the process
    when they see either.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.unread = cause.errno == errno.EPIPE


class _Out(io.TextIOWrapper):
    """Standard output: raises `OutputLost`."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as exc:
            raise OutputLost(exc) from exc

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as exc:
            raise OutputLost(exc) from exc


class _Dropping(io.TextIOWrapper):
    """A stream that drops text that cannot be written: standard error, because the failure could not be reported
    anywhere; and standard output, if only jobs print to it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare(*, output: bool = True) -> None:
    """Make this process's standard streams usable. Call this once, before anything else is opened.

    ``output`` False: only jobs print to standard output. Jobs must not fail because standard output cannot be written,
    so text that cannot be written is dropped.
    """
    for number, flags in _IN_PLACE:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the system uses the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # open as long as the process runs
    sys.stdout = _guarded(sys.stdout, 1, _Out if output else _Dropping)
    sys.stderr = _guarded(sys.stderr, 2, _Dropping)


def _guarded(stream: TextIO | None, number: int, kind: type[io.TextIOWrapper]) -> TextIO:
    if stream is None:  # closed before the start
        return kind(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), "utf-8", "backslashreplace")
    return kind(
        stream.buffer,
        stream.encoding,
        "backslashreplace",  # a character that the encoding lacks is shown as its number
        line_buffering=bool(stream.line_buffering),
        write_through=stream.write_through,  # type: ignore[attr-defined]
    )


def give_up() -> None:
    """Discard the text that is still buffered for standard output, so that the interpreter's flush at exit succeeds."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
