"""Decode records of other writers' schemas, away from the event loop: the lookup of a schema may wait for the
broker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from confluent_kafka import Message

from jobledger.consumers.state.work import Partition
from jobledger.errors import BrokerUnavailable, JobledgerError, RegistryNeeded, SchemaError, UnknownFact
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import JobEvent

#: A decoded record: an event, what keeps this worker from judging it, or why it cannot be read.
Read = JobEvent | UnknownFact | RegistryNeeded | str

#: How often the broker is asked for a schema before the worker gives up.
LOOKUPS = 3


def read(decoder: Decoder, value: object) -> Read:
    """Decode a record's value. What keeps it from being decoded is returned, not raised. Raises `BrokerUnavailable` if
    its schema had to be looked up and could not be."""
    try:
        return decoder.decode(value if isinstance(value, bytes) else None)
    except (UnknownFact, RegistryNeeded) as exc:
        return exc
    except SchemaError as exc:
        return str(exc)


class SchemaResolver(threading.Thread):
    """Decode records in the order in which they are put. ``back`` is called in this thread with each record and what
    `read` returned. ``fail``: stop the worker, because a record could not be decoded."""

    def __init__(
        self,
        decoder: Decoder,
        back: Callable[[Partition, Message, Read, bool], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-aside", daemon=True)
        self._decoder, self._back, self._fail = decoder, back, fail
        self._todo: queue.SimpleQueue[tuple[Partition, Message, bool] | None] = queue.SimpleQueue()

    def put(self, partition: Partition, message: Message, fresh: bool) -> None:
        """Queue a record that the partition's offsets have received. Any thread."""
        self._todo.put((partition, message, fresh))

    def close(self) -> None:
        """End the thread after the queued records."""
        self._todo.put(None)

    def run(self) -> None:
        """Decode until closed."""
        while (item := self._todo.get()) is not None:
            partition, message, fresh = item
            try:
                self._back(partition, message, self._read(message), fresh)
            except JobledgerError as exc:
                self._fail(exc)

    def _read(self, message: Message) -> Read:
        for left in reversed(range(LOOKUPS)):
            try:
                return read(self._decoder, message.value())
            except BrokerUnavailable:
                if not left:
                    raise
        raise AssertionError("unreachable")
