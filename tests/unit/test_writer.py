"""The writer that sends single records, with an address at which no broker listens: an error in a callback does not
affect other records."""

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
    """A writer that gives up each record after a second."""
    return LogWriter(NOWHERE, None)


def settled(writer: LogWriter) -> KafkaError | None:
    """Send a record, wait for its delivery report, and return the error."""
    reported: list[KafkaError | None] = []
    done = threading.Event()

    def callback(error: KafkaError | None, message: Message) -> None:
        reported.append(error)
        done.set()

    writer.post(RECORD, callback)
    assert done.wait(60), "nobody serves the callbacks any more"
    return reported[0]


def test_a_loop_that_is_closed_before_the_acknowledgement_affects_no_other_submission(
    writer: LogWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """The coroutine of the closed loop was cancelled. Later submissions of the same client get their reports, and no
    error is logged."""
    client = Client(NOWHERE, Names("shop"), lambda: cast(StatusSource, None))

    async def gives_up() -> None:
        sending = asyncio.create_task(client._acknowledged(writer, RECORD, "one"))
        await asyncio.sleep(0)  # the task sends the record
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
    """The thread that calls the callbacks continues."""

    def breaks(error: KafkaError | None, message: Message) -> None:
        raise ZeroDivisionError

    writer.post(RECORD, breaks)
    assert settled(writer) is not None
    assert settled(writer) is not None
    assert "a delivery callback failed" in caplog.text
    writer.close(0.0)


def test_the_first_event_of_a_class_waits_for_a_broker_as_a_submission_does() -> None:
    """The comparison of its class with the log takes at most JOBLEDGER_SUBMIT_TIMEOUT, and has no other time limit."""
    app = App("shop", settings=Settings(bootstrap="127.0.0.1:1", submit_timeout=1.0))

    @app.event
    class Happened:
        rows: int

    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 did not answer in time"):
        app.emit(Happened(1))  # type: ignore[call-arg]  # see types_of_events in test_typing.py
    assert 0.9 <= time.monotonic() - began < 9.0
    app.close()


def test_a_record_for_a_topic_that_is_deleted_before_it_is_sent_reports_a_missing_topic() -> None:
    """librdkafka reports such a record as "Broker handle destroyed for termination": it has removed the partition."""
    error = undelivered(KafkaError(KafkaError._DESTROY), NOWHERE, "sending to t", write("t"))
    assert isinstance(error, TopicMissing)
    assert "jobledger topics apply" in str(error)
