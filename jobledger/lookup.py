"""Where readers find other writers' schemas: on ``<ns>.schemas``, and in the Schema Registry if one is configured."""

from __future__ import annotations

import threading
import time

from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.errors import RegistryNeeded, RegistryUnavailable, SchemaError
from jobledger.log import LogReader, partitions_of, position_of
from jobledger.logger import get_logger
from jobledger.names import Names
from jobledger.registry import SETTING, Registry
from jobledger.schemas import codec
from jobledger.wire import id_key

LOG = get_logger("jobledger.kafka")

#: Seconds for which an id that nobody knows, certainly, is not asked for again: a flood of such records must not hold
#: up what stands behind them. As long as it takes to be certain.
DENIED_S = 1.0
DENIED_MOST = 1_000


class SchemaLookup:
    """``lookup(fingerprint)`` and `by_id` for `codec.Decoder`: asked for an unknown one, reads what is new on
    ``<ns>.schemas``.

    The topic's end is asked for every time. A schema is published before its first record, so what is not there now is
    published nowhere; an answer from a moment ago would reject the good records of a writer that has just begun.
    """

    def __init__(self, settings: Settings, names: Names) -> None:
        self._settings, self._names = settings, names
        self._registry = None if settings.schema_registry is None else Registry(settings.schema_registry)
        self._known: dict[bytes, str] = {}
        self._by_key: dict[bytes, str] = {}
        self._denied: dict[int, float] = {}
        self._reader: LogReader | None = None
        self._partitions = 0
        self._next: dict[int, int] = {}
        self._lock = threading.Lock()

    def __call__(self, fingerprint: bytes) -> str | None:
        """The schema's text, or None if it is published nowhere. Raises `BrokerUnavailable`, `TopicMissing`."""
        with self._lock:
            if fingerprint not in self._known:
                self._read_anew()
            return self._known.get(fingerprint)

    def by_id(self, schema_id: int, likely: bool) -> str | None:
        """The text of the schema that a frame's id stands for, or None if the registry knows none; ``likely``: its "no"
        must be certain.

        The registry's word counts. Where it says no, or is away, what our writers published under the id does: the log
        outlives registries. Raises `RegistryNeeded` if neither knows and none is configured, `RegistryUnavailable` if
        it is away, `BrokerUnavailable`, `TopicMissing`.
        """
        if self._registry is None:
            found = self._published(schema_id)
            if found is None:
                raise RegistryNeeded(
                    f"the record carries schema id {schema_id} of a Schema Registry, and none is configured: "
                    f"set {SETTING} to the registry's URL"
                )
            return found
        if time.monotonic() < self._denied.get(schema_id, 0.0):
            return None
        try:
            found = self._registry.schema(schema_id, sure=likely)
        except RegistryUnavailable:
            found = self._published(schema_id)
            if found is None:
                raise
        if found is None:
            found = self._published(schema_id)
            if found is None and likely:
                if len(self._denied) > DENIED_MOST:
                    self._denied.clear()
                self._denied[schema_id] = time.monotonic() + DENIED_S
        return found

    def _published(self, schema_id: int) -> str | None:
        key = id_key(schema_id).encode()
        with self._lock:
            if key not in self._by_key:
                self._read_anew()
            return self._by_key.get(key)

    def all(self) -> dict[bytes, str]:
        """Every schema on ``<ns>.schemas`` by its fingerprint. Raises `BrokerUnavailable`, `TopicMissing`."""
        with self._lock:
            self._read_anew()
            return dict(self._known)

    def close(self) -> None:
        """Give the connection back; the next question opens a new one."""
        with self._lock:
            self._drop()

    def _read_anew(self) -> None:
        try:
            self._read()
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        """Begin anew next time: a client that saw the broker go may believe for minutes that there is no such topic."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _read(self) -> None:
        topic = self._names.schemas
        if self._reader is None:
            self._partitions = partitions_of(self._settings, topic)
            self._reader = LogReader(self._settings)
        for partition in range(self._partitions):
            begin = self._next.get(partition, 0)
            _, end = self._reader.watermarks(topic, partition)
            if end < begin:  # another topic of this name
                begin = 0
            for message in self._reader.read(topic, partition, begin, end):
                self._learn(message)
            self._next[partition] = end

    def _learn(self, message: Message) -> None:
        key, value = message.key(), message.value()
        if key is None or value is None:
            return
        try:
            text = bytes(value).decode()
            mark = codec.fingerprint(text)
        except (UnicodeDecodeError, SchemaError) as exc:
            LOG.warning("%s is no schema: %s", position_of(message), exc)
            return
        self._known[mark] = text
        self._by_key[key] = text
