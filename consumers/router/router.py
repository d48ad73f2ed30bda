"""The router reads domain events, and submits one job for each event and handler. Its only state is its offsets.

A job's id is derived from the event's id and the handler. So an event that is routed again, after a crash or by another
router, results in the same job. Offsets are committed after the broker has acknowledged every job of a batch, so no
event is skipped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from confluent_kafka import OFFSET_STORED, Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import BY_KEY, WorkerProducer
from jobledger.consumers.router import initial_offsets
from jobledger.definitions.event_types import EVENT_TAG, EventType, Handler, check_classes, event_id_of
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import (
    AccessDenied,
    BadTags,
    BrokerUnavailable,
    ConfigError,
    JobledgerError,
    PayloadTooLarge,
    SchemaError,
)
from jobledger.kafka import acls
from jobledger.kafka.auth import AuthMonitor, check_connection, denied, join, read
from jobledger.kafka.clients import consumer as make_consumer
from jobledger.kafka.clients import consumer_config, error_topic, partitions_of, translate
from jobledger.kafka.coordinator_probe import CoordinatorProbe
from jobledger.kafka.topic_names import lane
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.log.writer import Outgoing
from jobledger.process import greenlets
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.process.wording import counted
from jobledger.schemas import codec
from jobledger.schemas.event_factory import submission
from jobledger.schemas.events import JobSpec

LOG = get_logger("jobledger.router")

#: Maximum number of events in a batch. After a crash, this batch and the batches not committed yet are routed again.
BATCH = 1_000
#: Seconds between two commits; seconds that a poll waits for the first event of a batch.
COMMIT_INTERVAL_S, POLL_S = 0.1, 0.1
#: How often a record that was not delivered is sent again before the router gives up.
RESENDS = 3
#: Seconds in which the broker must answer at the start.
START_TIMEOUT_S = 30.0


class Routes:
    """Builds the jobs of an event's handlers. Sends nothing. Looks up unknown schemas in ``schemas`` and reads the
    clock."""

    def __init__(
        self,
        registry: TaskRegistry,
        event_builder: WorkerEvents,
        writer: str,
        handlers: Iterable[Handler],
        schemas: SchemaLookup,
    ) -> None:
        self._names, self._source, self._schemas = registry.names, writer, schemas
        self._event_builder = event_builder
        self._by_topic: dict[str, tuple[EventType, list[Handler]]] = {}
        for handler in handlers:
            self._by_topic.setdefault(handler.event.topic, (handler.event, []))[1].append(handler)

    @property
    def topics(self) -> list[str]:
        """The topics to read, sorted."""
        return sorted(self._by_topic)

    def jobs(self, message: Message) -> tuple[list[tuple[str, Outgoing]], list[str]]:
        """Return two lists: the jobs of a record, each with its id; and the reasons why handlers get no job.

        Raises `SchemaError` for bytes that are not an event of the topic's class.
        """
        kind, handlers = self._by_topic[message.topic() or ""]
        if kind.passes(message.value()):
            return [], []
        by_id = self._schemas.of_others if kind.foreign else self._schemas.by_id
        plain = kind.decode(message.value(), self._schemas, by_id)
        headers: dict[str, Any] = dict(message.headers() or ())
        event_id = event_id_of(headers, kind.topic, message.partition() or 0, message.offset() or 0)
        trace = headers.get("traceparent")
        context = trace.decode(errors="replace") if isinstance(trace, bytes) else None
        jobs: list[tuple[str, Outgoing]] = []
        refused: list[str] = []
        for handler in handlers:
            try:
                jobs.append(self._job(handler, event_id, plain, context))
            except BadTags as exc:
                refused.append(str(exc))
        return jobs, refused

    def _job(self, handler: Handler, event_id: str, plain: dict[str, Any], trace: str | None) -> tuple[str, Outgoing]:
        task = handler.task
        job_id = handler.job_id(event_id)
        expires_in = task.policy.expires_in
        expires_in_ms = None if expires_in is None else max(1, round(expires_in * 1000))
        args = handler.args(plain)
        tags = {EVENT_TAG: event_id, **handler.tags(args)}
        spec = JobSpec(args, tags, None, expires_in_ms, None, task.policy.priority)
        event = submission(job_id, task.name, task.queue, None, spec, now_us(), self._source, trace)
        return job_id, Outgoing(self._names.jobs(lane(task.queue, task.policy.priority)), codec.encode(event), job_id)

    def rejected(self, message: Message, why: str) -> Outgoing:
        """Build the dead letter of a record that is rejected because of ``why``. Too large keys and values are cut."""
        key, value = message.key(), message.value()
        return self._event_builder.rejected(
            message.topic() or "",
            message.partition() or 0,
            message.offset() or 0,
            key if isinstance(key, bytes) else None,
            value if isinstance(value, bytes) else None,
            why,
        )


class EventBatch:
    """Sends the records of one batch until all are acknowledged. Each record is sent again up to `RESENDS` times."""

    def __init__(self, sender: WorkerProducer, address: str) -> None:
        self._sender, self._address = sender, address
        self._open = 0
        self._error: JobledgerError | None = None
        self._too_large: list[tuple[Message, Outgoing]] = []

    def send(self, origin: Message, record: Outgoing) -> None:
        """Queue a record that results from the event ``origin``.

        Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
        """
        self._open += 1
        self._send(origin, record, 0, alone=False)

    def _send(self, origin: Message, record: Outgoing, tries: int, *, alone: bool) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is None:
                self._open -= 1
                return
            try:
                refused = self._sender.failed(error, record.topic)
                if isinstance(refused, AccessDenied):
                    raise refused
                if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                    # The broker refuses a producer's batch as a whole. Each record is sent alone, to find the one
                    # that is too large.
                    if alone:
                        self._open -= 1
                        self._too_large.append((origin, record))
                    else:
                        self._send(origin, record, tries, alone=True)
                elif error.fatal() or tries >= RESENDS:
                    raise BrokerUnavailable(
                        f"a record for {record.topic} could not be delivered ({error.str()}; sent {counted(tries + 1, 'time')}): "
                        f"{self._address} does not accept it. Its event was not committed; the next router handles it again"
                    )
                else:
                    self._send(origin, record, tries + 1, alone=alone)
            except JobledgerError as exc:
                self._error = self._error or exc

        assert record.value is not None
        if alone:
            assert record.key is not None
            self._sender.send_alone(record.topic, record.value, record.key, BY_KEY, delivered)
        else:
            self._sender.send(record.topic, record.value, record.key, BY_KEY, delivered)

    def await_all(self) -> list[tuple[Message, Outgoing]]:
        """Wait until every record is acknowledged or refused for its size. Return the refused records, each with the
        event from which the record results. Raises the error because of which a record was not delivered."""
        while self._open and self._error is None:
            self._sender.poll(0.05)
            self._sender.check()
        if self._error is not None:
            raise self._error
        refused, self._too_large = self._too_large, []
        return refused


class Router:
    """Runs the router of one process. `run` blocks until ``stop`` is set or an error occurs. Use an instance only once.

    Raises `ConfigError` if the app has no handlers, or if its events need a Schema Registry and none is set.
    """

    def __init__(self, registry: TaskRegistry, settings: Settings) -> None:
        registry.check()
        greenlets.refuse("a router")
        settings = settings.acting_as("router")
        self.registry, self.settings, self.names = registry, settings, registry.names
        self._handlers = [handler for handlers in registry.handlers.values() for handler in handlers]
        if not self._handlers:
            raise ConfigError(f"app {self.names.namespace!r} has no handlers: decorate a function with @app.on(Event)")
        needs = sorted({handler.event.name for handler in self._handlers if handler.event.format == "avro"})
        if needs and settings.schema_registry is None:
            raise ConfigError(
                f"events {needs} are Avro with a Schema Registry's ids: set JOBLEDGER_SCHEMA_REGISTRY to its URL"
            )
        self._lookup = SchemaLookup(settings, self.names)
        writer = source("router")
        event_builder = WorkerEvents(registry, writer, settings.max_record_bytes)
        self.routes = Routes(registry, event_builder, writer, self._handlers, self._lookup)
        self._auth_monitor = AuthMonitor(settings)
        self._address = settings.bootstrap or "the embedded broker"
        self._from_end = {handler.event.topic for handler in self._handlers if handler.event.start == "latest"}
        self._notes: dict[str, str] = {}  # metadata for the commits of each topic
        self.events = self.jobs = self.rejected = 0
        self.partitions: dict[tuple[str, int], int] = {}  # owned: the next offset to commit; -1: nothing to commit
        self.started_at = time.monotonic()

    def health(self) -> dict[str, Any]:
        """Return the uptime (seconds) and the counts so far, as plain values."""
        return {
            "uptime": round(time.monotonic() - self.started_at, 1),
            "partitions": len(self.partitions),
            "events": self.events,
            "jobs": self.jobs,
            "rejected": self.rejected,
        }

    # -- start ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> WorkerProducer:
        """Check rights and topics, and that the handlers' event classes can read the earlier schemas. Publish this
        version's schema, and return the producer."""
        check_connection(self.settings)
        queues = {self.names.jobs(lane(handler.task.queue, handler.task.policy.priority)) for handler in self._handlers}
        names = self.names
        acls.check(self.settings, names.namespace, [*self.routes.topics, *queues, names.dead_letter, names.schemas])
        for topic in sorted({*self.routes.topics, *queues, names.dead_letter}):
            partitions_of(self.settings, topic)
        check_classes({h.event.name: h.event for h in self._handlers}.values(), self._lookup.all())
        sender = WorkerProducer(self.settings, self.names, 1.0)
        try:
            sender.prepare([*sorted(queues), self.names.dead_letter])
        except BaseException:
            sender.close()
            raise
        return sender

    # -- run ------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Route events until ``stop`` is set. Only events whose jobs were acknowledged are committed. Raises the error
        because of which the router cannot continue."""
        sender = retry_until(
            time.monotonic() + START_TIMEOUT_S,
            self._prepare,
            BrokerUnavailable,
            pause=1.0,
            stop=stop,
            on_retry=lambda error, _: LOG.warning("waiting: %s", error),
        )
        consumer = make_consumer(
            consumer_config(
                self.settings,
                group=self.names.router_group,
                auth_monitor=self._auth_monitor,
                **{"group.protocol": "consumer", "queued.max.messages.kbytes": 16_384, "fetch.error.backoff.ms": 100},
            )
        )
        try:
            consumer.subscribe(
                self.routes.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            self._loop(consumer, sender, stop)
            self._commit(consumer)
        except KafkaException as exc:
            raise translate(exc.args[0], self.settings, "reading events", join(self.names.router_group)) from exc
        finally:
            consumer.close()
            sender.close()
            self._lookup.close()

    def _loop(self, consumer: Consumer, sender: WorkerProducer, stop: threading.Event) -> None:
        committed_at = 0.0
        probe = CoordinatorProbe(consumer, self.names.router_group, self.routes.topics[0], LOG, "events")
        while not stop.is_set():
            first = consumer.poll(POLL_S)
            if first is None:
                self._auth_monitor.check()
                probe.check(bool(self.partitions))
            else:
                self._route([first, *consumer.consume(BATCH - 1, 0)], sender)
            now = time.monotonic()
            if now - committed_at >= COMMIT_INTERVAL_S:
                committed_at = now
                self._commit(consumer)

    def _route(self, messages: Sequence[Message], sender: WorkerProducer) -> None:
        """Send the jobs and dead letters of these records and wait until all are acknowledged."""
        batch = EventBatch(sender, self._address)
        ends: dict[tuple[str, int], int] = {}
        routed = 0
        for message in messages:
            error = message.error()
            if error is not None:
                self._message_error(message, error)
                continue
            where = (message.topic() or "", message.partition() or 0)
            if where not in self.partitions:
                continue  # the partition was revoked after the message was fetched
            ends[where] = (message.offset() or 0) + 1
            self.events += 1
            try:
                jobs, refused = self.routes.jobs(message)
            except SchemaError as exc:
                self._reject(batch, message, str(exc))
                continue
            for _, record in jobs:
                if (why := self._too_large(record)) is not None:
                    refused.append(why)
                    continue
                batch.send(message, record)
                routed += 1
            if refused:
                self._reject(batch, message, "; ".join(refused))
        for message, record in batch.await_all():
            routed -= 1
            why = f"its job makes a record of {len(record.value or b'')} bytes, above what {record.topic} takes"
            self._reject(batch, message, f"{why} (max.message.bytes)")
        if batch.await_all():  # dead letters that are too large
            raise PayloadTooLarge(
                f"{self.names.dead_letter} accepts smaller records (max.message.bytes) than the topics of events: raise the limit"
            )
        self.jobs += routed
        self.partitions.update(ends)

    def _too_large(self, record: Outgoing) -> str | None:
        """Return why a job's record is too large to be sent, or None."""
        limit, size = self.settings.max_record_bytes, len(record.value or b"")
        if size <= limit:
            return None
        return f"its job has a record of {size} bytes, above the limit of {limit} bytes (JOBLEDGER_MAX_RECORD_BYTES)"

    def _reject(self, batch: EventBatch, message: Message, why: str) -> None:
        self.rejected += 1
        LOG.error("%s[%s]@%s goes to the dead letters: %s", message.topic(), message.partition(), message.offset(), why)
        batch.send(message, self.routes.rejected(message, why))

    def _message_error(self, message: Message, error: KafkaError) -> None:
        topic = error_topic(message, self.routes.topics)
        translated = translate(error, self.settings, f"reading {topic}", read(topic), join(self.names.router_group))
        if error.fatal() or isinstance(translated, AccessDenied):
            raise translated
        LOG.warning("reading events: %s", error.str())

    def _commit(self, consumer: Consumer) -> None:
        """Commit the offsets of acknowledged batches. A failed commit is not repeated: the next commit covers it, or
        the next owner routes the same jobs again. Raises `AccessDenied` if this client may not commit."""
        due = [
            TopicPartition(t, p, offset, self._notes.get(t, ""))
            for (t, p), offset in self.partitions.items()
            if offset >= 0
        ]
        if not due:
            return
        try:
            results = consumer.commit(offsets=due, asynchronous=False) or ()
        except KafkaException as exc:
            refused = denied(
                exc.args[0], self.settings, "committing", *map(read, self.routes.topics), join(self.names.router_group)
            )
            if refused is not None:
                raise refused from exc
            LOG.info("commit refused: %s", exc.args[0].str())
            return
        for done in results:
            if done.error is None and self.partitions.get((done.topic, done.partition)) == done.offset:
                self.partitions[done.topic, done.partition] = -1

    # -- rebalances: called inside poll, when no batch is being routed ------------------------------------------------

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        if not assigned:  # the client calls this after a revocation, too
            return
        begin: dict[tuple[str, int], int] = {}
        for topic in sorted({where.topic for where in assigned} & self._from_end):
            numbers = [where.partition for where in assigned if where.topic == topic]
            offsets, self._notes[topic] = initial_offsets.at_the_end(
                self.settings, self.names.router_group, topic, numbers
            )
            begin |= {(topic, number): offset for number, offset in offsets.items()}
        for where in assigned:
            self.partitions[where.topic, where.partition] = begin.get((where.topic, where.partition), -1)
        consumer.incremental_assign(
            [TopicPartition(w.topic, w.partition, begin.get((w.topic, w.partition), OFFSET_STORED)) for w in assigned]
        )
        LOG.info("assigned %s", [f"{w.topic}[{w.partition}]" for w in assigned])
        if begin:
            LOG.info("read from their end, for the first time: %s", [f"{t}[{p}]@{o}" for (t, p), o in begin.items()])
            self._commit(consumer)  # at once: after a restart, the end would be a later offset

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self._commit(consumer)
        self._on_lost(consumer, revoked)

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        for where in lost:
            self.partitions.pop((where.topic, where.partition), None)
