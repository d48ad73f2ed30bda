"""Tracks which records of one partition are done: the watermark, the completion map and the takeover floor. Pure.

This module owns what a worker commits for a partition: the offset (the *watermark*), and a text of at most 4,096 bytes
in the offset's metadata. The module uses no client, clock or lock; the caller serialises the calls. Any doubt must
result in "not done": jobs may run twice, as documented, but no job may be lost.

The idea of a completion map in the commit's metadata comes from the Confluent Parallel Consumer. The rules below
prevent faults of that library: watermark and map of different moments, an unreadable map that was taken for "done",
reading that stalled at the limit.

`jobledger.log.commit_metadata` has the form of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jobledger.log.commit_metadata import METADATA_LIMIT, Restored, encode, varint_size

#: No more records are taken when the pending records could make the text longer than this share of the limit.
BRAKE = 0.75
_HEAD_ROOM = 60  # characters for version, flag, floor, begun, checksum and separators
_PAYLOAD_BUDGET = (int(METADATA_LIMIT * BRAKE) - _HEAD_ROOM) * 3 // 4  # bytes before base64
#: A bitset over this many records always stays below the brake.
SPAN_BUDGET = _PAYLOAD_BUDGET * 8
#: The next owner need not find the start of a running job if that start is more than this many facts back in the
#: lifecycle partition. This limit bounds what a takeover reads, however long jobs run.
SCAN_MOST = 20_000
#: The next owner looks for late outcomes of suspects in at most this many last facts of the lifecycle partition.
SUSPECT_MOST = 100_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state to commit: all records below ``offset`` are done, and ``metadata`` says which records beyond it are
    done."""

    offset: int
    metadata: str


