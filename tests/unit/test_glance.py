"""The fast path reads the same values as the full decoder, and reads no bytes that the full decoder refuses."""

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
        st.none() | st.builds(ev.Redrive, TEXT),
    ),
    st.builds(
        ev.JobStarted,
        *(TEXT, st.none() | TEXT, st.just({}) | st.dictionaries(TEXT, LONG, max_size=3)),
        *(TEXT, LONG | st.integers(0, 10**6), st.integers(0, 70)),
    ),
    st.builds(ev.JobSucceeded, st.none() | st.binary(max_size=80), LONG | st.integers(0, 10**6)),
    st.builds(ev.JobExpiredFact, LONG),
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


def expected_glance(event: ev.JobEvent) -> tuple[object, ...]:
    """Return the values of an event that `glance` returns."""
    fact = event.fact
    match fact:
        case ev.JobSubmitted(spec=spec):
            fact = ev.JobSubmitted(ev.JobSpec(b"", spec.tags, spec.parent), fact.delay_ms, fact.due_at)
        case ev.JobStarted():
            fact = ev.JobStarted(fact.worker, fact.version, {}, "", 0)
    return event.job_id, event.run, event.release, event.attempt, event.task, event.queue, event.key, fact


@given(EVENTS | PLAIN)
def test_the_fast_path_returns_the_values_of_the_decoder_or_none(event: ev.JobEvent) -> None:
    """`glance` may return None for any event, but never other values."""
    read = glance(codec.encode(event))
    assert read is None or read == expected_glance(event)


@given(PLAIN, st.data())
def test_the_fast_path_does_not_read_bytes_that_the_decoder_refuses(event: ev.JobEvent, data: st.DataObject) -> None:
    """For bytes that were cut, lengthened or changed, `glance` returns None or the decoder's values."""
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
    read = glance(bytes(value))
    if read is not None:
        assert read == expected_glance(codec.decode(bytes(value)))


@given(st.binary(max_size=300))
@example(b"")
def test_the_fast_path_returns_none_for_garbage(raw: bytes) -> None:
    """Bytes without the frame of an event raise no error."""
    for value in (raw, codec.MAGIC + codec.FINGERPRINT + b"H" + raw):
        read = glance(value)
        try:
            event = codec.decode(value)
        except SchemaError:
            assert read is None
        else:
            assert read is None or read == expected_glance(event)


def test_the_fast_path_reads_the_facts_of_a_plain_job() -> None:
    """The three facts of a plain job do not need the full decoder."""
    for fact in (
        ev.JobSubmitted(ev.JobSpec(b"x" * 5_000)),
        ev.JobSubmitted(ev.JobSpec(b"x" * 5_000, {"tenant": "a", "plan": "b"}, str(uuid.uuid4()))),
        ev.JobStarted("host:1", None, {}, "shop.jobs.mail", 2**40),
        ev.JobStarted("host:1", "2026.11-\N{LATIN SMALL LETTER E WITH ACUTE}", {}, "shop.jobs.mail", 7),
        ev.JobStarted("host:1", None, {"key": 1_200, "slots": 2**40}, "shop.jobs.mail", 7),
        ev.JobSucceeded(b'{"a":1}', 2**33),
    ):
        one, two = str(uuid.uuid4()), str(uuid.uuid4())
        for key, trace in ((None, None), ("account", None), (None, "00-" + "a" * 52), ("account", "00-" + "a" * 52)):
            event = ev.JobEvent(
                one, two, 1, 1, 1, 1_700_000_000_000_000, "send", "mail", key, None, "worker@h:1", trace, fact
            )
            assert glance(codec.encode(event)) == expected_glance(event)


def test_the_types_of_facts_are_in_the_order_of_the_schema() -> None:
    """The fast path reads the type of a fact by its number in the schema's union."""
    union = json.loads(codec.SCHEMA_TEXT)["fields"][-1]["type"]
    assert [record["name"] for record in union] == [ev.fact_name(kind) for kind in ev.Fact.__args__]
