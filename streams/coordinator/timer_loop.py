"""Run the timers. When a release is due, `ReleaseDecided` is written to the log. The job is released only when the
coordinator reads that record back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from jobledger.errors import JobledgerError
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.streams.coordinator.faust.async_producer import AckedWriter, Delivered, Deliveries, first_error
from jobledger.streams.coordinator.ownership import Ownership
from jobledger.streams.coordinator.rules.derived_events import release_decided
from jobledger.streams.coordinator.rules.schedule_rows import Kept
from jobledger.streams.coordinator.rules.timers import Timers, wake_at
from jobledger.streams.coordinator.table import Table
from jobledger.streams.coordinator.work_topics import WorkTopics

LOG = get_logger("jobledger.coordinator")

#: Largest number of decisions in one batch; largest number of batches that wait for their acknowledgement.
BATCH, UNACKNOWLEDGED = 500, 8
#: Seconds between two batches, so that releases that are due at nearly the same time are in one batch.
PACE = 0.004
#: Seconds between two checks while `Ownership.undisputed` is false; seconds while a partition is not caught up.
DISPUTED_PAUSE, BEHIND_PAUSE = 0.05, 0.02


class TimerLoop:
    """Run the timers of the owned partitions.

    ``caught_up(partition)``: returns whether the partition of the coordination topic was read up to the end offset that
    the partition had when the rows were restored. Before that, a timer could repeat a decision that is in the log
    already. ``step``: called between any two steps, for crash tests.
    """

    def __init__(
        self,
        names: Names,
        source: str,
        table: Table,
        writer: AckedWriter,
        topics: WorkTopics,
        ownership: Ownership,
        caught_up: Callable[[int], bool],
        step: Callable[[str], None],
    ) -> None:
        self._names, self._source, self._table, self._writer = names, source, table, writer
        self._topics, self._ownership, self._caught_up, self._step = topics, ownership, caught_up, step
        self._timers: dict[int, Timers] = {}
        self._decided: dict[bytes, tuple[int, int]] = {}  # (run, release) by row key: written, not read back yet
        self._armed = asyncio.Event()
        self._room = asyncio.Semaphore(UNACKNOWLEDGED)
        self._failure: JobledgerError | None = None
        self.clock = BrokerClock()

    @property
    def partitions(self) -> list[int]:
        """The partitions whose timers run here."""
        return sorted(self._timers)

    @property
    def next_due(self) -> int | None:
        """When the next timer is due, µs of the broker's clock; None without timers."""
        return min((at for t in self._timers.values() if (at := t.next()) is not None), default=None)

    @property
    def overdue(self) -> float:
        """Seconds since the earliest timer was due; 0 if none is due."""
        at = self.next_due
        return 0.0 if at is None else max(0.0, (self.clock.us() - at) / 1_000_000)

    def now_ms(self) -> int:
        """Return the estimated time of the broker's clock, ms."""
        return int(self.clock.ms())

    def replace(self, timers: Mapping[int, Timers]) -> None:
        """Replace all timers. Decisions that were not read back may be written again."""
        self._timers = dict(timers)
        self._decided.clear()
        self._armed.set()

    def set(self, timers: Sequence[tuple[int, bytes, int]]) -> None:
        """Add timers: (partition, key of a row, µs of the broker's clock). Timers of partitions that are not owned are
        ignored."""
        for partition, key, at in timers:
            if partition in self._timers:
                self._timers[partition].set(at, key)
        if timers:
            self._armed.set()

    def read_back(self, key: bytes) -> None:
        """Note that an event of the job with this row key was read: the job's row now shows what is decided."""
        self._decided.pop(key, None)

    async def run(self) -> None:
        """Write decisions when they are due. Runs until cancelled. Raises the error of a decision that could not be
        written."""
        while self._failure is None:
            self._armed.clear()
            if not self._ownership.undisputed:
                await self._ownership.confirm()
                await asyncio.sleep(DISPUTED_PAUSE)
                continue
            now = self.clock.us()
            due: list[tuple[int, bytes]] = []
            pause = 1.0
            for partition, timers in self._timers.items():
                if not self._caught_up(partition):
                    pause = min(pause, BEHIND_PAUSE)
                    continue
                due += [(partition, key) for key in timers.pop_passed(now, BATCH - len(due))]
                following = timers.next()
                if following is not None:
                    pause = min(pause, (following - now) / 1_000_000)
            if due:
                await self._write_down(self._still_due(due, now))
                await asyncio.sleep(PACE)
            elif pause > 0:
                # Do not use `asyncio.wait_for`: before Python 3.12, `wait_for` swallows a cancellation that arrives
                # together with the result.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._armed.wait()
        raise self._failure

    def _still_due(self, due: Sequence[tuple[int, bytes]], now: int) -> list[tuple[int, Kept]]:
        """Return the rows that wait for a decision. Timers of other rows are set again or dropped."""
        rows: list[tuple[int, Kept]] = []
        for partition, key in due:
            row = self._table.row(partition, key)
            if not isinstance(row, Kept) or self._decided.get(key) == (row.run, row.release):
                # The job was released or its run has ended meanwhile, or the decision is not read back yet.
                continue
            at = wake_at(row.acts_at)
            retry_in = self._topics.retry_in(row.lane)
            if at > now:
                self._timers[partition].set(at, key)
            elif retry_in:
                # The work topic is missing. Write no decision until the topic may exist.
                self._timers[partition].set(now + int(retry_in * 1_000_000), key)
            else:
                self._decided[key] = (row.run, row.release)
                rows.append((partition, row))
        return rows

    async def _write_down(self, rows: Sequence[tuple[int, Kept]]) -> None:
        """Write `ReleaseDecided` for each row. Waits while `UNACKNOWLEDGED` batches are not acknowledged."""
        if not rows:
            return
        written = now_us()
        records = [
            Outgoing(
                self._names.coordination,
                codec.encode(release_decided(row, written, self._source)),
                row.home or row.job_id,
                partition,
            )
            for partition, row in rows
        ]
        await self._room.acquire()
        self._step("due")
        sent = await self._writer.post(records)
        self._step("decisions-sent")
        sent.add_done_callback(self._acknowledged)

    def _acknowledged(self, sent: asyncio.Future[Deliveries]) -> None:
        self._room.release()
        if sent.cancelled():
            return
        deliveries = sent.result()
        self._step("decisions-acknowledged")
        self._failure = self._failure or first_error(deliveries)
        for delivery in deliveries:
            if isinstance(delivery, Delivered):
                self.clock.observe(delivery.appended_ms)
        if self._failure is not None:
            self._armed.set()
