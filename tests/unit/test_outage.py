"""The log lines about a cluster that cannot be reached."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

import pytest

from jobledger import Settings
from jobledger.kafka import outage
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.outage import Outage
from jobledger.log.writer import LogWriter
from jobledger.streams.coordinator.faust.log_filters import Connections


class Client:
    """A client that is open as long as this object lives."""


CLIENT = Client()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check the connection again at once, let no outage be a long one, and wait until no outage of another test is
    watched."""
    monkeypatch.setattr(outage, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(outage, "LONG_S", 600.0)
    monkeypatch.setattr(outage, "STOPPING_S", 600.0)
    monkeypatch.setattr(outage, "_quiet_until", float("-inf"))
    until(over)
    caplog.set_level(logging.INFO, "jobledger.kafka")


def until(check: Callable[[], bool]) -> None:
    """Wait until ``check`` is true."""
    deadline = time.monotonic() + 80
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def over() -> bool:
    """Return whether no thread watches an outage."""
    return not any(thread.name == "jobledger-outage" for thread in threading.enumerate())


def test_an_outage_is_logged_as_a_warning_then_as_an_error_and_its_end_as_info(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these lines is logged once for any number of reports, with the most detailed message."""
    monkeypatch.setattr(outage, "LONG_S", 0.2)
    up = threading.Event()
    seen = Outage("k:1", up.is_set)
    for _ in range(20):
        seen.heard("Connect to k:1 failed: Connection refused", CLIENT)
        seen.heard("1/1 brokers are down", CLIENT)
    until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
    up.set()
    until(over)
    assert [(record.levelno, re.sub(r" \d+ s\b.*", "", record.getMessage())) for record in caplog.records] == [
        (logging.WARNING, "k:1 cannot be reached, and is tried again: Connect to k:1 failed: Connection refused"),
        (logging.ERROR, "k:1 has not been reachable for"),
        (logging.INFO, "connected again to k:1, after"),
    ]


def test_a_connection_that_is_back_at_once_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is not logged. The next outage is logged."""
    answers = [True]
    seen = Outage("k:1", lambda: answers[0])
    seen.heard("Disconnected", CLIENT)
    until(over)
    assert caplog.records == []
    answers[0] = False
    seen.heard("Disconnected again", CLIENT)
    until(lambda: len(caplog.records) == 1)
    answers[0] = True
    until(over)
    assert "Disconnected again" in caplog.records[0].getMessage()


def test_an_error_while_checking_the_connection_counts_as_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The watch checks again, so the outage and its end are logged."""
    answers: list[bool | Exception] = [RuntimeError("no thread for a client"), False, True]

    def ask() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    Outage("k:1", ask).heard("Disconnected", CLIENT)
    until(over)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_a_process_that_stops_logs_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    """The process and its broker may be stopped at the same time."""
    outage.stopping()
    seen = Outage("k:1", lambda: False)
    seen.heard("Connect to k:1 failed: Connection refused", CLIENT)
    until(over)
    assert caplog.records == []


def test_an_outage_is_watched_while_a_client_that_reported_it_is_open(caplog: pytest.LogCaptureFixture) -> None:
    """After the last of these clients is gone, the watch ends. An outage of another client is logged again."""
    asked: list[bool] = []

    def ask() -> bool:
        asked.append(True)
        return False

    seen, one, other = Outage("k:1", ask), Client(), Client()
    seen.heard("Connect to k:1 failed: Connection refused", one)
    seen.heard("Disconnected", other)
    until(lambda: seen.said)
    del one
    before = len(asked)
    until(lambda: len(asked) > before + 2)
    del other
    until(over)
    assert not seen.said
    third = Client()
    seen.heard("Disconnected", third)
    until(lambda: seen.said)
    del third
    until(over)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_the_watch_of_an_outage_ends_when_the_client_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker never comes back."""
    monkeypatch.setattr(outage, "ANSWER_S", 0.1)
    settings = Settings(bootstrap=f"127.0.0.1:{free_port()}")
    writer = LogWriter(settings, None)
    until(lambda: outage.outage_of(settings).said)
    writer.close(0.1)
    del writer
    until(over)


def test_a_failed_request_is_a_warning_until_the_outage_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Later failed requests are logged at a lower level."""
    settings = Settings(bootstrap="nowhere.invalid:1")
    outage.log_missed(outage.LOG, settings, "asking for %s", "topics")
    outage.outage_of(settings).said = True
    outage.log_missed(outage.LOG, settings, "asking again")
    assert [(record.levelno, record.getMessage(), record.funcName) for record in caplog.records] == [
        (logging.WARNING, "asking for topics", "test_a_failed_request_is_a_warning_until_the_outage_is_logged")
    ]


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("Unable connect to node with id 1: refused", False),
        ("Failed fetch messages from 1: NodeNotReadyError: not ready", False),
        ("Unable to update metadata from [1]", False),
        ("Group Coordinator Request failed: [Error 30] GroupAuthorizationFailedError", True),
    ],
)
def test_lost_connections_of_aiokafka_are_reported_as_an_outage(line: str, passes: bool) -> None:
    """aiokafka's lines about lost connections go to the watch of outages, and its other lines are logged."""
    reported: list[str] = []
    connections = Connections()
    connections.heard = reported.append
    record = logging.LogRecord("aiokafka.client", logging.ERROR, __file__, 1, line, (), None)
    assert connections.filter(record) is passes
    assert reported == ([] if passes else [line])