class PartitionOffsets:
    """Tracks the completion of one partition's records, which are received in the log's order.

    ``restored``: what the last owner committed. ``start_floor``: the high watermark of the lifecycle partition at the
    assignment. Offsets without a record (compaction, transaction markers) count as done once a record with a higher
    offset was received.
    """

    __slots__ = (
        "_ahead",
        "_begun",
        "_end",
        "_hold",
        "_low",
        "_must_find_from",
        "_next_outcome",
        "_pending",
        "_ranges",
        "_running",
        "_since",
        "_suspects_below",
        "_suspects_from",
        "changed",
        "missing",
        "postponed",
    )

    def __init__(self, restored: Restored, start_floor: int) -> None:
        # Offsets that were received and are not done, in the log's order: the first key is the watermark.
        self._pending: dict[int, None] = {}
        self._end = restored.watermark  # all records below were received, or were done before the assignment
        self._low = restored.watermark  # a lower bound of the watermark, cheaper to read
        self._ahead = list(restored.done)[::-1]  # done by former owners, not received yet; lowest last
        self._next_outcome = start_floor
        self._hold: int | None = None
        self._suspects_below = self._suspects_from = 0
        self._must_find_from: dict[int, int] = {}
        # Begun records in the order of their starts, with the lowest lifecycle offset that each start can have.
        self._running: dict[int, int] = {}
        self._begun = restored.begun
        #: The number of done ranges in the last snapshot, and the number of records done since then.
        self._ranges = len(restored.done)
        self._since = 0
        #: The number of pending records that wait in wait queues. Other records will be done before these.
        self.postponed = 0
        #: The number of offsets without a record that were passed over.
        self.missing = 0
        #: Whether a snapshot would differ from the last one.
        self.changed = True
        self._absorb()

    def begin(self, offset: int) -> None:
        """Note that the record is begun: if this process dies, the record's job may be the cause."""
        self._running.setdefault(offset, self._next_outcome)
        if offset >= self._begun:
            self._begun = offset + 1
            self.changed = True

    # -- intake and completion ------------------------------------------------------------------------------------

    def receive(self, offset: int) -> bool:
        """Note that a record was received. Return False if its job must not be run, because the record is already done
        or was received before."""
        if offset < self._end:
            return False
        self.changed = True
        if offset > self._end:
            self.missing += offset - self._end
        ahead = self._ahead
        while ahead and ahead[-1][1] <= offset:
            ahead.pop()
        self._end = offset + 1
        if ahead and ahead[-1][0] <= offset:
            return False
        self._pending[offset] = None
        return True

    def done(self, offset: int) -> None:
        """Mark a record as done, because its outcome and the derived records are durable. Unknown offsets are
        ignored."""
        self._pending.pop(offset, 0)
        self._running.pop(offset, 0)
        self._since += 1
        if self._must_find_from:
            self._must_find_from.pop(offset, None)
        self.changed = True

    def acknowledged(self, lifecycle_offset: int) -> None:
        """Note that a fact of this owner is at this offset of the lifecycle partition."""
        if lifecycle_offset >= self._next_outcome:
            self._next_outcome = lifecycle_offset + 1

    def must_find_from(self, offset: int, lifecycle_offset: int) -> None:
        """Note that the next owner must find the record's outcome from ``lifecycle_offset`` on, because the outcome or
        a derived record is not known to be durable."""
        self._must_find_from[offset] = lifecycle_offset

    def continues_after_next_fact(self, offset: int) -> None:
        """Note that the record's job continues after its next fact. Call this before that fact is sent: the broker then
        appends the fact after all facts that are acknowledged now."""
        self.continues_from(offset, self._next_outcome)

    def continues_from(self, offset: int, lifecycle_offset: int) -> None:
        """Note that the record's job continues. The next owner must find the job's facts from ``lifecycle_offset``
        on."""
        if offset in self._pending:
            known = self._must_find_from.get(offset, lifecycle_offset)
            self._must_find_from[offset] = min(known, lifecycle_offset)

    @property
    def nothing_to_look_up(self) -> bool:
        """Whether the next owner need not look for facts in the log: every known outcome is in the map, no job
        continues after a fact, and no suspect is left. Jobs that run now are not considered."""
        return not self._must_find_from and not self._suspects

    def hold(self, floor: int | None) -> None:
        """Keep the floor at ``floor`` while the map does not yet have all outcomes of a former owner that the takeover
        found. None: compute the floor again."""
        if floor != self._hold:
            self._hold = floor
            self.changed = True

    def suspect(self, below: int, lifecycle_offset: int) -> None:
        """Note that a former owner may have begun records below offset ``below``.

        Until all these records are done, a handover is not clean, so the next owner suspects their jobs, too. The
        former owner may still write outcomes of these jobs. The next owner must find these outcomes from
        ``lifecycle_offset`` on, unless that offset lies more than `SUSPECT_MOST` facts back.
        """
        self._suspects_below, self._suspects_from = below, lifecycle_offset

    @property
    def _suspects(self) -> bool:
        return self.watermark < self._suspects_below

    # -- what is known --------------------------------------------------------------------------------------------

    @property
    def watermark(self) -> int:
        """The watermark: all records below it are done."""
        return next(iter(self._pending), self._end)

    @property
    def end(self) -> int:
        """One beyond the last received record."""
        return self._end

    @property
    def pending(self) -> int:
        """The number of received records that are not done."""
        return len(self._pending)

    @property
    def floor(self) -> int:
        """The takeover floor. Every outcome that is missing in the map, and every start of a running job, is at this
        lifecycle offset or above.

        Facts in flight are appended after every acknowledged outcome, because one idempotent producer writes a
        partition in order. Starts that lie too far back (`SCAN_MOST`) are not counted.
        """
        if self._hold is not None:
            return self._hold
        if self._suspects and self._suspects_from >= self._next_outcome - SUSPECT_MOST:
            return min(self._suspects_from, self._outcomes_floor())
        return self._outcomes_floor()

    def _outcomes_floor(self) -> int:
        running = self._running
        while running:
            record, start = next(iter(running.items()))
            if start >= self._next_outcome - SCAN_MOST:
                return min(start, *self._must_find_from.values()) if self._must_find_from else start
            del running[record]
        return min(self._must_find_from.values(), default=self._next_outcome)

    @property
    def braked(self) -> bool:
        """Whether one more record could, in the worst order of completions, make the text longer than the brake
        allows."""
        far = self._ahead[0][1] if self._ahead else self._end
        if far - self._low < SPAN_BUDGET:
            return False
        self._low = self.watermark
        span = max(far, self._end) - self._low
        if span < SPAN_BUDGET:
            return False
        # Each pending record and each range ahead adds at most one pair of runs, and no run is longer than the span.
        # There are also at most as many pairs as in the last snapshot, plus one for each record that was done since
        # then or may be done soon.
        soon = self._ranges + self._since + len(self._pending) - self.postponed
        pairs = min(len(self._pending), soon) + len(self._ahead) + 1
        return pairs * (varint_size(span) + 1) + 8 >= _PAYLOAD_BUDGET

    def snapshot(self, clean: bool = False) -> Snapshot | None:
        """Return the present watermark, map and floor. None if the text would be too long; the last snapshot then
        remains valid.

        ``clean``: the log holds no outcome that is missing in the map, so the next owner need not read the log.
        """
        self._absorb()
        watermark = self._low = self.watermark
        done = list(self._done())
        self._ranges, self._since = len(done), 0
        metadata = encode(watermark, done, self.floor, clean, self._begun)
        if metadata is None:
            return None
        self.changed = False
        return Snapshot(watermark, metadata)

    def _done(self) -> Iterator[tuple[int, int]]:
        """Yield the done ranges beyond the watermark, in order."""
        at = self._end
        for n, offset in enumerate(self._pending):
            if n and offset > at:
                yield at, offset
            at = offset + 1
        last = (at, self._end)
        for start, end in reversed(self._ahead):
            if start <= last[1]:
                last = (last[0], max(end, last[1]))
                continue
            if last[0] < last[1]:
                yield last
            last = (start, end)
        if last[0] < last[1]:
            yield last

    def _absorb(self) -> None:
        """If no record is pending, move the watermark over ranges that begin at it and that former owners have done."""
        while not self._pending and self._ahead and self._ahead[-1][0] <= self._end:
            self._end = max(self._end, self._ahead.pop()[1])
