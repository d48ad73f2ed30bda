"""What is logged of a cluster that cannot be reached."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from jobledger import outage
from jobledger.outage import Outage


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Questions follow each other at once, and an outage is long after a fifth of a second."""
    monkeypatch.setattr(outage, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(outage, "LONG_S", 0.2)
    monkeypatch.setattr(outage, "_quiet_until", float("-inf"))
    caplog.set_level(logging.INFO, "jobledger.kafka")


def until(check: Callable[[], bool]) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def over() -> bool:
    """Whether nobody watches."""
    return not any(thread.name == "jobledger-outage" for thread in threading.enumerate())


def test_an_outage_is_a_warning_then_an_error_and_its_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """However many clients hear of it, and in the words that say the most."""
    up = threading.Event()
    seen = Outage("k:1", up.is_set)
    for _ in range(20):
        seen.heard("Connect to k:1 failed: Connection refused")
        seen.heard("1/1 brokers are down")
    until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
    up.set()
    until(over)
    assert [(record.levelno, record.getMessage().partition(" 0 s")[0]) for record in caplog.records] == [
        (logging.WARNING, "k:1 cannot be reached, and is tried again: Connect to k:1 failed: Connection refused"),
        (logging.ERROR, "k:1 has not been reachable for"),
        (logging.INFO, "connected again to k:1, after"),
    ]


def test_a_connection_that_is_back_at_once_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of it; the next outage is."""
    answers = [True]
    seen = Outage("k:1", lambda: answers[0])
    seen.heard("Disconnected")
    until(over)
    assert caplog.records == []
    answers[0] = False
    seen.heard("Disconnected again")
    until(lambda: len(caplog.records) == 1)
    answers[0] = True
    until(over)
    assert "Disconnected again" in caplog.records[0].getMessage()


def test_a_process_that_stops_says_nothing_of_its_broker(caplog: pytest.LogCaptureFixture) -> None:
    """Both may be told to stop at the same time."""
    outage.stopping()
    seen = Outage("k:1", lambda: False)
    seen.heard("Connect to k:1 failed: Connection refused")
    until(over)
    assert caplog.records == []
