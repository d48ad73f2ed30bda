"""The topics of a namespace as they lie in the log, read and decoded by hand.

Imports nothing of Jobledger: the frame is cut here, and the schema comes from the file. Part of `independent`.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fastavro
import fastavro.schema
from confluent_kafka import Consumer, KafkaException, TopicPartition

T = TypeVar("T")

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "schemas" / "job_event.avsc"
SINGLE_OBJECT = b"\xc3\x01"


def fingerprint(schema_text: str) -> bytes:
    """CRC-64-AVRO of the canonical form, little endian (Avro specification, "Schema Fingerprints")."""
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
    """A schema without logical types, so that times stay the numbers they are."""
    if isinstance(node, list):
        return [plain(n) for n in node]
    if isinstance(node, dict):
        return {k: plain(v) for k, v in node.items() if k != "logicalType"}
    return node


class Schemas:
    """Writers' schemas by fingerprint: the file's own, and what was published."""

    def __init__(self) -> None:
        self._by_mark: dict[bytes, Any] = {}
        self.add(SCHEMA_FILE.read_text(encoding="utf-8"))

    def add(self, text: str) -> None:
        """Take one more. Raises whatever a text that is no schema makes the parser raise."""
        self._by_mark[fingerprint(text)] = fastavro.parse_schema(plain(json.loads(text)))

    def decode(self, value: bytes | None) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """The header, the fact's bare name and the fact. Raises `ValueError` saying why not."""
        if value is None:
            raise ValueError("null")
        if value[:2] != SINGLE_OBJECT or len(value) < 10:
            raise ValueError("framing")
        schema = self._by_mark.get(value[2:10])
        if schema is None:
            raise ValueError("unknown schema")
        try:
            datum: Any = fastavro.schemaless_reader(io.BytesIO(value[10:]), schema, None, return_record_name=True)
            name, fact = datum["fact"]
        except Exception as exc:
            raise ValueError(f"damaged: {exc!r}") from exc
        return datum, str(name).rsplit(".", 1)[-1], fact


class Record(NamedTuple):
    """One record of the log. ``at``: append time, ms. ``fact`` None: it is no event, ``why`` says so."""

    topic: str
    partition: int
    offset: int
    at: int
    fact: str | None = None
    head: Mapping[str, Any] = {}
    body: Mapping[str, Any] = {}
    raw: bytes | None = None
    why: str = ""

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it stands."""
        return self.topic, self.partition, self.offset

    @property
    def release(self) -> tuple[str, int, int]:
        """Which job, run and release it speaks of."""
        return self.head["job_id"], self.head["run"], self.head["release"]


@dataclass
class Log:
    """Everything a namespace's topics hold. ``committed``, ``ends``: by (topic, partition), of the work topics."""

    namespace: str
    records: list[Record] = field(default_factory=list)
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)

    def work(self) -> Iterable[Record]:
        """Records of work topics."""
        return (r for r in self.records if r.topic.startswith(f"{self.namespace}.jobs."))

    def of(self, topic: str) -> Iterable[Record]:
        """Records of one other topic, by its short name."""
        return (r for r in self.records if r.topic == f"{self.namespace}.{topic}")


