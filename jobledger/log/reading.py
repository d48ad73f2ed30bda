"""Reads ranges of the log, without a consumer group. Decodes no records itself, and commits nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.errors import (
    BrokerUnavailable,
    NotAnEvent,
    StatusTimeout,
)
from jobledger.kafka.auth import read
from jobledger.kafka.clients import (
    ASK_AGAIN_S,
    ELECTING,
    MISSING,
    MISSING_S,
    PASSING,
    consumer,
    consumer_config,
    partitions_of,
    position_of,
    translate,
)
from jobledger.process.retrying import retry_until
from jobledger.schemas.events import JobEvent, Position, Recorded

#: Settings of a client for `messages`. The last offset of a range may be a transaction marker, for which the client
#: returns no message. Only the end-of-partition event shows then that all messages were read.
RANGES: dict[str, Any] = {"enable.partition.eof": True}
#: Maximum number of messages that one call of the client returns, and seconds that the call waits for so many.
BATCH, BATCH_S = 1_000, 0.02
#: Maximum number of unwanted messages between two wanted ones that `LogReader.at_all` reads rather than starting anew.
GAP = 1_000


def messages(
    consumer: Consumer,
    settings: Settings,
    ranges: Mapping[tuple[str, int], tuple[int, int]],
    *,
    stall: float,
    first_only: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[Message]:
    """Yield every message of ``ranges``: half-open ranges of offsets, by (topic, partition).

    ``consumer``: a client with the settings `RANGES`, without an assignment. A range may have offsets without a
    message, and must not go beyond the log's end. ``first_only``: yield one message of each range. Ends early once
    ``wanted()`` is false. Raises `BrokerUnavailable` if no message arrives for ``stall`` seconds, and the translated
    error if a broker refuses the request.
    """
    ends = {where: end for where, (start, end) in ranges.items() if start < end}
    if not ends:
        return
    consumer.assign([TopicPartition(topic, number, ranges[topic, number][0]) for topic, number in ends])
    try:
        seen = time.monotonic()
        while ends and wanted():
            arrived = False
            for message in consumer.consume(BATCH, BATCH_S):
                where: tuple[Any, Any] = (message.topic(), message.partition())
                end = ends.get(where)
                if end is None:
                    continue
                offset = message.offset() or 0
                error = message.error()
                if error is None:
                    arrived = True
                    if offset < end:
                        yield message
                    over = offset + 1 >= end or first_only
                elif error.code() == KafkaError._PARTITION_EOF:
                    over = offset >= end
                elif error.retriable() or error.code() in PASSING:
                    continue
                else:
                    raise translate(error, settings, f"reading {where[0]}[{where[1]}]", read(where[0]))
                if over:
                    del ends[where]
                    # Not pause(): a pause outlasts unassign(), so the partition's next range would never be read.
                    consumer.incremental_unassign([TopicPartition(*where)])
            now = time.monotonic()  # after the caller has used the messages, which may take long
            if arrived:
                seen = now
            elif now - seen > stall:
                rest = ", ".join(f"{topic}[{number}]" for topic, number in sorted(ends))
                raise BrokerUnavailable(f"no record of {rest} arrived for {stall:g} s: check that every broker runs")
    finally:
        consumer.unassign()


class LogReader:
    """Reads ranges of partitions: for timelines, schema lookups, trimming, backfills and audits. Not thread-safe.
    Close the reader after use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # A request about the next partition waits behind the fetch of the previous one, on the same connection. With
        # the default of 500 ms for a fetch that finds nothing, twelve partitions cost two seconds of waiting.
        self._conf = consumer_config(settings) | RANGES | {"fetch.wait.max.ms": 10}
        self._consumer = consumer(self._conf)
        self._reading = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def bounds(self, topic: str, partition: int, timeout: float = 10.0) -> tuple[int, int]:
        """Return the partition's first offset and its high watermark (the next offset to be written).

        Raises `TopicMissing` if the broker reports this for `MISSING_S` seconds, and `BrokerUnavailable` after
        ``timeout`` seconds.
        """
        began = time.monotonic()

        def ask() -> tuple[int, int]:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout)
            return low, high

        def again(error: KafkaException) -> bool:
            # A topic created a moment ago, or a partition without a leader: the broker is available.
            code = error.args[0].code()
            return code in ELECTING or (code in MISSING and time.monotonic() - began < MISSING_S)

        def on_retry(error: KafkaException, seconds: float) -> None:
            if error.args[0].code() in MISSING:
                self._renew()

        try:
            return retry_until(began + timeout, ask, KafkaException, pause=ASK_AGAIN_S, again=again, on_retry=on_retry)
        except KafkaException as exc:
            what = f"asking for the first and last offset of {topic}[{partition}]"
            raise translate(exc.args[0], self.settings, what, read(topic)) from exc

    def _renew(self) -> None:
        """Replace the client, unless `read` uses it: a client to which a broker has reported that a topic does not
        exist continues to report this for minutes."""
        if not self._reading:
            self._consumer.close()
            self._consumer = consumer(self._conf)

    def offset_at(self, topic: str, partition: int, timestamp_ms: int, timeout: float = 10.0) -> int:
        """Return the first offset that was appended at or after a time (milliseconds since the epoch); the high
        watermark if there is none."""
        try:
            offsets = self._consumer.offsets_for_times(
                [TopicPartition(topic, partition, timestamp_ms)], timeout=timeout
            )
        except KafkaException as exc:
            what = f"asking for the offset of a time in {topic}[{partition}]"
            raise translate(exc.args[0], self.settings, what, read(topic)) from exc
        return offsets[0].offset if offsets[0].offset >= 0 else self.bounds(topic, partition, timeout)[1]

    def read(
        self, topic: str, partition: int, start: int, end: int | None = None, *, stall: float = 30.0
    ) -> Iterator[Message]:
        """Yield the messages from ``start`` up to, but not including, ``end`` (None: the current high watermark).

        Offsets may have gaps. Raises `BrokerUnavailable` if no message arrives for ``stall`` seconds.
        """
        low, high = self.bounds(topic, partition)
        end = high if end is None else min(end, high)
        self._reading += 1
        try:
            yield from messages(
                self._consumer, self.settings, {(topic, partition): (max(start, low), end)}, stall=stall
            )
        finally:
            self._reading -= 1

    def at_all(self, positions: Iterable[Position], *, stall: float = 30.0) -> Iterator[Message]:
        """Yield the messages at these positions, in any order; those that the log no longer has are left out.

        Positions that are close to one another are read together. Raises as `read` does.
        """
        by_partition: dict[tuple[str, int], list[int]] = {}
        for position in positions:
            by_partition.setdefault((position.topic, position.partition), []).append(position.offset)
        for (topic, partition), offsets in by_partition.items():
            wanted = set(offsets)
            for start, end in _ranges(sorted(wanted)):
                for message in self.read(topic, partition, start, end, stall=stall):
                    if message.offset() in wanted:
                        yield message

    def at(self, position: Position) -> Message | None:
        """Return the message at one position, or None if the log no longer has it."""
        for message in self.read(position.topic, position.partition, position.offset, position.offset + 1):
            return message
        return None


