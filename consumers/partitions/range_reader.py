"""Reads offset ranges of many partitions at once, for the takeover, with one client that is opened at its first use.

This module does not interpret the records. It is not thread-safe, except that ``closing`` may begin to return true at
any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.errors import AccessDenied, BrokerUnavailable
from jobledger.kafka.auth import read
from jobledger.kafka.clients import PASSING, consumer, consumer_config, translate

REQUEST_TIMEOUT_S = 10.0
#: Seconds without an answer or a record after which the reader gives up.
STALL_S = 60.0

T = TypeVar("T")


class LogRanges:
    """Reads the ranges of the log that a takeover needs. ``closing()``: whether reading is to stop early."""

    def __init__(self, settings: Settings, closing: Callable[[], bool]) -> None:
        self._settings, self._closing = settings, closing
        self._reader: Consumer | None = None

    @property
    def open(self) -> bool:
        """Whether connections are open."""
        return self._reader is not None

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _consumer(self) -> Consumer:
        if self._reader is None:
            # The last offset may be a transaction marker, for which the client returns no message. Only the
            # end-of-partition event shows then that all messages were read.
            self._reader = consumer(consumer_config(self._settings) | {"enable.partition.eof": True})
        return self._reader

    def ends(self, topic: str, number: int) -> tuple[int, int]:
        """Return the first offset and the high watermark of a partition.

        Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
        """
        low, high = self._ask(
            topic,
            f"asking for the ends of {topic}[{number}]",
            lambda reader: reader.get_watermark_offsets(TopicPartition(topic, number), REQUEST_TIMEOUT_S),
        )
        return low, high

    def partitions(self, topic: str) -> int:
        """Return the number of a topic's partitions. Raises what `ends` raises."""

        def ask(reader: Consumer) -> int:
            metadata = reader.list_topics(topic, REQUEST_TIMEOUT_S).topics[topic]
            if metadata.error is not None:
                raise KafkaException(metadata.error)
            return len(metadata.partitions)

        return self._ask(topic, f"asking for the partitions of {topic}", ask)

    def offsets_at(self, asked: list[TopicPartition]) -> dict[int, int]:
        """Return, by partition number, the first offset that was appended at or after a time; -1 if there is none.

        ``asked``: partitions of one topic, each with its time (ms since the epoch) as the offset. Raises what `ends`
        raises.
        """
        if not asked:
            return {}
        topic = asked[0].topic
        what = f"asking {topic} for a time"
        positions = self._ask(topic, what, lambda reader: reader.offsets_for_times(asked, REQUEST_TIMEOUT_S))
        return {position.partition: position.offset for position in positions}

    def _ask(self, topic: str, what: str, ask: Callable[[Consumer], T]) -> T:
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                return ask(self._consumer())
            except KafkaException as exc:
                problem = translate(exc.args[0], self._settings, what, read(topic))
                if isinstance(problem, AccessDenied) or time.monotonic() > deadline or self._closing():
                    raise problem from exc
                # A broker that shuts down reports its topics as missing, and the client repeats this answer for
                # minutes. So use a new client.
                self.close()
                time.sleep(0.2)

    def read(
        self,
        ranges: dict[tuple[str, int], tuple[int, int]],
        take: Callable[[Message], None],
        *,
        first_only: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Call ``take`` with every message of ``ranges``: half-open ranges of offsets, by (topic, partition).

        A range may have offsets without a message, and must not go beyond the log's end. ``first_only``: take one
        message of each range. Returns early once ``wanted()`` is false or ``closing()`` is true. Raises
        `BrokerUnavailable` if no message arrives for `STALL_S` seconds, and the translated error if a broker refuses
        the request.
        """
        ends = {where: end for where, (start, end) in ranges.items() if start < end}
        if not ends:
            return
        reader = self._consumer()
        reader.assign([TopicPartition(t, n, ranges[t, n][0]) for t, n in ends])
        try:
            seen = time.monotonic()
            while ends and not self._closing() and wanted():
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
                        # Not pause(): a pause outlasts unassign(), so the partition's next range would never be read.
                        reader.incremental_unassign([TopicPartition(*where)])
                if time.monotonic() - seen > STALL_S:
                    raise BrokerUnavailable(f"taking over: {sorted(ends)} gave nothing for {STALL_S:g} s")
        finally:
            reader.unassign()
