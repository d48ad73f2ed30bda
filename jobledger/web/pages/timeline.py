"""A job's timeline: its events as bars on a common time axis. Pure.

A bar begins with one fact and ends with the next: the job waited until the start, ran until the end of the attempt, and
backed off until the next release. Times are milliseconds of the broker's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jobledger.schemas import events as ev
from jobledger.schemas.events import ErrorInfo, Recorded, fact_name

#: Steps of the axis in seconds: the smallest with at most `TICKS` steps is used.
STEPS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200, 86_400, 172_800, 604_800),
)
TICKS = 6
#: Least width of a bar in percent of the axis, so that a short bar can be seen.
WIDTH_LEAST = 0.4


@dataclass
class Bar:
    """``kind``: ``scheduled``, ``waited``, ``ran`` or ``backed-off``. ``open``: no fact has ended the bar yet, so it
    is drawn up to now. ``x``, ``width``: percent of the axis."""

    kind: str
    start_ms: int
    end_ms: int
    open: bool = False
    x: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        """The length of the bar in seconds."""
        return (self.end_ms - self.start_ms) / 1000


@dataclass
class Attempt:
    """One attempt of a run, with its bars. ``outcome``: the name of the fact that ended it; None: none yet.
    ``waits``: the milliseconds that it waited in the worker, by cause."""

    run: int
    number: int
    bars: list[Bar] = field(default_factory=list)
    worker: str | None = None
    version: str | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    outcome: str | None = None
    error: ErrorInfo | None = None
    detail: str | None = None
    waits: dict[str, int] = field(default_factory=dict)
    starts: int = 0


@dataclass(frozen=True)
class Tick:
    """A step of the axis: percent from its beginning, and seconds."""

    x: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """The attempts of a job in their order, and the axis from ``start_ms`` to ``end_ms``."""

    attempts: list[Attempt]
    start_ms: int
    end_ms: int
    ticks: list[Tick]


def draw(records: Sequence[Recorded], now_ms: int, *, ended: bool) -> Timeline | None:
    """Return the timeline of a job's events, which are in the order of their append times; None without events.
    ``ended``: the job has ended, so no bar is open."""
    if not records:
        return None
    builder = _Builder()
    known: set[str] = set()
    for record in records:
        if record.event.event_id not in known:  # a copy stands for the same event
            known.add(record.event.event_id)
            builder.add(record)
    builder.close(now_ms, ended=ended)
    start = records[0].appended_ms
    end = max([records[-1].appended_ms, *(bar.end_ms for each in builder.attempts for bar in each.bars)])
    span = max(end - start, 1)
    for bar in (bar for each in builder.attempts for bar in each.bars):
        bar.width = round(max(100 * (bar.end_ms - bar.start_ms) / span, WIDTH_LEAST), 3)
        bar.x = round(min(100 * (bar.start_ms - start) / span, 100 - bar.width), 3)
    return Timeline(builder.attempts, start, end, _ticks(span / 1000))


def _ticks(seconds: float) -> list[Tick]:
    step = next((each for each in STEPS if seconds / each <= TICKS), max(STEPS[-1], seconds / TICKS))
    return [Tick(round(100 * n * step / seconds, 3), n * step) for n in range(int(seconds / step) + 1)]


class _Builder:
    """Collects the attempts and their bars."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self._waiting: tuple[str, int, Attempt] | None = None  # the kind and the beginning of a wait, and its attempt

    def add(self, record: Recorded) -> None:
        event, at = record.event, record.appended_ms
        fact = event.fact
        match fact:
            case ev.JobSubmitted():
                attempt = self._attempt(event.run, event.attempt)
                self._wait("scheduled" if fact.conditioned else "waited", at, attempt)
                if fact.redrive is not None:
                    reason = f": {fact.redrive.reason}" if fact.redrive.reason else ""
                    attempt.detail = f"redriven by {fact.redrive.by}{reason}"
            case ev.JobDue():
                self._end_wait(at)
                self._wait("waited", at, self._attempt(event.run, event.attempt))
            case ev.JobStarted():
                self._end_wait(at)
                self._started(self._attempt(event.run, event.attempt), fact, at)
            case ev.JobRetried() | ev.JobSnoozed():
                attempt = self._attempt(event.run, event.attempt)
                self._ended(attempt, fact, at)
                self._wait("backed-off", at, attempt)
            case ev.JobSucceeded() | ev.JobFailedFact() | ev.JobCancelledFact() | ev.JobExpiredFact():
                self._end_wait(at)
                self._ended(self._attempt(event.run, event.attempt), fact, at)

    def close(self, now_ms: int, *, ended: bool) -> None:
        """End the bars that no fact has ended: at the last fact of a job that has ended, else now."""
        if self._waiting is not None and not ended:
            kind, start, attempt = self._waiting
            attempt.bars.append(Bar(kind, start, max(now_ms, start), open=True))
        for attempt in self.attempts:
            if attempt.started_ms is not None and attempt.outcome is None and not ended:
                attempt.bars.append(Bar("ran", attempt.started_ms, max(now_ms, attempt.started_ms), open=True))

    def _attempt(self, run: int, number: int) -> Attempt:
        for each in reversed(self.attempts):
            if (each.run, each.number) == (run, number):
                return each
        self.attempts.append(Attempt(run, number))
        return self.attempts[-1]

    def _wait(self, kind: str, at: int, attempt: Attempt) -> None:
        self._waiting = (kind, at, attempt)

    def _end_wait(self, at: int) -> None:
        if self._waiting is not None:
            kind, start, attempt = self._waiting
            attempt.bars.append(Bar(kind, start, max(at, start)))
        self._waiting = None

    def _started(self, attempt: Attempt, fact: ev.JobStarted, at: int) -> None:
        if attempt.started_ms is not None and attempt.outcome is None:
            attempt.bars.append(Bar("ran", attempt.started_ms, max(at, attempt.started_ms)))  # its worker was lost
        attempt.worker, attempt.version, attempt.waits = fact.worker or None, fact.version, dict(fact.waits)
        attempt.started_ms, attempt.ended_ms, attempt.outcome = at, None, None
        attempt.starts += 1

    def _ended(self, attempt: Attempt, fact: ev.Fact, at: int) -> None:
        if attempt.outcome is not None:
            return  # a copy of the fact
        attempt.outcome, attempt.ended_ms = fact_name(fact), at
        attempt.error = getattr(fact, "error", None)
        if reason := getattr(fact, "reason", None):
            attempt.detail = str(reason)
        if attempt.started_ms is not None:
            attempt.bars.append(Bar("ran", attempt.started_ms, max(at, attempt.started_ms)))
