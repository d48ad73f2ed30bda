"""Unreadable records of any size become dead letters that fit into a record."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from jobledger import App, Settings
from jobledger.audit.rules import _kept_whole
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.errors import NotAnEvent
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.schemas import codec
from jobledger.schemas.dead_letters import rejection
from jobledger.schemas.events import JobEvent, RecordRejected
from jobledger.streams.coordinator.decoding import RecordDecoder
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


def of_coordinator(key: bytes | None, value: bytes | None, why: str) -> Outgoing:
    class Refusing(codec.Decoder):
        def decode(self, value: bytes | None) -> JobEvent:
            raise NotAnEvent(why)

    record_decoder = RecordDecoder(Names("shop"), Refusing(), "coordinator@h:1", lambda: 0, LIMIT - 100)
    record = SimpleNamespace(topic="shop.lifecycle", partition=2, offset=7, key=key, value=value)
    _, (letter,) = asyncio.run(record_decoder.decode([record]))
    return letter


def of_materializer(key: bytes | None, value: bytes | None, why: str) -> Outgoing:
    app = App("shop", settings=SETTINGS)
    made = Materializer(app.names, SETTINGS, [], "sqlite:///unused.db", registry=CollectorRegistry())
    message: Any = Message(key, value)
    return made._letter(message, NotAnEvent(why))


@pytest.mark.parametrize("write", [of_worker, of_coordinator, of_materializer])
@pytest.mark.parametrize("key", [None, b"", b"k" * 4_096, b"k" * 4_097, b"k" * 900_000])
@pytest.mark.parametrize("value", [None, b"v" * 100, b"v" * 100_000, b"v" * 990_000, b"v" * 999_900])
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
    body = {"raw_value": fact.raw_value, "error": fact.error}
    assert _kept_whole(value, body), "the audit accepts the shortened value"
    if value:
        assert not _kept_whole(value + b"v", body), "the audit accepts no other value"
    if value is None or len(value) <= 900_000:
        assert fact.raw_value == value
    else:
        assert_beginning("value", value, fact.raw_value, fact.error)


def assert_beginning(part: str, whole: bytes, kept: bytes | None, error: str) -> None:
    """Check that a part is kept whole, or that its beginning is kept and the error says so."""
    assert kept is not None
    assert whole.startswith(kept)
    note = f"the first {len(kept)} of its {part}'s {len(whole)} bytes are kept here"
    assert (note in error) == (kept != whole)


@given(
    st.integers(1_000, 5_000),
    st.one_of(st.none(), st.integers(0, 6_000)),
    st.one_of(st.none(), st.integers(0, 6_000)),
    st.text(max_size=20),
    st.integers(0, 200),
)
def test_a_dead_letter_fits_into_any_limit(
    limit: int, key_bytes: int | None, value_bytes: int | None, why: str, times: int
) -> None:
    """Key and value are whole, or the reason says that only their beginning is kept. A reason is shortened last, and
    never the notes."""
    key = None if key_bytes is None else b"k" * key_bytes
    value = None if value_bytes is None else b"v" * value_bytes
    letter = rejection(
        "t" * 100, 2, 7, key, value, why * times, event_id="e" * 36, at_us=1, source="worker@h:1", limit=limit
    )
    assert len(letter) <= limit
    event = codec.decode(letter)
    fact = event.fact
    assert isinstance(fact, RecordRejected)
    assert (event.event_id, event.job_id, event.occurred_at, event.source) == ("e" * 36, "", 1, "worker@h:1")
    for part, whole, kept in (("key", key, fact.raw_key), ("value", value, fact.raw_value)):
        if whole is None:
            assert kept is None
        else:
            assert_beginning(part, whole, kept, fact.error)


def test_a_reason_may_hold_characters_that_utf_8_cannot_encode() -> None:
    """They become question marks."""
    letter = rejection("t", 0, 0, None, b"", "a\ud800b", event_id="e", at_us=1, source="s", limit=1_000)
    assert codec.decode(letter).fact == RecordRejected("t", 0, 0, None, b"", "a?b")
