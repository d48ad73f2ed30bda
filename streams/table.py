"""The coordinator's rows: durable on the changelog first, then in the local copy; restored, mended and swept here.

Whoever changes rows does it through `Table.keep`, one at a time. Rows that were decided on and are not durable yet lie
over the others, so that the next events see them.

Rows name the offset of the event that made them, and outlive the log it stands in: the topic was made anew, or has lost
its end, and offsets begin again below those of the rows. All that comes would look like seen. So what is compared with
rows are shifted offsets (`Table.at`): a partition that ends below its rows gets a shift that lifts its first offset
above all of them, written down in its floor before anything is decided.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from jobledger.logger import get_logger
from jobledger.streams.aio import AckedWriter, Delivered, Ends, first_error
from jobledger.streams.decisions import raised_floor, sweepable
from jobledger.streams.faust_app import Group
from jobledger.streams.ownership import Ownership, Superseded
from jobledger.streams.schedules import NO_FLOOR, Floor, Kept, Row, decode_row, encode_row, floor_key, is_marker
from jobledger.streams.timers import Timers, wake_at
from jobledger.writer import Outgoing

LOG = get_logger("jobledger.coordinator")

#: Rows looked at in one step of a sweep or a restoration; between steps the event loop is given back.
SCAN_CHUNK = 2_000
#: Rows written at once by sweeps and mendings.
WRITE_CHUNK = 500

Key = tuple[int, bytes]
Put = tuple[int, bytes, bytes | None]


class Table:
    """Rows by (partition, key). ``changelog``: its topic. ``step`` is called between any two steps, for crash tests."""

    def __init__(
        self,
        changelog: str,
        group: Group,
        writer: AckedWriter,
        ends: Ends,
        ownership: Ownership,
        step: Callable[[str], None],
    ) -> None:
        self._changelog, self._group, self._writer, self._ends = changelog, group, writer, ends
        self._ownership, self._step = ownership, step
        self._lock = asyncio.Lock()
        self._next: dict[int, int] = {}  # the changelog offset that the next row written here must get
        self._floors: dict[int, int] = {}
        self._shifts: dict[int, int] = {}
        self._pending: dict[Key, Row] = {}
        self.scheduled: Counter[int] = Counter()
        self.restored = 0  # rows that restorations have looked at or mended so far: shows that one comes on

    def row(self, partition: int, key: bytes) -> Row | None:
        """A job's row, decided on or durable."""
        pending = self._pending.get((partition, key))
        if pending is not None:
            return pending
        data = self._group.rows.get(partition, key)
        row = None if data is None else decode_row(data)
        return None if isinstance(row, Floor) else row

    def at(self, partition: int, offset: int) -> int:
        """An offset of the source topic as it is compared with those of rows and floors."""
        return offset + self._shifts.get(partition, 0)

    def floor(self, partition: int) -> int:
        """Every event at or below it was dealt with."""
        return self._floors.get(partition, NO_FLOOR)

    def expect(self, rows: Mapping[Key, Row]) -> None:
        """These rows were decided on: `row` returns them from now on."""
        self._pending.update(rows)

    async def keep(self, rows: Mapping[Key, Row], epoch: int) -> None:
        """Make rows durable, if the partitions are still this instance's; else `Superseded`, and nothing is written."""
        async with self._lock:
            await self._ownership.certain(epoch)
            await self._write([(partition, key, encode_row(row)) for (partition, key), row in rows.items()])
            for key, row in rows.items():
                if self._pending.get(key) is row:
                    del self._pending[key]

    async def _write(self, puts: Sequence[Put]) -> None:
        """On the changelog, acknowledged, then locally.

        The changelog's offsets must follow one another: in a gap somebody else has written, who takes this partition
        for its own as well. If the broker confirms this instance, that was a late write of one that had been paused,
        and what it covered is written again; else this is the late one, and `Superseded` is raised.
        """
        while puts:
            sent = await self._writer.post(
                [Outgoing(self._changelog, value, key, partition) for partition, key, value in puts]
            )
            self._step("rows-sent")
            outcomes = await sent
            error = first_error(outcomes)
            if error is not None:
                raise error
            self._step("rows-acknowledged")
            own: dict[int, list[int]] = {}
            for outcome in outcomes:
                assert isinstance(outcome, Delivered)
                own.setdefault(outcome.partition, []).append(outcome.offset)
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
            puts = await self._covered(foreign)

    async def _covered(self, foreign: Mapping[int, set[int]]) -> list[Put]:
        """The rows, as they are here, whose keys somebody else has written at these offsets of the changelog."""
        puts: list[Put] = []
        for partition, offsets in foreign.items():
            keys = await self._ends.keys(self._changelog, partition, offsets)
            LOG.warning(
                "%s[%d]: %d late writes of another coordinator are undone", self._changelog, partition, len(keys)
            )
            puts += [(partition, key, self._group.rows.get(partition, key)) for key in sorted(keys)]
        return puts

    # -- restoring ---------------------------------------------------------------------------------------------------

    async def restore(self, partitions: set[int], ends: Mapping[int, int]) -> dict[int, Timers]:
        """After Faust has restored the local copy: floors, and the timers of every scheduled row. ``ends``: where the
        partitions of the source topic end."""
        async with self._lock:
            self._pending.clear()
            self._floors.clear()
            self._shifts.clear()
            self.scheduled.clear()
            self._next = {p: end for p, (_, end) in (await self._ends.of(self._changelog, partitions)).items()}
            timers = {partition: await self._timers_of(partition, ends[partition]) for partition in sorted(partitions)}
            await self._mend(partitions)
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
        if last >= self.at(partition, end):
            await self._shift(partition, end, last)
        self.scheduled[partition] = len(entries)
        return Timers(entries)

    async def _shift(self, partition: int, end: int, last: int) -> None:
        """Let the log's offsets begin above ``last``, the last one in rows, which the log that ends now never had."""
        floor = Floor(partition, self.floor(partition), last + 1)
        LOG.error(
            "partition %d of the coordination topic ends at %d, and the coordinator's table is ahead of it by %d records: "
            "the topic was recreated, or lost its end. Every event in it is treated as new, so releases of the last "
            "minutes may be repeated; information that was only in the lost records is lost",
            *(partition, end, last - self.at(partition, end) + 1),
        )
        await self._write([(partition, floor_key(partition), encode_row(floor))])
        self._shifts[partition] = floor.shift

    async def _mend(self, partitions: set[int]) -> None:
        """Write rows again whose changelog ends with an older version: an instance that was paused wrote it late."""
        rows = self._group.rows
        puts: list[Put] = []
        for partition, key in sorted(rows.overtaken):
            if partition in partitions:
                puts.append((partition, key, rows.get(partition, key)))
                rows.overtaken.discard((partition, key))
        for start in range(0, len(puts), WRITE_CHUNK):
            await self._write(puts[start : start + WRITE_CHUNK])
            self.restored += WRITE_CHUNK
        if puts:
            LOG.warning("%d rows were written to the changelog again: a late write had covered them", len(puts))

    # -- sweeping ----------------------------------------------------------------------------------------------------

    async def sweep(self, partition: int, now_ms: Callable[[], int], keep_ms: int) -> int:
        """One pass over a partition: delete markers that are committed and older than ``keep_ms``; how many."""
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
            await asyncio.sleep(0.005)  # a pass takes its time: nothing waits for it
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
        await self._ownership.certain(epoch)
        committed = self._group.committed(partition)
        if committed is None or not self._ownership.undisputed:
            return 0
        committed = self.at(partition, committed)
        gone: list[bytes] = []
        for key, data in marked:
            # Scanned without the lock: the row may have been replaced meanwhile, or be about to.
            unchanged = self._group.rows.get(partition, key) == data and (partition, key) not in self._pending
            if unchanged and sweepable(decode_row(data), committed, now_ms, keep_ms):
                gone.append(key)
        if not gone:
            return 0
        floor, shift = raised_floor(self.floor(partition), committed), self._shifts.get(partition, 0)
        self._step("sweep-begins")
        await self._write([(partition, floor_key(partition), encode_row(Floor(partition, floor, shift)))])
        self._floors[partition] = floor
        self._step("floor-kept")
        await self._ownership.certain(epoch)
        await self._write([(partition, key, None) for key in gone])
        self._step("swept")
        return len(gone)