def read(bootstrap: str, namespace: str, timeout: float = 120.0) -> Log:
    """The topics of a namespace from their first offset to the ends they have now."""
    base = {"bootstrap.servers": bootstrap, "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer({**base, "group.id": "independent", "enable.partition.eof": False})
    log = Log(namespace)
    try:
        names = [
            t
            for t in _patiently(lambda: consumer.list_topics(timeout=5), timeout).topics.items()
            if t[0].startswith(namespace + ".")
        ]
        kept = {f"{namespace}.{n}" for n in ("lifecycle", "coordination", "dead-letter", "control", "schemas")}
        places = [
            (name, partition)
            for name, meta in names
            if name in kept or name.startswith(f"{namespace}.jobs.")
            for partition in meta.partitions
        ]
        if not places:
            raise SystemExit(f"{bootstrap} has no topic of namespace {namespace}")
        # What is committed before what is written: while workers run, a job may end and be committed between the two.
        log.committed = _committed(
            base, namespace, [p for p in places if p[0].startswith(f"{namespace}.jobs.")], timeout
        )
        # Schemas first: what they decode comes after.
        schemas = Schemas()
        for first in (True, False):
            chosen = [p for p in places if (p[0] == f"{namespace}.schemas") is first]
            ends = {p: _end(consumer, p, timeout) for p in chosen}
            for message in _drain(consumer, ends, timeout):
                topic, partition, offset = message.topic(), message.partition(), message.offset()
                where = (topic, partition, offset, message.timestamp()[1])
                value = message.value()
                if first:
                    try:
                        schemas.add(value.decode())
                        log.records.append(Record(*where, raw=value, why="schema"))
                    except Exception as exc:  # noqa: BLE001  # a text that is no schema raises whatever it likes
                        log.records.append(Record(*where, raw=value, why=f"no schema: {exc!r}"))
                    continue
                try:
                    head, fact, body = schemas.decode(value)
                    log.records.append(Record(*where, fact, head, body, value))
                except ValueError as exc:
                    log.records.append(Record(*where, raw=value, why=str(exc)))
            log.ends.update({p: end for p, end in ends.items() if p[0].startswith(f"{namespace}.jobs.")})
    finally:
        consumer.close()
    return log


def _committed(
    base: dict[str, Any], namespace: str, places: list[tuple[str, int]], timeout: float
) -> dict[tuple[str, int], int]:
    """The offsets that the workers' groups have committed on their work topics."""
    committed = {}
    for topic in {topic for topic, _ in places}:
        asker = Consumer({**base, "group.id": f"{namespace}.worker.{topic.removeprefix(f'{namespace}.jobs.')}"})
        try:
            wanted = [TopicPartition(t, p) for t, p in places if t == topic]
            for found in _patiently(partial(asker.committed, wanted, timeout=5), timeout):
                committed[found.topic, found.partition] = max(0, found.offset)
        finally:
            asker.close()
    return committed


def _end(consumer: Consumer, place: tuple[str, int], timeout: float) -> int:
    low_high = _patiently(lambda: consumer.get_watermark_offsets(TopicPartition(*place), timeout=5), timeout)
    return int(low_high[1])


def _patiently(ask: Callable[[], T], timeout: float) -> T:
    """Ask again while the broker is away or has not taken its partitions up yet."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return ask()
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _drain(consumer: Consumer, ends: Mapping[tuple[str, int], int], timeout: float) -> Iterable[Any]:
    where = [TopicPartition(topic, partition, 0) for (topic, partition), end in ends.items() if end]
    left = {(p.topic, p.partition) for p in where}
    consumer.assign(where)
    deadline = time.monotonic() + timeout
    while left:
        for message in consumer.consume(2000, 0.1):
            if message.error() is not None:
                continue
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            assert topic is not None and partition is not None and offset is not None  # noqa: PT018  # for the types
            if offset < ends[topic, partition]:
                yield message
        for at in consumer.position(where):
            if at.offset >= ends[at.topic, at.partition]:
                left.discard((at.topic, at.partition))
        if time.monotonic() > deadline:
            raise TimeoutError(f"not read within {timeout:g} s: {sorted(left)}")
    consumer.unassign()


def show(record: Record) -> str:
    """A record in one line."""
    head = record.head
    who = f" {head['job_id']} run {head['run']} release {head['release']}" if head else f" {record.why}"
    return f"{record.fact}{who} at {record.topic}[{record.partition}]@{record.offset} ({record.at})"


def life_of(log: Log, job_id: str) -> list[str]:
    """All that the log says of one job, in order of time: for a failure's message."""
    return [show(r) for r in sorted(log.records, key=lambda r: (r.at, r.place)) if r.head.get("job_id") == job_id]
