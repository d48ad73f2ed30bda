"""Sends a worker's facts and derived records. The producer's queue is bounded. No closing fact and no derived record is
dropped silently; a `JobStarted`, a progress fact or the renewal of a job lease may be lost.

Any thread may send. Delivery callbacks run in the thread that polls. While the event loop is busy, it polls, because
each callback acquires the interpreter lock, and a separate polling thread would compete with the event loop for that
lock at every record. The ack tracker thread polls when the event loop does not poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError
from jobledger.kafka.auth import AuthMonitor, write
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.kafka.clients import MISSING, batch_room, producer, producer_config, undelivered
from jobledger.kafka.topic_names import Names
from jobledger.log.framing import Framing, framing
from jobledger.schemas import codec

#: Stands for a partition number: the Kafka client chooses the partition by the key.
BY_KEY = -1
#: No new job is begun while this many records are unacknowledged. A job sends two facts, so a crash reruns about
#: half as many jobs at most.
UNACKNOWLEDGED_LIMIT = 8_000
#: Seconds that `WorkerProducer.hurry` waits for acknowledgements.
HURRY_S = 0.005
#: Seconds to wait while the producer's queue is full, or while a topic is reported as missing.
WAIT_S = 10.0

Delivered = Callable[[KafkaError | None, Message], None]


class WorkerProducer:
    """A producer with a bounded wait for space in its queue. ``linger_ms``: milliseconds that a record may wait for
    other records of its batch.

    With a Schema Registry, values are framed for the registry. Without a Schema Registry, framing costs nothing.
    """

    def __init__(self, settings: Settings, names: Names, linger_ms: float) -> None:
        self._settings, self._schemas = settings, names.schemas
        self._auth_monitor = AuthMonitor(settings)
        self._fatal: KafkaError | None = None
        self._names, self._linger_ms = names, linger_ms
        self._producer = producer(producer_config(settings, linger_ms=linger_ms, auth_monitor=self._auth_monitor))
        self._single_record_producer: Producer | None = None
        #: `time.monotonic` of the last poll.
        self.polled_at = 0.0
        self.clock = BrokerClock()
        self._framing: Framing | None = framing(settings, names, self._publish)
        self.produce = self._entry()

    def _entry(self) -> Callable[..., None]:
        return self._producer.produce if self._framing is None else self._produce_framed

    def _produce_framed(
        self,
        topic: str,
        value: bytes,
        key: str | bytes | None,
        partition: int,
        on_delivery: Delivered | None = None,
    ) -> None:
        assert self._framing is not None
        self._producer.produce(topic, self._framing.framed(topic, value), key, partition, on_delivery)

    def framed(self, topic: str, value: bytes) -> bytes:
        """Return an event as it is sent to ``topic``. With a Schema Registry this may register the schema for the topic
        first, and wait for that. Raises `RegistryUnavailable`, `SchemaRefused` and `ConfigError`. Any thread."""
        return value if self._framing is None else self._framing.framed(topic, value)

    def _publish(self, key: str) -> None:
        self.send_and_wait(self._schemas, codec.SCHEMA_TEXT.encode(), key, WAIT_S)

    def prepare(self, topics: Iterable[str]) -> None:
        """Limit the size of batches to what the topics accept. Then publish this version's schema and wait for the
        acknowledgement, and with a Schema Registry register the schema for ``topics``.

        This blocks, so call it at the start, before any other record is sent. Raises what `send_and_wait` raises,
        `RegistryUnavailable`, `SchemaRefused` and `ConfigError`.
        """
        room = batch_room(self._settings, self._names)
        if room is not None:
            conf = producer_config(
                self._settings, linger_ms=self._linger_ms, auth_monitor=self._auth_monitor, batch=room
            )
            unused, self._producer = self._producer, producer(conf)
            self.produce = self._entry()
            _close(unused)
        self._publish(codec.FINGERPRINT.hex())
        if self._framing is not None:
            self._framing.prepare(topics)

    def send(
        self, topic: str, value: bytes, key: str | bytes | None, partition: int, on_delivery: Delivered | None
    ) -> None:
        """Put a record into the producer's queue. Wait up to `WAIT_S` seconds for space in the queue, or for a topic
        that is reported as missing. Any thread.

        Raises `BrokerUnavailable` if the queue stays full, `TopicMissing` if there is no such topic, `AccessDenied` if
        the cluster refuses the record.
        """
        deadline = 0.0
        while True:
            try:
                self.produce(topic, value, key, partition, on_delivery)
                return
            except BufferError:
                problem: JobledgerError = BrokerUnavailable(
                    f"the send queue stayed full for {WAIT_S:g} s: "
                    f"{self._settings.bootstrap or 'the embedded broker'} takes nothing"
                )
            except KafkaException as exc:
                problem = self.failed(exc.args[0], topic)
                # Try again: a broker that shuts down reports its topics as missing.
                if exc.args[0].code() not in MISSING:
                    raise problem from exc
            self.check()
            deadline = deadline or time.monotonic() + WAIT_S
            if time.monotonic() > deadline:
                raise problem
            self.poll(0.01)

    def send_alone(
        self, topic: str, value: bytes, key: str | bytes | None, partition: int, delivered: Delivered
    ) -> None:
        """Put a record into a producer's queue, in a batch of its own, because the broker refuses batches as a whole.

        A second producer sends the record, so its order relative to other records is not defined. Does not wait. Raises
        what `send` raises.
        """
        if self._single_record_producer is None:
            conf = producer_config(self._settings, auth_monitor=self._auth_monitor)
            self._single_record_producer = producer({**conf, "batch.num.messages": 1})
        try:
            self._single_record_producer.produce(topic, self.framed(topic, value), key, partition, delivered)
        except BufferError:
            raise BrokerUnavailable(f"the send queue for single records is full: {topic} accepts no records") from None
        except KafkaException as exc:
            raise self.failed(exc.args[0], topic) from exc

    def send_and_wait(self, topic: str, value: bytes, key: str, timeout: float) -> None:
        """Send a record and wait for its acknowledgement. After that the producer has its id and its connections.

        Without this first record, the jobs of the first second would run long before any of their facts is in the log,
        and the first expiries and delays would be judged by this machine's clock instead of the broker's. Raises what
        `send` raises, and `BrokerUnavailable` after ``timeout`` seconds.
        """
        answers: list[KafkaError | None] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is None:
                self.clock.heard(message)
            answers.append(error)

        self.send(topic, value, key, BY_KEY, delivered)
        deadline = time.monotonic() + timeout
        while not answers:
            self.poll(0.05)
            if not answers:
                self.check()
            if time.monotonic() > deadline:
                address = self._settings.bootstrap or "the embedded broker"
                raise BrokerUnavailable(f"{address} acknowledged nothing on {topic} within {timeout:g} s")
        if answers[0] is not None:
            raise self.failed(answers[0], topic)

    def failed(self, error: KafkaError, topic: str) -> JobledgerError:
        """Return the error to raise for a record that was not delivered or cannot be delivered."""
        what, cause = f"sending to {topic}", self._fatal or error
        return self._auth_monitor.behind(error) or undelivered(cause, self._settings, what, write(topic))

    def check(self) -> None:
        """Raise `AccessDenied` if the cluster no longer accepts this client, or the error with which this producer
        failed permanently."""
        self._auth_monitor.check()
        if self._fatal is not None:
            raise self.failed(self._fatal, self._schemas)

    def poll(self, timeout: float = 0.0) -> None:
        """Run the delivery callbacks of all reports that have arrived or arrive within ``timeout`` seconds. Any
        thread."""
        self.polled_at = time.monotonic()
        try:
            self._producer.poll(timeout)
            if self._single_record_producer is not None:
                self._single_record_producer.poll(0.0)
        except KafkaException as exc:
            self._fatal = exc.args[0]

    def hurry(self) -> None:
        """Send queued records at once, and run the delivery callbacks of reports that arrive within `HURRY_S`
        seconds."""
        try:
            self._producer.flush(HURRY_S)
        except KafkaException as exc:  # as in `poll`
            self._fatal = exc.args[0]

    @property
    def unacknowledged(self) -> int:
        """The number of sent records whose delivery callback has not run."""
        return len(self._producer) + (0 if self._single_record_producer is None else len(self._single_record_producer))

    def flush(self, timeout: float) -> int:
        """Wait for acknowledgements, up to ``timeout`` seconds for each of the two producers. Return the number of
        missing acknowledgements."""
        left = self._producer.flush(timeout)
        return left + (0 if self._single_record_producer is None else self._single_record_producer.flush(timeout))

    def close(self) -> None:
        """Drop unsent records and close the connections. Unsent records are dropped because closing must not wait for a
        broker that is not available."""
        for each in (self._producer, self._single_record_producer):
            if each is not None:
                _close(each)


def _close(unneeded: Producer) -> None:
    """Drop the unsent records of a producer and close its connections."""
    with suppress(KafkaException):  # the producer has failed permanently
        unneeded.purge()
        unneeded.flush(1.0)
        unneeded.close()
