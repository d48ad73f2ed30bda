"""Runs functions on the worker's event loop, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from jobledger.errors import JobledgerError
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")


class LoopCalls:
    """Runs functions on `loop`. An exception in such a function calls ``fail(error)``, which stops the worker, because
    otherwise a job might not run, and nobody would notice that.

    `loop` must be set before any other method is called.
    """

    __slots__ = ("fail", "loop")

    def __init__(self, fail: Callable[[JobledgerError], None]) -> None:
        self.fail = fail
        self.loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run ``function`` on the loop soon. Any thread. Does nothing if the loop is closed, because the worker has
        ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._guarded, function, args)

    def soon(self, function: Callable[..., object]) -> None:
        """Do the same as `call`, but only on the loop, where no system call is needed."""
        self.loop.call_soon(self._guarded, function, ())

    def later(self, seconds: float, function: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        """Run ``function`` after ``seconds`` seconds. On the loop."""
        return self.loop.call_later(seconds, self._guarded, function, args)

    def _guarded(self, function: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            function(*args)
        except JobledgerError as exc:
            self.fail(exc)
        except Exception as exc:
            LOG.exception("a function on the worker's event loop failed")
            self.fail(JobledgerError(f"a function on the worker's event loop failed: {exc!r}"))