def _ranges(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges that hold these offsets, which are in ascending order. Gaps of up to `GAP` are included."""
    start = end = -1
    for offset in offsets:
        if start >= 0 and offset - end > GAP:
            yield start, end
            start = -1
        start = offset if start < 0 else start
        end = offset + 1
    if start >= 0:
        yield start, end


def recorded(message: Message, decode: Callable[[bytes | None], JobEvent]) -> Recorded:
    """Return a consumed message as an event with its position and append time. Raises `SchemaError`."""
    value = message.value()
    if isinstance(value, str):  # only a deserializer returns text, and Jobledger's consumers have none
        raise NotAnEvent("the record was decoded before it reached the codec")
    return Recorded(decode(value), position_of(message), message.timestamp()[1])


def wait_until(check: Callable[[], bool], timeout: float, what: str, poll: float = 0.02) -> None:
    """Poll ``check`` every ``poll`` seconds until it returns True. Raises `StatusTimeout` that names ``what`` after
    ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() >= deadline:
            raise StatusTimeout(f"{what} did not happen within {timeout:g} s")
        time.sleep(poll)


def high_watermarks(reader: LogReader, topics: Sequence[str], settings: Settings) -> dict[tuple[str, int], int]:
    """Return the high watermarks of every partition of ``topics``."""
    return {
        (topic, partition): reader.bounds(topic, partition)[1]
        for topic in topics
        for partition in range(partitions_of(settings, topic))
    }
