"""The three standard streams of a command: there, writable in any encoding, and with one error when they fail.

Owns what is done where a stream was closed before the start (`>&-`), is full, has few characters, or has lost its reader
(`| head -1`). Commands print as if none of this could happen.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO

#: How each descriptor is opened if it was closed before the start. Writing to one opened for reading fails as writing
#: to a closed one does, so standard output reports it; what is said on standard error has nobody to reach.
_IN_PLACE = ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY))


class OutputLost(OSError):
    """Standard output cannot be written any more. ``unread``: the reader has gone, as `head` does when it has enough.

    No `BrokenPipeError`, and without its number: libraries that see those end the process in ways of their own.
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
    """Standard error: what cannot be written there is dropped, as nobody can be told."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare(*, output: bool = True) -> None:
    """Make this process's standard streams usable: once, before anything else is opened.

    ``output`` False: standard output is no part of what this process is for, only jobs print there, whose code must not
    fail for it; so what cannot be written is dropped.
    """
    for number, flags in _IN_PLACE:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for the process's life
    sys.stdout = _guarded(sys.stdout, 1, _Out if output else _Dropping)
    sys.stderr = _guarded(sys.stderr, 2, _Dropping)


def _guarded(stream: TextIO | None, number: int, kind: type[io.TextIOWrapper]) -> TextIO:
    if stream is None:  # it was closed
        return kind(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), "utf-8", "backslashreplace")
    return kind(
        stream.buffer,
        stream.encoding,
        "backslashreplace",  # a character that the encoding lacks is shown as its number
        line_buffering=bool(stream.line_buffering),
        write_through=stream.write_through,  # type: ignore[attr-defined]
    )


def give_up() -> None:
    """Let what is still to be written to standard output go nowhere, so that the interpreter's end can flush it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
