"""Reads offset ranges of many partitions at once, for the takeover, with one client that is opened at its first use.

This module does not interpret the records. It is not thread-safe, except that ``closing`` may begin to return true at
any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.errors import AccessDenied, JobledgerError
from jobledger.kafka.auth import read
from jobledger.kafka.clients import consumer, consumer_config, translate
from jobledger.log.reading import RANGES, messages
from jobledger.process.retrying import retry_until

REQUEST_TIMEOUT_S = 10.0
#: Seconds without an answer or a record after which the reader gives up.
STALL_S = 60.0

T = TypeVar("T")


class RangeReader:
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
            self._reader = consumer(consumer_config(self._settings) | RANGES)
        return self._reader

    def bounds(self, topic: str, number: int) -> tuple[int, int]:
        """Return the first offset and the high watermark of a partition.

        Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
        """
        low, high = self._ask(
            topic,
            f"asking for the bounds of {topic}[{number}]",
            lambda reader: reader.get_watermark_offsets(TopicPartition(topic, number), REQUEST_TIMEOUT_S),
        )
        return low, high

    def partitions(self, topic: str) -> int:
        """Return the number of a topic's partitions. Raises what `bounds` raises."""

        def ask(reader: Consumer) -> int:
            metadata = reader.list_topics(topic, REQUEST_TIMEOUT_S).topics[topic]
            if metadata.error is not None:
                raise KafkaException(metadata.error)
            return len(metadata.partitions)

        return self._ask(topic, f"asking for the partitions of {topic}", ask)

    def offsets_at(self, asked: list[TopicPartition]) -> dict[int, int]:
        """Return, by partition number, the first offset that was appended at or after a time; -1 if there is none.

        ``asked``: partitions of one topic, each with its time (ms since the epoch) as the offset. Raises what
        `bounds` raises.
        """
        if not asked:
            return {}
        topic = asked[0].topic
        what = f"asking {topic} for a time"
        positions = self._ask(topic, what, lambda reader: reader.offsets_for_times(asked, REQUEST_TIMEOUT_S))
        return {position.partition: position.offset for position in positions}

    def _ask(self, topic: str, what: str, ask: Callable[[Consumer], T]) -> T:
        def again(error: KafkaException) -> bool:
            return not self._closing() and not isinstance(self._translated(error.args[0], what, topic), AccessDenied)

        def on_retry(error: KafkaException, seconds: float) -> None:
            # A broker that shuts down reports its topics as missing, and the client repeats this answer for minutes.
            # So use a new client.
            self.close()

        try:
            return retry_until(
                time.monotonic() + STALL_S,
                lambda: ask(self._consumer()),
                KafkaException,
                pause=0.2,
                again=again,
                on_retry=on_retry,
            )
        except KafkaException as exc:
            raise self._translated(exc.args[0], what, topic) from exc

    def _translated(self, error: KafkaError, what: str, topic: str) -> JobledgerError:
        return translate(error, self._settings, what, read(topic))

    def read(
        self,
        ranges: dict[tuple[str, int], tuple[int, int]],
        take: Callable[[Message], None],
        *,
        first_only: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Call ``take`` with every message of ``ranges``; see `jobledger.log.reading.messages`.

        Returns early once ``wanted()`` is false or ``closing()`` is true. Raises `BrokerUnavailable` if no message
        arrives for `STALL_S` seconds, and the translated error if a broker refuses the request.
        """
        for message in messages(
            self._consumer(),
            self._settings,
            ranges,
            stall=STALL_S,
            first_only=first_only,
            wanted=lambda: not self._closing() and wanted(),
        ):
            take(message)
