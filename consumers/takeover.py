"""What a new owner does before it runs anything of a partition.

It marks the partition as dirty in the group's offsets and awaits that; reads the latest releases before its base, so
that a second record of the same release is dropped; and, unless the last owner left cleanly, reads the lifecycle
partition from the takeover floor: a release whose closing fact is there is done, and what derives from the fact is sent
again. A thread of its own; the fetch thread goes on polling meanwhile, with the partition paused.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.access import read
from jobledger.config import Settings
from jobledger.consumers.fetch import Fetcher
from jobledger.consumers.offsets import PartitionOffsets, Restored, Snapshot, decode, encode
from jobledger.consumers.releases import REMEMBERED, REMEMBERED_MS, key_of, release_key
from jobledger.consumers.settle import Settler
from jobledger.consumers.work import Found, Partition
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError, RegistryNeeded, SchemaError
from jobledger.log import PASSING, consumer, consumer_config, translate
from jobledger.names import Names
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Fact, JobRetried, JobSnoozed, JobStarted, JobSucceeded, settles
from jobledger.schemas.glance import glance

LOG = logging.getLogger("jobledger.worker")

REQUEST_TIMEOUT_S = 10.0
#: Seconds without an answer or a record after which the worker gives up.
STALL_S = 60.0
#: Seconds after which a reader that nobody needs gives its connections back.
IDLE_S = 10.0
#: Starts that a process that died may have taken with it: those of so many milliseconds, and within these bounds.
UNSEEN_MS, UNSEEN_LEAST, UNSEEN_MOST = 250, 16, 1_000


class _Plan:
    """What is to be read for one partition."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.low = self.high = self.lifecycle_low = self.lifecycle_high = 0
        self.restored = Restored(0)
        self.floor = 0
        self.seed_from = 0
        self.begun = 0  # no start of a record from here on is in the log
        self.lately: deque[int] = deque(maxlen=UNSEEN_MOST)  # when records of it were begun, in ms

    @property
    def unseen(self) -> int:
        """How many more records may have been begun: their starts were still on their way when the process died."""
        last = self.lately[-1] if self.lately else 0
        return UNSEEN_LEAST + sum(at > last - UNSEEN_MS for at in self.lately)


