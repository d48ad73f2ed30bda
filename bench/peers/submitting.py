"""The command line of every Python program that submits: ``one|bulk TASK COUNT [RATE]``. Such a program prints
``{"seconds": …, "jobs": …}``.

This module uses only the standard library, because it runs in the peers' own environments. `submit.mjs` does the same
in Node.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator


class Course:
    """The arguments of the jobs to submit. Iterate over this object, or over its `chunks`, and submit each job or chunk
    before the next one is taken.

    If there are several jobs or chunks, the clock starts once the first one is submitted, so that connecting is not
    counted. The clock stops when the iteration ends. With ``rate``, each job or chunk waits for its time, so that
    ``rate`` jobs a second are submitted.
    """

    def __init__(self, arguments: list[str] | None = None) -> None:
        given = sys.argv[1:] if arguments is None else arguments
        if len(given) not in (3, 4) or given[0] not in ("one", "bulk"):
            raise SystemExit("usage: one|bulk TASK COUNT [RATE]")
        self.bulk = given[0] == "bulk"
        self.task = given[1]
        self.count = int(given[2])
        self.rate = float(given[3]) if len(given) == 4 else 0.0

    def _argument(self, number: int) -> int:
        return time.time_ns() if self.task == "stamp" else number

    def __iter__(self) -> Iterator[int]:
        """Yield the jobs' arguments, one by one."""
        for chunk in self.chunks(1):
            yield chunk[0]

    def chunks(self, size: int) -> Iterator[list[int]]:
        """Yield the jobs' arguments, ``size`` at a time. Print the measured time at the end."""
        begin = clock = time.perf_counter()
        counted = self.count
        for first in range(0, self.count, size):
            if first == size:
                clock = time.perf_counter()
                counted -= size
            if self.rate:
                time.sleep(max(0.0, begin + first / self.rate - time.perf_counter()))
            yield [self._argument(n) for n in range(first, min(first + size, self.count))]
        print(json.dumps({"seconds": time.perf_counter() - clock, "jobs": counted}))
