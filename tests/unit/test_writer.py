"""What sends beside the hot path, against an address at which nobody listens: callbacks that break harm nobody else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import cast

import pytest
from confluent_kafka import KafkaError, Message

from jobledger import App
from jobledger.client.client import Client, StatusSource
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, TopicMissing
from jobledger.kafka.auth import write
from jobledger.kafka.clients import undelivered
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import LogWriter, Outgoing

NOWHERE = Settings(bootstrap="127.0.0.1:1", submit_timeout=1.0)
RECORD = Outgoing("t", b"x", "k")


@pytest.fixture
def writer() -> LogWriter:
    """One that gives up on each record after a second."""
    return LogWriter(NOWHERE, None)


def settled(writer: LogWriter) -> KafkaError | None:
    """Send a record and wait until it is told what became of it."""
    told: list[KafkaError | None] = []
    done = threading.Event()

    def callback(error: KafkaError | None, message: Message) -> None:
        told.append(error)
        done.set()

    writer.post(RECORD, callback)
    assert done.wait(60), "nobody serves the callbacks any more"
    return told[0]


def test_a_loop_that_is_closed_before_the_acknowledgement_harms_nobody_else(
    writer: LogWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """Its coroutine has given up; later submissions of the same client are settled, and nothing is said of it."""
    client = Client(NOWHERE, Names("shop"), lambda: cast(StatusSource, None))

    async def gives_up() -> None:
        sending = asyncio.create_task(client._acknowledged(writer, RECORD, "one"))
        await asyncio.sleep(0)  # it has sent the record
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    async def waits() -> None:
        with pytest.raises(BrokerUnavailable, match="another"):
            await client._acknowledged(writer, RECORD, "another")

    asyncio.run(gives_up())
    assert settled(writer) is not None
    asyncio.run(waits())
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []
    writer.close(0.0)


def test_a_callback_that_breaks_is_logged_and_the_next_one_is_called(
    writer: LogWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that serves them lives on."""

    def breaks(error: KafkaError | None, message: Message) -> None:
        raise ZeroDivisionError

    writer.post(RECORD, breaks)
    assert settled(writer) is not None
    assert settled(writer) is not None
    assert "a delivery callback failed" in caplog.text
    writer.close(0.0)


def test_the_first_event_of_a_class_waits_for_a_broker_as_a_submission_does() -> None:
    """It waits JOBLEDGER_SUBMIT_TIMEOUT, and no span of its own, while its class is compared with the log."""
    app = App("shop", settings=Settings(bootstrap="127.0.0.1:1", submit_timeout=1.0))

    @app.event
    class Happened:
        rows: int

    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 did not answer in time"):
        app.emit(Happened(1))  # type: ignore[call-arg]  # see told_of_events in test_typing.py
    assert 0.9 <= time.monotonic() - began < 9.0
    app.close()


def test_a_record_for_a_topic_that_is_deleted_before_it_is_sent_reports_a_missing_topic() -> None:
    """librdkafka reports such a record as "Broker handle destroyed for termination": it has removed the partition."""
    error = undelivered(KafkaError(KafkaError._DESTROY), NOWHERE, "sending to t", write("t"))
    assert isinstance(error, TopicMissing)
    assert "jobledger topics apply" in str(error)
