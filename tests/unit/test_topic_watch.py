"""The thread that reads the settings of topics."""

from __future__ import annotations

import logging
import threading

import pytest

from jobledger import Settings
from jobledger.kafka import topic_watch
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topic_watch import TopicWatch


def test_the_watch_of_topics_continues_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception of one check is logged, and the next check follows. Otherwise later changes of settings would not be
    noticed."""
    monkeypatch.setattr(topic_watch, "LOOK_S", 0.01)
    looks, often = 0, threading.Event()

    def topics() -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 3:
            often.set()
        raise TimeoutError

    watch = TopicWatch(Settings(bootstrap="127.0.0.1:1"), Names("a"), topics, logging.getLogger("jobledger.worker"))
    watch.start()
    try:
        assert often.wait(30)
    finally:
        watch.close()
        watch.join(30)
    assert "the settings of topics cannot be read" in caplog.text
