"""Collects cyclic garbage according to the memory that the process uses.

Python starts a collection according to the number of objects created. The errors of a few hundred jobs are few objects,
but their frames may hold gigabytes. So this module compares the memory of the process with the memory after the last
collection, a few times a second, and collects garbage if the memory has grown enough.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable

from jobledger.consumers.isolation.resident_memory import resident_memory

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None

#: A collection is due when the memory has grown by `GROWN` bytes and by 1/`GROWN_SHARE` of the memory in use after the
#: last collection. The second condition limits the time for collections in a process that grows for a good reason.
GROWN, GROWN_SHARE = 64 << 20, 8
#: Bytes of growth after which a collection is due in an idle worker, where it delays no job.
GROWN_IDLE = 8 << 20
#: After a collection there is no other one for `PAUSE` times its duration. A collection blocks the event loop, and if
#: jobs allocate and free much memory, nearly every check finds growth. But after growth by `GROWN_MOST` bytes and by
#: 1/`GROWN_MOST_SHARE` of the memory in use, there is no pause, because bounding the memory is more important.
PAUSE = 9
GROWN_MOST, GROWN_MOST_SHARE = 256 << 20, 2


def due(in_use: int, after_last: int, idle: bool) -> bool:
    """Return whether a collection is due. ``in_use``: bytes now; ``after_last``: bytes after the last collection."""
    return in_use - after_last >= (GROWN_IDLE if idle else max(GROWN, after_last // GROWN_SHARE))


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    try:
        return resident_memory("self")
    except OSError:  # not Linux
        import psutil

        return int(psutil.Process().memory_info().rss)


def collect() -> None:
    """Free the objects that only cycles hold, and return free memory to the system if the C library can (glibc)."""
    gc.collect()
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


class Garbage:
    """Collects garbage when a collection is due. Call `look` in the thread of the event loop, because uvloop's handles
    may be freed only there."""

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
        """Collect garbage if a collection is due and the pause after the last one is over. After large growth, collect
        even during the pause."""
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
