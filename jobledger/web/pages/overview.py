"""The contents of the overview: numbers of all queues, throughput, failure rate, workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobledger.client.commands import Standing
from jobledger.job import State
from jobledger.streams.status.store.protocol import QueueSummary
from jobledger.web.pages.rates import EVERY_S, Rates
from jobledger.web.pages.sources import Sources
from jobledger.web.pages.workers import WorkerRow, worker_rows

#: Number of measurements in the table below the chart, and of queues in the table of queues.
MEASURED, QUEUES_MOST = 12, 200


@dataclass(frozen=True)
class Part:
    """A part of a bar. ``x``, ``width``: percent."""

    state: str
    x: float
    width: float


@dataclass(frozen=True)
class QueueRow:
    """A queue with its numbers by state. ``paused``: author and reason of a pause."""

    queue: str
    numbers: Mapping[str, int]
    parts: Sequence[Part]
    oldest_ms: int | None
    paused: str | None = None


@dataclass(frozen=True)
class Overview:
    """The overview. ``later``: scheduled and retrying jobs. ``failure``: the share of failed jobs among those
    that succeeded or failed in the last minute; ``failure_all``: among all jobs that ended; None: no job ended."""

    total: int
    numbers: Mapping[str, int]
    queues: Sequence[QueueRow]
    oldest_ms: int | None
    oldest_queue: str | None
    lately: Mapping[str, float] | None
    failure: float | None
    failure_all: float | None
    measured: Sequence[Sequence[float]]
    workers: Sequence[WorkerRow]
    tasks: Sequence[str] = field(default_factory=list)
    every: float = EVERY_S

    @property
    def depth(self) -> int:
        """The number of queued jobs."""
        return self.numbers["queued"]

    @property
    def later(self) -> int:
        """The number of jobs that wait for their due time."""
        return self.numbers["scheduled"] + self.numbers["retrying"]

    @property
    def running(self) -> int:
        """The number of running jobs."""
        return self.numbers["running"]

    @property
    def failed(self) -> int:
        """The number of failed jobs."""
        return self.numbers["failed"]

    @property
    def task(self) -> str | None:
        """A task of the app, for an example."""
        return self.tasks[0] if self.tasks else None

    @property
    def slots(self) -> int:
        """The number of slots of all workers."""
        return sum(worker.slots for worker in self.workers)

    @property
    def slots_used(self) -> int:
        """The number of jobs that the workers run."""
        return sum(worker.running for worker in self.workers)

    @property
    def silent(self) -> int:
        """The number of workers that are silent."""
        return sum(worker.silent for worker in self.workers)


def overview(sources: Sources, rates: Rates) -> Overview:
    """Return the overview, from two queries of the status table. Raises `StoreError`."""
    rows = [queue_row(each) for each in sources.queues()]
    numbers = {state.value: sum(row.numbers[state.value] for row in rows) for state in State}
    oldest = min((row for row in rows if row.oldest_ms is not None), key=lambda row: row.oldest_ms or 0, default=None)
    lately = rates.lately()
    ended = sum(numbers[state] for state in ("succeeded", "failed", "cancelled", "expired"))
    just = None if lately is None else lately["succeeded"] + lately["failed"]
    series = rates.series()
    return Overview(
        total=sum(numbers.values()),
        numbers=numbers,
        queues=rows[:QUEUES_MOST],
        oldest_ms=None if oldest is None else oldest.oldest_ms,
        oldest_queue=None if oldest is None else oldest.queue,
        lately=lately,
        failure=lately["failed"] / just if lately is not None and just else None,
        failure_all=numbers["failed"] / ended if ended else None,
        measured=list(zip(*series, strict=True))[-MEASURED:][::-1],
        workers=worker_rows(sources.workers()),
        tasks=sorted(sources.app.tasks),
    )


def queue_row(summary: QueueSummary, standing: Standing | None = None) -> QueueRow:
    """Return a queue's row. ``standing``: the commands in force on the queue."""
    numbers = {state.value: int(getattr(summary, "depth" if state is State.QUEUED else state.value)) for state in State}
    return QueueRow(
        summary.queue,
        numbers,
        parts(numbers),
        summary.oldest_ms,
        None if standing is None else standing.paused,
    )


def parts(numbers: Mapping[str, int]) -> list[Part]:
    """Return the parts of a bar with these numbers, from the left."""
    total = sum(numbers.values())
    found: list[Part] = []
    x = 0.0
    for state, number in numbers.items():
        if number:
            width = 100 * number / total
            found.append(Part(state, round(x, 3), round(width, 3)))
            x += width
    return found


def chart(rates: Rates) -> list[list[Any]]:
    """Return the series of the chart: times in seconds since the epoch, and the jobs per second of each line."""
    return [list(column) for column in rates.series()]
