"""The three standard streams of a command: open, writable in any encoding, and with one error if they fail.

This module handles a stream that was closed before the start (`>&-`), is full, has a limited encoding, or has lost its
reader (`| head -1`). Commands print without regard to this.
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
    """Standard output can no longer be written. ``unread``: the reader is gone, as `head` is when it has enough.

    This is not a `BrokenPipeError` and does not have its number: some libraries end the process when they see those.
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
    """Standard error: text that cannot be written is dropped, as it could not be reported anywhere."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare(*, output: bool = True) -> None:
    """Make this process's standard streams usable: once, before anything else is opened.

    ``output`` False: only jobs print to standard output, and must not fail if it cannot be written; so such output is
    dropped.
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
    """Discard what is still to be written to standard output, so that the interpreter can flush it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
