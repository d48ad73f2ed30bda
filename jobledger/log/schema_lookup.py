"""Finds the schemas of other writers: on ``<ns>.schemas``, and in the Schema Registry if one is configured. Reads the
log; writes nothing."""

from __future__ import annotations

import json
import time

from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.errors import ConfigError, RegistryNeeded, SchemaError
from jobledger.kafka.clients import partitions_of, position_of
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.schema_registry import SETTING, SchemaRegistry, id_key
from jobledger.process import forks
from jobledger.process.logger import get_logger
from jobledger.schemas import codec

LOG = get_logger("jobledger.kafka")

#: Seconds for which an id that is certainly unknown is not looked up again, because many records with such an id must
#: not delay the records behind them. This is as long as a certain lookup takes.
DENIED_S = 1.0
DENIED_MOST = 1_000


class SchemaLookup:
    """Looks up schemas for `codec.Decoder`, by fingerprint (call the object) or by a registry's id (`by_id`). For an
    unknown schema the lookup reads the new records of ``<ns>.schemas``.

    Each such lookup reads the topic to its end. A schema is published before its first record, so a schema that is not
    on the topic now is not published. A missing schema is looked up again for each record, because a writer with this
    schema may have just started (an id that a registry certainly does not have: after `DENIED_S` seconds). ``timeout``:
    seconds that a broker may take to answer about the topic.
    """

    def __init__(self, settings: Settings, names: Names, *, timeout: float = 10.0) -> None:
        self._settings, self._names, self._timeout = settings, names, timeout
        self._registry = None if settings.schema_registry is None else SchemaRegistry(settings.schema_registry)
        self._known: dict[bytes, str] = {}
        self._by_key: dict[bytes, str] = {}
        self._unknown_until: dict[int, float] = {}
        self._reader: LogReader | None = None
        self._partitions = 0
        self._next: dict[int, int] = {}
        self._lock = forks.Lock()

    def __call__(self, fingerprint: bytes) -> str | None:
        """Return the schema's text, or None if the schema is not published. Raises `BrokerUnavailable`,
        `TopicMissing`."""
        with self._lock("reading the schemas on the log"):
            if fingerprint not in self._known:
                self._read_new_schemas()
            return self._known.get(fingerprint)

    def by_id(self, schema_id: int, likely: bool) -> str | None:
        """Return the text of the schema with this id in a frame of Jobledger's writers, or None if the registry does
        not have the id. ``likely``: ask again before the answer is None.

        A schema that Jobledger's writers published under the id is preferred: the log outlives registries, and a
        registry that was replaced or restored may have another schema under this id. The registry is asked only for ids
        that are not published. Raises `RegistryNeeded` if the id is not published and no registry is configured,
        `RegistryUnavailable`, `BrokerUnavailable`, `TopicMissing`.
        """
        if time.monotonic() < self._unknown_until.get(schema_id, 0.0):
            return None
        text = self.published(schema_id)
        if text is None:
            text = self._registered(schema_id, likely)
        return text

    def of_others(self, schema_id: int, likely: bool) -> str | None:
        """Return the text of the schema with this id in a record of another program, whose ids only the registry knows;
        None if the registry does not have the id. ``likely``: as for `by_id`.

        Raises `ConfigError` if Jobledger's writers published another schema under this id: then this registry is not
        the one that they used, and it is not known which of the two schemas the record has.
        """
        if time.monotonic() < self._unknown_until.get(schema_id, 0.0):
            return None
        text = self._registered(schema_id, likely)
        if text is not None and self._registry is not None:
            self.check(schema_id, text, self._registry.shown)
        return text

    def check(self, schema_id: int, text: str, registry: str) -> bool:
        """Return whether Jobledger's writers published this schema under the id that a registry gives it; False if no
        schema is published under the id. Raises `ConfigError` if another schema is published under the id."""
        ours = self.published(schema_id)
        if ours is None:
            return False
        if codec.fingerprint(ours) == codec.fingerprint(text):
            return True
        raise ConfigError(
            f"schema id {schema_id} is {_named(text)} in the schema registry {registry}, and {_named(ours)} on "
            f"{self._names.schemas}: the registry was replaced, or restored with other ids. Set {SETTING} to the registry "
            "that this namespace was written with, or restore the registry's ids (import mode). Or leave the setting "
            f"unset: existing records stay readable with the schemas on {self._names.schemas}"
        )

    def _registered(self, schema_id: int, likely: bool) -> str | None:
        if self._registry is None:
            raise RegistryNeeded(
                f"the record carries schema id {schema_id} of a Schema Registry, and none is configured: "
                f"set {SETTING} to the registry's URL"
            )
        text = self._registry.schema(schema_id, sure=likely)
        if text is None and likely:
            if len(self._unknown_until) > DENIED_MOST:
                self._unknown_until.clear()
            self._unknown_until[schema_id] = time.monotonic() + DENIED_S
        return text

    def published(self, schema_id: int) -> str | None:
        """Return the schema that Jobledger's writers published under a registry's id; None if there is no such
        schema."""
        key = id_key(schema_id).encode()
        with self._lock("reading the schemas on the log"):
            if key not in self._by_key:
                self._read_new_schemas()
            return self._by_key.get(key)

    def all(self) -> dict[bytes, str]:
        """Return every schema on ``<ns>.schemas`` by its fingerprint. Raises `BrokerUnavailable`, `TopicMissing`."""
        with self._lock("reading the schemas on the log"):
            self._read_new_schemas()
            return dict(self._known)

    def close(self) -> None:
        """Close the connection; the next lookup opens a new one."""
        with self._lock("reading the schemas on the log"):
            self._close_reader()

    def _read_new_schemas(self) -> None:
        try:
            self._read()
        except Exception:
            self._close_reader()
            raise

    def _close_reader(self) -> None:
        """Close the connection. After an error this is necessary, because a client that has lost its broker may report
        the topic as missing for minutes."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _read(self) -> None:
        topic = self._names.schemas
        if self._reader is None:
            self._partitions = partitions_of(self._settings, topic, self._timeout)
            self._reader = LogReader(self._settings)
        for partition in range(self._partitions):
            begin = self._next.get(partition, 0)
            _, end = self._reader.bounds(topic, partition)
            if end < begin:  # the topic was deleted and created again
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
            fingerprint = codec.fingerprint(text)
        except (UnicodeDecodeError, SchemaError) as exc:
            LOG.warning("%s is not a schema: %s", position_of(message), exc)
            return
        self._known[fingerprint] = text
        self._by_key[key] = text


def _named(text: str) -> str:
    """Return a schema's name and fingerprint, for errors."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    name = parsed.get("name", "?") if isinstance(parsed, dict) else "?"
    return f"{name!s:.100} (fingerprint {codec.fingerprint(text).hex()})"


def decoder(settings: Settings, names: Names) -> codec.Decoder:
    """Return a decoder that finds other writers' schemas on ``<ns>.schemas``, and in the Schema Registry if one is
    configured.

    Raises `ConfigError` for a registry that cannot be used.
    """
    lookup = SchemaLookup(settings, names)
    return codec.Decoder(lookup, lookup.by_id)
