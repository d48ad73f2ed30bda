"""Remembers which releases were in a partition recently, so that only the first record of a release there counts.

A release is (job, run, release). The memory holds 64-bit hashes in open-addressed tables of machine words: eight bytes
for each slot and no object for each release, so a full memory takes a few megabytes for each partition and does not
grow further. With a full memory, the probability that a new release has the hash of another release is about 10^-14 for
each record. The hash is seeded per process, so nobody can choose ids that collide.
"""

from __future__ import annotations

import io
import json
from array import array
from typing import Any

import fastavro
from confluent_kafka import Message

from jobledger.errors import SchemaError
from jobledger.schemas import codec
from jobledger.schemas.events import Fact, settles
from jobledger.schemas.fast_path import glance

#: Each partition's memory has at least the last so many of the releases that were added to it.
REMEMBERED = 100_000
#: A new owner reads the work records of the last so many milliseconds, but at most the last `REMEMBERED` records.
REMEMBERED_MS = 10 * 60 * 1000

_FIRST_SLOTS = 1 << 10
#: Minimum number of slots for each release in a full table: with fewer slots, probing takes long.
_ROOM = 1.3
_PREFIX = codec.MAGIC + codec.FINGERPRINT
#: The first fields of an event: event_id, job_id, run, attempt, release. Its Avro bytes begin with them.
_PEEK = fastavro.parse_schema(
    {"type": "record", "name": "JobEventHead", "fields": json.loads(codec.SCHEMA_TEXT)["fields"][:5]}
)


def release_key(job_id: str, run: int, release: int) -> int:
    """Return the hash by which a release is remembered; never 0. Valid within this process only."""
    return hash((job_id, run, release)) & 0xFFFF_FFFF_FFFF_FFFF or 1


class ReleaseMemory:
    """Remembers at least the latest ``capacity`` releases, at most twice as many, in two generations. When the newer
    generation is full, the older one is dropped.

    Each generation is a table with linear probing, whose size is a power of two; 0 marks a free slot. A table grows
    when half of its slots are used, up to the smallest size that holds the capacity: a megabyte for the default
    capacity.
    """

    __slots__ = ("_capacity", "_count", "_limit", "_mask", "_most", "_old", "_old_count", "_old_mask", "_slots")

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self._capacity = capacity
        self._most = max(_FIRST_SLOTS, 1 << int(capacity * _ROOM).bit_length())
        self._begin()
        self._old, self._old_mask, self._old_count = array("Q", bytes(8)), 0, 0

    def _begin(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))
        self._mask, self._limit, self._count = _FIRST_SLOTS - 1, _FIRST_SLOTS // 2, 0

    def __len__(self) -> int:
        return self._count + self._old_count

    def __contains__(self, key: int) -> bool:
        return bool(self._slots[_slot(self._slots, self._mask, key)]) or bool(
            self._old_count and self._old[_slot(self._old, self._old_mask, key)]
        )

    def add(self, key: int) -> bool:
        """Add a release, given by its `release_key`. Return False if the release was known, else True."""
        # `_slot` is inlined here: this runs for every record.
        if self._old_count:
            slots, mask = self._old, self._old_mask
            at = key & mask
            while stored := slots[at]:
                if stored == key:
                    return False
                at = (at + 1) & mask
        slots, mask = self._slots, self._mask
        at = key & mask
        while stored := slots[at]:
            if stored == key:
                return False
            at = (at + 1) & mask
        slots[at] = key
        self._count += 1
        if self._count > self._limit:
            self._grow()
        if self._count >= self._capacity:
            self._old, self._old_mask, self._old_count = self._slots, self._mask, self._count
            self._begin()
        return True

    def _grow(self) -> None:
        size = min((self._mask + 1) * 4, self._most)
        bigger = array("Q", bytes(8 * size))
        for key in self._slots:
            if key:
                bigger[_slot(bigger, size - 1, key)] = key
        self._slots, self._mask = bigger, size - 1
        self._limit = size // 2 if size < self._most else size


def _slot(slots: array[int], mask: int, key: int) -> int:
    """Return the slot that holds ``key``, or the free slot where it would be put."""
    at = key & mask
    while (stored := slots[at]) and stored != key:
        at = (at + 1) & mask
    return at


def release_key_of(message: Message, decoder: codec.Decoder) -> int | None:
    """Return the `release_key` of a work record, from its headers or its first fields; None if the record cannot be
    read.

    The headers are ``jl-job``, ``jl-run`` and ``jl-release`` (decimal text); writers other than Jobledger may omit
    them. Raises `RegistryNeeded` if the record can be read only with a Schema Registry.
    """
    headers = message.headers()
    if headers:
        named = dict(headers)
        try:
            return release_key(_text(named["jl-job"]), int(_text(named["jl-run"])), int(_text(named["jl-release"])))
        except (KeyError, ValueError, UnicodeDecodeError, TypeError):
            pass  # foreign or incomplete headers: the value also has the fields
    value = message.value()
    if not isinstance(value, bytes):
        return None
    value = decoder.own_form(value) or value
    if value.startswith(_PREFIX):
        try:
            head: Any = fastavro.schemaless_reader(io.BytesIO(value[len(_PREFIX) :]), _PEEK, None)
            return release_key(head["job_id"], head["run"], head["release"])
        except Exception:  # noqa: BLE001  # damaged bytes make the reader raise any exception
            return None
    try:
        event = decoder.decode(value)
    except SchemaError:
        return None
    return release_key(event.job_id, event.run, event.release)


def settling_fact_of(message: Message, decoder: codec.Decoder) -> tuple[tuple[str, int, int], Fact] | None:
    """Return the release and the fact of a lifecycle record that settles a release; None for any other record.

    Raises `RegistryNeeded` if the record can be read only with a Schema Registry.
    """
    value = message.value()
    raw = (decoder.own_form(value) or value) if isinstance(value, bytes) else None
    seen = None if raw is None else glance(raw)
    if seen is not None:
        job_id, run, release, fact = seen[0], seen[1], seen[2], seen[7]
    else:
        try:
            event = decoder.decode(raw)
        except SchemaError:
            return None  # the materializer reports the unreadable record
        job_id, run, release, fact = event.job_id, event.run, event.release, event.fact
    return ((job_id, run, release), fact) if settles(fact) else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
