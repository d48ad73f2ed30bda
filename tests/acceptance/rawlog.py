"""Reads all topics of a namespace into memory.

`jobledger.audit` reads and decodes them, without the product's codec.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jobledger.audit.records import SINGLE_OBJECT, Record, Schemas, fingerprint, plain, show
from jobledger.audit.source import LogTrimmed, Source
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable
from jobledger.kafka.topic_names import Names

__all__ = [
    "SCHEMA_FILE",
    "SINGLE_OBJECT",
    "Log",
    "Record",
    "Schemas",
    "fingerprint",
    "life_of",
    "plain",
    "read",
    "show",
]

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "schemas" / "job_event.avsc"


@dataclass
class Log:
    """All records of a namespace's topics. ``committed`` and ``ends`` are those of the work topics, by (topic,
    partition)."""

    namespace: str
    records: list[Record] = field(default_factory=list)
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)

    def work(self) -> Iterable[Record]:
        """Return the records of the work topics."""
        return (r for r in self.records if r.topic.startswith(f"{self.namespace}.jobs."))

    def of(self, topic: str) -> Iterable[Record]:
        """Return the records of one other topic, by its short name."""
        return (r for r in self.records if r.topic == f"{self.namespace}.{topic}")


def read(bootstrap: str, namespace: str, timeout: float = 120.0) -> Log:
    """Read the topics of a namespace from their first offset to their present ends. The request is repeated while the
    broker is unavailable."""
    settings, names = Settings(bootstrap=bootstrap), Names(namespace)
    deadline = time.monotonic() + timeout
    while True:
        try:
            with Source(settings, names, also=("control", "schemas")) as source:
                records = list(source.records())
        except (BrokerUnavailable, LogTrimmed):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            continue
        work = {place: end for place, end in source.span.end.items() if names.queue_of(place[0])}
        return Log(namespace, records, dict(source.span.committed), work)


def life_of(log: Log, job_id: str) -> list[str]:
    """Return everything that the log says about one job, by time, for the message of a failure."""
    return [show(r) for r in by_time(log) if r.head.get("job_id") == job_id]


def by_time(log: Log) -> list[Record]:
    """Return all records in the order of their append times."""
    return sorted(log.records, key=lambda r: (r.at, r.place))
