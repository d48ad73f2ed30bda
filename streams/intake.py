"""Records of the coordination topic as events; what is none becomes a dead letter. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from jobledger.errors import RegistryNeeded, SchemaError, UnknownFact
from jobledger.log import now_us
from jobledger.names import Names
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, RecordRejected
from jobledger.streams.derived import derived_id
from jobledger.writer import Outgoing

LOG = logging.getLogger("jobledger.coordinator")

#: Raw bytes of a rejected record are left out above this size: the dead letter must fit as well.
REJECT_BYTES = 500_000


class Read(NamedTuple):
    """An event where it stands; ``appended_ms``: the broker's clock."""

    event: JobEvent
    partition: int
    offset: int
    appended_ms: int


class Intake:
    """Decodes batches. ``decoder`` may block when it meets a schema it has not seen; it then runs in a thread."""

    def __init__(self, names: Names, decoder: codec.Decoder, source: str) -> None:
        self._names, self._decoder, self._source = names, decoder, source

    async def decode(self, records: Sequence[Any]) -> tuple[list[Read], list[Outgoing]]:
        """Events of consumed records, and the dead letters of what is none.

        Raises `UnknownFact` for a well-formed event whose fact is not known: it must not be passed. `RegistryNeeded`
        for what may be one; `BrokerUnavailable` if its schema cannot be looked for.
        """
        read: list[Read] = []
        rejects: list[Outgoing] = []
        loop = asyncio.get_running_loop()
        decode, asks = self._decoder.decode, self._decoder.asks
        for message in records:
            value = message.value
            try:
                event = await loop.run_in_executor(None, decode, value) if asks(value) else decode(value)
                read.append(Read(event, message.partition, message.offset, message.timestamp))
            except UnknownFact as exc:
                raise UnknownFact(
                    exc.fact,
                    f"{_where(message)} carries the fact {exc.fact!r}, which this coordinator does not know and must not "
                    "pass: upgrade this coordinator",
                ) from exc
            except RegistryNeeded as exc:
                raise RegistryNeeded(f"{_where(message)}: {exc}") from exc
            except SchemaError as exc:
                rejects.append(self._reject(message, str(exc)))
        return read, rejects

    def _reject(self, message: Any, why: str) -> Outgoing:
        LOG.error("%s is no event and goes to %s: %s", _where(message), self._names.dead_letter, why)
        value = message.value
        if value is not None and len(value) > REJECT_BYTES:
            value, why = None, f"{why}; its {len(message.value)} bytes are left out here"
        fact = RecordRejected(message.topic, message.partition, message.offset, message.key, value, why)
        event_id = derived_id(message.topic, message.partition, message.offset, "rejected")
        event = JobEvent(event_id, "", 0, 0, 0, now_us(), "", "", None, None, self._source, None, fact)
        return Outgoing(self._names.dead_letter, codec.encode(event), event_id)


def _where(message: Any) -> str:
    return f"{message.topic}[{message.partition}]@{message.offset}"
