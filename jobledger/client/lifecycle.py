"""Everything that happens to jobs, as one typed stream for other services: billing, audits, webhooks, a cache.

A stream has its own consumer group and reads every topic of the namespace that has facts of jobs or control commands. A
record counts as processed when the next record is requested. So a service that dies gets the records since its last
commit again, at least the record that it was processing: delivery is at least once, and in order within a partition.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Literal, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.client.commands import is_copy
from jobledger.config import Settings
from jobledger.definitions.durations import Seconds, check_patience
from jobledger.errors import ConfigError, SchemaError, UnknownFact
from jobledger.kafka import acls
from jobledger.kafka.auth import AuthMonitor, check_connection, join, read
from jobledger.kafka.clients import consumer, consumer_config, error_topic, partitions_of, position_of, translate
from jobledger.kafka.topic_names import Names, check_name
from jobledger.log.reading import recorded
from jobledger.log.schema_lookup import decoder
from jobledger.process.logger import get_logger
from jobledger.schemas.events import Fact, Recorded

LOG = get_logger("jobledger.lifecycle")

#: Seconds between two commits.
COMMIT_S = 1.0
#: Maximum number of records fetched at once, and seconds to wait for the first of them.
BATCH, POLL_S = 500, 0.2
#: Kafka errors that are permanent: waiting does not help.
HOPELESS = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
)


class LifecycleStream:
    """A stream of job facts and control commands; see `App.lifecycle`. Iterate over the stream with ``for`` or
    ``async for``, in one thread or task, and close it afterwards."""

    def __init__(
        self,
        settings: Settings,
        names: Names,
        lanes: Iterable[str],
        group: str,
        *,
        facts: Iterable[type[Any]] | None = None,
        start: Literal["earliest", "latest"] = "earliest",
        timeout: Seconds | None = None,
    ) -> None:
        check_name("group", group)
        if start not in ("earliest", "latest"):
            raise ConfigError(f"start={start!r} is neither 'earliest' nor 'latest'")
        self._facts = None if facts is None else tuple(facts)
        unknown = [f for f in self._facts or () if f not in Fact.__args__]
        if unknown:
            raise ConfigError(
                f"facts={unknown!r}: these are not facts; the facts are {[f.__name__ for f in Fact.__args__]}"
            )
        settings = settings.acting_as("reader")
        self._settings, self._timeout = settings, check_patience(timeout)
        self._names, self._checked = names, False
        standing = (names.lifecycle, names.coordination, names.dead_letter, names.control)
        self._topics = [*standing, *(names.jobs(lane) for lane in lanes)]
        self._decode = decoder(settings, names).decode
        self._group = names.lifecycle_group(group)
        self._auth_monitor = AuthMonitor(settings)
        self._consumer = consumer(
            consumer_config(
                settings,
                group=self._group,
                auth_monitor=self._auth_monitor,
                **{
                    "group.protocol": "consumer",
                    "auto.offset.reset": start,
                    "queued.max.messages.kbytes": 16_384,
                },
            )
        )
        self._fetched: deque[Message] = deque()
        self._current: tuple[str, int, int] | None = None  # returned last, not known to be processed
        self._done: dict[tuple[str, int], int] = {}  # the next offsets to commit
        self._owned: set[tuple[str, int]] = set()
        self._committed_at = time.monotonic()
        #: Number of records that were skipped because they are not events.
        self.skipped = 0
        self._subscribed = self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(done=kind is None)

    def close(self, *, done: bool = True) -> None:
        """Commit and leave the group. ``done``: whether the record returned last counts as processed."""
        if self._closed:
            return
        self._closed = True
        if done:
            self._finish_current()
        try:
            self.commit()
        finally:
            self._consumer.close()

    # -- iterating ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Recorded]:
        last = time.monotonic()
        while not self._closed:
            record = self._next()
            if record is not None:
                yield record
                last = time.monotonic()
            elif self._over(last):
                return

    async def __aiter__(self) -> AsyncIterator[Recorded]:
        last = time.monotonic()
        while not self._closed:
            if not self._fetched:
                await asyncio.to_thread(self._fetch)
            record = self._next(fetch=False)
            if record is not None:
                yield record
                last = time.monotonic()
            elif not self._fetched and self._over(last):
                return

    def _over(self, last: float) -> bool:
        return self._timeout is not None and time.monotonic() - last >= self._timeout

    def _next(self, *, fetch: bool = True) -> Recorded | None:
        """Return the next matching record, or None if there is none right now. The record that was returned before
        counts as processed.

        Raises `UnknownFact` for an event of a newer version: that event must not be skipped.
        """
        self._finish_current()
        if time.monotonic() - self._committed_at >= COMMIT_S:
            self.commit()
        if fetch and not self._fetched:
            self._fetch()
        while self._fetched:
            message = self._fetched.popleft()
            where = position_of(message)
            if (where.topic, where.partition) not in self._owned:
                continue  # the partition now belongs to another member of the group
            self._current = (where.topic, where.partition, where.offset)
            if message.value() is None and where.topic == self._names.control:
                self._finish_current()  # the tombstone of a control command
                continue
            try:
                record = recorded(message, self._decode)
            except UnknownFact as exc:
                self._current = None
                self._fetched.appendleft(message)  # the next call raises again, instead of returning the next record
                raise UnknownFact(
                    exc.fact,
                    f"{where} has the fact {exc.fact!r}, which this version does not know: upgrade this reader",
                ) from exc
            except SchemaError as exc:
                self.skipped += 1
                LOG.warning("%s is not an event and is skipped: %s", where, exc)
            else:
                wanted = self._facts is None or isinstance(record.event.fact, self._facts)
                if wanted and not is_copy(record, self._names):
                    return record
            self._finish_current()
        return None

    def _finish_current(self) -> None:
        if self._current is not None:
            topic, partition, offset = self._current
            if (topic, partition) in self._owned:
                self._done[topic, partition] = offset + 1
            self._current = None

    def _fetch(self) -> None:
        """Wait briefly for records. Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied` for permanent
        errors."""
        consumer = self._consumer
        if not self._checked:
            check_connection(self._settings)
            acls.check(self._settings, self._names.namespace, [*self._topics, self._names.schemas])
            for topic in self._topics:  # a member of a group waits for a missing topic without an error
                partitions_of(self._settings, topic)
            self._checked = True
        try:
            if not self._subscribed:
                self._subscribed = True
                consumer.subscribe(
                    self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
                )
            first = consumer.poll(POLL_S)
            batch = [] if first is None else [first, *consumer.consume(BATCH - 1, 0)]
        except KafkaException as exc:
            raise translate(exc.args[0], self._settings, "reading the lifecycle", join(self._group)) from exc
        # Store the valid messages first: messages that were fetched together with an error are not fetched again.
        self._fetched.extend(message for message in batch if message.error() is None)
        for message in batch:
            error = message.error()
            if error is not None and (error.fatal() or error.code() in HOPELESS):
                topic = error_topic(message, self._topics)
                raise translate(error, self._settings, f"reading {topic}", read(topic), join(self._group))
        if not batch:
            self._auth_monitor.check()

    def commit(self) -> None:
        """Commit the records processed so far. A refused commit is not an error: those records are delivered again."""
        self._committed_at = time.monotonic()
        due = [TopicPartition(topic, partition, offset) for (topic, partition), offset in self._done.items()]
        if not due:
            return
        try:
            self._consumer.commit(offsets=due, asynchronous=False)
        except KafkaException as exc:
            LOG.info("the commit was refused, so its records may be delivered again: %s", exc.args[0].str())
        else:
            self._done.clear()

    # -- rebalances: these methods run inside poll --------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        self._owned |= {(p.topic, p.partition) for p in assigned}

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self.commit()
        self._on_lost(consumer, revoked)

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        for partition in {(p.topic, p.partition) for p in lost}:
            self._owned.discard(partition)
            self._done.pop(partition, None)
