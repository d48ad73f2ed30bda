"""The quick look reads what the full decoder reads, and never answers for what that one refuses."""

from __future__ import annotations

import json
import uuid

from hypothesis import example, given
from hypothesis import strategies as st

from jobledger.errors import SchemaError
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.fast_path import glance

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
LONG = st.integers(-(2**63), 2**63 - 1)
FACTS: st.SearchStrategy[ev.Fact] = st.one_of(
    st.builds(
        ev.JobSubmitted,
        st.builds(
            ev.JobSpec, st.binary(max_size=300), st.just({}) | st.dictionaries(TEXT, TEXT, max_size=1), st.none() | TEXT
        ),
        st.none() | LONG,
        st.none() | LONG,
    ),
    st.builds(ev.JobStarted, TEXT, TEXT, LONG | st.integers(0, 10**6), st.integers(0, 70)),
    st.builds(ev.JobSucceeded, st.none() | st.binary(max_size=80), LONG | st.integers(0, 10**6)),
    st.builds(ev.JobExpired, LONG),
)
IDS = st.uuids().map(str) | TEXT
NUMBERS = st.integers(-2, 70)
TIMES = st.integers(1_600_000_000_000_000, 2_600_000_000_000_000) | LONG
NONE_OR_TEXT = st.none() | st.none() | TEXT
EVENTS = st.builds(
    ev.JobEvent, IDS, IDS, NUMBERS, NUMBERS, NUMBERS, TIMES, TEXT, TEXT, NONE_OR_TEXT, NONE_OR_TEXT, TEXT, NONE_OR_TEXT, FACTS
)  # fmt: skip
PLAIN = st.builds(
    ev.JobEvent,
    st.uuids().map(str),
    st.uuids().map(str),
    *[st.integers(0, 63)] * 3,
    st.just(1_700_000_000_000_000),
    st.text(max_size=20),
    st.text(max_size=20),
    *[NONE_OR_TEXT] * 2,
    st.text(max_size=20),
    NONE_OR_TEXT,
    FACTS,
)


def seen(event: ev.JobEvent) -> tuple[object, ...]:
    """An event as a glance shows it."""
    fact = event.fact
    match fact:
        case ev.JobSubmitted(spec=spec):
            fact = ev.JobSubmitted(ev.JobSpec(b"", spec.tags, spec.parent), fact.delay_ms, fact.due_at)
        case ev.JobStarted():
            fact = ev.JobStarted("", "", 0)
    return event.job_id, event.run, event.release, event.attempt, event.task, event.queue, fact


@given(EVENTS | PLAIN)
def test_a_glance_sees_what_the_decoder_sees(event: ev.JobEvent) -> None:
    """A glance answers with the very values the decoder gives, or not at all."""
    found = glance(codec.encode(event))
    assert found is None or found == seen(event)


@given(PLAIN, st.data())
def test_a_glance_refuses_what_the_decoder_refuses(event: ev.JobEvent, data: st.DataObject) -> None:
    """Bytes that were cut, lengthened or changed get no answer, or the one the full decoder gives."""
    value = bytearray(codec.encode(event))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(value) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "drop"])):
            case "set":
                value[where] = data.draw(st.integers(0, 255))
            case "cut":
                del value[max(1, where) :]
            case "insert":
                value[where:where] = data.draw(st.binary(max_size=4))
            case "drop" if len(value) > 1:
                del value[where]
    found = glance(bytes(value))
    if found is not None:
        assert found == seen(codec.decode(bytes(value)))


@given(st.binary(max_size=300))
@example(b"")
def test_a_glance_at_garbage_is_none(raw: bytes) -> None:
    """Bytes without our framing get no answer, and raise nothing."""
    for value in (raw, codec.MAGIC + codec.FINGERPRINT + b"H" + raw):
        found = glance(value)
        try:
            event = codec.decode(value)
        except SchemaError:
            assert found is None
        else:
            assert found is None or found == seen(event)


def test_the_plain_life_is_answered() -> None:
    """The three facts of a plain job's life need no full decoding."""
    for fact in (
        ev.JobSubmitted(ev.JobSpec(b"x" * 5_000)),
        ev.JobSubmitted(ev.JobSpec(b"x" * 5_000, {"tenant": "a", "plan": "b"}, str(uuid.uuid4()))),
        ev.JobStarted("host:1", "shop.jobs.mail", 2**40),
        ev.JobSucceeded(b'{"a":1}', 2**33),
    ):
        one, two = str(uuid.uuid4()), str(uuid.uuid4())
        for key, trace in ((None, None), ("account", None), (None, "00-" + "a" * 52), ("account", "00-" + "a" * 52)):
            event = ev.JobEvent(
                one, two, 1, 1, 1, 1_700_000_000_000_000, "send", "mail", key, None, "worker@h:1", trace, fact
            )
            assert glance(codec.encode(event)) == seen(event)


def test_facts_stand_in_the_schemas_order() -> None:
    """The branch that is read by its number is the one the schema means."""
    union = json.loads(codec.SCHEMA_TEXT)["fields"][-1]["type"]
    assert [record["name"] for record in union] == [kind.__name__ for kind in ev.Fact.__args__]