class Takeover(threading.Thread):
    """Takes assigned partitions over, a batch at a time; ``ready`` is called with those that may be run."""

    def __init__(
        self,
        settings: Settings,
        names: Names,
        settler: Settler,
        decoder: Decoder,
        *,
        ready: Callable[[list[Partition]], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-takeover", daemon=True)
        self._settings, self._names, self._settler, self._decoder = settings, names, settler, decoder
        self._ready, self._fail = ready, fail
        self._todo: queue.SimpleQueue[tuple[Fetcher, list[Partition]] | None] = queue.SimpleQueue()
        self._reader: Consumer | None = None
        self._closing = False
        #: Releases found closed in the log, seeded releases and seconds spent, since the start.
        self.found = self.seeded = 0
        self.seconds = 0.0

    def take_over(self, fetcher: Fetcher, partitions: list[Partition]) -> None:
        """Begin with newly assigned partitions of one queue; returns at once."""
        self._todo.put((fetcher, partitions))

    def close(self) -> None:
        """Stop after what is under way."""
        self._closing = True
        self._todo.put(None)

    def run(self) -> None:
        """Take over until closed."""
        try:
            while True:
                try:
                    item = self._todo.get(timeout=IDLE_S if self._reader is not None else None)
                except queue.Empty:
                    self._drop_reader()
                    continue
                if item is None:
                    return
                began = time.monotonic()
                self._take_over(*item)
                self.seconds += time.monotonic() - began
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(translate(exc.args[0], self._settings, "taking partitions over"))
        except Exception as exc:
            LOG.exception("the takeover broke")
            self._fail(JobledgerError(f"the takeover of partitions broke: {exc!r}"))
        finally:
            self._drop_reader()

    # -- steps ----------------------------------------------------------------------------------------------------

    def _take_over(self, fetcher: Fetcher, partitions: list[Partition]) -> None:
        plans = [_Plan(p) for p in partitions if p.owned]
        if not plans:
            return
        for plan in plans:
            self._judge(plan)
        self._unknown_floors(fetcher.topic, [p for p in plans if p.restored.floor is None])
        if not self._mark_dirty(fetcher, plans):
            return
        self._seed_starts(fetcher.topic, plans)
        for plan in plans:
            plan.partition.offsets = PartitionOffsets(plan.restored, plan.lifecycle_high)
        self._read(fetcher.topic, plans)
        if self._closing:
            # It may have been cut short: what the log holds is the next owner's to find, and the mark above
            # says so. Only where nothing had to be looked for, the last commit may say that once more;
            # nothing is run of that either.
            for plan in plans:
                plan.partition.ready = plan.restored.clean and plan.partition.stopped is None
            return
        # A stopped one is not taken over: what was committed above stands, and the next
        # owner begins where this one did.
        read = [p for p in plans if p.partition.stopped is None]
        for plan in read:
            self._conclude(plan)
        done = [p.partition for p in read if p.partition.owned]
        for partition in done:
            partition.ready = True
        self._ready(done)

    def _judge(self, plan: _Plan) -> None:
        """What the last owner left, held against the log as it is."""
        partition = plan.partition
        plan.low, plan.high = self._ends(partition.topic, partition.number)
        plan.lifecycle_low, plan.lifecycle_high = self._ends(self._names.lifecycle, partition.number)
        base = partition.committed
        if base > plan.high:
            LOG.error(
                "%r: the committed offset %d is beyond the log's end %d: was the topic made anew? Reading from its start",
                partition,
                base,
                plan.high,
            )
        if base < 0 or base > plan.high:
            plan.restored = Restored(plan.low)
        elif base < plan.low:
            LOG.error("%r: records %d to %d were deleted before they were done", partition, base, plan.low - 1)
            plan.restored = Restored(plan.low)
        else:
            plan.restored = decode(base, partition.metadata, plan.high)
            if partition.metadata and plan.restored.floor is None:
                LOG.error("%r: the completion map cannot be read: nothing beyond %d counts as done", partition, base)
        plan.floor = plan.restored.floor if plan.restored.floor is not None else 0

    def _unknown_floors(self, topic: str, plans: list[_Plan]) -> None:
        """No floor is known: no outcome of what follows the base can be older than the record at the base."""
        for plan in plans:
            plan.floor = plan.lifecycle_high
        plans = [p for p in plans if p.restored.base < p.high and p.lifecycle_low < p.lifecycle_high]
        times: dict[int, int] = {}
        ranges = {(topic, p.partition.number): (p.restored.base, p.high) for p in plans}
        self._read_ranges(ranges, lambda m: _first(times, m), first_only=True)
        asked = [TopicPartition(self._names.lifecycle, number, stamp) for number, stamp in times.items()]
        if asked:
            found = {t.partition: t.offset for t in self._consumer().offsets_for_times(asked, REQUEST_TIMEOUT_S)}
            for plan in plans:
                offset = found.get(plan.partition.number, -1)
                if offset >= 0:
                    plan.floor = offset

    def _mark_dirty(self, fetcher: Fetcher, plans: list[_Plan]) -> bool:
        """Commit what was found, unchanged but for ``clean=false``, and await it; False if nothing is ours any more."""
        deadline = time.monotonic() + STALL_S
        while True:
            owned = [p for p in plans if p.partition.owned]
            if not owned or self._closing or self._settler.broken:
                return False
            snapshots: list[tuple[Partition, Snapshot]] = []
            for plan in owned:
                if plan.restored.clean:
                    plan.floor = plan.lifecycle_high
                restored = plan.restored
                metadata = encode(restored.base, restored.done, plan.floor, False, restored.begun)
                assert metadata is not None  # it was read from a text of this length
                snapshots.append((plan.partition, Snapshot(plan.restored.base, metadata)))
            request = fetcher.request_commit(snapshots)
            while not request.done.wait(1.0):
                if self._closing or not fetcher.is_alive():
                    return False
            if request.accepted:
                return True
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"{fetcher.topic}: taking over partitions {[p.partition.number for p in owned]} was not "
                    f"acknowledged within {STALL_S:g} s: {fetcher.committer.last_error}"
                )
            time.sleep(0.1)

    def _seed_starts(self, topic: str, plans: list[_Plan]) -> None:
        asked = [
            TopicPartition(topic, p.partition.number, int(time.time() * 1000) - REMEMBERED_MS)
            for p in plans
            if p.restored.base > p.low
        ]
        by_time: dict[int, int] = {}
        if asked:
            by_time = {t.partition: t.offset for t in self._consumer().offsets_for_times(asked, REQUEST_TIMEOUT_S)}
        for plan in plans:
            base = plan.restored.base
            recent = by_time.get(plan.partition.number, -1)
            # -1: nothing was appended that lately.
            plan.seed_from = max(plan.low, base - REMEMBERED, recent if recent >= 0 else base)

    def _read(self, topic: str, plans: list[_Plan]) -> None:
        """Seed the memories from the work topic and scan lifecycle, all partitions at once."""
        by_number = {p.partition.number: p for p in plans}
        ranges: dict[tuple[str, int], tuple[int, int]] = {}
        for plan in plans:
            number = plan.partition.number
            ranges[topic, number] = (plan.seed_from, plan.restored.base)
            if not plan.restored.clean and plan.restored.base < plan.high:
                ranges[self._names.lifecycle, number] = (plan.floor, plan.lifecycle_high)

        def take(message: Message) -> None:
            partition = by_number[message.partition() or 0].partition
            try:
                if message.topic() != topic:
                    self._scanned(by_number[message.partition() or 0], message)
                elif (key := key_of(message, self._decoder)) is not None:
                    partition.memory.add(key)
                    self.seeded += 1
            except RegistryNeeded as exc:
                # What it says may be that a job is done: not knowing it, nothing of the partition may be run.
                if partition.stopped is None:
                    partition.stop(message, str(exc))

        self._read_ranges(ranges, take, wanted=lambda: any(p.partition.owned for p in plans))

    def _scanned(self, plan: _Plan, message: Message) -> None:
        partition = plan.partition
        value = message.value()
        raw = (self._decoder.own_form(value) or value) if isinstance(value, bytes) else None
        seen = None if raw is None else glance(raw)
        if seen is not None and raw is not None:
            key = release_key(seen[0], seen[1], seen[2])
            if type(seen[6]) is JobSucceeded:
                self._note_end(partition, message, key, seen[6])
            elif type(seen[6]) is JobStarted:
                # A glance leaves it all out; in the shape it answers for, the count is the last byte.
                self._note_start(partition, key, raw[-1] >> 1)
                self._begun_at(plan, *_started_at(raw), message.timestamp()[1])
            return
        try:
            event = self._decoder.decode(raw)
        except SchemaError:
            return  # the materializer's to report
        fact = event.fact
        key = release_key(event.job_id, event.run, event.release)
        if settles(fact):
            self._note_end(partition, message, key, fact)
        elif isinstance(fact, JobRetried | JobSnoozed):  # in place: that start has ended, and the next one is due
            partition.starts.pop(key, None)
            attempt = event.attempt + isinstance(fact, JobRetried)
            partition.held[key] = (attempt, message.timestamp()[1] + fact.delay_ms, message.offset() or 0)
        elif isinstance(fact, JobStarted):
            self._note_start(partition, key, fact.takeover)
            self._begun_at(plan, fact.work_topic.encode(), fact.work_offset, message.timestamp()[1])

    @staticmethod
    def _begun_at(plan: _Plan, topic: bytes, offset: int, appended_ms: int) -> None:
        if topic.endswith(plan.partition.topic.encode()):
            plan.begun = max(plan.begun, offset + 1)
            plan.lately.append(appended_ms)

    def _note_start(self, partition: Partition, key: int, takeover: int) -> None:
        if key not in partition.closed:
            partition.starts[key] = max(partition.starts.get(key, 0), takeover) + 1

    def _note_end(self, partition: Partition, message: Message, key: int, fact: Fact) -> None:
        partition.closed.setdefault(key, Found(message.offset() or 0, message.timestamp()[1], fact))
        partition.starts.pop(key, None)
        partition.held.pop(key, None)

    def _conclude(self, plan: _Plan) -> None:
        partition = plan.partition
        assert partition.offsets is not None
        # Most of what the scan finds lies before the base, where it is done anyway.
        for key in [k for k in partition.closed if k in partition.memory]:
            del partition.closed[key]
        partition.scanned_to, partition.floor = plan.high, plan.floor
        if not plan.restored.clean and partition.committed >= 0:
            partition.careful = max(plan.begun, plan.restored.begun, plan.restored.base) + plan.unseen
        if partition.closed or partition.held or partition.starts:
            partition.offsets.hold(plan.floor)
        if plan.high <= plan.restored.base:
            partition.closed.clear()
            partition.starts.clear()
            partition.held.clear()
            partition.offsets.hold(None)
        self.found += len(partition.closed)
        LOG.info(
            "%r: taken over at %d (%s), %d outcomes found beyond it",
            partition,
            plan.restored.base,
            "clean" if plan.restored.clean else f"lifecycle read from {plan.floor} to {plan.lifecycle_high}",
            len(partition.closed),
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def _consumer(self) -> Consumer:
        if self._reader is None:
            # The end of a partition may be a mark that no message stands for; only the end-of-partition event tells.
            self._reader = consumer(consumer_config(self._settings) | {"enable.partition.eof": True})
        return self._reader

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _ends(self, topic: str, number: int) -> tuple[int, int]:
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                low, high = self._consumer().get_watermark_offsets(TopicPartition(topic, number), REQUEST_TIMEOUT_S)
                return low, high
            except KafkaException as exc:
                what = f"asking for the ends of {topic}[{number}]"
                problem = translate(exc.args[0], self._settings, what, read(topic))
                if isinstance(problem, AccessDenied) or time.monotonic() > deadline or self._closing:
                    raise problem from exc
                # A broker that shuts down says that its topics do not exist, and a client believes that for minutes.
                self._drop_reader()
                time.sleep(0.2)

    def _read_ranges(
        self,
        ranges: dict[tuple[str, int], tuple[int, int]],
        take: Callable[[Message], None],
        *,
        first_only: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Every message of half-open ranges of offsets, which may have gaps; none of them lies beyond the log's end."""
        ends = {where: end for where, (start, end) in ranges.items() if start < end}
        if not ends:
            return
        reader = self._consumer()
        reader.assign([TopicPartition(t, n, ranges[t, n][0]) for t, n in ends])
        try:
            seen = time.monotonic()
            while ends and not self._closing and wanted():
                for message in reader.consume(1000, 0.02):
                    where: tuple[Any, Any] = (message.topic(), message.partition())
                    end = ends.get(where)
                    if end is None:
                        continue
                    offset = message.offset() or 0
                    error = message.error()
                    if error is None:
                        seen = time.monotonic()
                        if offset < end:
                            take(message)
                        over = offset + 1 >= end or first_only
                    elif error.code() == KafkaError._PARTITION_EOF:
                        over = offset >= end
                    elif error.retriable() or error.code() in PASSING:
                        continue
                    else:
                        raise translate(error, self._settings, f"reading {where[0]}[{where[1]}]", read(where[0]))
                    if over:
                        del ends[where]
                        # Not pause(): it outlives unassign(), and the partition's next
                        # range would stay silent for ever.
                        reader.incremental_unassign([TopicPartition(*where)])
                if time.monotonic() - seen > STALL_S:
                    raise BrokerUnavailable(f"taking over: {sorted(ends)} gave nothing for {STALL_S:g} s")
        finally:
            reader.unassign()


def _started_at(raw: bytes) -> tuple[bytes, int]:
    """The end of the topic's name and the offset in the bytes of a plain `JobStarted`: … topic, offset, a byte's count.

    Read from the end: of a number's bytes all but the last have the high bit, and a name's have none.
    """
    end = at = len(raw) - 2
    while raw[at - 1] & 0x80:
        at -= 1
    number = 0
    for n, byte in enumerate(raw[at : end + 1]):
        number |= (byte & 0x7F) << 7 * n
    return raw[max(0, at - 300) : at], number >> 1


def _first(times: dict[int, int], message: Message) -> None:
    times.setdefault(message.partition() or 0, message.timestamp()[1])
