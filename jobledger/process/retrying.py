"""Repeats a call that fails for a passing reason, such as a question to a broker or a database, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Stop(Protocol):
    """Ends the retries early; `threading.Event` is one."""

    def is_set(self) -> bool:
        """Return whether to stop."""

    def wait(self, timeout: float) -> bool:
        """Wait until `is_set` is true, at most ``timeout`` seconds, and return it."""


def retry_until(
    deadline: float | Callable[[], float],
    ask: Callable[[], T],
    errors: type[Exception] | tuple[type[Exception], ...],
    *,
    pause: float,
    pause_most: float | None = None,
    again: Callable[[Any], bool] = lambda error: True,
    stop: Stop | None = None,
    on_retry: Callable[[Any, float], object] = lambda error, seconds: None,
) -> T:
    """Return what ``ask()`` returns. If it raises one of ``errors``, call it again after a pause.

    The last call begins at ``deadline``, a time of `time.monotonic` in seconds, or earlier. If ``deadline`` is a
    function, it is called at the first error, and returns that time. ``pause``: seconds between two calls; with
    ``pause_most`` they double after each call, up to ``pause_most``. ``again(error)``: whether a call may succeed after
    this error; by default after each of ``errors``. ``stop``: if it is set, ``ask`` is not called again.
    ``on_retry(error, seconds)`` is called before each pause of that many seconds.

    Raises every other error of ``ask`` at once, and the error of the last call.
    """
    while True:
        try:
            return ask()
        except errors as error:
            if not again(error):
                raise
            if callable(deadline):
                deadline = deadline()
            left = deadline - time.monotonic()
            if left <= 0 or (stop is not None and stop.is_set()):
                raise
            seconds = min(pause, left)
            on_retry(error, seconds)
            if stop is None:
                time.sleep(seconds)  # looked up now: gevent may have replaced it
            elif stop.wait(seconds):
                raise
        if pause_most is not None:
            pause = min(pause_most, pause * 2)
