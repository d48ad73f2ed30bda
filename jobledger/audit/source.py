"""Reads every record of a namespace's topics, from the log's first offset to its current ends, and decodes the records.

Only the connection uses Jobledger's other code: settings, rights and errors are those of every other command. This
module commits nothing and joins no group.

While workers run, a cause and its consequence may be written between two reads. So the reads have this order: first the
workers' committed offsets, then the ends of all partitions (`Span.bound`), then all records below these ends, then the
ends again (`Span.end`), and at last the records between the two ends. Every record that was committed, and every cause
of a record below ``bound``, is below ``end``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.audit.records import Record, Schemas
from jobledger.config import Settings
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError, RegistryNeeded
from jobledger.kafka import acls
from jobledger.kafka.auth import read as may_read
from jobledger.kafka.clients import PASSING, consumer, consumer_config, partitions_of, translate
from jobledger.kafka.topic_names import Names
from jobledger.log.group_offsets import group_offsets
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import SchemaLookup

Partition = tuple[str, int]
#: Progress callback: (records read, records in total).
Tell = Callable[[int, int], None]

#: Kilobytes of records in the client's queue, and bytes of one fetch. They limit the memory, however long the log is.
QUEUE_KB, FETCH_BYTES = 32 * 1024, 16 * 1024 * 1024
#: Maximum number of records that are taken from the client at once.
BATCH = 2_000
#: Seconds without a record after which the broker counts as unavailable, if an end is not reached yet.
STALL_S = 60.0
REQUEST_TIMEOUT_S = 10.0
_APPEND_TIME = 2  # the type in `Message.timestamp` of a time that the broker has set
#: The coordinator rejects an event whose job id or ``home`` has more bytes than this, or whose run, attempt or release
#: is at least this number.
ID_BYTES, NUMBER_MOST = 1_000, (1 << 31) - 1


class LogTrimmed(JobledgerError):
    """The log was trimmed while the audit read it."""


@dataclass
class Span:
    """The part of each partition that was read: the offsets from ``low`` up to, but not including, ``end``.

    ``bound``: the end when reading began. ``committed``: the workers' committed offsets on work topics; a work topic
    whose offsets could not be read has none. ``begins``: for each partition whose first records were trimmed or not
    read, the append time from which on no record is missing, in ms.
    """

    low: dict[Partition, int] = field(default_factory=dict)
    bound: dict[Partition, int] = field(default_factory=dict)
    end: dict[Partition, int] = field(default_factory=dict)
    committed: dict[Partition, int] = field(default_factory=dict)
    begins: dict[Partition, int] = field(default_factory=dict)

    @property
    def horizon(self) -> int:
        """The append time from which on no record of any partition is missing, in ms.

        The value is 0 if all partitions begin with their first record.
        """
        return max(self.begins.values(), default=0)


class Source:
    """Reads one namespace once. Close the source after use.

    ``queues``: read only the work topics and jobs of these queues; if empty, those of all queues. ``since_ms``: read
    only records that were appended at this time (ms) or later. ``also``: further topics of the namespace to read,
    without ``<ns>.``. ``refused``: work topics whose committed offsets this user may not read, with the error.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names,
        *,
        queues: Collection[str] = (),
        since_ms: int | None = None,
        also: Collection[str] = (),
    ) -> None:
        self._settings, self._names = settings.acting_as("web"), names
        self._queues, self._since, self._further = frozenset(queues), since_ms, tuple(also)
        self.span = Span()
        self.refused: dict[str, AccessDenied] = {}
        self._lookup = SchemaLookup(self._settings, names)
        self._schemas = Schemas(self._registered)
        self._reader = LogReader(self._settings)
        self._consumer: Consumer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()
        self._lookup.close()
        if self._consumer is not None:
            self._consumer.close()

    def records(self, tell: Tell | None = None) -> Iterator[Record]:
        """Yield every record, those of one partition in order. `span` is complete when the iterator is exhausted.

        ``tell``: called with the number of records that were read, and their total. Raises `TopicMissing`,
        `BrokerUnavailable`, `AccessDenied`, and `LogTrimmed` if records were trimmed while the log was read.
        """
        span = self.span
        topics = self._topics()
        for topic in topics:
            self._commits(topic)
        for topic, partitions in topics.items():
            for number in range(partitions):
                partition = (topic, number)
                low, end = self._reader.bounds(topic, number)
                if self._since is not None and (later := self._reader.offset_at(topic, number, self._since)) > low:
                    low = later
                    span.begins[partition] = self._since
                elif low > 0 and low >= end:  # no record is left whose append time could be used
                    span.begins[partition] = int((time.time() - self._settings.retention_days * 86_400) * 1000)
                span.low[partition], span.bound[partition], span.end[partition] = low, end, end
        self._read_schemas()
        yield from self._read(span.low, span.bound, tell)
        span.end = {partition: self._reader.bounds(*partition)[1] for partition in span.bound}
        self._read_schemas()
        yield from self._read(span.bound, span.end, None)
        self._check_lows()

    # -- topics, committed offsets and schemas ------------------------------------------------------------------------

    def _topics(self) -> dict[str, int]:
        """Return the topics to read, with their partition counts. Create the consumer."""
        names, settings = self._names, self._settings
        wanted = (names.lifecycle, names.coordination, names.dead_letter)
        limits = {"queued.max.messages.kbytes": QUEUE_KB, "fetch.max.bytes": FETCH_BYTES}
        self._consumer = consumer(consumer_config(settings) | limits | {"enable.partition.eof": True})
        try:
            listed = self._consumer.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        except KafkaException as exc:
            raise translate(exc.args[0], settings, "asking for topics") from exc
        work = [t for t in listed if (queue := names.queue_of(t)) and (not self._queues or queue in self._queues)]
        # The cluster does not list topics that this user may not read. Without this check they would seem to be empty.
        acls.check(settings, names.namespace, (*wanted, names.schemas, *work))
        for topic in wanted:
            if topic not in listed:
                partitions_of(settings, topic)  # raises an error: without the topic, the log would seem to be empty
        also = [topic for each in self._further if (topic := f"{names.namespace}.{each}") in listed]
        return {topic: len(listed[topic].partitions) for topic in (*sorted(work), *wanted, *also)}

    def _commits(self, topic: str) -> None:
        lane = self._names.lane_of(topic)
        if lane is None:
            return
        try:
            offsets = group_offsets(self._settings, self._names.worker_group(lane), topic)
        except AccessDenied as exc:
            self.refused[topic] = exc
            return
        self.span.committed.update({partition: each.offset for partition, each in offsets.items()})

    def _read_schemas(self) -> None:
        """Read every schema on ``<ns>.schemas``, before the records that need these schemas."""
        topic = self._names.schemas
        for number in range(partitions_of(self._settings, topic)):
            for message in self._reader.read(topic, number, 0):
                key, value = message.key(), message.value()
                if not isinstance(value, bytes):
                    continue
                try:
                    self._schemas.add(value.decode(), key if isinstance(key, bytes) else None)
                except Exception:  # noqa: BLE001, S112  # the parser raises many kinds of errors for an invalid schema
                    continue

    def _registered(self, schema_id: int) -> str | None:
        try:
            return self._lookup.by_id(schema_id, False)
        except RegistryNeeded:
            return None

    def _check_lows(self) -> None:
        """Raise `LogTrimmed` if records that had to be read were trimmed, because their jobs cannot be checked."""
        lost = [
            f"{topic}[{number}]"
            for (topic, number), low in self.span.low.items()
            if low < self.span.end[topic, number] and self._reader.bounds(topic, number)[0] > low
        ]
        if lost:
            raise LogTrimmed(f"the log was trimmed while it was read ({', '.join(lost)}): run the audit again")

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int], tell: Tell | None
    ) -> Iterator[Record]:
        unread = {partition for partition, end in ends.items() if starts[partition] < end}
        begins = self.span.begins
        fresh = {partition for partition in unread if starts[partition] == self.span.low[partition] > 0} - begins.keys()
        total, done, last = sum(ends[partition] - starts[partition] for partition in unread), 0, time.monotonic()
        client = self._consumer
        assert client is not None
        client.assign([TopicPartition(*partition, starts[partition]) for partition in unread])
        while unread:
            messages = client.consume(BATCH, 0.1)
            for message in messages:
                partition = (message.topic() or "", message.partition() or 0)
                offset = message.offset() or 0
                if (error := message.error()) is not None:
                    if error.code() != KafkaError._PARTITION_EOF:
                        self._check_error(error, partition)
                    elif offset >= ends[partition]:
                        unread.discard(partition)
                    continue
                if offset < ends[partition]:
                    record = self._record(message)
                    if partition in fresh:
                        fresh.discard(partition)
                        begins[partition] = record.at
                    done += 1
                    if not self._queues or record.fact is None or record.head["queue"] in (*self._queues, ""):
                        yield record
                if offset + 1 >= ends[partition]:
                    unread.discard(partition)
            if messages:
                last = time.monotonic()
                if tell is not None:
                    tell(done, total)
            elif time.monotonic() - last > STALL_S:
                unread_text = ", ".join(f"{topic}[{number}]" for topic, number in sorted(unread))
                raise BrokerUnavailable(
                    f"no record arrived for {STALL_S:g} s, but {unread_text} is not read to its end: check that every "
                    "broker runs"
                )
        client.unassign()

    def _check_error(self, error: KafkaError, partition: Partition) -> None:
        if not (error.retriable() or error.code() in PASSING):
            raise translate(error, self._settings, f"reading {partition[0]}[{partition[1]}]", may_read(partition[0]))

    def _record(self, message: Message) -> Record:
        kind, at = message.timestamp()
        topic, value = message.topic() or "", message.value()
        raw = value if value is None or isinstance(value, bytes) else value.encode()
        position = (topic, message.partition() or 0, message.offset() or 0, at)
        timed = kind == _APPEND_TIME
        try:
            head, fact, body = self._schemas.decode(raw)
            if topic == self._names.coordination:
                _check_head(head)
        except ValueError as exc:
            return Record(*position, raw=raw, why=str(exc), timed=timed)
        return Record(*position, fact, head, body, raw, timed=timed)


def _check_head(head: Mapping[str, object]) -> None:
    """Raise `ValueError` for an event that the coordinator rejects.

    Such an event has no job id, or an id that is too long, or a number that is too high.
    """
    for name in ("job_id", "home"):
        if len(str(head[name] or "").encode()) > ID_BYTES:
            raise ValueError(f"{name} has more than {ID_BYTES} bytes")
    if not head["job_id"]:
        raise ValueError("job_id is empty")
    if any(int(str(head[name])) >= NUMBER_MOST for name in ("run", "attempt", "release")):
        raise ValueError(f"run, attempt or release is above {NUMBER_MOST - 1}")
