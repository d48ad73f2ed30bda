"""The records of every topic the status table is made of, from given offsets on. Commits nothing: offsets are the
reader's own business.

Assigned by hand, without a group: what was read is known by the database alone, and nothing rebalances.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from confluent_kafka import (
    OFFSET_BEGINNING,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    OffsetSpec,
)

from jobledger.access import Door, read
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable
from jobledger.log import PASSING, admin, answer_of, consumer, consumer_config, translate
from jobledger.logger import get_logger
from jobledger.names import Names
from jobledger.streams.store.protocol import Partition

LOG = get_logger("jobledger.materializer")

#: Kilobytes of records that wait in the client: bounds memory at any backlog.
QUEUE_KB = 32 * 1024
FETCH_BYTES = 16 * 1024 * 1024
REQUEST_TIMEOUT_S = 10.0

_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
_OUT_OF_RANGE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
_TRANSPORT = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)
#: A partition that has just been made or moved. librdkafka does not call these retriable in answers to admin requests.
_ELECTING = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.REQUEST_TIMED_OUT,
)


class Feed:
    """Reads all work topics, lifecycle, coordination and dead letters of a namespace. For one thread; close it."""

    def __init__(self, settings: Settings, names: Names) -> None:
        self._settings, self._names = settings, names
        self._door = Door(settings)
        self._consumer = consumer(
            consumer_config(
                settings,
                group="jobledger-status",
                door=self._door,
                **{
                    # An offset the log does not have is said, not silently replaced.
                    "auto.offset.reset": "error",
                    "queued.max.messages.kbytes": QUEUE_KB,
                    "fetch.max.bytes": FETCH_BYTES,
                },
            )
        )
        self._admin: AdminClient | None = None
        self._assigned: set[Partition] = set()
        #: Partitions whose next offset the log no longer had, with the offset read instead; the reader takes them out.
        self.resets: dict[Partition, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._consumer.close()

    @property
    def assigned(self) -> frozenset[Partition]:
        """The partitions that are read."""
        return frozenset(self._assigned)

    def present(self, timeout: float = REQUEST_TIMEOUT_S) -> set[Partition]:
        """The partitions that there are to read, now. Raises `BrokerUnavailable`, `NotAuthenticated`."""
        self._door.check()
        try:
            topics = self._consumer.list_topics(timeout=timeout).topics
        except KafkaException as exc:
            raise translate(exc.args[0], self._settings, "asking for topics") from exc
        return {
            (name, partition)
            for name, meta in topics.items()
            if meta.error is None and self._wanted(name)
            for partition in meta.partitions
        }

    def _wanted(self, topic: str) -> bool:
        names = self._names
        return topic in (names.lifecycle, names.coordination, names.dead_letter) or names.queue_of(topic) is not None

    def identities(self, topics: Iterable[str], timeout: float = REQUEST_TIMEOUT_S) -> dict[str, str]:
        """As the function of this name; with one client for all questions."""
        if self._admin is None:
            self._admin = admin(self._settings)
        return identities(self._admin, topics, timeout)

    def restart(self, partitions: Iterable[Partition]) -> None:
        """Read these from the log's start, whatever was read of them before. Raises `BrokerUnavailable`, `TopicMissing`."""
        places = list(partitions)
        starts = {place: low for place, (low, _) in bounds(self._settings, places).items()}
        self.drop(places)
        self.add(starts)
        self.resets |= starts

    def add(self, offsets: Mapping[Partition, int | None]) -> None:
        """Read these partitions, too, from these offsets on; None: from the log's start."""
        new = {place: offset for place, offset in offsets.items() if place not in self._assigned}
        if new:
            self._consumer.incremental_assign([_at(place, offset) for place, offset in new.items()])
            self._assigned |= set(new)

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Read these no more."""
        known = [place for place in partitions if place in self._assigned]
        if known:
            self._consumer.incremental_unassign([_at(place, None) for place in known])
            self._assigned -= set(known)

    def read(self, most: int, patience: float, until: float = 0.0) -> list[Message]:
        """Up to ``most`` records: waits ``patience`` seconds for the first, then for more ``until`` that time.

        ``until``: as `time.monotonic` counts; 0: take what is there.
        """
        messages = self._consumer.consume(1, patience)
        if not messages:
            self._door.check()
            return messages
        messages += self._consumer.consume(most - 1, max(0.0, until - time.monotonic()))
        if any(message.error() is not None for message in messages):
            return [message for message in messages if not self._error(message)]
        return messages

    def _error(self, message: Message) -> bool:
        """Whether a message stands for an error; deals with it. Raises what cannot be read past."""
        error = message.error()
        if error is None:
            return False
        place = (message.topic() or "", message.partition() or 0)
        code = error.code()
        if code in _OUT_OF_RANGE:
            if place in self._assigned:
                low, high = bounds(self._settings, [place])[place]
                LOG.error(
                    "%s[%d]: the next records to read are gone (%s): continuing at its start, offset %d of %d. Was "
                    "the topic deleted or trimmed by hand?",
                    *(*place, error.str(), low, high),
                )
                self.resets[place] = low
                # Not seek(): the partition stands still after this error, and only an assignment starts it.
                self._consumer.incremental_unassign([_at(place, None)])
                self._consumer.incremental_assign([_at(place, low)])
        elif code in _GONE:
            LOG.warning("%s[%d] is gone: %s", *place, error.str())
            self.drop([place])
        elif error.fatal() or not (error.retriable() or code in _TRANSPORT or code in PASSING):
            raise translate(error, self._settings, f"reading {place[0]}[{place[1]}]", read(place[0]))
        return True

    def lag(self, offsets: Mapping[Partition, int]) -> dict[str, int]:
        """Records of each topic not read yet, as far as the client has heard. Asks nobody."""
        found: dict[str, int] = {}
        for place in self._assigned:
            ends = self._consumer.get_watermark_offsets(_at(place, None), cached=True)
            behind = 0 if ends is None or ends[1] < 0 else max(0, ends[1] - offsets.get(place, max(0, ends[0])))
            found[place[0]] = found.get(place[0], 0) + behind
        return found

    def passed(self, ends: Mapping[Partition, int]) -> set[Partition]:
        """Of the partitions that are read, those whose next record is at or past the given end."""
        asked = [_at(place, None) for place in self._assigned if place in ends]
        return {
            (p.topic, p.partition) for p in self._consumer.position(asked) if p.offset >= ends[(p.topic, p.partition)]
        }


def _at(place: Partition, offset: int | None) -> TopicPartition:
    return TopicPartition(place[0], place[1], OFFSET_BEGINNING if offset is None else offset)


def identities(client: AdminClient, topics: Iterable[str], timeout: float = REQUEST_TIMEOUT_S) -> dict[str, str]:
    """The ids of topics, by which a topic is known from a later one of its name; without those that the broker does not
    tell."""
    found: dict[str, str] = {}
    asked = TopicCollection(sorted(topics))
    for topic, future in client.describe_topics(asked, request_timeout=timeout).items():
        try:
            found[topic] = str(answer_of(future, timeout).topic_id)
        except KafkaException:
            continue
    return found


def bounds(
    settings: Settings, partitions: Iterable[Partition], timeout: float = REQUEST_TIMEOUT_S
) -> dict[Partition, tuple[int, int]]:
    """Of each partition the log's first offset and the next one to be written; one question for all of them.

    Raises `BrokerUnavailable` if they are not told within ``timeout`` seconds,
    `TopicMissing` for one that is not there.
    """
    client = admin(settings)
    deadline = time.monotonic() + timeout
    found: list[dict[Partition, int]] = []
    for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):  # type: ignore[no-untyped-call]  # they bear no types
        told: dict[Partition, int] = {}
        left = {_at(place, None) for place in partitions}
        while left:
            asked = client.list_offsets(dict.fromkeys(left, spec), request_timeout=timeout)
            for at, future in asked.items():
                try:
                    told[(at.topic, at.partition)] = answer_of(future, timeout).offset
                except KafkaException as exc:
                    error: KafkaError = exc.args[0]
                    again = error.retriable() or error.code() in (*_TRANSPORT, *_ELECTING)
                    if not again or time.monotonic() > deadline:
                        what = f"asking for the ends of {at.topic}[{at.partition}]"
                        raise translate(error, settings, what, read(at.topic)) from exc
                    time.sleep(0.05)
            left = {at for at in left if (at.topic, at.partition) not in told}
        found.append(told)
    return {place: (low, found[1][place]) for place, low in found[0].items()}


def read_until(feed: Feed, ends: Mapping[Partition, int], most: int, stall: float = 60.0) -> Iterator[list[Message]]:
    """Batches of all records below ``ends`` of the partitions that were added.

    Raises `BrokerUnavailable` if nothing comes for ``stall`` seconds.
    """
    last = time.monotonic()
    while feed.assigned:
        messages = feed.read(most, 0.05)
        if messages:
            last = time.monotonic()
            # Partitions that reached their end are no longer asked for; what was fetched beyond it is left out.
            yield [m for m in messages if (m.offset() or 0) < ends[(m.topic() or "", m.partition() or 0)]]
        elif time.monotonic() - last > stall:
            left = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(feed.assigned))
            raise BrokerUnavailable(f"no record arrived for {stall:g} s, and {left} is not read to its end")
        feed.drop(feed.passed(ends))
