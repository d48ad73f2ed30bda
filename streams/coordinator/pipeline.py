"""The coordinator's pipeline: read events, decide, release jobs, make rows durable, allow offsets to be committed.

The rules are in `jobledger.streams.coordinator.rules.decisions`. The pipeline is safe because of the order of its
steps. First the broker acknowledges the outputs. Then the rows are written to the changelog and acknowledged, and then
they are written to the local copy. Only then may the event's offset be committed. After a crash between any two steps,
the steps are repeated with the same ids. Nothing is lost, and no repeated decision contradicts an earlier one.

Two stages run concurrently. The first stage decides on events and sends the outputs. The second stage waits for
acknowledgements and makes rows durable. Both stages keep the order of the log.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from jobledger.config import Settings
from jobledger.kafka.clients import Headers
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.schemas import codec
from jobledger.schemas.events import DeadLettered, ErrorInfo, JobEvent
from jobledger.streams.coordinator.decoding import RecordDecoder
from jobledger.streams.coordinator.faust.async_producer import (
    AckedWriter,
    Delivered,
    Deliveries,
    LogBounds,
    first_error,
    record_bytes,
)
from jobledger.streams.coordinator.faust.faust_app import Group, Options, changelog
from jobledger.streams.coordinator.metrics import Metrics
from jobledger.streams.coordinator.ownership import Ownership, Superseded
from jobledger.streams.coordinator.rules.decisions import DecisionBatch, Place
from jobledger.streams.coordinator.rules.derived_events import job_due, undeliverable
from jobledger.streams.coordinator.rules.schedule_rows import Kept, Row, row_key
from jobledger.streams.coordinator.table import Key, Table
from jobledger.streams.coordinator.timer_loop import TimerLoop
from jobledger.streams.coordinator.work_topics import WorkTopics

LOG = get_logger("jobledger.coordinator")

#: Number of records that wait for a decision, at which fetching pauses.
INBOX = 2_000
#: Number of events between the two stages, at which deciding pauses.
UNDER_WAY = 4_000


class PlannedWrites(NamedTuple):
    """A batch of events with its decisions.

    ``sent``: the deliveries of the batch's outputs, those of ``released`` first; None without outputs.
    ``rejects``: number of records that are not events. ``refused``: number of releases that are too large for their
    topics.
    """

    epoch: int
    records: Sequence[Any]
    batch: DecisionBatch
    rejects: int
    refused: int
    released: Sequence[Kept]
    sent: asyncio.Future[Deliveries] | None


class Pipeline:
    """Process the events of one instance's partitions.

    ``step``: called between any two steps, for crash tests. ``topics``: work topics known to exist, each with the
    largest batch that the topic accepts (bytes; None: not known).
    """

    def __init__(
        self,
        names: Names,
        settings: Settings,
        options: Options,
        group: Group,
        writer: AckedWriter,
        log_bounds: LogBounds,
        decoder: codec.Decoder,
        metrics: Metrics,
        step: Callable[[str], None],
        topics: Mapping[str, int | None] | None = None,
    ) -> None:
        self._names, self._options, self._group = names, options, group
        self._writer, self._log_bounds, self._metrics, self._step = writer, log_bounds, metrics, step
        self._source = source("coordinator")
        self._ownership = Ownership(group, self._on_gap)
        self.table = Table(changelog(names), group, writer, log_bounds, self._ownership, step)
        self.topics = WorkTopics(names, settings, topics or {})
        self.timer_loop = TimerLoop(
            names, self._source, self.table, writer, self.topics, self._ownership, self._caught_up, step
        )
        letter_bytes = min(settings.max_record_bytes, writer.most_bytes)
        self._record_decoder = RecordDecoder(names, decoder, self._source, self.timer_loop.now_ms, letter_bytes)
        self._inbox: deque[Any] = deque()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._plans: deque[PlannedWrites] = deque()
        self._under_way = 0
        self._ending = False
        self._changed = asyncio.Condition()  # guards `_plans` and `_under_way`
        self._position: dict[int, int] = {}  # events below this offset were processed
        self._ends_at_restore: dict[int, int] = {}  # end of the source topic when the rows were restored
        self._barrier: dict[int, int] = {}  # timers act only after the source topic was read up to here

    # -- state, for the coordinator ----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every owned partition is restored and read up to its barrier."""
        return self._ownership.undisputed and all(map(self._caught_up, self.timer_loop.partitions))

    @property
    def restoring(self) -> bool:
        """Whether a rebalance is under way. Nothing is decided before the rows are restored."""
        return self._ownership.generation is None

    def position(self, partition: int) -> int:
        """Return the next offset of the coordination topic's partition to be processed."""
        return max(self._position.get(partition, 0), self._group.committed(partition) or 0)

    def beat(self) -> None:
        """Check whether this process was paused; see `Ownership.beat`. The caller calls this a few times a second."""
        self._ownership.beat()

    def _on_gap(self) -> None:
        self.timer_loop.clock.reset()

    def _caught_up(self, partition: int) -> bool:
        return self.position(partition) >= self._barrier.get(partition, 0)

    # -- first stage: decide and send --------------------------------------------------------------------------------

    async def take(self, generation: int, records: list[Any]) -> None:
        """Take fetched records, in order, with the group's generation.

        Waits while `INBOX` or more records wait for a decision.
        """
        if self._ending:
            return  # the next owner reads these records
        self._inbox.extend((generation, record) for record in records)
        self._arrived.set()
        while len(self._inbox) >= INBOX:
            self._room.clear()
            await self._room.wait()

    async def decide(self) -> None:
        """Decide on the records that were taken. Runs until cancelled."""
        while True:
            if not self._inbox:
                self._arrived.clear()
                await self._arrived.wait()
            async with self._changed:
                await self._changed.wait_for(lambda: self._under_way < UNDER_WAY)
            epoch, generation = self._ownership.epoch, self._ownership.generation
            taken = [self._inbox.popleft() for _ in range(min(len(self._inbox), self._options.batch))]
            self._room.set()
            # Drop records fetched under an earlier assignment. These records are fetched again, from a lower offset on.
            # If they were processed now, the events below them would look like duplicates when they are fetched.
            records = [record for fetched_under, record in taken if fetched_under == generation]
            if records:
                self._under_way += len(records)
                plan = await self._plan(records, epoch)
                async with self._changed:
                    self._plans.append(plan)
                    self._changed.notify_all()

    async def _plan(self, records: Sequence[Any], epoch: int) -> PlannedWrites:
        events, rejects = await self._record_decoder.decode(records)
        while True:
            batch = DecisionBatch(self.table.row, self.table.floor, self.topics.is_open)
            for recorded in events:
                partition, offset = recorded.position.partition, recorded.position.offset
                place = Place(partition, self.table.shifted(partition, offset), recorded.appended_ms)
                batch.add(recorded.event, place)
            if not batch.held_back_lanes or not await self.topics.find(batch.held_back_lanes):
                break
        self._step("decided")
        if epoch != self._ownership.epoch:  # the rows looked up may belong to another instance now
            return PlannedWrites(epoch, records, batch, 0, 0, (), None)
        released, outputs, ended = self._outputs(batch.releases)
        outputs += [*ended, *map(self._outgoing_event, batch.events), *rejects]
        sent = await self._writer.post(outputs) if outputs else None
        self._step("releases-sent")
        if epoch != self._ownership.epoch:
            # Partitions were assigned or revoked meanwhile, so this plan is dropped and its events are read again. Do
            # not keep its rows as pending: they never become durable, and the events would look like duplicates.
            return PlannedWrites(epoch, records, batch, 0, 0, (), None)
        self.table.add_pending(batch.rows)
        for recorded in events:
            self.timer_loop.read_back(row_key(recorded.event.job_id))
        return PlannedWrites(epoch, records, batch, len(rejects), len(batch.releases) - len(released), released, sent)

    def _outputs(self, releases: Sequence[Kept]) -> tuple[list[Kept], list[Outgoing], list[Outgoing]]:
        """Return the released rows, their records, and the records that end jobs whose release is too large for its
        topic.

        A release that is too large is not sent: the broker would refuse all records of the same producer batch with it.
        """
        now = now_us()
        released: list[Kept] = []
        outputs: list[Outgoing] = []
        ended: list[Outgoing] = []
        for row in releases:
            record = self._due(row, now)
            over = self.topics.refuses(record.topic, record_bytes(record))
            if over is None:
                released.append(row)
                outputs.append(record)
                continue
            LOG.error("job %s (%s) fails and is written to the dead letters: %s", row.job_id, row.task, over)
            failed, letter = undeliverable(row, ErrorInfo("PayloadTooLarge", over), now, self._source)
            ended.append(Outgoing(self._names.lifecycle, codec.encode(failed), row.job_id))
            ended.append(Outgoing(self._names.dead_letter, codec.encode(letter), row.job_id))
        return released, outputs, ended

    def _outgoing_event(self, event: JobEvent) -> Outgoing:
        topic = self._names.dead_letter if isinstance(event.fact, DeadLettered) else self._names.lifecycle
        if not event.source:
            event = msgspec.structs.replace(event, source=self._source)
        return Outgoing(topic, codec.encode(event), event.job_id)

    def _due(self, row: Kept, now: int) -> Outgoing:
        headers: Headers = [
            ("jl-job", row.job_id.encode()),
            ("jl-run", b"%d" % row.run),
            ("jl-release", b"%d" % row.release),
        ]
        value = codec.encode(job_due(row, now, self._source))
        return Outgoing(self._names.jobs(row.lane), value, row.key or row.job_id, None, headers)

    # -- second stage: make durable and acknowledge ------------------------------------------------------------------

    async def write(self) -> None:
        """Make decisions durable, in order. Runs until cancelled. Raises the error that prevents this."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: bool(self._plans))
                plans = list(self._plans)
                self._plans.clear()
            try:
                await self._write([plan for plan in plans if plan.epoch == self._ownership.epoch])
            except Superseded:
                LOG.info(
                    "events that are read again later, because their partitions are being reassigned: %d",
                    sum(len(p.records) for p in plans),
                )
            finally:
                async with self._changed:
                    self._under_way -= sum(len(plan.records) for plan in plans)
                    self._changed.notify_all()

    async def _write(self, plans: Sequence[PlannedWrites]) -> None:
        if not plans:
            return
        for plan in plans:
            if plan.sent is not None:
                self._released(plan.released, await plan.sent)
        self._step("released")
        rows: dict[Key, Row] = {}
        for plan in plans:
            rows.update(plan.batch.rows)
        epoch = plans[-1].epoch
        await self.table.make_durable(rows, epoch)
        self._step("rows-durable")
        if epoch != self._ownership.epoch:
            raise Superseded
        for plan in plans:
            self._acknowledge(plan)
        self._step("acknowledged")

    def _released(self, releases: Sequence[Kept], deliveries: Deliveries) -> None:
        for row, delivery in zip(releases, deliveries, strict=False):
            if isinstance(delivery, Delivered):
                self.timer_loop.clock.observe(delivery.appended_ms)
                self._metrics.released(delivery.appended_ms / 1000 - row.due / 1_000_000)
        error = first_error(deliveries)
        if error is not None:
            # For example, a work topic was deleted, or now accepts only smaller records. The next start handles that.
            raise error

    def _acknowledge(self, plan: PlannedWrites) -> None:
        """Set the timers of a plan, and allow its offsets to be committed. The plan's rows and outputs are durable."""
        for partition, change in plan.batch.kept_change.items():
            self.table.kept[partition] += change
        self.timer_loop.set(plan.batch.timers)
        offsets: dict[int, list[int]] = {}
        for record in plan.records:
            offsets.setdefault(record.partition, []).append(record.offset)
        self._group.acknowledge(offsets)
        for partition, done in offsets.items():
            expected = self._position.get(partition)
            if expected is not None and done[0] > expected:
                LOG.warning(
                    "partition %d of the coordination topic: offset %d was expected, but the next record has offset %d",
                    partition,
                    expected,
                    done[0],
                )
            self._position[partition] = done[-1] + 1
        self._metrics.verdicts(plan.batch.verdicts)
        self._metrics.rejected(plan.rejects)
        self._metrics.undeliverable(plan.refused)

    # -- assignment --------------------------------------------------------------------------------------------------

    async def revoked(self) -> None:
        """Prepare for a rebalance: start nothing more, and wait until the events being processed are done, for at most
        0.8 of the session timeout."""
        self._ownership.revoking()
        self.timer_loop.replace({})
        self._inbox.clear()
        self._room.set()
        try:
            # Events being processed may be completed, since no other instance owns their rows yet. But the group
            # removes members that take too long.
            async with asyncio.timeout(self._options.session_timeout * 0.8), self._changed:
                await self._changed.wait_for(lambda: self._under_way == 0)
        except TimeoutError:
            LOG.warning(
                "the partitions are given back; events that are not processed yet, and that the next owner processes: %d",
                self._under_way,
            )
        self._ownership.moved()

    async def finish(self, seconds: float) -> None:
        """Start nothing more, and wait at most ``seconds`` until the events being processed are done. Then the rows of
        sent releases are durable, and the next start does not repeat these releases."""
        self._ending = True
        self.timer_loop.replace({})
        self._inbox.clear()
        self._room.set()
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._under_way == 0)
        except TimeoutError:
            LOG.warning(
                "events that were not processed within %g s, and that the next start processes: %d",
                seconds,
                self._under_way,
            )

    async def rebuild(self) -> None:
        """Set up timers, floors and barriers of the owned partitions. Called when Faust has restored the table and
        before events are delivered."""
        began = time.monotonic()
        self._ownership.revoking()
        self._ownership.moved()
        epoch = self._ownership.epoch
        self._inbox.clear()
        self._room.set()
        owned = self._group.partitions()
        bounds = await self._log_bounds.of(self._names.coordination, owned)
        self._ends_at_restore = {partition: end for partition, (_, end) in bounds.items()}
        timers = await self.table.restore(owned, self._ends_at_restore)
        if epoch != self._ownership.epoch:
            return  # the next rebalance has begun, and another call of `rebuild` follows
        self._position.clear()
        # If all records below the end were deleted, no record arrives that could move the position to the barrier.
        self._barrier = {partition: end if end > begin else 0 for partition, (begin, end) in bounds.items()}
        self._ownership.gained()
        self.timer_loop.replace(timers)
        kept = sum(self.table.kept.values())
        duration = time.monotonic() - began
        LOG.info("partitions %s: %s kept, restored in %.2f s", sorted(owned), counted(kept, "release"), duration)

    async def sweep(self) -> None:
        """Delete markers that are no longer needed. Runs until cancelled."""
        keep_ms = int(self._options.keep_markers * 1000)
        while True:
            await asyncio.sleep(min(30.0, max(self._options.keep_markers / 10, 0.1)))
            for partition in self.timer_loop.partitions:
                if self._committed_is_processed(partition):
                    swept = await self.table.sweep(partition, self.timer_loop.now_ms, keep_ms)
                    self._metrics.swept(swept)

    def _committed_is_processed(self, partition: int) -> bool:
        """Return whether all events below the committed offset were processed. This is false if the log was
        truncated: then the offset that was committed before may be above the new end."""
        committed = self._group.committed(partition) or 0
        return committed <= max(self._ends_at_restore.get(partition, 0), self._position.get(partition, 0))
