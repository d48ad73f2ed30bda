"""The Confluent frame: an event is the same in both frames, and bytes that only look like a frame are not taken for an
event."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.errors import NotAnEvent, RegistryNeeded, SchemaError, UnknownSchema
from jobledger.schemas import codec, confluent_frame
from jobledger.schemas import events as ev
from jobledger.schemas.fast_path import glance
from tests.unit.test_codec import EVENTS, an_event, in_future

HEAD = len(codec.MAGIC + codec.FINGERPRINT)
PRINTABLE = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=40)
IDS = st.integers(min_value=0, max_value=2**32 - 1)


def framed(value: bytes, schema_id: int) -> bytes:
    """Put a value that is in the single-object form into the Confluent frame."""
    return confluent_frame.head(schema_id) + value[HEAD:]


def asked(schemas: dict[int, str]) -> codec.Decoder:
    """Return a decoder with a registry of these schemas."""
    return codec.Decoder(None, lambda schema_id, likely: schemas.get(schema_id))


def without_a_registry(schema_id: int, likely: bool) -> str | None:
    """A lookup without a registry."""
    raise RegistryNeeded("no registry")


@given(EVENTS, IDS)
def test_both_framings_carry_the_same_event(event: ev.JobEvent, schema_id: int) -> None:
    """This holds for any schema id. If the id is known, the decoder does not ask the registry, and `own_form` returns
    exactly the bytes of the single-object form."""
    single = codec.encode(event)
    value = framed(single, schema_id)
    decoder = asked({schema_id: codec.SCHEMA_TEXT})
    assert decoder.asks(value)
    assert decoder.own_form(value) is None
    assert decoder.decode(value) == decoder.decode(single) == event
    assert not decoder.asks(value)
    assert not decoder.asks(single)
    assert decoder.own_form(value) == single
    assert decoder.own_form(single) is None


def test_the_fast_path_reads_both_frames() -> None:
    """An event that `glance` reads in one frame is also read in the other."""
    event = ev.JobEvent(
        "0" * 36, "1" * 36, 1, 1, 1, 1_700_000_000_000_000, "send", "mail", None, None, "t", None,
        ev.JobSubmitted(ev.JobSpec(b"{}")),
    )  # fmt: skip
    single = codec.encode(event)
    decoder = asked({5: codec.SCHEMA_TEXT})
    decoder.decode(framed(single, 5))
    own = decoder.own_form(framed(single, 5))
    assert own is not None
    assert glance(single) is not None
    assert glance(own) == glance(single)


def test_a_frame_is_what_a_plain_avro_library_writes() -> None:
    """The frame is a zero byte, the id in big endian, and the datum as fastavro writes it with the published schema."""
    event = an_event()
    datum: Any = fastavro.schemaless_reader(
        io.BytesIO(codec.encode(event)[HEAD:]), fastavro.parse_schema(json.loads(codec.SCHEMA_TEXT)), None, True
    )
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(codec.SCHEMA_TEXT)), datum)
    value = b"\0" + (258).to_bytes(4, "big") + out.getvalue()
    assert value[:5] == b"\0\0\0\1\2"
    assert framed(codec.encode(event), 258) == value
    assert asked({258: codec.SCHEMA_TEXT}).decode(value) == event


def test_an_event_of_a_later_schema_is_read_by_its_id() -> None:
    """The event is read with the writer's schema, as in the single-object form."""
    spec = {"args": b"{}", "tags": {"a": "b"}, "parent": None}
    raw, published = in_future(("jobledger.JobSubmitted", {"spec": spec, "delay_ms": 5, "weight": 3}))
    decoder = asked({7: next(iter(published.values()))})
    value = framed(raw, 7)
    assert decoder.decode(value) == an_event(ev.JobSubmitted(ev.JobSpec(b"{}", {"a": "b"}), 5))
    assert decoder.own_form(value) is None


