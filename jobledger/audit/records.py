"""Decodes one record of the log as docs/wire.md describes, with fastavro alone.

This module parses the head of a value. The writers' schemas come from the schema file, from ``<ns>.schemas`` and from a
Schema Registry. This module must not use Jobledger's codec or its fast path.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import fastavro
import fastavro.schema

SINGLE_OBJECT = b"\xc3\x01"
#: The first byte of a Schema Registry's frame, and the number of bytes before the datum.
FRAMED, FRAME_HEAD = b"\0", 5
#: The text of the schema with which this version of Jobledger writes events.
SCHEMA_TEXT: str = files("jobledger.schemas").joinpath("job_event.avsc").read_text(encoding="utf-8")


def fingerprint(schema_text: str) -> bytes:
    """Return the CRC-64-AVRO of the schema's canonical form, in little endian.

    The algorithm is that of the Avro specification, "Schema Fingerprints".
    """
    empty = 0xC15D213AA4D7A795
    table = []
    for byte in range(256):
        word = byte
        for _ in range(8):
            word = (word >> 1) ^ (empty & -(word & 1))
        table.append(word)
    crc = empty
    for byte in fastavro.schema.to_parsing_canonical_form(json.loads(schema_text)).encode():
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc.to_bytes(8, "little")


def plain(node: Any) -> Any:
    """Return the schema without logical types, so that times are decoded as integers."""
    if isinstance(node, list):
        return [plain(n) for n in node]
    if isinstance(node, dict):
        return {k: plain(v) for k, v in node.items() if k != "logicalType"}
    return node


class Schemas:
    """The writers' schemas, by fingerprint and by the id of a Schema Registry.

    ``by_id``: called with an id that was not published on ``<ns>.schemas``; returns the schema's text, or None.
    """

    def __init__(self, by_id: Callable[[int], str | None] = lambda schema_id: None) -> None:
        self._by_fingerprint: dict[bytes, Any] = {}
        self._by_id: dict[int, Any] = {}
        self._text_by_id = by_id
        self.add(SCHEMA_TEXT)

    def add(self, text: str, key: bytes | None = None) -> None:
        """Add a schema. ``key``: its key on ``<ns>.schemas``. Raises the parser's own error for an invalid schema."""
        parsed = fastavro.parse_schema(plain(json.loads(text)))
        self._by_fingerprint[fingerprint(text)] = parsed
        if key is not None and key.startswith(b"id-") and key[3:].isdigit():
            self._by_id[int(key[3:])] = parsed

    def decode(self, value: bytes | None) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return the header, the fact's name without its namespace, and the fact.

        Raises `ValueError` with the reason if the value is not an event.
        """
        if value is None:
            raise ValueError("the record has no value")
        if value[:2] == SINGLE_OBJECT and len(value) >= 10:
            schema, datum_at = self._by_fingerprint.get(value[2:10]), 10
        elif value[:1] == FRAMED and len(value) > FRAME_HEAD:
            schema, datum_at = self._framed(int.from_bytes(value[1:FRAME_HEAD], "big")), FRAME_HEAD
        else:
            raise ValueError("the first bytes are not the head of an event")
        if schema is None:
            raise ValueError("unknown schema: the writer's schema is not published")
        try:
            datum: Any = fastavro.schemaless_reader(io.BytesIO(value[datum_at:]), schema, None, return_record_name=True)
            name, fact = datum["fact"]
        except Exception as exc:
            raise ValueError(f"the bytes after the head are damaged: {exc!r}") from exc
        return datum, str(name).rsplit(".", 1)[-1], fact

    def _framed(self, schema_id: int) -> Any:
        if schema_id not in self._by_id:
            text = self._text_by_id(schema_id)
            if text is None:
                return None
            self._by_id[schema_id] = fastavro.parse_schema(plain(json.loads(text)))
        return self._by_id[schema_id]


class Record(NamedTuple):
    """One record of the log.

    ``at``: the time of the record in ms: if ``timed`` is True, the append time by the broker's clock, else the writer's
    time. ``fact``: the fact's name; None if the value is not an event, and then ``why`` is the reason. ``head``,
    ``body``: the fields of the event's header and of its fact. ``raw``: the bytes of the value.
    """

    topic: str
    partition: int
    offset: int
    at: int
    fact: str | None = None
    head: Mapping[str, Any] = {}
    body: Mapping[str, Any] = {}
    raw: bytes | None = None
    why: str = ""
    timed: bool = True

    @property
    def place(self) -> tuple[str, int, int]:
        """The position of the record: topic, partition and offset."""
        return self.topic, self.partition, self.offset

    @property
    def release(self) -> tuple[str, int, int]:
        """The release to which the record belongs: job id, run and release number."""
        return self.head["job_id"], self.head["run"], self.head["release"]

    @property
    def position(self) -> str:
        """The position as text: ``topic[partition]@offset``."""
        return f"{self.topic}[{self.partition}]@{self.offset}"


def show(record: Record) -> str:
    """Return one line of text that describes a record."""
    head = record.head
    subject = f" {head['job_id']} run {head['run']} release {head['release']}" if head else f" {record.why}"
    return f"{record.fact}{subject} at {record.position} ({record.at})"
