"""Estimates the broker's clock from the append times of records. By this clock a worker decides whether a job has
expired, and the coordinator when to look at a scheduled release."""

from __future__ import annotations

import time

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

#: Observations of two periods are kept, each of this many milliseconds. Older observations are dropped, because clocks
#: are set and brokers change.
_HALF_MS = 60_000.0


class BrokerClock:
    """Estimates the broker's time. The estimate is never ahead of that time, because this process learns of a record
    after the broker has appended the record.

    An observation is the append time minus this process's time of receipt, so it is the difference of the clocks minus
    a latency. The largest one is the best estimate (as in NTP's clock filter, RFC 5905, section 10).

    Between records the estimate advances with the monotonic clock, which is never set. If that clock is paused while
    the machine is suspended, the estimate is behind until the next record, or until `reset`. Before the first record,
    this machine's own clock is used.
    """

    __slots__ = ("_before", "_now", "_since")

    def __init__(self) -> None:
        self._now: float | None = None  # largest difference of broker time and monotonic time (ms) in this period
        self._before: float | None = None  # the same of the period before
        self._since = 0.0

    def heard(self, message: Message) -> None:
        """Observe the append time of a record that was just acknowledged.

        The report is ignored if the broker had the record already (the report then has no offset), or if the topic does
        not use append times (the report then has the writer's own time).
        """
        kind, appended_ms = message.timestamp()
        if kind == TIMESTAMP_LOG_APPEND_TIME and message.offset() is not None:
            self.observe(appended_ms)

    def observe(self, appended_ms: int) -> None:
        """Note the append time (ms since the epoch; -1: none) of a record that was just received or acknowledged."""
        if appended_ms <= 0:
            return
        here = time.monotonic() * 1000
        if here - self._since > _HALF_MS:
            self._before, self._now, self._since = self._now, None, here
        seen = appended_ms - here
        self._now = seen if self._now is None else max(self._now, seen)

    def ms(self) -> float:
        """Return the broker's time, in milliseconds since the epoch."""
        known = [d for d in (self._now, self._before) if d is not None]
        return time.monotonic() * 1000 + max(known) if known else time.time() * 1000

    def us(self) -> int:
        """Return the broker's time, in microseconds since the epoch, rounded down."""
        return int(self.ms() * 1000)

    @property
    def known(self) -> bool:
        """Whether there is an observation. Without one, the time is that of this machine."""
        return self._now is not None or self._before is not None

    @property
    def ahead_s(self) -> float:
        """Upper bound of the seconds by which this machine's clock is ahead of the broker's; negative if it is behind;
        0 before the first record."""
        return 0.0 if self._now is None and self._before is None else time.time() - self.ms() / 1000

    def reset(self) -> None:
        """Drop all observations, because this process was paused or a clock was set."""
        self._now = self._before = None
