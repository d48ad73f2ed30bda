"""Sends records to the log with time limits, for all code that is not on the hot path. Publishes the events' schema
before the first event."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConnectionUnusable, JobledgerError, PayloadTooLarge
from jobledger.kafka.auth import AuthMonitor, Need, away, write
from jobledger.kafka.clients import Headers, batch_room, position_of, producer, producer_config, undelivered
from jobledger.kafka.topic_names import Names
from jobledger.log.framing import Framing, framing
from jobledger.process import forks, greenlets
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.events import Position

LOG = get_logger("jobledger.client")

DeliveryCallback = Callable[[KafkaError | None, Message], None]


class Resendable(Protocol):
    """A delivery callback for `LogWriter.resend`. ``alone``: the record has already been sent in its own batch."""

    def __call__(self, error: KafkaError | None, message: Message, *, alone: bool = False) -> None: ...


class Outgoing(NamedTuple):
    """One record to send. If ``partition`` is None, the key decides the partition."""

    topic: str
    value: bytes | None
    key: str | bytes | None = None
    partition: int | None = None
    headers: Headers | None = None


class LogWriter:
    """A producer with time limits, which publishes Jobledger's schema first. A thread of its own serves its delivery
    callbacks.

    Thread-safe. ``names`` None: do not publish the schema (for records that are not events, or if another writer has
    published the schema). ``serve`` False: start no thread; the caller polls, as bulk senders do. ``framing``: use this
    framing of another writer; by default the settings decide, and without ``names`` records are sent unframed.
    ``batch``: the result of `jobledger.kafka.clients.batch_room`; if not given, it is determined when the schema is
    published. Raises `ConfigError` for a Schema Registry that cannot be used.

    ``served``: whether the thread runs. If no thread can be started (late in the end of a process), callers poll while
    they wait.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names | None,
        *,
        linger_ms: float = 0.0,
        serve: bool = True,
        framing: Framing | None = None,
        batch: int | None = None,
    ) -> None:
        self.settings = settings
        self._names = names
        self.framing = framing or self._own_framing()
        self._auth_monitor = AuthMonitor(settings)
        self._fatal: KafkaError | None = None
        self._linger_ms, self.batch = linger_ms, batch
        self.producer = self._connected()
        self._single_producer: Producer | None = None
        self._schema_published = names is None
        self._failed_at = float("-inf")
        self._failure: JobledgerError | None = None
        self._lock = forks.Lock()
        self._polling = forks.Alone()
        self._single_lock = greenlets.native_lock()
        self._closing = threading.Event()
        #: The class of the events that a callback sets. Callbacks run in a native thread.
        self.event = greenlets.event()
        self._thread: greenlets.Joinable | None = None
        if serve and not forks.ending:
            self._start()
        self.served = self._thread is not None

    def _start(self) -> None:
        with suppress(RuntimeError):  # no thread can be started: the process is ending, or the system has too many
            self._thread = greenlets.start_thread(self._serve, "jobledger-producer")

    def _connected(self, **more: Any) -> Producer:
        return producer(
            producer_config(self.settings, linger_ms=self._linger_ms, auth_monitor=self._auth_monitor, batch=self.batch)
            | more
        )

    @property
    def _producers(self) -> tuple[Producer, ...]:
        return (self.producer,) if self._single_producer is None else (self.producer, self._single_producer)

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                self._poll(0.1)
            except Exception:  # of a callback: without this thread no caller would get a result
                LOG.exception("a delivery callback failed")

    def poll(self, timeout: float) -> None:
        """Run the delivery callbacks that have arrived, for up to ``timeout`` seconds. If the cluster refuses this
        client, all waiting records fail with that error, so that no caller waits in vain.

        librdkafka's client fails if a callback polls again. So a signal handler that interrupts a poll and polls itself
        gets `ConnectionUnusable`.
        """
        with self._polling("serving acknowledgements"):
            try:
                self._poll(timeout)
            except RuntimeError as exc:
                raise self._closed() from exc

    def polled_here(self) -> bool:
        """Return whether this thread is polling. If it is, the caller is a signal handler, and must use another
        writer."""
        return self._polling.busy()

    def wait(self, done: greenlets.Flag, timeout: float) -> bool:
        """Wait until a callback has set ``done``. Returns False after ``timeout`` seconds."""
        if self.served:
            return done.wait(timeout)
        deadline = time.monotonic() + timeout
        while not done.is_set() and time.monotonic() < deadline:
            self.poll(0.05)
        return done.is_set()

    def _closed(self) -> ConnectionUnusable:
        return ConnectionUnusable("the connection to Kafka was closed meanwhile by another thread or a signal handler")

    def _poll(self, timeout: float) -> None:
        try:
            self.producer.poll(timeout)
            if self._single_producer is not None:
                self._single_producer.poll(0.0)
        except KafkaException as exc:  # a fatal error: this producer can send nothing more
            self._fatal = exc.args[0]
        if self._fatal is not None or self._auth_monitor.refusal is not None:
            for each in self._producers:
                each.purge()

    def failed(self, error: KafkaError, what: str, *needs: Need) -> JobledgerError:
        """Return Jobledger's error for a record that was not delivered."""
        return self._auth_monitor.behind(error) or undelivered(self._fatal or error, self.settings, what, *needs)

    @property
    def ready(self) -> bool:
        """Whether the schema is published. Before that the producer may still be replaced."""
        return self._schema_published

    def ensure_schema(self) -> None:
        """Publish this version's schema and wait for the acknowledgement, unless this writer has published it."""
        if self._schema_published:
            return
        if self._lock.busy():  # the caller is a signal handler, which cannot wait; publishing twice is harmless
            self.publish(codec.FINGERPRINT.hex())
            return
        arrived_at = time.monotonic()
        with self._lock("publishing the events' schema"):
            if self._schema_published or self._names is None:
                return
            if (
                self._failure is not None and self._failed_at > arrived_at
            ):  # while this thread waited: do not wait again
                raise self._failure.with_traceback(None)
            try:
                self.publish(codec.FINGERPRINT.hex())
            except JobledgerError as exc:
                self._failed_at, self._failure = time.monotonic(), exc
                raise
            self.batch = batch_room(self.settings, self._names)
            if self.batch is not None:  # no other thread uses the producer yet
                self.producer = self._connected()
            self._schema_published = True

    def _own_framing(self) -> Framing | None:
        return None if self._names is None else framing(self.settings, self._names, self.publish)

    def publish(self, key: str) -> None:
        """Write this version's schema to ``<ns>.schemas`` under ``key``, and wait for the acknowledgement."""
        assert self._names is not None
        self._send_all([Outgoing(self._names.schemas, codec.SCHEMA_TEXT.encode(), key)])

    def waits_for(self, record: Outgoing) -> bool:
        """Return whether posting this record must wait for the registration of its topic's schema."""
        return self.framing is not None and self.framing.waits(record.topic, record.value)

    def post(self, record: Outgoing, on_delivery: DeliveryCallback) -> None:
        """Put a record into the client's queue and return; ``on_delivery(error, message)`` runs in the thread that
        polls.

        If the queue is full, wait up to ``submit_timeout`` seconds, then raise `BrokerUnavailable`. A value above
        ``max_record_bytes`` raises `PayloadTooLarge` and is not sent. With a Schema Registry a topic's schema is
        registered before its first event; if that fails, this raises `RegistryUnavailable`, `SchemaRefused` or
        `ConfigError`.
        """
        value = record.value
        if value is not None and self.framing is not None:
            value = self.framing.framed(record.topic, value)
        if value is not None and len(value) > self.settings.max_record_bytes:
            raise PayloadTooLarge(
                f"a record of {len(value)} bytes for {record.topic} is above the limit of "
                f"{self.settings.max_record_bytes} bytes (JOBLEDGER_MAX_RECORD_BYTES): pass a reference instead of the data"
            )
        deadline: float | None = None
        more: dict[str, Any] = {}
        if record.partition is not None:
            more["partition"] = record.partition
        if record.headers is not None:
            more["headers"] = record.headers
        while True:
            try:
                self.producer.produce(record.topic, value, record.key, on_delivery=on_delivery, **more)
                return
            except BufferError:
                now = time.monotonic()
                deadline = deadline or now + self.settings.submit_timeout
                if now >= deadline:
                    raise BrokerUnavailable(
                        f"the send queue stayed full for {self.settings.submit_timeout:g} s: "
                        + away(self.settings, "accepts no records")
                    ) from None
                if self.served:
                    time.sleep(0.005)
                else:
                    self.poll(0.005)
            except KafkaException as exc:
                raise self.failed(exc.args[0], f"sending to {record.topic}", write(record.topic)) from exc
            except RuntimeError as exc:
                raise self._closed() from exc

    def resend(
        self, error: KafkaError, message: Message, headers: Headers | None, on_delivery: Resendable, alone: bool
    ) -> bool:
        """Send a record again in its own batch if the broker refused the record for its size. Returns whether this was
        done.

        The broker refuses a batch as a whole. The record that is too large can be found only if each record is sent
        ``alone``. This is needed if the result of `jobledger.kafka.clients.batch_room` is not known, or if the limit
        was lowered since. Such a record may be appended after later records of its key.
        """
        if alone or error.code() != KafkaError.MSG_SIZE_TOO_LARGE:
            return False
        with self._single_lock:
            if self._single_producer is None:
                self._single_producer = self._connected(**{"batch.num.messages": 1})
        again = partial(on_delivery, alone=True)
        more: dict[str, Any] = {} if headers is None else {"headers": headers}
        deadline = time.monotonic() + self.settings.submit_timeout
        while True:
            try:
                self._single_producer.produce(
                    message.topic() or "", message.value(), message.key(), message.partition() or 0, again, **more
                )
                return True
            except BufferError:
                if time.monotonic() >= deadline:
                    return False
                self._single_producer.poll(0.05)
            except KafkaException:
                return False

    def send(self, records: Iterable[Outgoing]) -> list[Position]:
        """Send records and wait for all acknowledgements. Returns their positions in order.

        Raises `BrokerUnavailable`, `PayloadTooLarge`, `TopicMissing` or `AccessDenied` for the first record that
        failed.
        """
        self.ensure_schema()
        return self._send_all(records)

    def _send_all(self, records: Iterable[Outgoing]) -> list[Position]:
        positions: list[Position | None] = []
        failed: list[tuple[KafkaError, str]] = []
        answered: list[int] = []
        some_answered = self.event()

        def delivered(index: int, headers: Headers | None) -> DeliveryCallback:
            def callback(error: KafkaError | None, message: Message, *, alone: bool = False) -> None:
                if error is not None:
                    if self.resend(error, message, headers, callback, alone):
                        return
                    failed.append((error, message.topic() or "?"))
                else:
                    positions[index] = position_of(message)
                answered.append(index)
                some_answered.set()

            return callback

        for record in records:
            positions.append(None)
            self.post(record, delivered(len(positions) - 1, record.headers))
        deadline = time.monotonic() + self.settings.submit_timeout + 5.0
        while len(answered) < len(positions):
            some_answered.clear()
            if len(answered) < len(positions) and not self.wait(some_answered, max(0.0, deadline - time.monotonic())):
                raise BrokerUnavailable(
                    f"{self.settings.bootstrap or 'the embedded broker'} did not acknowledge every record within "
                    f"{self.settings.submit_timeout:g} s (JOBLEDGER_SUBMIT_TIMEOUT)"
                )
        if failed:
            raise self.failed(failed[0][0], f"sending to {failed[0][1]}", write(failed[0][1]))
        return [p for p in positions if p is not None]

    def flush(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds until the queue is empty. Returns the number of unacknowledged records."""
        deadline = time.monotonic() + timeout
        with self._polling("serving acknowledgements"):
            with suppress(KafkaException):  # of a producer with a fatal error: its records have failed
                self.producer.flush(timeout)
            if self._single_producer is not None:  # created by now if the broker refused a record of the other producer
                with suppress(KafkaException):
                    self._single_producer.flush(max(0.0, deadline - time.monotonic()))
        return sum(map(len, self._producers))

    def close(self, timeout: float = 10.0) -> None:
        """Flush within ``timeout`` seconds and stop the thread. A second call does nothing. A call in a fork of the
        process that opened the writer does nothing either."""
        forks.notice()
        if self._closing.is_set():
            return
        self.flush(timeout)
        self._closing.set()
        if self._thread is not None:
            self._thread.join(1.0)
        for each in self._producers:
            with suppress(KafkaException, RuntimeError):  # another thread has closed the producer
                each.close()
