"""Write the coordinator's rows to the changelog, then to the local copy. Restore, repair and sweep the rows.

Only `Table` writes rows to the changelog, for one caller at a time (a lock). The local copy is changed by `Table` and
by Faust's restoring. Rows that were decided on but are not durable yet are held in memory. `Table.row` prefers these
rows, so that the decisions on the next events use them.

A row contains the offset of the event from which the row was made. If the coordination topic is recreated or loses its
end, new offsets are below those in the rows, and new events would be dropped as duplicates. So offsets are shifted
before they are compared with rows (`Table.shifted`). If a partition ends below the offsets in its rows, the partition
gets a shift with which its first offset is above all offsets in its rows. The shift is stored in the partition's floor
before any event of the partition is decided on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from jobledger.log.writer import Outgoing
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.streams.coordinator.faust.async_producer import AckedWriter, Delivered, LogBounds, first_error
from jobledger.streams.coordinator.faust.faust_app import Group
from jobledger.streams.coordinator.ownership import Ownership, Superseded
from jobledger.streams.coordinator.rules.decisions import raised_floor, sweepable
from jobledger.streams.coordinator.rules.schedule_rows import (
    NO_FLOOR,
    Floor,
    Kept,
    Row,
    decode_row,
    encode_row,
    floor_key,
    is_marker,
)
from jobledger.streams.coordinator.rules.timers import Timers, wake_at

LOG = get_logger("jobledger.coordinator")

#: Largest number of rows read in one step of a sweep or a restoration. Between two steps, other tasks of the event loop
#: can run.
SCAN_CHUNK = 2_000
#: Largest number of rows that a sweep or a repair writes at once.
WRITE_CHUNK = 500

Key = tuple[int, bytes]
Put = tuple[int, bytes, bytes | None]


class Table:
    """Hold the rows by (partition, key). ``changelog``: name of the changelog topic. ``step``: called between any two
    steps, for crash tests."""

    def __init__(
        self,
        changelog: str,
        group: Group,
        writer: AckedWriter,
        log_bounds: LogBounds,
        ownership: Ownership,
        step: Callable[[str], None],
    ) -> None:
        self._changelog, self._group, self._writer, self._log_bounds = changelog, group, writer, log_bounds
        self._ownership, self._step = ownership, step
        self._lock = asyncio.Lock()
        self._next: dict[int, int] = {}  # by partition: changelog offset expected for the next own row
        self._floors: dict[int, int] = {}
        self._shifts: dict[int, int] = {}
        self._pending: dict[Key, Row] = {}
        self.kept: Counter[int] = Counter()  # number of `Kept` rows by partition
        self.restored = 0  # rows that restorations have read or repaired so far: shows their progress

    def row(self, partition: int, key: bytes) -> Row | None:
        """Return a job's row, whether it is durable or only decided on; None if the job has no row."""
        pending = self._pending.get((partition, key))
        if pending is not None:
            return pending
        data = self._group.rows.get(partition, key)
        row = None if data is None else decode_row(data)
        return None if isinstance(row, Floor) else row

    def shifted(self, partition: int, offset: int) -> int:
        """Return an offset of the source topic with the shift added, for a comparison with those in rows and floors."""
        return offset + self._shifts.get(partition, 0)

    def floor(self, partition: int) -> int:
        """Return the partition's floor: every event at or below this (shifted) offset was processed."""
        return self._floors.get(partition, NO_FLOOR)

    def add_pending(self, rows: Mapping[Key, Row]) -> None:
        """Add rows that were decided on. From now on `row` returns these rows, before they are durable."""
        self._pending.update(rows)

    async def make_durable(self, rows: Mapping[Key, Row], epoch: int) -> None:
        """Make rows durable. Raises `Superseded` if partitions were assigned or revoked since ``epoch``, or if the
        membership is not certain; or the error of a record that was not delivered."""
        async with self._lock:
            await self._ownership.require(epoch)
            await self._write([(partition, key, encode_row(row)) for (partition, key), row in rows.items()])
            for key, row in rows.items():
                if self._pending.get(key) is row:
                    del self._pending[key]

    async def _write(self, puts: Sequence[Put]) -> None:
        """Write rows to the changelog, wait for the acknowledgements, then write the rows to the local copy.

        The changelog offsets of these writes must follow one another. A gap means that another instance, which also
        considers itself the owner of the partition, has written there. If the broker confirms this instance's
        membership, the other instance was paused and wrote late; the rows that the late write has overwritten are
        written again. If the broker does not confirm the membership, this instance is the late one. Raises `Superseded`
        in that case, or the error of a record that was not delivered.
        """
        while puts:
            sent = await self._writer.post(
                [Outgoing(self._changelog, value, key, partition) for partition, key, value in puts]
            )
            self._step("rows-sent")
            deliveries = await sent
            error = first_error(deliveries)
            if error is not None:
                raise error
            self._step("rows-acknowledged")
            own: dict[int, list[int]] = {}
            for delivery in deliveries:
                assert isinstance(delivery, Delivered)
                own.setdefault(delivery.partition, []).append(delivery.offset)
            foreign = {
                partition: strangers
                for partition, offsets in own.items()
                if (strangers := set(range(self._next.get(partition, min(offsets)), max(offsets))) - set(offsets))
            }
            if foreign and not await self._ownership.confirm(doubt=True):
                raise Superseded
            for partition, offsets in own.items():
                self._next[partition] = max(offsets) + 1
                rows = [(key, value) for p, key, value in puts if p == partition]
                self._group.rows.write(partition, rows, max(offsets))
            puts = await self._rows_to_repair(foreign)

    async def _rows_to_repair(self, foreign: Mapping[int, set[int]]) -> list[Put]:
        """Return this instance's rows for the keys that another instance wrote at these changelog offsets."""
        puts: list[Put] = []
        for partition, offsets in foreign.items():
            keys = await self._log_bounds.keys(self._changelog, partition, offsets)
            LOG.warning(
                "%s[%d]: %d late writes of another coordinator are undone", self._changelog, partition, len(keys)
            )
            puts += [(partition, key, self._group.rows.get(partition, key)) for key in sorted(keys)]
        return puts

    # -- restoring ---------------------------------------------------------------------------------------------------

    async def restore(self, partitions: set[int], ends: Mapping[int, int]) -> dict[int, Timers]:
        """Read the rows of ``partitions`` after Faust has restored the local copy. Set floors and shifts, repair rows,
        and return the timers of all kept rows, by partition. ``ends``: end offsets of the source topic, by
        partition."""
        async with self._lock:
            self._pending.clear()
            self._floors.clear()
            self._shifts.clear()
            self.kept.clear()
            bounds = await self._log_bounds.of(self._changelog, partitions)
            self._next = {partition: end for partition, (_, end) in bounds.items()}
            timers = {partition: await self._timers_of(partition, ends[partition]) for partition in sorted(partitions)}
            await self._repair_overtaken(partitions)
            return timers

    async def _timers_of(self, partition: int, end: int) -> Timers:
        entries: list[tuple[int, bytes]] = []
        after: bytes | None = None
        last = NO_FLOOR
        while chunk := self._group.rows.scan(partition, after, SCAN_CHUNK):
            after = chunk[-1][0]
            self.restored += len(chunk)
            for key, data in chunk:
                row = decode_row(data)
                last = max(last, row.offset)
                if isinstance(row, Kept):
                    entries.append((wake_at(row.acts_at), key))
                elif isinstance(row, Floor):
                    self._floors[partition], self._shifts[partition] = row.offset, row.shift
            await asyncio.sleep(0)
        if last >= self.shifted(partition, end):
            await self._shift(partition, end, last)
        self.kept[partition] = len(entries)
        return Timers(entries)

    async def _shift(self, partition: int, end: int, last: int) -> None:
        """Store a shift with which all offsets of the partition are above ``last``, the highest offset in its rows.

        ``end``: the end offset of the source topic's partition, which is not above ``last`` with the present shift.
        """
        floor = Floor(partition, self.floor(partition), last + 1)
        LOG.error(
            "partition %d of the coordination topic ends at %d, and the coordinator's table is ahead of it by %s: "
            "the topic was recreated or truncated. Every event in it is treated as new, so releases of the last "
            "minutes may be repeated; information that was only in the lost records is lost",
            *(partition, end, counted(last - self.shifted(partition, end) + 1, "record")),
        )
        await self._write([(partition, floor_key(partition), encode_row(floor))])
        self._shifts[partition] = floor.shift

    async def _repair_overtaken(self, partitions: set[int]) -> None:
        """Write those rows again whose last changelog record is an older version that a paused instance wrote late."""
        rows = self._group.rows
        puts: list[Put] = []
        for partition, key in sorted(rows.overtaken):
            if partition in partitions:
                puts.append((partition, key, rows.get(partition, key)))
                rows.overtaken.discard((partition, key))
        for start in range(0, len(puts), WRITE_CHUNK):
            chunk = puts[start : start + WRITE_CHUNK]
            await self._write(chunk)
            self.restored += len(chunk)
        if puts:
            LOG.warning(
                "rows that were written to the changelog again, because another coordinator had written older rows late: %d",
                len(puts),
            )

    # -- sweeping ----------------------------------------------------------------------------------------------------

    async def sweep(self, partition: int, now_ms: Callable[[], int], keep_ms: int) -> int:
        """Delete a partition's markers that are below the committed offset and at least ``keep_ms`` old.

        Return the number of deleted markers. ``now_ms()``: returns the time of the broker's clock, ms.
        """
        epoch = self._ownership.epoch
        swept = 0
        after: bytes | None = None
        while self._ownership.undisputed and epoch == self._ownership.epoch:
            chunk = self._group.rows.scan(partition, after, SCAN_CHUNK)
            if not chunk:
                break
            after = chunk[-1][0]
            marked = [(key, data) for key, data in chunk if is_marker(data)]
            for start in range(0, len(marked), WRITE_CHUNK):
                swept += await self._sweep(partition, marked[start : start + WRITE_CHUNK], epoch, now_ms(), keep_ms)
            await asyncio.sleep(0.005)  # slow on purpose: nothing waits for a sweep
        return swept

    async def _sweep(
        self, partition: int, marked: Sequence[tuple[bytes, bytes]], epoch: int, now_ms: int, keep_ms: int
    ) -> int:
        async with self._lock:
            try:
                return await self._sweep_locked(partition, marked, epoch, now_ms, keep_ms)
            except Superseded:
                return 0

    async def _sweep_locked(
        self, partition: int, marked: Sequence[tuple[bytes, bytes]], epoch: int, now_ms: int, keep_ms: int
    ) -> int:
        await self._ownership.require(epoch)
        committed = self._group.committed(partition)
        if committed is None or not self._ownership.undisputed:
            return 0
        committed = self.shifted(partition, committed)
        deletable: list[bytes] = []
        for key, data in marked:
            # The scan did not hold the lock, so the row may have been replaced since, or a decision on it may be
            # pending.
            unchanged = self._group.rows.get(partition, key) == data and (partition, key) not in self._pending
            if unchanged and sweepable(decode_row(data), committed, now_ms, keep_ms):
                deletable.append(key)
        if not deletable:
            return 0
        floor, shift = raised_floor(self.floor(partition), committed), self._shifts.get(partition, 0)
        self._step("sweep-begins")
        await self._write([(partition, floor_key(partition), encode_row(Floor(partition, floor, shift)))])
        self._floors[partition] = floor
        self._step("floor-durable")
        await self._ownership.require(epoch)
        await self._write([(partition, key, None) for key in deletable])
        self._step("swept")
        return len(deletable)