@pytest.mark.parametrize("union", [True, False])
def test_a_schema_that_knows_one_fact_only_is_read(union: bool) -> None:
    """A writer that only submits jobs may leave out all other facts of the schema, and the union."""
    schema = json.loads(codec.SCHEMA_TEXT)
    submitted = schema["fields"][-1]["type"][0]
    schema["fields"][-1]["type"] = [submitted] if union else submitted
    event = an_event()
    datum = msgspec.structs.asdict(event)
    datum["fact"] = {"spec": {"args": b"{}", "tags": {}, "parent": None}, "delay_ms": 3, "due_at": None}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), datum)
    decoded = asked({8: json.dumps(schema)}).decode(confluent_frame.head(8) + out.getvalue())
    assert decoded == msgspec.structs.replace(event, fact=ev.JobSubmitted(ev.JobSpec(b"{}"), 3))


@pytest.mark.parametrize(
    "schema",
    ['{"type": "record", "name": "Order", "fields": [{"name": "id", "type": "string"}]}', '"string"', '["int"]'],
)
def test_another_teams_record_is_no_event(schema: str) -> None:
    """Other programs use the same registry. Their records are rejected, and do not stop the reader."""
    with pytest.raises(NotAnEvent, match="schema id 7"):
        asked({7: schema}).decode(b"\0\0\0\0\7" + b"\2x")


def test_an_id_that_the_registry_does_not_know_raises_an_error() -> None:
    """The error is `UnknownSchema` with the id. The decoder asks for the id again at the next record."""
    schemas: dict[int, str] = {}
    decoder = asked(schemas)
    value = framed(codec.encode(an_event()), 9)
    with pytest.raises(UnknownSchema, match="id 9"):
        decoder.decode(value)
    schemas[9] = codec.SCHEMA_TEXT
    assert decoder.decode(value) == an_event()


@given(EVENTS, PRINTABLE, st.just("") | PRINTABLE, IDS)
def test_an_event_is_not_rejected_if_no_registry_is_set(
    event: ev.JobEvent, event_id: str, job_id: str, schema_id: int
) -> None:
    """A framed event with an unknown id raises `RegistryNeeded`. This is no `SchemaError`, so a reader does not reject
    the event."""
    decoder = codec.Decoder(None, without_a_registry)
    event = msgspec.structs.replace(event, event_id=event_id, job_id=job_id)
    value = framed(codec.encode(event), schema_id)
    assert confluent_frame.looks_like_an_event(value)
    with pytest.raises(RegistryNeeded):
        decoder.decode(value)
    assert not issubclass(RegistryNeeded, SchemaError)


@given(st.binary(max_size=60))
def test_garbage_after_a_zero_byte_raises_no_unexpected_error(rest: bytes) -> None:
    """Without a registry, any bytes after a zero byte are no event, or begin like an event and need a registry."""
    value = b"\0" + rest
    with pytest.raises((NotAnEvent, RegistryNeeded)) as caught:
        codec.Decoder(None, without_a_registry).decode(value)
    assert (caught.type is RegistryNeeded) == (
        len(value) > confluent_frame.HEAD and confluent_frame.looks_like_an_event(value)
    )


@pytest.mark.parametrize(
    "value",
    [b"\0", b"\0\0\0\0\1", bytes(100), "zwölf".encode("utf-16-be") * 9, (12345).to_bytes(8, "big"), b"\0\0\0\1{}" * 20],
)
def test_everyday_garbage_does_not_look_like_an_event(value: bytes) -> None:
    """Empty heads, zeros, UTF-16 text and a Java long are rejected at once, with or without a registry."""
    assert not (confluent_frame.is_framed(value) and confluent_frame.looks_like_an_event(value))
    with pytest.raises(NotAnEvent):
        codec.Decoder(None, without_a_registry).decode(value)


@given(EVENTS, st.data())
def test_a_truncated_frame_raises_a_schema_error(event: ev.JobEvent, data: st.DataObject) -> None:
    """A frame that is cut at any byte raises no other exception."""
    value = framed(codec.encode(event), 3)
    cut = data.draw(st.integers(0, len(value) - 1))
    with pytest.raises(SchemaError):
        asked({3: codec.SCHEMA_TEXT}).decode(value[:cut])


@pytest.mark.parametrize("schema_id", [-1, 2**32])
def test_an_id_of_more_than_four_bytes_is_refused(schema_id: int) -> None:
    """The frame has four bytes for the id."""
    with pytest.raises(ValueError, match="not a schema id"):
        confluent_frame.head(schema_id)
