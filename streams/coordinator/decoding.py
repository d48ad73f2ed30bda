"""Decode records of the coordination topic to events. A record that is not an event becomes a dead letter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from jobledger.errors import NotAnEvent, RegistryNeeded, SchemaError, UnknownFact
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.dead_letters import rejection
from jobledger.schemas.events import JobEvent, Position, Recorded, fact_name
from jobledger.schemas.ids import derived_id

LOG = get_logger("jobledger.coordinator")

#: The timestamp type of a fetched record whose time was set by the broker (LogAppendTime).
APPEND_TIME = 1
#: Largest size of an id, in bytes. Jobledger's ids have 36 bytes. Ids become keys of rows and records.
ID_BYTES = 1_000
#: The largest number of a run, attempt or release in the schema (Avro int).
NUMBER_MOST = (1 << 31) - 1


class RecordDecoder:
    """Decode batches of records. ``decoder`` blocks while it looks up an unknown schema; such a call runs in a thread.

    ``now_ms()``: returns the estimated time of the broker's clock, ms. A record with its writer's time (the topic has
    message.timestamp.type=CreateTime) is treated as appended now, so that no delayed job is released early. ``limit``:
    largest size of a dead letter, in bytes.
    """

    def __init__(
        self, names: Names, decoder: codec.Decoder, source: str, now_ms: Callable[[], int], limit: int
    ) -> None:
        self._names, self._decoder, self._source, self._now_ms, self._limit = names, decoder, source, now_ms, limit

    async def decode(self, records: Sequence[Any]) -> tuple[list[Recorded], list[Outgoing]]:
        """Return the events of ``records``, and the dead letters of records that are not events.

        Raises `UnknownFact` for a valid event whose fact this version does not know, because such an event must not be
        skipped; `RegistryNeeded` for a record that may be an event whose schema only a Schema Registry knows;
        `BrokerUnavailable` if the schema of a record cannot be looked up.
        """
        events: list[Recorded] = []
        rejects: list[Outgoing] = []
        loop = asyncio.get_running_loop()
        decode, asks = self._decoder.decode, self._decoder.asks
        for message in records:
            value = message.value
            try:
                event = await loop.run_in_executor(None, decode, value) if asks(value) else decode(value)
                check_head(event)
                appended_ms = message.timestamp if message.timestamp_type == APPEND_TIME else self._now_ms()
                position = Position(message.topic, message.partition, message.offset)
                events.append(Recorded(event, position, appended_ms))
            except UnknownFact as exc:
                raise UnknownFact(
                    exc.fact,
                    f"{_where(message)} carries the fact {exc.fact!r}, which this coordinator does not know and must not "
                    "skip: upgrade this coordinator",
                ) from exc
            except RegistryNeeded as exc:
                raise RegistryNeeded(f"{_where(message)}: {exc}") from exc
            except SchemaError as exc:
                rejects.append(self._reject(message, str(exc)))
        return events, rejects

    def _reject(self, message: Any, why: str) -> Outgoing:
        LOG.error("%s is not an event and is copied to %s: %s", _where(message), self._names.dead_letter, why)
        event_id = derived_id(message.topic, message.partition, message.offset, "rejected")
        value = rejection(
            message.topic,
            message.partition,
            message.offset,
            message.key,
            message.value,
            why,
            event_id=event_id,
            at_us=now_us(),
            source=self._source,
            limit=self._limit,
        )
        return Outgoing(self._names.dead_letter, value, event_id)


def check_head(event: JobEvent) -> None:
    """Raise `NotAnEvent` if the coordinator cannot keep a row for this event: the event has no job id, or has an id or
    a number that is too large for the records that derive from the event."""
    if not event.job_id:
        raise NotAnEvent(f"the job_id of this {fact_name(event.fact)} is empty")
    for name, text in (("job_id", event.job_id), ("home", event.home or "")):
        if len(text) > ID_BYTES // 4 and len(text.encode()) > ID_BYTES:
            raise NotAnEvent(f"its {name} has more than {ID_BYTES} bytes")
    if max(event.run, event.attempt, event.release) >= NUMBER_MOST:
        raise NotAnEvent(
            f"run {event.run}, attempt {event.attempt} or release {event.release} is above {NUMBER_MOST - 1}"
        )


def _where(message: Any) -> str:
    return f"{message.topic}[{message.partition}]@{message.offset}"
