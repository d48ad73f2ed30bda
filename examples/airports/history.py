"""Reads what happened from the log itself: each job's facts with the broker's times.

This module writes nothing, and does not read the status table. So the log and the status table can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobledger.kafka.clients import partitions_of
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import (
    CLOSING,
    TERMINAL,
    JobDue,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    Recorded,
)

if TYPE_CHECKING:
    from jobledger import App


@dataclass(slots=True)
class Life:
    """One job. Times are in milliseconds since the epoch by the broker's clock, keyed by release. Of several records of
    the same kind and release, the first one counts. ``ran_us``: duration in microseconds, keyed by release."""

    released: dict[int, int] = field(default_factory=dict)
    started: dict[int, int] = field(default_factory=dict)
    closed: dict[int, int] = field(default_factory=dict)
    ran_us: dict[int, int] = field(default_factory=dict)
    ends: list[JobSucceeded | JobFailedFact] = field(default_factory=list)
    retries: int = 0

    @property
    def succeeded(self) -> bool:
        """Whether the job has only one outcome, and has succeeded."""
        return len(self.ends) == 1 and isinstance(self.ends[0], JobSucceeded)

    @property
    def failed(self) -> JobFailedFact | None:
        """The job's failure, if it is the only outcome; else None."""
        end = self.ends[0] if len(self.ends) == 1 else None
        return end if isinstance(end, JobFailedFact) else None

    @property
    def to_start_ms(self) -> float | None:
        """Milliseconds from the submission to the first start."""
        return min(self.started.values()) - self.released[1] if self.started and 1 in self.released else None

    @property
    def to_end_ms(self) -> float | None:
        """Milliseconds from the submission to the outcome."""
        return max(self.closed.values()) - self.released[1] if self.ends and 1 in self.released else None

    @property
    def waiting_ms(self) -> float:
        """Milliseconds that the job waited in the work topic, over all releases."""
        return sum(at - self.released[n] for n, at in self.started.items() if n in self.released)

    @property
    def running_ms(self) -> float:
        """Milliseconds that workers spent in the job's code, over all attempts."""
        return sum(self.ran_us.values()) / 1000

    @property
    def backing_off_ms(self) -> float:
        """Milliseconds from a retry to the record that released the job again, over all retries."""
        return sum(self.released[n + 1] - at for n, at in self.closed.items() if n + 1 in self.released)


def fold(events: Iterable[Recorded]) -> dict[str, Life]:
    """Return lives by job id, from events in any order and with copies (the log promises at least once)."""
    lives: dict[str, Life] = {}
    for record in events:
        event, at = record.event, record.appended_ms
        fact, release = event.fact, event.release
        life = lives.setdefault(event.job_id, Life())
        if isinstance(fact, JobSubmitted | JobDue):
            life.released[release] = min(at, life.released.get(release, at))
        elif isinstance(fact, JobStarted):
            life.started[release] = min(at, life.started.get(release, at))
        elif isinstance(fact, CLOSING):
            if isinstance(fact, TERMINAL):
                assert isinstance(fact, JobSucceeded | JobFailedFact), f"nobody cancels or expires these: {event}"
                life.ends.append(fact)
            if release not in life.closed and isinstance(fact, JobRetried | JobSnoozed):
                life.retries += 1
            life.closed[release] = min(at, life.closed.get(release, at))
            if isinstance(fact, JobRetried | JobSnoozed | JobSucceeded | JobFailedFact):
                life.ran_us.setdefault(release, fact.duration_us)
    return lives


def read(app: App) -> Iterator[Recorded]:
    """Yield every event of the app's work topics and lifecycle topic, up to their present ends."""
    decode = decoder(app.settings, app.names).decode
    topics = [*(app.names.jobs(queue) for queue in app.queues), app.names.lifecycle]
    with LogReader(app.settings) as reader:
        for topic in topics:
            for partition in range(partitions_of(app.settings, topic)):
                for message in reader.read(topic, partition, 0):
                    yield recorded(message, decode)
