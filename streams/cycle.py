"""The coordinator's cycle: read events, decide, let jobs go, make rows durable, acknowledge; and its timers and sweep.

The rules are `jobledger.streams.decisions`, Faust's side is behind `jobledger.streams.faust_app.Group`. Order is everything
here: outputs are acknowledged before rows are written, rows are acknowledged on the changelog before they are kept
locally, and only then may an event's offset be committed. Dying between any two of these steps makes things happen again
under the same ids; nothing is lost and nothing contradicted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobledger.config import Settings
from jobledger.errors import JobledgerError, SchemaError, TopicMissing, UnknownFact, UnknownSchema
from jobledger.log import Headers, Outgoing, now_us, partitions_of, source
from jobledger.names import Names
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, RecordRejected
from jobledger.streams.aio import AckedWriter, Delivered, Ends, first_error
from jobledger.streams.decisions import (
    NO_FLOOR,
    Batch,
    Floor,
    Row,
    Scheduled,
    decode_row,
    derived_id,
    encode_row,
    floor_key,
    is_marker,
    job_due,
    raised_floor,
    release_decided,
    sweepable,
)
from jobledger.streams.faust_app import Group, Options, changelog
from jobledger.streams.metrics import Metrics
from jobledger.streams.timers import BrokerClock, Timers, wake_at

LOG = logging.getLogger("jobledger.coordinator")

_OWN_PREFIX = codec.MAGIC + codec.FINGERPRINT
#: Events held between Faust's stream and the cycle.
INBOX = 2_000
#: Rows looked at in one step of the sweep or of a rebuild; between steps the loop is given back.
SCAN_CHUNK = 2_000
#: Seconds between two looks for a missing topic: at first, and at most.
TOPIC_RETRY, TOPIC_RETRY_MOST = 1.0, 60.0
#: Raw bytes of a rejected record are left out above this size: the dead letter must fit as well.
REJECT_BYTES = 500_000


class Superseded(Exception):
    """The partitions were taken away in the middle of a cycle: it is dropped, and its events are read again."""


class Overtaken(JobledgerError):
    """Somebody else wrote to a changelog partition that this instance takes for its own: it must start anew."""


class Cycle:
    """One instance's share of the schedules. ``step`` is called between any two steps, for crash tests; ``topics`` are
    work topics known to exist."""

    def __init__(
        self,
        names: Names,
        settings: Settings,
        options: Options,
        group: Group,
        writer: AckedWriter,
        ends: Ends,
        decode: Callable[[bytes | None], JobEvent],
        metrics: Metrics,
        step: Callable[[str], None],
        topics: Iterable[str] = (),
    ) -> None:
        self._names, self._settings, self._options = names, settings, options
        self._group, self._writer, self._ends, self._decode = group, writer, ends, decode
        self._metrics, self._step = metrics, step
        self._source = source("coordinator")
        self._changelog = changelog(names)
        self._lock = asyncio.Lock()
        self._inbox: deque[Any] = deque()
        self._arrived, self._room, self._armed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._epoch = 0
        self._generation: int | None = None  # of the assignment the rows were restored for
        self._timers: dict[int, Timers] = {}
        self._floors: dict[int, int] = {}
        self._next: dict[int, int] = {}  # the changelog offset that the next own row must get
        self._position: dict[int, int] = {}  # everything below was dealt with
        self._barrier: dict[int, int] = {}  # no timer acts before the source was read up to here
        self._decided: dict[bytes, tuple[int, int]] = {}  # decisions written and not read back yet
        self._doubted = asyncio.Event()  # set: nothing is sent until the broker has confirmed this member
        self._topics = set(topics)  # known to exist
        self._missing: dict[str, tuple[float, float]] = {}  # topic: next look (monotonic), pause
        self.clock = BrokerClock()
        self.scheduled: Counter[int] = Counter()

    # -- what the outside asks ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every owned partition is restored and read up to its barrier."""
        return self._group.settled and not self._doubted.is_set() and all(map(self._caught_up, self._timers))

    @property
    def partitions(self) -> list[int]:
        """The partitions whose timers run here."""
        return sorted(self._timers)

    @property
    def missing_topics(self) -> list[str]:
        """Work topics that releases wait for."""
        return sorted(self._missing)

    @property
    def next_due(self) -> int | None:
        """When the next timer passes, µs."""
        return min((at for t in self._timers.values() if (at := t.next()) is not None), default=None)

    def position(self, partition: int) -> int:
        """The next source offset to be dealt with."""
        return max(self._position.get(partition, 0), self._group.committed(partition) or 0)

    def doubt(self) -> None:
        """The clock jumped: this process stood still, and may have been replaced meanwhile."""
        self._doubted.set()
        self.clock.reset()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, stream: Any) -> None:
        """Faust's agent: hands events over. The cycle acknowledges them, one by one, when their rows are durable."""
        stream.enable_acks = False
        async for event in stream.events():
            self._inbox.append(event)
            self._arrived.set()
            if len(self._inbox) >= INBOX:
                self._room.clear()
                await self._room.wait()

    async def work(self) -> None:
        """Deal with what was read, for ever."""
        while True:
            if not self._inbox:
                self._arrived.clear()
                await self._arrived.wait()
            async with self._lock:
                epoch, generation = self._epoch, self._generation
                batch = [self._inbox.popleft() for _ in range(min(len(self._inbox), self._options.batch))]
                self._room.set()
                # What was fetched under an earlier assignment is fetched again, beginning further below: dealing with
                # it first would make what lies between look like seen.
                batch = [event for event in batch if event.message.generation_id == generation]
                try:
                    await self._deal_with(batch, epoch)
                except Superseded:
                    LOG.info("a cycle of %d events was dropped: the partitions are being moved", len(batch))

    async def _deal_with(self, events: Sequence[Any], epoch: int) -> None:
        decoded, rejects = await self._decode_all(events)
        while True:
            batch = Batch(self._row, self._floor, self._is_open)
            for message, event in decoded:
                batch.add(event, message.partition, message.offset, _ms(message))
            if batch.closed and await self._look_for(batch.closed):
                continue
            self._step("decided")
            if await self._let_go(batch.releases, rejects):
                break
        self._step("released")
        await self._certain(epoch)
        await self._keep([(p, key, encode_row(row)) for (p, key), row in batch.rows.items()])
        self._step("kept")
        if epoch != self._epoch:
            raise Superseded
        self._settle(events, decoded, batch)
        self._step("acknowledged")

    def _settle(self, events: Sequence[Any], decoded: Sequence[tuple[Any, JobEvent]], batch: Batch) -> None:
        """Everything is durable: set timers, forget decisions that came back, let offsets be committed."""
        for partition, change in batch.waiting.items():
            self.scheduled[partition] += change
        for _, event in decoded:
            self._decided.pop(event.job_id.encode(), None)
        for partition, key, at in batch.timers:
            if partition in self._timers:
                self._timers[partition].set(at, key)
        if batch.timers:
            self._armed.set()
        for event in events:
            event.ack()
            message = event.message
            expected = self._position.get(message.partition)
            if expected is not None and message.offset > expected:
                LOG.warning(
                    "%s[%d]: no record between %d and %d", message.topic, message.partition, expected, message.offset
                )
            self._position[message.partition] = message.offset + 1
        self._metrics.verdicts(batch.verdicts)

    async def _decode_all(self, events: Sequence[Any]) -> tuple[list[tuple[Any, JobEvent]], list[Outgoing]]:
        """Events with their messages, and the dead letters of what is none. Raises `UnknownFact`: never passed."""
        decoded: list[tuple[Any, JobEvent]] = []
        rejects: list[Outgoing] = []
        retried = False
        for event in events:
            message = event.message
            value = message.value
            try:
                if value is not None and value[: len(_OWN_PREFIX)] == _OWN_PREFIX:
                    decoded.append((message, self._decode(value)))
                    continue
                loop = asyncio.get_running_loop()
                try:
                    # Looking a schema up reads a topic: not in the event loop.
                    found = await loop.run_in_executor(None, self._decode, value)
                except UnknownSchema:
                    if retried:
                        raise
                    # The topic of schemas may have been read just before this one was published.
                    await asyncio.sleep(1.1)
                    retried = True
                    found = await loop.run_in_executor(None, self._decode, value)
                decoded.append((message, found))
            except UnknownFact as exc:
                where = f"{message.topic}[{message.partition}]@{message.offset}"
                raise UnknownFact(
                    exc.fact,
                    f"{where} carries the fact {exc.fact!r}, which this coordinator does not know and must not pass: "
                    "upgrade this coordinator",
                ) from exc
            except SchemaError as exc:
                rejects.append(self._reject(message, str(exc)))
        return decoded, rejects

    def _reject(self, message: Any, why: str) -> Outgoing:
        where = f"{message.topic}[{message.partition}]@{message.offset}"
        LOG.error("%s is no event and goes to %s: %s", where, self._names.dead_letter, why)
        self._metrics.rejected()
        value = message.value
        if value is not None and len(value) > REJECT_BYTES:
            value, why = None, f"{why}; its {len(message.value)} bytes are left out here"
        fact = RecordRejected(message.topic, message.partition, message.offset, message.key, value, why)
        event_id = derived_id(message.topic, message.partition, message.offset, "rejected")
        event = JobEvent(event_id, "", 1, 1, 0, now_us(), "", "", None, None, self._source, None, fact)
        return Outgoing(self._names.dead_letter, codec.encode(event), event_id)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _row(self, partition: int, key: bytes) -> Row | None:
        data = self._group.rows.get(partition, key)
        row = None if data is None else decode_row(data)
        return None if isinstance(row, Floor) else row

    def _floor(self, partition: int) -> int:
        return self._floors.get(partition, NO_FLOOR)

    async def _keep(self, puts: Sequence[tuple[int, bytes, bytes | None]]) -> None:
        """Make rows durable: on the changelog, acknowledged, then locally. Called with the lock held.

        The changelog's offsets must follow one another: a gap means that another instance writes there too, so that
        one of both was replaced without having noticed.
        """
        if not puts:
            return
        sent = self._writer.post([Outgoing(self._changelog, value, key, partition) for partition, key, value in puts])
        self._step("rows-sent")
        outcomes = await sent
        error = first_error(outcomes)
        if error is not None:
            raise error
        self._step("rows-acknowledged")
        ends: dict[int, int] = {}
        for outcome in outcomes:
            assert isinstance(outcome, Delivered)
            expected = self._next.get(outcome.partition)
            if expected is not None and outcome.offset != expected:
                raise Overtaken(
                    f"{self._changelog}[{outcome.partition}]: offset {outcome.offset} was given where {expected} was "
                    "expected, so another coordinator owns this partition; this one stops and starts anew"
                )
            self._next[outcome.partition] = outcome.offset + 1
            ends[outcome.partition] = outcome.offset
        for partition, end in ends.items():
            self._group.rows.write(partition, [(key, value) for p, key, value in puts if p == partition], end)

    async def _certain(self, epoch: int) -> None:
        """Go on only as the owner: raises `Superseded` if the partitions are being moved."""
        if self._doubted.is_set():
            if not await self._group.confirm():
                raise Superseded
            self._doubted.clear()
        if epoch != self._epoch:
            raise Superseded

    # -- letting go --------------------------------------------------------------------------------------------------

    async def _let_go(self, releases: Sequence[Scheduled], rejects: Sequence[Outgoing]) -> bool:
        """Send what lets jobs go, and dead letters, and wait for every acknowledgement.

        False if a work topic has gone since it was looked for: decide again, its releases are then held back.
        """
        if not releases and not rejects:
            return True
        now = now_us()
        sent = self._writer.post([*(self._due(row, now) for row in releases), *rejects])
        self._step("releases-sent")
        outcomes = await sent
        received = now_us()
        gone = False
        for row, outcome in zip(releases, outcomes, strict=False):
            if isinstance(outcome, Delivered):
                self.clock.observe(received, outcome.appended_ms)
                self._metrics.released(outcome.appended_ms / 1000 - row.due / 1_000_000)
            elif isinstance(outcome, TopicMissing):
                self._topics.discard(self._names.jobs(row.queue))
                gone = True
        error = first_error(outcomes[len(releases) :] if gone else outcomes)
        if error is not None:
            raise error
        return not gone

    def _due(self, row: Scheduled, now: int) -> Outgoing:
        headers: Headers = [
            ("jl-job", row.job_id.encode()),
            ("jl-run", b"%d" % row.run),
            ("jl-release", b"%d" % row.release),
        ]
        value = codec.encode(job_due(row, now, self._source))
        return Outgoing(self._names.jobs(row.queue), value, row.key or row.job_id, None, headers)

    def _is_open(self, queue: str) -> bool:
        return self._names.jobs(queue) in self._topics

    async def _look_for(self, queues: set[str]) -> bool:
        """Look for work topics that are not known yet, each at its own pace; whether one was found."""
        found = False
        for queue in queues:
            topic = self._names.jobs(queue)
            due, pause = self._missing.get(topic, (0.0, TOPIC_RETRY))
            if time.monotonic() < due:
                continue
            try:
                await asyncio.get_running_loop().run_in_executor(None, partitions_of, self._settings, topic)
            except TopicMissing:
                self._missing[topic] = (time.monotonic() + pause, min(pause * 2, TOPIC_RETRY_MOST))
                LOG.error(
                    "%s does not exist: releases to it are held back and tried again; "
                    "create it with `jobledger topics apply MODULE:APP`",
                    topic,
                )
            else:
                self._topics.add(topic)
                self._missing.pop(topic, None)
                found = True
        return found

    # -- timers ------------------------------------------------------------------------------------------------------

    def _caught_up(self, partition: int) -> bool:
        return self.position(partition) >= self._barrier.get(partition, 0)

    async def fire(self) -> None:
        """Write down what has become due, for ever. Nothing is released here."""
        while True:
            self._armed.clear()
            if not self._group.settled or self._doubted.is_set():
                if self._doubted.is_set() and self._group.settled:
                    async with self._lock:
                        if self._group.settled and self._doubted.is_set() and await self._group.confirm():
                            self._doubted.clear()
                await asyncio.sleep(0.05)
                continue
            now = self.clock.now(now_us())
            due: list[tuple[int, bytes]] = []
            pause = 1.0
            for partition, timers in self._timers.items():
                if not self._caught_up(partition):
                    pause = min(pause, 0.02)
                    continue
                due += [(partition, key) for key in timers.pop_passed(now, self._options.batch - len(due))]
                following = timers.next()
                if following is not None:
                    pause = min(pause, (following - now) / 1_000_000)
            if due:
                await self._write_down(due, now)
            elif pause > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._armed.wait(), pause)

    async def _write_down(self, due: Sequence[tuple[int, bytes]], now: int) -> None:
        """`ReleaseDecided` for every row that is due by ``now``, acknowledged."""
        rows: list[tuple[int, bytes, Scheduled]] = []
        held: set[str] = set()
        for partition, key in due:
            row = self._row(partition, key)
            if not isinstance(row, Scheduled) or self._decided.get(key) == (row.run, row.release):
                continue  # passed meanwhile, or decided already and about to be read back
            at = wake_at(row.due)
            if at > now:
                self._timers[partition].set(at, key)
                continue
            missing = self._missing.get(self._names.jobs(row.queue))
            if missing is not None:
                held.add(row.queue)
                # Held back: nothing is written to the log for it until its topic is there.
                self._timers[partition].set(now + int(max(missing[0] - time.monotonic(), 0.1) * 1e6), key)
                continue
            rows.append((partition, key, row))
        if held:
            await self._look_for(held)
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
            for partition, _, row in rows
        ]
        for _, key, row in rows:
            self._decided[key] = (row.run, row.release)
        self._step("due")
        sent = self._writer.post(records)
        self._step("decisions-sent")
        outcomes = await sent
        received = now_us()
        self._step("decisions-acknowledged")
        error = first_error(outcomes)
        if error is not None:
            raise error
        for outcome in outcomes:
            assert isinstance(outcome, Delivered)
            self.clock.observe(received, outcome.appended_ms)

    # -- assignment --------------------------------------------------------------------------------------------------

    async def revoked(self) -> None:
        """All partitions are about to move: end what was begun, begin nothing."""
        self._timers.clear()
        self._barrier.clear()
        self._decided.clear()
        self._generation = None
        self._inbox.clear()
        self._room.set()
        try:
            # A cycle under way may finish: nobody else owns its rows yet. But the group does not wait for ever.
            async with asyncio.timeout(self._options.session_timeout * 0.8), self._lock:
                self._epoch += 1
        except TimeoutError:
            self._epoch += 1
            LOG.warning("the partitions are given back in the middle of a cycle, which will be dropped")

    async def rebuild(self) -> None:
        """The table is restored, streams stand still: set up timers, floors, barriers for the partitions owned now."""
        async with self._lock:
            self._epoch += 1
            self._inbox.clear()
            self._room.set()
            began = time.monotonic()
            owned = self._group.partitions()
            ends = await self._ends.of(self._names.coordination, owned)
            self._next = {p: end for p, (_, end) in (await self._ends.of(self._changelog, owned)).items()}
            fresh: dict[int, Timers] = {}
            self._floors.clear()
            self.scheduled.clear()
            for partition in owned:
                fresh[partition] = await self._timers_of(partition)
            await self._mend(owned)
            self._position.clear()
            self._decided.clear()
            # If everything below the end was trimmed away, nothing comes that could lift the barrier.
            self._barrier = {p: end if end > begin else 0 for p, (begin, end) in ends.items()}
            self._generation = self._group.generation
            self._timers = fresh
            self._doubted.clear()
            self._armed.set()
            LOG.info(
                "partitions %s: %d releases scheduled, restored in %.2f s",
                sorted(owned),
                sum(self.scheduled.values()),
                time.monotonic() - began,
            )

    async def _timers_of(self, partition: int) -> Timers:
        entries: list[tuple[int, bytes]] = []
        after = b""
        while chunk := self._group.rows.scan(partition, after, SCAN_CHUNK):
            after = chunk[-1][0]
            for key, data in chunk:
                if is_marker(data):
                    continue
                row = decode_row(data)
                if isinstance(row, Scheduled):
                    entries.append((wake_at(row.due), key))
                elif isinstance(row, Floor):
                    self._floors[partition] = row.offset
            await asyncio.sleep(0)
        self.scheduled[partition] = len(entries)
        return Timers(entries)

    async def _mend(self, owned: set[int]) -> None:
        """Write rows again whose changelog ends with an older version: an instance that was paused wrote it late."""
        rows = self._group.rows
        puts: list[tuple[int, bytes, bytes | None]] = []
        for partition, key in sorted(rows.overtaken):
            if partition in owned:
                puts.append((partition, key, rows.get(partition, key)))
                rows.overtaken.discard((partition, key))
        for start in range(0, len(puts), self._options.batch):
            await self._keep(puts[start : start + self._options.batch])
        if puts:
            LOG.warning("%d rows were written to the changelog again: a late write had covered them", len(puts))

    # -- sweep -------------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Delete markers that are no longer needed, for ever; a pass over all rows takes its time."""
        pause = min(30.0, max(self._options.keep_markers / 10, 0.1))
        while True:
            await asyncio.sleep(pause)
            epoch = self._epoch
            for partition in list(self._timers):
                after = b""
                while epoch == self._epoch and self._group.settled and partition in self._timers:
                    chunk = self._group.rows.scan(partition, after, SCAN_CHUNK)
                    if not chunk:
                        break
                    after = chunk[-1][0]
                    marked = [(key, data) for key, data in chunk if is_marker(data)]
                    for start in range(0, len(marked), self._options.batch):
                        await self._sweep(partition, marked[start : start + self._options.batch], epoch)
                    await asyncio.sleep(0.005)

    async def _sweep(self, partition: int, marked: Sequence[tuple[bytes, bytes]], epoch: int) -> None:
        async with self._lock:
            committed = self._group.committed(partition)
            if committed is None or epoch != self._epoch or self._doubted.is_set() or not self._group.settled:
                return
            now_ms = self.clock.now(now_us()) // 1000
            keep_ms = int(self._options.keep_markers * 1000)
            gone: list[bytes] = []
            for key, data in marked:
                # Scanned without the lock: the row may have changed meanwhile.
                if self._group.rows.get(partition, key) == data and sweepable(
                    decode_row(data), committed, now_ms, keep_ms
                ):
                    gone.append(key)
            if not gone:
                return
            floor = raised_floor(self._floor(partition), committed)
            self._step("sweep-begins")
            try:
                await self._certain(epoch)
            except Superseded:
                return
            await self._keep([(partition, floor_key(partition), encode_row(Floor(partition, floor)))])
            self._floors[partition] = floor
            self._step("floor-kept")
            await self._keep([(partition, key, None) for key in gone])
            self._step("swept")
            self._metrics.swept(len(gone))


def _ms(message: Any) -> int:
    """A message's append time, which Faust keeps as seconds."""
    seconds: float = message.timestamp
    return round(seconds * 1000)
