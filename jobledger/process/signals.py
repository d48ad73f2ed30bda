"""Signal handlers that forks of the process do not keep."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection
from types import FrameType

from jobledger.process import forks


class SignalHandlers:
    """Calls ``handle(number, frame)`` for each of these signals while this context is entered, in this process only.

    In a process that the app's code forks, the signals get their default effect: they end the process. A handler that
    ends the forked process would not be enough. If a signal arrives after Python's last check for signals and before a
    system call that waits, Python calls the handler only after this system call.
    """

    def __init__(self, numbers: Collection[int], handle: Callable[[int, FrameType | None], object]) -> None:
        self._handle, self._pid = handle, os.getpid()
        self._before = {number: signal.getsignal(number) for number in numbers}

    def __enter__(self) -> None:
        """Set the handlers. Raises `ValueError` outside the main thread."""
        forks.in_child(self)
        for number in self._before:
            signal.signal(number, self._received)

    def __exit__(self, *error: object) -> None:
        self.restore(*self._before)

    def restore(self, *numbers: int) -> None:
        """Handle these signals as before."""
        for number in numbers:
            signal.signal(number, self._before[number])

    def after_fork(self) -> None:
        """Give the signals their default effect, unless other handlers have been set since."""
        with contextlib.suppress(ValueError):  # in a thread of a fork that Python did not notice, no handler can be set
            for number in self._before:
                if signal.getsignal(number) == self._received:
                    signal.signal(number, signal.SIG_DFL)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a fork that Python did not notice, or where `after_fork` has not run yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._handle(number, frame)
