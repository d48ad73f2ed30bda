"""The command line of every program that submits, in Python: ``one|bulk TASK COUNT [RATE]``; prints ``{"seconds": …}``.

The standard library alone, because this runs in the peers' own environments. `submit.mjs` does the same in Node.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator


class Course:
    """What to submit: iterate over it, or over its `chunks`, and submit each before the next is taken.

    The clock starts once the first job, or chunk if there are several, is submitted, so connecting is not counted, and
    stops when no further one is asked for. With ``rate`` a second, each waits for its time.
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
        """The jobs' arguments, one by one."""
        for chunk in self.chunks(1):
            yield chunk[0]

    def chunks(self, size: int) -> Iterator[list[int]]:
        """The jobs' arguments, ``size`` at a time."""
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
