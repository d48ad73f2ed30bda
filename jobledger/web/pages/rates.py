"""Throughput, measured by this process: differences between counters of the status table, which a thread reads while
somebody looks at the overview."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jobledger.errors import JobledgerError

#: Seconds between two reads, number of reads that are kept (an hour), and seconds from the last request for the overview
#: to the end of the thread.
EVERY_S, KEPT, IDLE_S = 5.0, 720, 600.0

#: The series of the chart.
SERIES = ("submitted", "succeeded", "failed")


@dataclass(frozen=True)
class Sample:
    """One read of the counters. ``at``: seconds since the epoch; ``total``: all jobs of the table."""

    at: float
    total: int
    succeeded: int
    failed: int


class Rates:
    """Reads the counters every `EVERY_S` seconds, and keeps the last `KEPT` reads. ``read``: returns the number of jobs
    in each state; if it raises a `JobledgerError`, this read is left out."""

    def __init__(self, read: Callable[[], Mapping[str, int]], clock: Callable[[], float] = time.time) -> None:
        self._read, self._clock = read, clock
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._looked = 0.0
        self._closed = threading.Event()

    def look(self) -> None:
        """Keep reading for the next `IDLE_S` seconds. Does nothing after `close`."""
        with self._lock:
            self._looked = self._clock()
            if self._closed.is_set():
                return
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(target=self._run, name="jobledger-rates", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                if self._clock() - self._looked > IDLE_S:
                    self._thread = None
                    return
            self.sample()
            self._closed.wait(EVERY_S)

    def sample(self) -> None:
        """Read the counters once."""
        try:
            numbers = self._read()
        except JobledgerError:
            return
        self._samples.append(
            Sample(self._clock(), sum(numbers.values()), numbers.get("succeeded", 0), numbers.get("failed", 0))
        )

    def series(self) -> list[list[float]]:
        """Return the times (seconds since the epoch) and, for each of `SERIES`, the jobs per second before each."""
        columns: list[list[float]] = [[], [], [], []]
        for before, after in _measured(list(self._samples)):
            rates = [number / (after.at - before.at) for number in _numbers(before, after)]
            for column, value in zip(columns, (after.at, *rates), strict=True):
                column.append(round(value, 3))
        return columns

    def lately(self, seconds: float = 60.0) -> Mapping[str, float] | None:
        """Return the jobs per second of each of `SERIES` over the last ``seconds``; None: not measured yet."""
        samples = [each for each in self._samples if each.at >= self._clock() - seconds - EVERY_S]
        pairs = _measured(samples)
        if not pairs:
            return None
        span = sum(after.at - before.at for before, after in pairs)
        numbers = [sum(some) for some in zip(*(_numbers(*pair) for pair in pairs), strict=True)]
        return {name: number / span for name, number in zip(SERIES, numbers, strict=True)}


def _measured(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return the pairs of successive reads that say something: when rows of ended jobs were removed between two reads
    (`jobledger.table_retention`), their differences do not tell how many jobs ended."""
    return [
        (before, after)
        for before, after in pairwise(samples)
        if after.at > before.at and after.total >= before.total and after.succeeded >= before.succeeded
    ]


def _numbers(before: Sample, after: Sample) -> tuple[int, int, int]:
    """Return how many jobs were submitted, succeeded and failed between two reads. A redrive reduces the
    number of failed jobs; a decrease counts as 0."""
    return after.total - before.total, after.succeeded - before.succeeded, max(0, after.failed - before.failed)
