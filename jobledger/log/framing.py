"""Chooses how records are framed when they are sent. With a Schema Registry the Confluent frame replaces the head of
the single-object encoding.

`codec.encode` always writes the single-object form; senders ask `Framing` for the bytes to send. Readers accept both
forms at any time: `codec.Decoder`, `jobledger.log.schema_lookup`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from jobledger.config import Settings
from jobledger.errors import AccessDenied, RegistryUnavailable
from jobledger.kafka.topic_names import Names
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.log.schema_registry import SchemaRegistry, id_key
from jobledger.process import forks
from jobledger.schemas import codec, confluent_frame

_OWN = codec.MAGIC + codec.FINGERPRINT
_SKIP = len(_OWN)


class Framing:
    """Frames events by topic, with the subject ``<topic>-value``. Thread-safe.

    ``publish(key)`` writes this version's schema to ``<ns>.schemas`` under a key and waits for the acknowledgement. So
    an id is published before the first record with this id, and the log can be read without the registry.
    ``published(id, text, registry)`` returns whether the schema is published already, and raises `ConfigError` if
    another schema is published under the id.
    """

    def __init__(
        self, url: str, publish: Callable[[str], None], published: Callable[[int, str, str], bool] | None = None
    ) -> None:
        self._registry, self._publish, self._is_published = SchemaRegistry(url), publish, published
        self._heads: dict[str, bytes] = {}
        self._published: set[int] = set()
        self._lock = forks.Lock()
        self._failed_at = float("-inf")
        self._failure = ""

    def waits(self, topic: str, value: bytes | None) -> bool:
        """Return whether `framed` would have to register the topic's schema first."""
        return topic not in self._heads and value is not None and value.startswith(_OWN)

    def prepare(self, topics: Iterable[str]) -> None:
        """Register this version's schema for topics, and wait for the registry's confirmation. Raises
        `RegistryUnavailable`, `SchemaRefused`, `ConfigError`, and what ``publish`` raises."""
        for topic in topics:
            if topic not in self._heads:
                self._register(topic)

    def framed(self, topic: str, value: bytes) -> bytes:
        """Return the bytes to send. A value that is not an event of this version is returned unchanged. Raises what
        `prepare` raises."""
        if not value.startswith(_OWN):
            return value
        return (self._heads.get(topic) or self._register(topic)) + value[_SKIP:]

    def _register(self, topic: str) -> bytes:
        arrived_at = time.monotonic()
        with self._lock(f"registering the schema of {topic}"):
            if topic in self._heads:
                return self._heads[topic]
            if self._failed_at > arrived_at:  # failed while this thread waited; a new request would delay the next one
                raise RegistryUnavailable(self._failure)
            try:
                schema_id = self._registry.register(f"{topic}-value", codec.SCHEMA_TEXT)
                if schema_id not in self._published:
                    shown = self._registry.shown
                    if self._is_published is None or not self._is_published(schema_id, codec.SCHEMA_TEXT, shown):
                        self._publish(id_key(schema_id))
                    self._published.add(schema_id)
            except RegistryUnavailable as exc:
                self._failed_at, self._failure = time.monotonic(), str(exc)
                raise
            self._heads[topic] = confluent_frame.head(schema_id)
            return self._heads[topic]


def framing(settings: Settings, names: Names, publish: Callable[[str], None]) -> Framing | None:
    """Return the framing according to the settings; None: single-object encoding."""
    if settings.schema_registry is None:
        return None

    def published(schema_id: int, text: str, registry: str) -> bool:
        lookup = SchemaLookup(settings, names)
        try:
            return lookup.check(schema_id, text, registry)
        except AccessDenied:  # a client that only submits may lack the right to read the topic
            return False
        finally:
            lookup.close()

    return Framing(settings.schema_registry, publish, published)
