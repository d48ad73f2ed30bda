"""The local copy of the coordinator's rows: a Faust table in RocksDB, or in memory if no folder can be written.

`jobledger.streams.coordinator.table` decides which instance may write, and writes the changelog records that make a row
durable. A row is written here after its changelog record was acknowledged, so the local copy is never ahead of the
changelog. After a rebalance Faust restores the copy from the changelog. A row from a later event then replaces a row
from an earlier event, in whatever order the rows were written. So the late write of a paused instance changes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from jobledger.errors import SchemaError
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger
from jobledger.streams.coordinator.rules.schedule_rows import decode_row, newer, of_unknown_kind

try:
    import faust
    import rocksdict
    from faust.stores import memory, rocksdb
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.coordinator")

# Faust's defaults are sized for one large table: 64 MB of write buffer and 2 GB of cache for every partition.
ROCKSDB_OPTIONS = {"write_buffer_size": 8 << 20, "block_cache_size": 16 << 20, "max_open_files": 256}

#: A row's key and its bytes; None deletes it.
Put = tuple[bytes, bytes | None]


class Rows(Protocol):
    """The local copy of the table, as the coordinator uses it."""

    #: (partition, key) of rows whose last changelog record is older than the local row. These rows must be written to
    #: the changelog again.
    overtaken: set[tuple[int, bytes]]
    #: The error that prevents the copy from being restored, or None. Faust would only log a warning and retry forever.
    failure: Exception | None

    def get(self, partition: int, key: bytes) -> bytes | None:
        """Return a row's bytes, or None."""

    def write(self, partition: int, puts: Iterable[Put], changelog_offset: int) -> None:
        """Store rows whose changelog records were acknowledged, the last one at ``changelog_offset``: all or none."""

    def scan(self, partition: int, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """Return up to ``limit`` rows in key order: those with keys above ``after``, or the first ones (None)."""


def merged(current: bytes | None, incoming: bytes) -> bytes | None:
    """Return ``incoming`` if it replaces ``current``; None if ``incoming`` is older or is not a row.

    Raises `SchemaError` for a row of a kind that only a later version knows.
    """
    try:
        row = decode_row(incoming)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        if of_unknown_kind(incoming):
            raise SchemaError(
                f"a row on the changelog is of a kind that this coordinator does not know ({incoming[:16].hex()}…): it was "
                "written by a later version; upgrade this coordinator"
            ) from exc
        LOG.error("a changelog record is not a row and was skipped: %s…", incoming[:16].hex())
        return None
    if current is None or newer(row, decode_row(current)):
        return incoming
    return None


def apply_changelog(rows: Rows, batch: Iterable[Any]) -> None:
    """Apply changelog records to ``rows`` for Faust. A row from a later event replaces one from an earlier event.

    Each partition's rows and its changelog offset are written in one call of `Rows.write`. An error is stored in
    `Rows.failure` and raised.
    """
    try:
        _apply(rows, batch)
    except Exception as exc:
        rows.failure = exc
        raise


def _apply(rows: Rows, batch: Iterable[Any]) -> None:
    seen: dict[int, dict[bytes, bytes | None]] = defaultdict(dict)
    offsets: dict[int, int] = {}
    for event in batch:
        message = event.message
        partition, key, value = message.partition, message.key, message.value
        offsets[partition] = max(message.offset, offsets.get(partition, -1))
        if key is None:
            continue
        if value is not None:
            known = seen[partition]
            value = merged(known[key] if key in known else rows.get(partition, key), value)
            if value is None:
                rows.overtaken.add((partition, key))
                continue
        rows.overtaken.discard((partition, key))
        seen[partition][key] = value
    for partition, offset in offsets.items():
        rows.write(partition, seen[partition].items(), offset)


class RocksRows(rocksdb.Store):
    """`Rows` in one RocksDB per partition. The files survive a restart, which replays only newer changelog records."""

    def __post_init__(self) -> None:
        self.overtaken: set[tuple[int, bytes]] = set()
        self.failure: Exception | None = None

    def get(self, partition: int, key: bytes) -> bytes | None:  # type: ignore[override]
        """Return a row's bytes, or None."""
        db = self._dbs.get(partition)
        data: bytes | None = None if db is None else db.get(key)
        return data

    def write(self, partition: int, puts: Iterable[Put], changelog_offset: int) -> None:
        """Store acknowledged rows, and the changelog offset up to which rows are stored, in one atomic write."""
        db = self._dbs.get(partition)
        if db is None:
            # Another instance owns the partition now. If this instance gets the partition again, Faust restores the
            # copy from the changelog.
            return
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in puts:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(self.offset_key, str(changelog_offset).encode())
        db.write(batch)

    def scan(self, partition: int, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """Return rows above ``after`` in key order."""
        rows: list[tuple[bytes, bytes]] = []
        db = self._dbs.get(partition)
        if db is None:
            return rows
        # Start at the smallest key above ``after``, so that the last row is not returned again.
        for key, value in db.items(from_key=b"" if after is None else after + b"\0"):
            if key != self.offset_key:
                rows.append((key, value))
                if len(rows) >= limit:
                    break
        return rows

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        """Apply changelog records for Faust, as `apply_changelog` does."""
        apply_changelog(self, batch)

    def revoke_partitions(self, table: Any, tps: Any) -> None:
        """Close the copies of revoked partitions.

        Faust itself leaves this to the garbage collector. If a partition is assigned again before its old copy is
        collected, the partition's files are locked, and Faust crashes after 30 s of retries.
        """
        for tp in tps:
            if tp.topic in table.changelog_topic.topics:
                self._close(tp.partition)

    async def stop(self) -> None:
        """Close all copies."""
        for partition in list(self._dbs):
            self._close(partition)

    def _close(self, partition: int) -> None:
        db = self._dbs.pop(partition, None)
        if db is not None:
            db.close()


class MemoryRows(memory.Store[bytes, bytes]):
    """`Rows` in dictionaries, used if no folder can be written. A restart replays the whole changelog."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.overtaken: set[tuple[int, bytes]] = set()
        self.failure: Exception | None = None
        self._parts: dict[int, dict[bytes, bytes]] = defaultdict(dict)
        self._sorted: tuple[int, list[bytes]] | None = None

    def get(self, partition: int, key: bytes) -> bytes | None:  # type: ignore[override]
        """Return a row's bytes, or None."""
        return self._parts[partition].get(key)

    def write(self, partition: int, puts: Iterable[Put], changelog_offset: int) -> None:
        """Store acknowledged rows."""
        rows = self._parts[partition]
        for key, value in puts:
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value

    def scan(self, partition: int, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """Return rows above ``after`` in key order, but only rows that existed when the scan began (``after`` None)."""
        if after is None or self._sorted is None or self._sorted[0] != partition:
            self._sorted = (partition, sorted(self._parts[partition]))
        rows, keys = self._parts[partition], self._sorted[1]
        start = 0 if after is None else bisect_right(keys, after)
        chunk = keys[start : start + limit]
        return [(key, rows[key]) for key in chunk if key in rows]

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        """Apply changelog records for Faust, as `apply_changelog` does."""
        apply_changelog(self, batch)

    async def on_rebalance(self, assigned: Any, revoked: Any, newly_assigned: Any, generation_id: int = 0) -> None:
        """Drop the rows of revoked partitions. If one is assigned again, its whole changelog is replayed."""
        for tp in revoked:
            if tp.topic in self.table.changelog_topic.topics:
                self._parts.pop(tp.partition, None)


class RowTable(faust.Table[bytes, bytes]):
    """A Faust table that restores into `Rows`. Rows are never written through Faust."""

    def _new_store(self) -> Any:
        durable = self.app.conf.store.scheme == "rocksdb"
        options: dict[str, Any] = {
            "table_name": self.name,
            "key_type": self.key_type,
            "key_serializer": self.key_serializer,
            "value_serializer": self.value_serializer,
            "value_type": self.value_type,
            "loop": self.loop,
        }
        if durable:
            return RocksRows("rocksdb://", self.app, self, options=dict(ROCKSDB_OPTIONS), **options)
        return MemoryRows("memory://", self.app, self, options={}, **options)
