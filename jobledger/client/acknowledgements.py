"""Acknowledgements for which callers of the client wait: of one record, and of many records at once."""

from __future__ import annotations

import time
from functools import partial

from confluent_kafka import KafkaError, Message

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError, PayloadTooLarge
from jobledger.kafka.auth import write
from jobledger.kafka.clients import Headers, position_of
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas.events import Position

#: Maximum number of unacknowledged submissions of `submit_many`. This bounds the memory, however many jobs are
#: submitted.
WINDOW = 20_000
#: Jobs between two checks of the acknowledgements in `submit_many`.
CHUNK = 500
#: Maximum number of failed requests of `submit_many` that an error lists.
NAMED = 10


class Ack:
    """The acknowledgement of one record, which was sent with these headers."""

    __slots__ = ("_error", "_headers", "_position", "_writer", "event")

    def __init__(self, writer: LogWriter, headers: Headers | None) -> None:
        self.event = writer.event()
        self._writer, self._headers = writer, headers
        self._error: KafkaError | None = None
        self._position: Position | None = None

    def __call__(self, error: KafkaError | None, message: Message, *, alone: bool = False) -> None:
        if error is not None and self._writer.resend(error, message, self._headers, self, alone):
            return
        self._error, self._position = error, position_of(message)
        self.event.set()

    def position(self, what: str, topic: str) -> Position:
        """Return the record's position. Raises the error of the delivery if the record was not delivered."""
        if self._error is not None or self._position is None:
            raise self._writer.failed(self._error or KafkaError(KafkaError._FAIL), what, write(topic))
        return self._position


class BulkAck:
    """The acknowledgements of one `submit_many` or `emit_many`, with a limit on how many may be outstanding.

    The caller's own thread serves the delivery callbacks, between records: a second thread would compete for the
    interpreter.
    """

    def __init__(self, settings: Settings, writer: LogWriter, what: str) -> None:
        self._settings, self._writer, self._what = settings, writer, what
        self._added: list[tuple[str, str]] = []
        self._positions: dict[int, tuple[int, int]] = {}
        self._answered = 0
        #: Errors by index in the order of `add`.
        self._failed: dict[int, KafkaError | PayloadTooLarge] = {}

    def _delivered(
        self,
        index: int,
        error: KafkaError | None,
        message: Message,
        *,
        headers: Headers | None = None,
        alone: bool = False,
    ) -> None:
        if error is None:
            self._positions[index] = (message.partition() or 0, message.offset() or 0)
        elif self._writer.resend(error, message, headers, partial(self._delivered, index, headers=headers), alone):
            return
        else:
            self._failed[index] = error
        self._answered += 1

    def add(self, identity: str, record: Outgoing) -> None:
        """Send one more record. Waits while `WINDOW` records are outstanding. If a record is too large, only that
        record fails."""
        index = len(self._added)
        if not index % CHUNK:
            self._writer.poll(0)
            if index - self._answered >= WINDOW:
                self._await(WINDOW - CHUNK)
        delivered = partial(self._delivered, index)
        if record.headers is not None:
            delivered = partial(delivered, headers=record.headers)
        try:
            self._writer.post(record, delivered)
        except PayloadTooLarge as exc:
            self._failed[index] = exc
            self._answered += 1
        self._added.append((identity, record.topic))

    def _await(self, outstanding: int) -> None:
        """Serve delivery callbacks until at most ``outstanding`` acknowledgements are missing. The time limit starts
        again with each acknowledgement. Raises `BrokerUnavailable`."""
        patience = self._settings.submit_timeout + 5.0
        answered, since = self._answered, time.monotonic()
        while len(self._added) - self._answered > outstanding:
            self._writer.poll(0.05)
            if self._answered != answered:
                answered, since = self._answered, time.monotonic()
            elif time.monotonic() - since > patience:
                missing = len(self._added) - self._answered
                raise BrokerUnavailable(
                    f"{missing} of {len(self._added)} {self._what} were not acknowledged: no acknowledgement arrived for "
                    f"{patience:g} s"
                )

    def finish(self) -> list[tuple[str, Position]]:
        """Wait for all acknowledgements. Returns the ids and positions in order. Raises the first error."""
        self._await(0)
        if self._failed:
            raise self._error()
        positions = self._positions
        return [(identity, Position(topic, *positions[index])) for index, (identity, topic) in enumerate(self._added)]

    def _error(self) -> JobledgerError:
        failed = tuple(sorted(self._failed))
        named = ", ".join(f"{index} ({self._added[index][0]})" for index in failed[:NAMED])
        more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        what = (
            f"{len(self._positions)} of {len(self._added)} {self._what} were accepted; not accepted, counted from 0: "
            f"{named}{more}"
        )
        first, topic = self._failed[failed[0]], self._added[failed[0]][1]
        if isinstance(first, PayloadTooLarge):
            error: JobledgerError = PayloadTooLarge(f"{what}: {first}")
        else:
            error = self._writer.failed(first, what, write(topic))
        error.failed = failed
        return error
