"""Unreadable records of any size become dead letters that fit into a record."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from jobledger import App, Settings
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.errors import NotAnEvent
from jobledger.log.writer import Outgoing
from jobledger.schemas import codec
from jobledger.schemas.events import RecordRejected
from jobledger.streams.status.materializer import Materializer

LIMIT = 1_000_000
SETTINGS = Settings(bootstrap="h:1")


class Message:
    """A consumed record, with the methods that a dead letter needs."""

    def __init__(self, key: bytes | None, value: bytes | None) -> None:
        self._key, self._value = key, value

    def topic(self) -> str:
        return "shop.lifecycle"

    def partition(self) -> int:
        return 2

    def offset(self) -> int:
        return 7

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value


def of_worker(key: bytes | None, value: bytes | None, why: str) -> Outgoing:
    facts = WorkerEvents(App("shop", settings=SETTINGS).registry, "worker@h:1", LIMIT)
    return facts.rejected("shop.lifecycle", 2, 7, key, value, why)


def of_materializer(key: bytes | None, value: bytes | None, why: str) -> Outgoing:
    app = App("shop", settings=SETTINGS)
    made = Materializer(app.names, SETTINGS, [], "sqlite:///unused.db", registry=CollectorRegistry())
    message: Any = Message(key, value)
    return made._letter(message, NotAnEvent(why))


@pytest.mark.parametrize("write", [of_worker, of_materializer])
@pytest.mark.parametrize("key", [None, b"", b"k" * 4_096, b"k" * 4_097, b"k" * 900_000])
@pytest.mark.parametrize("value", [None, b"v" * 100, b"v" * 100_000, b"v" * 990_000])
@pytest.mark.parametrize("why", ["no event", "x" * 10_000])
def test_a_dead_letter_of_a_record_of_any_size_fits_into_a_record(
    write: Any, key: bytes | None, value: bytes | None, why: str
) -> None:
    """The dead letter has the beginning of the key, and the value if there is room. Its error says if the key is
    cut."""
    letter = write(key, value, why)
    assert letter.topic == "shop.dead-letter"
    assert len(letter.value) + len(letter.key) <= LIMIT
    fact = codec.decode(letter.value).fact
    assert isinstance(fact, RecordRejected)
    assert (fact.topic, fact.partition, fact.offset) == ("shop.lifecycle", 2, 7)
    assert fact.raw_key == (None if key is None else key[:4_096])
    assert (f"the first 4096 of its key's {len(key or b'')} bytes" in fact.error) == (len(key or b"") > 4_096)
    if value is not None and len(value) <= 100_000:
        assert fact.raw_value == value
