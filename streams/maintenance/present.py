"""The present time by the broker's clock, from which the maintenance computes its limits. Append times are by that clock.

A limit that is too late removes what must stay, and a clock of this machine may be wrong by any time. So the maintenance
writes a small record and uses the append time that the broker gives it.
"""

from __future__ import annotations

import time

from confluent_kafka import KafkaError, Message

from jobledger.errors import BrokerUnavailable
from jobledger.kafka.auth import away, write
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import LogWriter, Outgoing

#: The key of the record on ``<ns>.schemas``. The record has no value, so readers of schemas skip it, and compaction
#: removes it.
KEY = "clock"
#: Number of records, at most: the report about a record that had to be sent twice may have no time.
_TRIES = 3


def present_ms(writer: LogWriter, names: Names) -> int:
    """Return the present time in ms: by the broker's clock or by this machine's, whichever is earlier.

    If the topic does not use append times, the times of its records are those of the writers, and the time is that of
    this machine. Raises `BrokerUnavailable`, `TopicMissing`, `AccessDenied`.
    """
    clock = BrokerClock()
    writer.ensure_schema()
    for _ in range(_TRIES):
        if clock.known:
            break
        _sample(writer, names.schemas, clock)
    return int(min(clock.ms(), time.time() * 1000))


def _sample(writer: LogWriter, topic: str, clock: BrokerClock) -> None:
    done = writer.event()
    errors: list[KafkaError] = []

    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            clock.heard(message)
        else:
            errors.append(error)
        done.set()

    writer.post(Outgoing(topic, None, KEY), delivered)
    if not writer.wait(done, writer.settings.submit_timeout + 5.0):
        raise BrokerUnavailable(away(writer.settings, f"did not acknowledge a record on {topic} in time"))
    if errors:
        raise writer.failed(errors[0], f"writing to {topic}", write(topic))
