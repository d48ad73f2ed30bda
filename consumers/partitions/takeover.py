"""Prepares newly assigned partitions before any of their records is run.

The takeover commits the partition as dirty (not clean) and waits for the acknowledgement. It reads the latest releases
below the committed offset (the watermark), so that a second record of the same release is dropped. Unless the last
owner left cleanly, the takeover also reads the lifecycle partition from the takeover floor: a release whose closing
fact is found is not run again, and the records that derive from the fact are sent again. The takeover has its own
thread; meanwhile the fetch thread continues to poll, and the partition's messages wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from confluent_kafka import KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.partitions.fetcher import Fetcher
from jobledger.consumers.partitions.range_reader import STALL_S, RangeReader
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.state.dedup import REMEMBERED, REMEMBERED_MS, release_key, release_key_of, settling_fact_of
from jobledger.consumers.state.offset_tracker import PartitionOffsets, Snapshot
from jobledger.consumers.state.prior_state import NOTHING_FOLLOWS, PriorFact, PriorState
from jobledger.consumers.state.work import Partition
from jobledger.errors import BrokerUnavailable, JobledgerError, RegistryNeeded, SchemaError
from jobledger.kafka.clients import translate
from jobledger.kafka.partitioner import partition_of
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topology import lifecycle_too_small
from jobledger.log.commit_metadata import Restored, decode, encode
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Fact, JobLeased, JobRetried, JobSnoozed, JobStarted, JobSucceeded, settles
from jobledger.schemas.fast_path import glance

LOG = get_logger("jobledger.worker")

#: Facts that settle a release but do not end its job: the coordinator decides what follows.
OPEN = (JobLeased, JobRetried, JobSnoozed)
#: Seconds after which an unused reader closes its connections.
IDLE_S = 10.0
#: Milliseconds by which the clocks of two brokers may differ.
SKEW_MS = 60_000
#: A worker that died may have begun records whose starts are not in the log. Their assumed number is `UNSEEN_LEAST`
#: plus the number of starts in the log's last `UNSEEN_MS` milliseconds, of which at most `UNSEEN_MOST` are counted.
UNSEEN_MS, UNSEEN_LEAST, UNSEEN_MOST = 250, 16, 1_000


class _Scan:
    """The log ranges that the takeover of one partition reads, and the state that was found in them."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.low = self.high = self.lifecycle_low = self.lifecycle_high = 0
        self.restored = Restored(0)
        self.floor = 0
        self.memory_from = 0
        #: Releases that a fact of `OPEN` settles, by `release_key`: (job id, append time of the fact in ms).
        self.open: dict[int, tuple[str, int]] = {}
        self.begun = 0  # one beyond the highest offset of a record whose start was found
        self.lately: deque[int] = deque(maxlen=UNSEEN_MOST)  # append times of the latest starts, in ms

    @property
    def unseen(self) -> int:
        """Number of records from `begun` on that may have been begun: their starts were in flight when the worker
        died."""
        last = self.lately[-1] if self.lately else 0
        return UNSEEN_LEAST + sum(at > last - UNSEEN_MS for at in self.lately)


