"""The broker's clock, as a worker can know it: expiries are counted on it, and every
record it appends tells the time."""

from __future__ import annotations

import time

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

#: Milliseconds after which what was learned is forgotten, in two halves: clocks are set, and brokers change.
_HALF_MS = 60_000.0


class BrokerClock:
    """An estimate that is never ahead: a record heard of now was appended at its time or, on its way, a little before.

    Counted on from there by the monotonic clock, which nobody sets; one that stands still while the machine is suspended
    leaves the estimate behind until the next record. Until a record tells, this machine's own clock stands for it.
    """

    __slots__ = ("_before", "_now", "_since")

    def __init__(self) -> None:
        self._now: float | None = None  # the best difference of this half, and of the one before
        self._before: float | None = None
        self._since = 0.0

    def heard(self, message: Message) -> None:
        """A record was just acknowledged. If the broker had it already, or its topic does not carry append times, the report
        has the writer's own time, which says nothing of the broker's clock."""
        kind, appended_ms = message.timestamp()
        if kind == TIMESTAMP_LOG_APPEND_TIME and message.offset() is not None:
            self.observe(appended_ms)

    def observe(self, appended_ms: int) -> None:
        """A record that was just heard of carries this append time (milliseconds since the epoch; -1: none)."""
        if appended_ms <= 0:
            return
        here = time.monotonic() * 1000
        if here - self._since > _HALF_MS:
            self._before, self._now, self._since = self._now, None, here
        seen = appended_ms - here
        self._now = seen if self._now is None else max(self._now, seen)

    def ms(self) -> float:
        """Milliseconds since the epoch, broker's clock."""
        known = [d for d in (self._now, self._before) if d is not None]
        return time.monotonic() * 1000 + max(known) if known else time.time() * 1000
