"""Decodes records whose schema must be looked up. A separate thread does this, because a lookup may wait for
the broker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from confluent_kafka import Message

from jobledger.consumers.state.work import Partition
from jobledger.errors import BrokerUnavailable, JobledgerError, RegistryNeeded, SchemaError, UnknownFact
from jobledger.process.logger import get_logger
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import JobEvent

LOG = get_logger("jobledger.worker")

#: A decoded record: the event; or the error because of which this worker cannot judge the record; or the text of the
#: error because of which the record cannot be read.
Read = JobEvent | UnknownFact | RegistryNeeded | str

#: Number of attempts to look up a schema, after which the worker stops.
LOOKUPS = 3


def read(decoder: Decoder, value: object) -> Read:
    """Decode a record's value. An error of the record is returned, not raised. Raises `BrokerUnavailable` if the schema
    had to be looked up and the lookup failed."""
    try:
        return decoder.decode(value if isinstance(value, bytes) else None)
    except (UnknownFact, RegistryNeeded) as exc:
        return exc
    except SchemaError as exc:
        return str(exc)


class SchemaResolver(threading.Thread):
    """Decodes records in the order of the calls of `put`. ``on_resolved`` is called in this thread with each record and
    the value that `read` returned for it. ``fail``: stops the worker, because the lookup of a schema failed."""

    def __init__(
        self,
        decoder: Decoder,
        on_resolved: Callable[[Partition, Message, Read, bool], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-schemas", daemon=True)
        self._decoder, self._on_resolved, self._fail = decoder, on_resolved, fail
        self._todo: queue.SimpleQueue[tuple[Partition, Message, bool] | None] = queue.SimpleQueue()

    def put(self, partition: Partition, message: Message, fresh: bool) -> None:
        """Queue a record that the partition's offset tracker has received. Any thread."""
        self._todo.put((partition, message, fresh))

    def close(self) -> None:
        """End the thread after the queued records."""
        self._todo.put(None)

    def run(self) -> None:
        """Decode queued records until closed."""
        while (item := self._todo.get()) is not None:
            partition, message, fresh = item
            try:
                self._on_resolved(partition, message, self._read(message), fresh)
            except JobledgerError as exc:
                self._fail(exc)
            except Exception as exc:
                LOG.exception("a record could not be decoded")
                self._fail(JobledgerError(f"{partition!r}@{message.offset()} could not be decoded: {exc!r}"))

    def _read(self, message: Message) -> Read:
        for left in reversed(range(LOOKUPS)):
            try:
                return read(self._decoder, message.value())
            except BrokerUnavailable:
                if not left:
                    raise
        raise AssertionError("unreachable")
