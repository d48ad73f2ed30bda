"""librdkafka for an event loop: delivery reports as one awaitable per batch, and the ends of partitions.

Knows no events. Ends are not asked through Faust's consumer: its requests queue behind a fetch that waits for records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from confluent_kafka import KafkaError, Message

from jobledger.config import Settings
from jobledger.errors import JobledgerError
from jobledger.log import LogReader, LogWriter, Outgoing, translate


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


class Ends:
    """Where partitions begin and end, asked from the broker on a connection of its own. Close it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reader: LogReader | None = None
        # One thread: the reader is not to be shared.
        self._thread = ThreadPoolExecutor(1, "jobledger-ends")

    async def of(self, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """First offset and high watermark by partition. Raises `BrokerUnavailable` or `TopicMissing`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, topic, sorted(partitions))

    def _ask(self, topic: str, partitions: Sequence[int]) -> dict[int, tuple[int, int]]:
        if self._reader is None:
            self._reader = LogReader(self._settings)
        return {partition: self._reader.watermarks(topic, partition) for partition in partitions}

    def close(self) -> None:
        """Give the connection back; does not wait for an answer that is under way."""
        reader = self._reader
        if reader is not None:
            self._thread.submit(reader.close)
        self._thread.shutdown(wait=False)
