"""Sending from an event loop: librdkafka's delivery reports as one awaitable per batch. Knows no events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from confluent_kafka import KafkaError, Message

from jobledger.errors import JobledgerError
from jobledger.log import LogWriter, Outgoing, translate


class Delivered(NamedTuple):
    """Where an acknowledged record stands, and when the broker appended it (ms)."""

    partition: int
    offset: int
    appended_ms: int


class AckedWriter:
    """A `LogWriter` for one event loop. Waits are bounded by its delivery timeout."""

    def __init__(self, writer: LogWriter) -> None:
        self.writer = writer

    def post(self, records: Sequence[Outgoing]) -> asyncio.Future[list[Delivered | JobledgerError]]:
        """Hand records over, at least one; what became of each, in order, once all are settled. Nothing is raised."""
        settings = self.writer.settings
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Delivered | JobledgerError]] = loop.create_future()
        lost = JobledgerError("never sent")
        outcomes: list[Delivered | JobledgerError] = [lost] * len(records)
        settled = 0
        expected = -1

        def finish() -> None:
            if not future.done():
                future.set_result(outcomes)

        def on_delivery(index: int) -> None:
            def report(error: KafkaError | None, message: Message) -> None:
                nonlocal settled
                if error is None:
                    outcomes[index] = Delivered(message.partition() or 0, message.offset() or 0, message.timestamp()[1])
                else:
                    outcomes[index] = translate(error, settings, f"sending to {message.topic()}")
                settled += 1  # reports come from one thread
                if settled == expected:
                    loop.call_soon_threadsafe(finish)

            self.writer.post(records[index], report)

        refused = 0
        for index in range(len(records)):
            try:
                on_delivery(index)
            except JobledgerError as exc:
                outcomes[index] = exc
                refused += 1
        expected = len(records) - refused
        # The last report may have come before `expected` was known; finishing twice does no harm.
        if settled == expected:
            loop.call_soon(finish)
        return future


def first_error(outcomes: Sequence[Delivered | JobledgerError]) -> JobledgerError | None:
    """The first record that was not acknowledged, as its error."""
    return next((o for o in outcomes if isinstance(o, JobledgerError)), None)
