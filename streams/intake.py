"""Records of the coordination topic as events; what is none becomes a dead letter. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jobledger.errors import NotAnEvent, RegistryNeeded, SchemaError, UnknownFact
from jobledger.log import now_us
from jobledger.logger import get_logger
from jobledger.names import Names
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, RecordRejected
from jobledger.streams.derived import derived_id
from jobledger.writer import Outgoing

LOG = get_logger("jobledger.coordinator")

#: Raw bytes of a rejected record are left out above this size, its key and the reason are cut: the dead letter must fit
#: as well.
REJECT_BYTES, KEY_BYTES, WHY_CHARS = 500_000, 4_096, 2_000
#: What a fetched record says of its time: the broker set it.
APPEND_TIME = 1
#: Bytes an id may have. Ours have 36; those of other writers become keys of rows and records.
ID_BYTES = 1_000
#: The largest number that the schema has for runs, attempts and releases.
NUMBER_MOST = (1 << 31) - 1


class Read(NamedTuple):
    """An event where it stands; ``appended_ms``: the broker's clock."""

    event: JobEvent
    partition: int
    offset: int
    appended_ms: int


class Intake:
    """Decodes batches. ``decoder`` may block when it meets a schema it has not seen; it then runs in a thread.

    ``now_ms``: the broker's clock, as far as it is known. A record that bears its writer's time instead, as it does while
    the topic has message.timestamp.type=CreateTime, counts as appended now: whenever it was appended, what it delays is not
    early.
    """

    def __init__(self, names: Names, decoder: codec.Decoder, source: str, now_ms: Callable[[], int]) -> None:
        self._names, self._decoder, self._source, self._now_ms = names, decoder, source, now_ms

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
                check_head(event)
                appended_ms = message.timestamp if message.timestamp_type == APPEND_TIME else self._now_ms()
                read.append(Read(event, message.partition, message.offset, appended_ms))
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
        return read, rejects

    def _reject(self, message: Any, why: str) -> Outgoing:
        LOG.error("%s is no event and goes to %s: %s", _where(message), self._names.dead_letter, why)
        key, value, why = bounded(message.key, message.value, why, REJECT_BYTES)
        fact = RecordRejected(message.topic, message.partition, message.offset, key, value, why)
        event_id = derived_id(message.topic, message.partition, message.offset, "rejected")
        event = JobEvent(event_id, "", 0, 0, 0, now_us(), "", "", None, None, self._source, None, fact)
        return Outgoing(self._names.dead_letter, codec.encode(event), event_id)


def check_head(event: JobEvent) -> None:
    """Raise `NotAnEvent` for what the coordinator can keep no row of: an event of no job, as only dead letters and
    control know it, and ids or numbers that nothing made of them could carry."""
    if not event.job_id:
        raise NotAnEvent(f"a {type(event.fact).__name__} of no job: its job_id is empty")
    for name, text in (("job_id", event.job_id), ("home", event.home or "")):
        if len(text) > ID_BYTES // 4 and len(text.encode()) > ID_BYTES:
            raise NotAnEvent(f"its {name} has more than {ID_BYTES} bytes")
    if max(event.run, event.attempt, event.release) >= NUMBER_MOST:
        raise NotAnEvent(f"run {event.run}, attempt {event.attempt}, release {event.release}: no next one is a number")


def bounded(key: bytes | None, value: bytes | None, why: str, most: int) -> tuple[bytes | None, bytes | None, str]:
    """Key, value and reason of a rejected record as a dead letter can carry them: a value above ``most`` bytes is left
    out, a key above `KEY_BYTES` cut, and the reason says so."""
    why = why[:WHY_CHARS].encode("utf-8", "replace").decode()  # a text may hold what UTF-8 cannot carry
    if key is not None and len(key) > KEY_BYTES:
        why = f"{why}; the first {KEY_BYTES} of its key's {len(key)} bytes are kept here"
        key = key[:KEY_BYTES]
    if value is not None and len(value) > most:
        why = f"{why}; its {len(value)} bytes are left out here"
        value = None
    return key, value, why


def _where(message: Any) -> str:
    return f"{message.topic}[{message.partition}]@{message.offset}"
