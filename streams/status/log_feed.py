"""Reads the records of every topic from which the status table is built, from given offsets on.

The module commits no offsets: the caller stores them. Partitions are assigned directly, without a consumer group. So no
rebalance happens, and only the database stores which records were read.
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
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # the module declares no exports
    AdminClient,
    OffsetSpec,
)

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, TopicMissing
from jobledger.kafka.auth import AuthMonitor, denied, read
from jobledger.kafka.clients import ELECTING, PASSING, admin, answer_of, consumer, consumer_config, translate
from jobledger.kafka.topic_names import Names
from jobledger.process.logger import get_logger
from jobledger.streams.status.store.protocol import Partition

LOG = get_logger("jobledger.materializer")

#: Kilobytes of records that the client may prefetch. This limit bounds memory, however large the backlog is.
QUEUE_KB = 32 * 1024
FETCH_BYTES = 16 * 1024 * 1024
REQUEST_TIMEOUT_S = 10.0

_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
_OUT_OF_RANGE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
_TRANSPORT = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)
#: Errors of a partition that has just been created or moved. In answers to admin requests librdkafka does not mark
#: these errors as retriable.
_ELECTING = (*ELECTING, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.REQUEST_TIMED_OUT)


class LogFeed:
    """Reads all work topics, and the lifecycle, coordination, dead-letter and plans topics of a namespace. Use a feed from
    one thread, and close it.

    ``workers``: also read the topic of the workers' reports, unless this user may not read it.
    """

    def __init__(self, settings: Settings, names: Names, *, workers: bool = False) -> None:
        self._settings, self._names = settings, names
        self._auth_monitor = AuthMonitor(settings)
        self._consumer = consumer(
            consumer_config(
                settings,
                group="jobledger-status",
                auth_monitor=self._auth_monitor,
                **{
                    # An offset that the log does not have is reported as an error, not silently replaced.
                    "auto.offset.reset": "error",
                    "queued.max.messages.kbytes": QUEUE_KB,
                    "fetch.max.bytes": FETCH_BYTES,
                },
            )
        )
        self._admin: AdminClient | None = None
        self._assigned: set[Partition] = set()
        self._reads_workers = workers
        #: Partitions whose next offset the log no longer had, or for which `restart` was called. Each value is the
        #: offset from which the partition is read instead. The caller removes the entries.
        self.resets: dict[Partition, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    @property
    def assigned(self) -> frozenset[Partition]:
        """The partitions that are being read."""
        return frozenset(self._assigned)

    def present(self, timeout: float = REQUEST_TIMEOUT_S) -> set[Partition]:
        """Return the existing partitions of the topics to read. ``timeout``: seconds. Raises `BrokerUnavailable`,
        `NotAuthenticated`."""
        self._auth_monitor.check()
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
        facts = (names.lifecycle, names.coordination, names.dead_letter, names.plans)
        return topic in facts or names.queue_of(topic) is not None or (self._reads_workers and topic == names.workers)

    def identities(self, topics: Iterable[str], timeout: float = REQUEST_TIMEOUT_S) -> dict[str, str]:
        """Return the ids of topics: see the function `identities` of this module. All calls share one client."""
        if self._admin is None:
            self._admin = admin(self._settings)
        return identities(self._admin, self._settings, topics, timeout)

    def restart(self, partitions: Iterable[Partition]) -> None:
        """Read these partitions again from the log's start. Raises `BrokerUnavailable`, `TopicMissing`."""
        to_restart = list(partitions)
        starts = {partition: low for partition, (low, _) in bounds(self._settings, to_restart).items()}
        self.drop(to_restart)
        self.add(starts)
        self.resets |= starts

    def add(self, offsets: Mapping[Partition, int | None]) -> None:
        """Start to read these partitions, from these offsets on (None: from the log's start). A partition that is read
        already is not changed."""
        new = {partition: offset for partition, offset in offsets.items() if partition not in self._assigned}
        if new:
            self._consumer.incremental_assign([_at(partition, offset) for partition, offset in new.items()])
            self._assigned |= set(new)

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Stop reading these partitions."""
        known = [partition for partition in partitions if partition in self._assigned]
        if known:
            self._consumer.incremental_unassign([_at(partition, None) for partition in known])
            self._assigned -= set(known)

    def read(self, most: int, patience: float, until: float = 0.0) -> list[Message]:
        """Return up to ``most`` records. Wait up to ``patience`` seconds for the first record, then until ``until`` for
        more.

        ``until``: a time of `time.monotonic`; 0: return the records that are available. Raises `NotAuthenticated` if
        the cluster refuses this client, or another error after which reading cannot continue.
        """
        messages = self._consumer.consume(1, patience)
        if not messages:
            self._auth_monitor.check()
            return messages
        messages += self._consumer.consume(most - 1, max(0.0, until - time.monotonic()))
        if any(message.error() is not None for message in messages):
            return [message for message in messages if not self._is_error(message)]
        return messages

    def _is_error(self, message: Message) -> bool:
        """Return whether a message is an error, and handle the error. Raises an error after which reading cannot
        continue."""
        error = message.error()
        if error is None:
            return False
        partition = (message.topic() or "", message.partition() or 0)
        code = error.code()
        if code in _OUT_OF_RANGE:
            if partition in self._assigned:
                self._begin_again(partition, error)
        elif code in _GONE:
            LOG.warning("%s[%d] no longer exists: %s", *partition, error.str())
            self.drop([partition])
        elif code == KafkaError.TOPIC_AUTHORIZATION_FAILED and partition[0] == self._names.workers:
            LOG.warning("%s is not read, so the status table does not list the workers: %s", partition[0], error.str())
            self._reads_workers = False
            self.drop([partition])
        elif error.fatal() or not (error.retriable() or code in _TRANSPORT or code in PASSING):
            raise translate(error, self._settings, f"reading {partition[0]}[{partition[1]}]", read(partition[0]))
        return True

    def _begin_again(self, partition: Partition, error: KafkaError) -> None:
        """Continue at the first offset of a partition whose next offset the log does not have. A partition that no longer
        exists is dropped."""
        try:
            low, high = bounds(self._settings, [partition])[partition]
        except (BrokerUnavailable, TopicMissing):
            # The client finds no leader, if the topic was just deleted as well as if the broker does not answer.
            if partition in self.present():
                raise
            LOG.warning("%s[%d] no longer exists: %s", *partition, error.str())
            self.drop([partition])
            return
        LOG.error(
            "%s[%d]: the next records to read no longer exist (%s): reading continues at the first offset, %d, of a "
            "partition that ends at %d. Was the topic deleted or trimmed manually?",
            *(*partition, error.str(), low, high),
        )
        self.resets[partition] = low
        # Not seek(): after this error the partition is paused until it is assigned again.
        self._consumer.incremental_unassign([_at(partition, None)])
        self._consumer.incremental_assign([_at(partition, low)])

    def lag(self, offsets: Mapping[Partition, int]) -> dict[str, int]:
        """Return for each topic how many records are in the log at or above ``offsets``. Uses the ends that the client
        knows, without a request to the broker."""
        lags: dict[str, int] = {}
        for partition in self._assigned:
            ends = self._consumer.get_watermark_offsets(_at(partition, None), cached=True)
            behind = 0 if ends is None or ends[1] < 0 else max(0, ends[1] - offsets.get(partition, max(0, ends[0])))
            lags[partition[0]] = lags.get(partition[0], 0) + behind
        return lags

    def passed(self, ends: Mapping[Partition, int]) -> set[Partition]:
        """Return the partitions being read whose next record is at or past the given end."""
        assigned = [_at(partition, None) for partition in self._assigned if partition in ends]
        return {
            (p.topic, p.partition)
            for p in self._consumer.position(assigned)
            if p.offset >= ends[(p.topic, p.partition)]
        }


def _at(partition: Partition, offset: int | None) -> TopicPartition:
    return TopicPartition(partition[0], partition[1], OFFSET_BEGINNING if offset is None else offset)


def identities(
    client: AdminClient, settings: Settings, topics: Iterable[str], timeout: float = REQUEST_TIMEOUT_S
) -> dict[str, str]:
    """Return the ids of topics. ``timeout``: seconds. A recreated topic has another id than the earlier topic of its
    name. Topics whose id the broker does not return are left out. Raises `NotAuthorized` for a topic that this user may
    not read."""
    ids: dict[str, str] = {}
    collection = TopicCollection(sorted(topics))
    for topic, future in client.describe_topics(collection, request_timeout=timeout).items():
        try:
            ids[topic] = str(answer_of(future, timeout).topic_id)
        except KafkaException as exc:
            refused = denied(exc.args[0], settings, f"asking for the id of {topic}", read(topic))
            if refused is not None:
                raise refused from exc
    return ids


def bounds(
    settings: Settings, partitions: Iterable[Partition], timeout: float = REQUEST_TIMEOUT_S
) -> dict[Partition, tuple[int, int]]:
    """Return each partition's first offset in the log, and the offset that its next record will get. Each request is
    for all partitions at once.

    Raises `BrokerUnavailable` if the broker does not answer within ``timeout`` seconds, `TopicMissing` if a partition
    does not exist.
    """
    client = admin(settings)
    deadline = time.monotonic() + timeout
    results: list[dict[Partition, int]] = []
    for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):  # type: ignore[no-untyped-call]  # untyped functions
        offsets: dict[Partition, int] = {}
        pending = {_at(partition, None) for partition in partitions}
        while pending:
            answers = client.list_offsets(dict.fromkeys(pending, spec), request_timeout=timeout)
            for at, future in answers.items():
                try:
                    offsets[(at.topic, at.partition)] = answer_of(future, timeout).offset
                except KafkaException as exc:
                    error: KafkaError = exc.args[0]
                    again = error.retriable() or error.code() in (*_TRANSPORT, *_ELECTING)
                    if not again or time.monotonic() > deadline:
                        what = f"asking for the first and last offset of {at.topic}[{at.partition}]"
                        raise translate(error, settings, what, read(at.topic)) from exc
                    time.sleep(0.05)
            pending = {at for at in pending if (at.topic, at.partition) not in offsets}
        results.append(offsets)
    return {partition: (low, results[1][partition]) for partition, low in results[0].items()}


def read_until(feed: LogFeed, ends: Mapping[Partition, int], most: int, stall: float = 60.0) -> Iterator[list[Message]]:
    """Yield, in batches, all records below ``ends`` of the partitions that were added to ``feed``.

    Raises `BrokerUnavailable` if no record arrives for ``stall`` seconds.
    """
    last = time.monotonic()
    while feed.assigned:
        messages = feed.read(most, 0.05)
        if messages:
            last = time.monotonic()
            # Partitions that reached their end are dropped below. Records fetched beyond the end are left out.
            yield [m for m in messages if (m.offset() or 0) < ends[(m.topic() or "", m.partition() or 0)]]
        elif time.monotonic() - last > stall:
            unread = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(feed.assigned))
            raise BrokerUnavailable(
                f"no record arrived for {stall:g} s, but {unread} is not read to its end: check that every broker runs"
            )
        feed.drop(feed.passed(ends))
