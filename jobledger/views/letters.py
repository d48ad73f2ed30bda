"""The last dead letters, as they are shown to people and scripts. Reads the log; writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobledger.errors import RegistryNeeded, SchemaError, text_of

if TYPE_CHECKING:
    from jobledger.config import Settings
    from jobledger.kafka.topic_names import Names
    from jobledger.schemas.events import Recorded

#: Number of bytes of a rejected record and of its key, and of characters of an error, that are shown.
RAW_MOST, KEY_MOST, WHY_MOST = 400, 80, 500


@dataclass(frozen=True)
class Letter:
    """A record of the topic of dead letters.

    ``job_id``, ``task``: of a failed job; empty for a rejected record. ``what``: the subject of the record. ``why``: the
    error. ``key``, ``raw``: the beginning of a rejected record's key and value, as text. ``at``: append time, in ms of the
    broker's clock.
    """

    job_id: str
    task: str
    what: str
    why: str
    key: str
    raw: str
    at: int
    position: str


def last_letters(settings: Settings, names: Names, most: int) -> list[Letter]:
    """Return the last dead letters, the newest first: at most ``most`` of them, and at most ``most`` records of each
    partition are read. Raises `BrokerUnavailable`, `TopicMissing` and `AccessDenied`."""
    from jobledger.kafka.clients import partitions_of, position_of
    from jobledger.log.reading import LogReader, recorded
    from jobledger.log.schema_lookup import decoder

    topic, decode = names.dead_letter, decoder(settings, names).decode
    letters: list[Letter] = []
    with LogReader(settings) as reader:
        for partition in range(partitions_of(settings, topic)):
            low, high = reader.bounds(topic, partition)
            for message in reader.read(topic, partition, max(low, high - most), high):
                try:
                    letters.append(letter(recorded(message, decode)))
                except (SchemaError, RegistryNeeded) as exc:
                    at = message.timestamp()[1]
                    letters.append(
                        Letter("", "", "unreadable record", text_of(exc), "", "", at, str(position_of(message)))
                    )
            letters.sort(key=lambda each: each.at, reverse=True)
            del letters[most:]
    return letters


def letter(record: Recorded) -> Letter:
    """Return a record of the topic of dead letters as it is shown."""
    from jobledger.schemas.events import DeadLettered, RecordRejected

    event, fact, at, position = record.event, record.event.fact, record.appended_ms, str(record.position)
    if isinstance(fact, DeadLettered):
        why = f"{fact.reason}: {fact.error.type}: {fact.error.message}"[:WHY_MOST]
        return Letter(event.job_id, event.task, "job", why, "", "", at, position)
    if isinstance(fact, RecordRejected):
        what = f"rejected record {fact.topic}[{fact.partition}]@{fact.offset}"
        key, raw = _beginning(fact.raw_key, KEY_MOST), _beginning(fact.raw_value, RAW_MOST)
        return Letter("", "", what, fact.error[:WHY_MOST], key, raw, at, position)
    return Letter(event.job_id, event.task, "record", type(fact).__name__, "", "", at, position)


def _beginning(raw: bytes | None, most: int) -> str:
    return "" if raw is None else raw[:most].decode("utf-8", "backslashreplace")
