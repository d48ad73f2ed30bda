"""Which releases a partition has carried lately: the memory behind "first in the partition wins".

A release is (job, run, release). Kept are 64-bit hashes in open-addressed tables of plain machine words: eight bytes a
slot, no object per release, so a full memory is a few megabytes a partition and stays what it is. Two distinct releases
of one partition are taken for the same with a probability of about 10^-14 a record at a full memory; the hash is seeded
per process, so nobody can choose such ids.
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
from jobledger.schemas.glance import glance

#: Records each partition's memory covers at least, as far as it has seen them.
REMEMBERED = 100_000
#: How far back a new owner looks, whichever of this and `REMEMBERED` is less.
REMEMBERED_MS = 10 * 60 * 1000

_FIRST_SLOTS = 1 << 10
#: Slots for each remembered release, at least, in a full table: below it probing gets long.
_ROOM = 1.3
_PREFIX = codec.MAGIC + codec.FINGERPRINT
#: The header's first fields: event_id, job_id, run, attempt, release. A datum's bytes begin with them.
_PEEK = fastavro.parse_schema(
    {"type": "record", "name": "JobEventHead", "fields": json.loads(codec.SCHEMA_TEXT)["fields"][:5]}
)


def release_key(job_id: str, run: int, release: int) -> int:
    """The hash a release is remembered by; never 0. Holds within this process only."""
    return hash((job_id, run, release)) & 0xFFFF_FFFF_FFFF_FFFF or 1


class ReleaseMemory:
    """The latest `REMEMBERED` to twice as many releases: two generations, the older one dropped when the newer is full.

    Each generation is a table of a power of two with linear probing; 0 marks a free slot. It grows when half full, up
    to the smallest size that holds the capacity: a megabyte for the default one.
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
        """Remember a release; False if it was known."""
        # Written out: this runs for every record.
        if self._old_count:
            slots, mask = self._old, self._old_mask
            at = key & mask
            while found := slots[at]:
                if found == key:
                    return False
                at = (at + 1) & mask
        slots, mask = self._slots, self._mask
        at = key & mask
        while found := slots[at]:
            if found == key:
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
    """Where ``key`` stands, or the free slot where it would."""
    at = key & mask
    while (found := slots[at]) and found != key:
        at = (at + 1) & mask
    return at


def key_of(message: Message, decoder: codec.Decoder) -> int | None:
    """The release a work record carries, from its headers or its first fields; None if it cannot be read.

    The headers are ``jl-job``, ``jl-run`` and ``jl-release`` (decimal text); other
    writers than ours may leave them out.
    """
    headers = message.headers()
    if headers:
        named = dict(headers)
        try:
            return release_key(_text(named["jl-job"]), int(_text(named["jl-run"])), int(_text(named["jl-release"])))
        except (KeyError, ValueError, UnicodeDecodeError, TypeError):
            pass  # not ours, or not whole: the value says it too
    value = message.value()
    if not isinstance(value, bytes):
        return None
    value = decoder.own_form(value) or value
    if value.startswith(_PREFIX):
        try:
            head: Any = fastavro.schemaless_reader(io.BytesIO(value[len(_PREFIX) :]), _PEEK, None)
            return release_key(head["job_id"], head["run"], head["release"])
        except Exception:  # noqa: BLE001  # damaged bytes make the reader raise whatever it likes
            return None
    try:
        event = decoder.decode(value)
    except SchemaError:
        return None
    return release_key(event.job_id, event.run, event.release)


def end_of(message: Message, decoder: codec.Decoder) -> tuple[tuple[str, int, int], Fact] | None:
    """Of a record of lifecycle, which release it says the end of, and what; None if it says none.

    Raises `RegistryNeeded` if only a schema registry can tell.
    """
    value = message.value()
    raw = (decoder.own_form(value) or value) if isinstance(value, bytes) else None
    seen = None if raw is None else glance(raw)
    if seen is not None:
        job_id, run, release, fact = seen[0], seen[1], seen[2], seen[6]
    else:
        try:
            event = decoder.decode(raw)
        except SchemaError:
            return None  # the materializer's to report
        job_id, run, release, fact = event.job_id, event.run, event.release, event.fact
    return ((job_id, run, release), fact) if settles(fact) else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
