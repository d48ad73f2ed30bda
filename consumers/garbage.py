"""Collects garbage that holds itself in cycles, by the memory it takes.

Python looks for cycles by the number of objects that were made. The errors of a few hundred jobs are few objects, and their
frames may hold gigabytes. So the memory of the process is looked at a few times a second: when it has grown since the last
collection, there is another.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None

#: Bytes by which a process grows before garbage is collected; and its share of what is in use, so that a process that
#: rightly grows is not busy with it.
GROWN, GROWN_SHARE = 64 << 20, 8
#: The same while no job begins or ends: nobody is held up then.
GROWN_IDLE = 8 << 20
#: After a collection there is none for so many times as long as it took: the event loop waits for it, and where jobs take
#: and free much memory, nearly every look would find growth. Growth by so many bytes, or such a share of what is in use, does
#: not wait: memory is bounded before anything else.
PAUSE = 9
GROWN_MOST, GROWN_MOST_SHARE = 256 << 20, 2


def due(in_use: int, after_last: int, idle: bool) -> bool:
    """Whether to collect: ``in_use`` bytes now, ``after_last`` after the last collection."""
    return in_use - after_last >= (GROWN_IDLE if idle else max(GROWN, after_last // GROWN_SHARE))


def resident() -> int:
    """Bytes of memory that this process has in use."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:  # no Linux
        import psutil

        return int(psutil.Process().memory_info().rss)


def collect() -> None:
    """Free what cycles hold, and give free memory back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


class Garbage:
    """Collects when it is due. Where uvloop runs, to be looked at on its thread: its handles may be freed nowhere else."""

    def __init__(
        self,
        in_use: Callable[[], int] = resident,
        collect: Callable[[], object] = collect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_use, self._collect, self._clock = in_use, collect, clock
        self._after_last, self._not_before = in_use(), 0.0
        self.collections = 0

    def look(self, *, idle: bool) -> None:
        """Collect if the process has grown enough since the last collection, and that is long enough ago; or has grown much."""
        now = self._in_use()
        if due(now, self._after_last, idle):
            began = self._clock()
            if began < self._not_before and now - self._after_last < max(
                GROWN_MOST, self._after_last // GROWN_MOST_SHARE
            ):
                return
            self._collect()
            ended = self._clock()
            self._not_before = ended + PAUSE * (ended - began)
            self.collections += 1
            self._after_last = self._in_use()
        elif now < self._after_last:
            self._after_last = now
