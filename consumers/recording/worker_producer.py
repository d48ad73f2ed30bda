"""Sends a worker's facts and derived records. The producer's queue is bounded, and no record is dropped silently.

Any thread may send. Delivery callbacks run in whichever thread polls. The event loop polls while it is busy: each
callback acquires the interpreter lock, and a separate polling thread would compete with the loop for it at every
record. The settler polls when the loop does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from jobledger.config import Settings
from jobledger.consumers.state.broker_clock import BrokerClock
from jobledger.errors import BrokerUnavailable, JobledgerError
from jobledger.kafka.auth import AuthMonitor, write
from jobledger.kafka.clients import MISSING, batch_room, producer, producer_config, undelivered
from jobledger.kafka.topic_names import Names
from jobledger.log.framing import Framing, framing
from jobledger.schemas import codec

#: The client chooses the partition by the key.
BY_KEY = -1
#: No new job is begun while this many records are unacknowledged. A job sends two facts, so a crash reruns about
#: half as many jobs at most.
UNACKNOWLEDGED_LIMIT = 8_000
#: Seconds that `WorkerProducer.hurry` waits for acknowledgements.
HURRY_S = 0.005
#: Seconds to wait while the send queue is full, or a topic is reported as missing.
WAIT_S = 10.0

Delivered = Callable[[KafkaError | None, Message], None]


class WorkerProducer:
    """A producer with a bounded wait for space in its queue. ``linger_ms``: how long a record may wait for others.

    With a Schema Registry, values are framed for it. Without one, this costs nothing.
    """

    def __init__(self, settings: Settings, names: Names, linger_ms: float) -> None:
        self._settings, self._schemas = settings, names.schemas
        self._door = AuthMonitor(settings)
        self._fatal: KafkaError | None = None
        self._names, self._linger_ms = names, linger_ms
        self._producer = producer(producer_config(settings, linger_ms=linger_ms, door=self._door))
        self._alone: Producer | None = None
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

    def _publish(self, key: str) -> None:
        self.first(self._schemas, codec.SCHEMA_TEXT.encode(), key, WAIT_S)

    def prepare(self, topics: Iterable[str]) -> None:
        """Publish this version's schema, acknowledged; bound batches by what the topics accept; register the schema for
        ``topics``. It waits, so call it at the start, before anything else is sent. Raises what `first` raises,
        `RegistryUnavailable`, `SchemaRefused` and `ConfigError`."""
        self._publish(codec.FINGERPRINT.hex())
        room = batch_room(self._settings, self._names)
        if room is not None:
            conf = producer_config(self._settings, linger_ms=self._linger_ms, door=self._door, batch=room)
            self._producer = producer(conf)
            self.produce = self._entry()
        if self._framing is not None:
            self._framing.prepare(topics)

    def send(
        self, topic: str, value: bytes, key: str | bytes | None, partition: int, on_delivery: Delivered | None
    ) -> None:
        """Queue a record; wait up to `WAIT_S` seconds. Any thread. Raises `BrokerUnavailable` if the queue stays full,
        `TopicMissing` if there is no such topic, `AccessDenied` if the cluster refuses it."""
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
                # A broker that shuts down reports its topics as missing.
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
        """Queue a record in a batch of its own, because the broker refuses batches as a whole.

        A second producer sends it, so it is in no order with other records. Does not wait. Raises what `send` raises.
        """
        if self._alone is None:
            conf = producer_config(self._settings, door=self._door)
            self._alone = producer({**conf, "batch.num.messages": 1})
        try:
            framed = value if self._framing is None else self._framing.framed(topic, value)
            self._alone.produce(topic, framed, key, partition, delivered)
        except BufferError:
            raise BrokerUnavailable(f"the send queue for single records is full: {topic} accepts no records") from None
        except KafkaException as exc:
            raise self.failed(exc.args[0], topic) from exc

    def first(self, topic: str, value: bytes, key: str, timeout: float) -> None:
        """Send a record and wait for its acknowledgement. Then the producer has its id and its connections.

        Without this, the jobs of the first second would run long before any of their facts is in the log, and the first
        expiries and delays would be judged by this machine's clock instead of the broker's. Raises what `send` raises,
        and `BrokerUnavailable` after ``timeout`` seconds.
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
        """Return the error to raise for a record that was not, or cannot be, delivered."""
        what, found = f"sending to {topic}", self._fatal or error
        return self._door.behind(error) or undelivered(found, self._settings, what, write(topic))

    def check(self) -> None:
        """Raise `AccessDenied` if the cluster no longer accepts this client, or the error with which this producer
        failed for good."""
        self._door.check()
        if self._fatal is not None:
            raise self.failed(self._fatal, self._schemas)

    def poll(self, timeout: float = 0.0) -> None:
        """Run the delivery callbacks that have arrived or arrive within ``timeout`` seconds. Any thread."""
        self.polled_at = time.monotonic()
        try:
            self._producer.poll(timeout)
            if self._alone is not None:
                self._alone.poll(0.0)
        except KafkaException as exc:
            self._fatal = exc.args[0]

    def hurry(self) -> None:
        """Send queued records at once, and run the delivery callbacks that arrive within `HURRY_S` seconds."""
        try:
            self._producer.flush(HURRY_S)
        except KafkaException as exc:  # as in `poll`
            self._fatal = exc.args[0]

    @property
    def unacknowledged(self) -> int:
        """The number of sent records whose delivery callback has not run."""
        return len(self._producer) + (0 if self._alone is None else len(self._alone))

    def flush(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds, for each producer, for acknowledgements. Returns how many are missing."""
        left = self._producer.flush(timeout)
        return left + (0 if self._alone is None else self._alone.flush(timeout))

    def close(self) -> None:
        """Drop unsent records and close the connections: closing must not wait for a broker that is away."""
        for each in (self._producer, self._alone):
            if each is not None:
                with suppress(KafkaException):  # the producer has failed for good
                    each.purge()
                    each.flush(1.0)
                    each.close()