class Takeover(threading.Thread):
    """Takes over assigned partitions, one batch at a time.

    ``ready`` is called in this thread with the partitions whose jobs may run now. ``fail`` stops the worker.
    ``lifecycle_partitions``: the number of lifecycle partitions when the worker started.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names,
        ack_tracker: AckTracker,
        decoder: Decoder,
        *,
        lifecycle_partitions: int,
        ready: Callable[[list[Partition]], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-takeover", daemon=True)
        self._settings, self._fail = settings, fail
        self._todo: queue.SimpleQueue[tuple[Fetcher, list[Partition]] | None] = queue.SimpleQueue()
        self._closing = False
        self._log = RangeReader(settings, lambda: self._closing)
        self._lifecycle_partitions_seen = lifecycle_partitions
        self._names, self._ack_tracker, self._decoder, self._ready = names, ack_tracker, decoder, ready
        #: Counts since the start: releases that the log settled, and work records that were read into release memories.
        self.found_settled = self.seeded = 0

    def take_over(self, fetcher: Fetcher, partitions: list[Partition]) -> None:
        """Queue newly assigned partitions of one lane for takeover. Does not wait."""
        self._todo.put((fetcher, partitions))

    def close(self) -> None:
        """End the thread. A takeover that is in progress is aborted."""
        self._closing = True
        self._todo.put(None)

    def run(self) -> None:
        """Take over the queued batches in order, until `close` is called. An error stops the worker."""
        try:
            while True:
                try:
                    item = self._todo.get(timeout=IDLE_S if self._log.open else None)
                except queue.Empty:
                    self._log.close()
                    continue
                if item is None:
                    return
                self._take_over(*item)
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(translate(exc.args[0], self._settings, "taking partitions over"))
        except Exception as exc:
            LOG.exception("the takeover of partitions failed")
            self._fail(JobledgerError(f"the takeover of partitions failed: {exc!r}"))
        finally:
            self._log.close()

    # -- steps ----------------------------------------------------------------------------------------------------

    def _take_over(self, fetcher: Fetcher, partitions: list[Partition]) -> None:
        scans = [_Scan(p) for p in self._with_lifecycle_partition(fetcher.topic, partitions) if p.owned]
        if not scans:
            return
        for scan in scans:
            self._restore(scan)
        self._unknown_floors(fetcher.topic, [scan for scan in scans if scan.restored.floor is None])
        if not self._mark_dirty(fetcher, scans):
            return
        self._choose_memory_ranges(fetcher.topic, scans)
        for scan in scans:
            scan.partition.offsets = PartitionOffsets(scan.restored, scan.lifecycle_high)
        self._read(fetcher.topic, scans)
        self._read_elsewhere(scans)
        if self._closing:
            # The reads may be incomplete. The partitions were committed as dirty above, so the next owner reads the
            # log itself. A commit that was found clean is committed as clean again at the handover
            # (`PriorState.clean_commit`).
            return
        # A stopped partition is not taken over: the next owner begins at the offset where this owner began.
        read = [scan for scan in scans if scan.partition.stopped is None]
        for scan in read:
            self._conclude(scan)
        done = [scan.partition for scan in read if scan.partition.owned]
        for partition in done:
            partition.ready = True
        self._ready(done)

    def _with_lifecycle_partition(self, topic: str, partitions: list[Partition]) -> list[Partition]:
        """Return the partitions whose number the lifecycle topic has, too. Stop the other partitions, because facts
        about their jobs cannot be written."""
        most = max((p.number for p in partitions), default=-1)
        if most < self._lifecycle_partitions_seen:  # Kafka never removes partitions
            return partitions
        there = self._lifecycle_partitions_seen = self._log.partitions(self._names.lifecycle)
        if most < there:
            return partitions
        why = lifecycle_too_small(topic, self._log.partitions(topic), self._names.lifecycle, there)
        beyond = [p for p in partitions if p.number >= there]
        for partition in beyond:
            partition.start_no_more(why)
        return [p for p in partitions if p not in beyond]

    def _restore(self, scan: _Scan) -> None:
        """Restore what the last owner committed, after a check against the present range of the log."""
        partition, prior = scan.partition, scan.partition.prior
        scan.low, scan.high = self._log.bounds(partition.topic, partition.number)
        scan.lifecycle_low, scan.lifecycle_high = self._log.bounds(self._names.lifecycle, partition.number)
        committed = prior.committed
        if committed > scan.high:
            LOG.error(
                "%r: the committed offset %d is beyond the log's end %d: was the topic recreated? Reading from its start",
                partition,
                committed,
                scan.high,
            )
        if committed < 0 or committed > scan.high:
            scan.restored = Restored(scan.low)
        elif committed < scan.low:
            LOG.error("%r: records %d to %d were deleted before they were done", partition, committed, scan.low - 1)
            scan.restored = Restored(scan.low)
        else:
            scan.restored = decode(committed, prior.metadata, scan.high)
            if scan.restored.clean and prior.metadata is not None:
                prior.clean_commit = Snapshot(committed, prior.metadata)
            if prior.metadata and scan.restored.floor is None:
                LOG.error(
                    "%r: the completion map cannot be read: nothing beyond %d counts as done", partition, committed
                )
        scan.floor = scan.restored.floor if scan.restored.floor is not None else 0

    def _unknown_floors(self, topic: str, scans: list[_Scan]) -> None:
        """Set the takeover floor of partitions whose commit has none.

        The floor is the first lifecycle offset that was appended since the first work record at or above the watermark:
        no outcome of such a record can be older.
        """
        for scan in scans:
            scan.floor = scan.lifecycle_high
        scans = [
            scan for scan in scans if scan.restored.watermark < scan.high and scan.lifecycle_low < scan.lifecycle_high
        ]
        times: dict[int, int] = {}
        ranges = {(topic, scan.partition.number): (scan.restored.watermark, scan.high) for scan in scans}
        self._log.read(ranges, lambda m: _first(times, m), first_only=True)
        asked = [TopicPartition(self._names.lifecycle, number, stamp) for number, stamp in times.items()]
        if asked:
            offsets = self._log.offsets_at(asked)
            for scan in scans:
                offset = offsets.get(scan.partition.number, -1)
                if offset >= 0:
                    scan.floor = offset

    def _mark_dirty(self, fetcher: Fetcher, scans: list[_Scan]) -> bool:
        """Commit the restored state as dirty, with the takeover floor, and wait for the acknowledgement.

        Return False if no partition is owned any more, or the worker ends. Raises `BrokerUnavailable` after `STALL_S`
        seconds.
        """
        deadline = time.monotonic() + STALL_S
        while True:
            owned = [scan for scan in scans if scan.partition.owned]
            if not owned or self._closing or self._ack_tracker.commits_stopped:
                return False
            snapshots: list[tuple[Partition, Snapshot]] = []
            for scan in owned:
                if scan.restored.clean:
                    scan.floor = scan.lifecycle_high
                restored = scan.restored
                metadata = encode(restored.watermark, restored.done, scan.floor, False, restored.begun)
                # The text fits: `offset_tracker.BRAKE` keeps the text of a former owner well below the limit, and
                # another floor adds a few characters at most.
                assert metadata is not None
                snapshots.append((scan.partition, Snapshot(scan.restored.watermark, metadata)))
            request = fetcher.request_commit(snapshots)
            while not request.done.wait(1.0):
                if self._closing or not fetcher.is_alive():
                    return False
            if request.accepted:
                return True
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"{fetcher.topic}: taking over partitions {[scan.partition.number for scan in owned]} was not "
                    f"acknowledged within {STALL_S:g} s: {fetcher.committer.last_error}"
                )
            time.sleep(0.1)

    def _choose_memory_ranges(self, topic: str, scans: list[_Scan]) -> None:
        asked = [
            TopicPartition(topic, scan.partition.number, int(time.time() * 1000) - REMEMBERED_MS)
            for scan in scans
            if scan.restored.watermark > scan.low
        ]
        by_time: dict[int, int] = {}
        if asked:
            by_time = self._log.offsets_at(asked)
        for scan in scans:
            watermark = scan.restored.watermark
            recent = by_time.get(scan.partition.number, -1)
            # -1: no record was appended in that time.
            scan.memory_from = max(scan.low, watermark - REMEMBERED, recent if recent >= 0 else watermark)

    def _read(self, topic: str, scans: list[_Scan]) -> None:
        """Read work records into the release memories, and scan the lifecycle topic, for all partitions at once."""
        by_number = {scan.partition.number: scan for scan in scans}
        ranges: dict[tuple[str, int], tuple[int, int]] = {}
        for scan in scans:
            number = scan.partition.number
            ranges[topic, number] = (scan.memory_from, scan.restored.watermark)
            if not scan.restored.clean and scan.restored.watermark < scan.high:
                ranges[self._names.lifecycle, number] = (scan.floor, scan.lifecycle_high)

        def take(message: Message) -> None:
            partition = by_number[message.partition() or 0].partition
            try:
                if message.topic() != topic:
                    self._take_lifecycle_record(by_number[message.partition() or 0], message)
                elif (key := release_key_of(message, self._decoder)) is not None:
                    partition.memory.add(key)
                    self.seeded += 1
            except RegistryNeeded as exc:
                # The record cannot be read, and may say that a job is done. So no job of the partition may run.
                if partition.stopped is None:
                    partition.start_no_more(str(exc), message)

        self._log.read(ranges, take, wanted=lambda: any(scan.partition.owned for scan in scans))

    def _take_lifecycle_record(self, scan: _Scan, message: Message) -> None:
        prior = scan.partition.prior
        value = message.value()
        raw = (self._decoder.own_form(value) or value) if isinstance(value, bytes) else None
        seen = None if raw is None else glance(raw)
        if seen is not None and raw is not None:
            job_id, run, release, fact = seen[0], seen[1], seen[2], seen[7]
            key = release_key(job_id, run, release)
            if type(fact) is JobSucceeded:
                self._note_settling_fact(
                    scan, (job_id, run, release), fact, message.offset() or 0, message.timestamp()[1]
                )
            elif type(fact) is JobStarted:
                self._note_later_release(scan, job_id, run, release)
                # `glance` leaves the fields of the fact empty. In the encoding that `glance` reads, the takeover count
                # is the last byte.
                self._note_start(prior, key, raw[-1] >> 1)
                self._begun_at(scan, *_started_at(raw), message.timestamp()[1])
            return
        try:
            event = self._decoder.decode(raw)
        except SchemaError:
            return  # the materializer reports the record
        other: Fact = event.fact
        job_id, run, release = event.job_id, event.run, event.release
        key = release_key(job_id, run, release)
        if settles(other):
            self._note_settling_fact(scan, (job_id, run, release), other, message.offset() or 0, message.timestamp()[1])
        elif isinstance(other, JobRetried | JobSnoozed):  # in place: this attempt ended, and the next one follows
            attempt = event.attempt + isinstance(other, JobRetried)
            # A lower attempt: a late fact of a former owner, which is ignored.
            if attempt >= prior.next_attempts.get(key, (0,))[0]:
                prior.starts.pop(key, None)
                prior.next_attempts[key] = (attempt, message.timestamp()[1] + other.delay_ms, message.offset() or 0)
        elif isinstance(other, JobStarted):
            self._note_later_release(scan, job_id, run, release)
            self._note_start(prior, key, other.takeover)
            self._begun_at(scan, other.work_topic.encode(), other.work_offset, message.timestamp()[1])

    @staticmethod
    def _begun_at(scan: _Scan, topic: bytes, offset: int, appended_ms: int) -> None:
        if topic.endswith(scan.partition.topic.encode()):
            scan.begun = max(scan.begun, offset + 1)
            scan.lately.append(appended_ms)

    def _note_start(self, prior: PriorState, key: int, starts_before: int) -> None:
        if key not in prior.settled:
            prior.starts[key] = max(prior.starts.get(key, 0), starts_before) + 1

    def _note_settling_fact(
        self, scan: _Scan, of: tuple[str, int, int], fact: Fact, offset: int, appended_ms: int
    ) -> None:
        """Note a fact that settles a release. A scan of the lifecycle partition from ``offset`` on finds it again.

        The first such fact counts, with two exceptions: an outcome replaces a fact of `OPEN`, and any other fact
        replaces a `JobLeased`.
        """
        prior, key = scan.partition.prior, release_key(*of)
        known = prior.settled.get(key)
        if (
            known is None
            or (isinstance(known.fact, OPEN) and not isinstance(fact, OPEN))
            or (isinstance(known.fact, JobLeased) and not isinstance(fact, JobLeased))
        ):
            # Keep the offset of the first fact: a scan from there finds both facts.
            prior.settled[key] = PriorFact(offset if known is None else known.offset, appended_ms, fact)
            if isinstance(fact, OPEN):
                scan.open[key] = (of[0], appended_ms)
            else:
                scan.open.pop(key, None)
        self._note_later_release(scan, *of)
        prior.starts.pop(key, None)
        prior.next_attempts.pop(key, None)

    @staticmethod
    def _note_later_release(scan: _Scan, job_id: str, run: int, release: int) -> None:
        """Note that the log has a fact of this release, so that the records that derive from the previous release are
        not sent again.

        The coordinator may have forgotten this release by now, so a second request would release the job twice.
        """
        if release > 1 and scan.open and scan.open.pop(key := release_key(job_id, run, release - 1), None) is not None:
            settled = scan.partition.prior.settled
            known = settled[key]
            settled[key] = PriorFact(known.offset, known.appended_ms, NOTHING_FOLLOWS)

    def _read_elsewhere(self, scans: list[_Scan]) -> None:
        """Read the facts that the coordinator wrote about releases that a fact of `OPEN` settles: the outcomes of
        leased jobs, and the outcomes of the releases that follow.

        The coordinator writes to the lifecycle partition of the job's id. If the queue has fewer partitions than the
        lifecycle topic, this may be another partition than the one that `_read` reads.
        """
        wanted: dict[int, _Scan] = {}
        since: dict[int, int] = {}
        count = 0
        for scan in scans:
            for key, (job_id, appended_ms) in scan.open.items():
                if key in scan.partition.memory or not scan.partition.owned:
                    continue  # the release is below the watermark, so done; or the partition is no longer owned
                count = count or self._log.partitions(self._names.lifecycle)
                number = partition_of(job_id.encode(), count)
                if number != scan.partition.number:
                    wanted[key] = scan
                    since[number] = min(since.get(number, appended_ms), appended_ms)
        if not wanted:
            return
        lifecycle = self._names.lifecycle
        asked = [TopicPartition(lifecycle, number, max(0, at - SKEW_MS)) for number, at in since.items()]
        begins = self._log.offsets_at(asked)
        ranges = {
            (lifecycle, n): (begins[n], self._log.bounds(lifecycle, n)[1]) for n in since if begins.get(n, -1) >= 0
        }

        def take(message: Message) -> None:
            try:
                end = settling_fact_of(message, self._decoder)
            except RegistryNeeded as exc:  # as in `_read`
                for asking in {id(scan): scan.partition for scan in wanted.values()}.values():
                    if asking.stopped is None:
                        asking.start_no_more(str(exc), message)
                return
            if end is not None:
                (job_id, run, release), fact = end
                scan = wanted.get(release_key(*end[0])) or wanted.get(release_key(job_id, run, release - 1))
                if scan is not None:
                    self._note_settling_fact(scan, end[0], fact, scan.floor, message.timestamp()[1])

        self._log.read(ranges, take, wanted=lambda: any(scan.partition.owned for scan in scans))

    def _conclude(self, scan: _Scan) -> None:
        partition, prior = scan.partition, scan.partition.prior
        assert partition.offsets is not None
        # Most of the facts that the scan finds are about records below the watermark, which are done.
        for key in [k for k in prior.settled if k in partition.memory]:
            del prior.settled[key]
        prior.scanned_to, prior.floor = scan.high, scan.floor
        if not scan.restored.clean and prior.committed >= 0:
            prior.suspect_below = max(scan.begun, scan.restored.begun, scan.restored.watermark) + scan.unseen
            partition.offsets.suspect(min(prior.suspect_below, scan.high), scan.lifecycle_high)
        if not prior.used_up:
            partition.offsets.hold(scan.floor)
        if scan.high <= scan.restored.watermark:
            prior.forget_releases()
            partition.offsets.hold(None)
        self.found_settled += len(prior.settled)
        LOG.info(
            "%r: taken over at %d (%s), %s found beyond it",
            partition,
            scan.restored.watermark,
            "clean" if scan.restored.clean else f"lifecycle read from {scan.floor} to {scan.lifecycle_high}",
            counted(len(prior.settled), "settled release"),
        )


def _started_at(raw: bytes) -> tuple[bytes, int]:
    """Return two fields of an encoded plain `JobStarted`: up to 300 bytes that end in the topic's name, and the work
    offset.

    The last fields of the encoding are topic, offset and a count of one byte. They are read from the end: all bytes of
    the offset except the last have the high bit set, and no byte of a topic's name has it.
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
