"""The codec: an event is read as it was written, events of other versions are read, and unreadable values are
refused."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import errors
from jobledger.errors import NotAnEvent, SchemaError, UnknownFact, UnknownSchema
from jobledger.schemas import codec, confluent_frame
from jobledger.schemas import events as ev

LONG = st.integers(min_value=-(2**63), max_value=2**63 - 1)
INT = st.integers(min_value=-(2**31), max_value=2**31 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TAGS = st.dictionaries(TEXT, TEXT, max_size=3)
LINKS = st.builds(ev.JobLinks, st.none() | TEXT, st.none() | TEXT, st.none() | TEXT)
SPECS = st.builds(
    ev.JobSpec,
    *(st.binary(max_size=80), TAGS, st.none() | TEXT),
    *(st.none() | LONG, st.none() | LONG, st.none() | TEXT, st.none() | LINKS),
)
ERRORS = st.builds(ev.ErrorInfo, TEXT, TEXT, st.none() | TEXT)
FACTS: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        ev.JobSubmitted,
        *(SPECS, st.none() | LONG, st.none() | LONG),
        st.none() | st.builds(ev.Redrive, TEXT, st.none() | TEXT, st.none() | TEXT),
    ),
    st.builds(ev.JobDue, SPECS, LONG),
    st.builds(ev.JobStarted, TEXT, st.none() | TEXT, st.dictionaries(TEXT, LONG, max_size=2), TEXT, LONG, INT),
    st.builds(ev.JobProgressed, LONG, LONG, st.none() | LONG, st.none() | TEXT),
    st.builds(ev.JobRetried, ERRORS, LONG, LONG),
    st.builds(ev.JobSnoozed, LONG, st.none() | TEXT, LONG),
    st.builds(ev.JobSucceeded, st.none() | st.binary(max_size=80), LONG),
    st.builds(ev.JobFailedFact, TEXT, ERRORS, LONG),
    st.builds(ev.JobCancelledFact, TEXT, st.none() | TEXT),
    st.builds(ev.JobExpiredFact, LONG),
    st.builds(ev.ReleaseRequested, SPECS, st.none() | LONG, st.none() | LONG),
    st.builds(ev.ReleaseDecided, LONG),
    st.builds(ev.ReleaseOverdue, SPECS, LONG),
    st.builds(ev.DeadLettered, SPECS, TEXT, ERRORS),
    st.builds(ev.RecordRejected, TEXT, INT, LONG, st.none() | st.binary(), st.none() | st.binary(), TEXT),
    st.builds(
        ev.PlanOpened, TEXT, TEXT, st.none() | TEXT, st.none() | st.floats(allow_nan=False), TEXT, st.none() | TEXT
    ),
    st.builds(ev.PlanListed, INT, st.lists(st.builds(ev.PlannedJob, TEXT, INT), max_size=3)),
    st.builds(ev.PlanSealed, INT, LONG),
    st.builds(ev.PlanAdvanced, INT, INT, INT, INT, st.none() | TEXT),
    st.builds(ev.PlanSteered, TEXT, TEXT, st.none() | TEXT),
    st.builds(
        ev.WorkerReported,
        *(TEXT, LONG, st.none() | TEXT, TEXT, LONG),
        *(st.lists(TEXT, max_size=3), INT, st.lists(TEXT, max_size=3), INT, INT, INT),
        *(st.lists(st.builds(ev.RunningJob, TEXT, LONG), max_size=3), st.none() | LONG, INT),
    ),
)
OPTIONAL = st.none() | TEXT
EVENTS = st.builds(ev.JobEvent, TEXT, TEXT, INT, INT, INT, LONG, TEXT, TEXT, OPTIONAL, OPTIONAL, TEXT, OPTIONAL, FACTS)


def an_event(fact: ev.Fact | None = None) -> ev.JobEvent:
    """Return a plain event."""
    fact = fact or ev.JobSubmitted(ev.JobSpec(b'{"to":"a"}'))
    return ev.JobEvent("e", "j", 1, 1, 1, 7, "send", "mail", None, None, "client@here:1", None, fact)


@given(EVENTS)
def test_an_encoded_event_decodes_to_the_same_event(event: ev.JobEvent) -> None:
    """This holds for every type of fact."""
    assert codec.decode(codec.encode(event)) == event


@given(EVENTS)
def test_the_codec_writes_the_same_bytes_as_fastavro(event: ev.JobEvent) -> None:
    """fastavro writes these bytes with the published schema, so any Avro reader can read them."""
    published = fastavro.parse_schema(json.loads(codec.SCHEMA_TEXT))
    raw = codec.encode(event)
    datum: Any = fastavro.schemaless_reader(
        io.BytesIO(raw[10:]), fastavro.parse_schema(codec._plain(json.loads(codec.SCHEMA_TEXT))), None, True
    )
    out = io.BytesIO()
    fastavro.schemaless_writer(out, published, datum)
    assert raw[10:] == out.getvalue()
    assert raw[:10] == b"\xc3\x01" + codec.fingerprint(codec.SCHEMA_TEXT)


def test_types_and_schema_agree() -> None:
    """Each record of the schema has a type with the same fields in the same order, and each type has a record."""
    schema = json.loads(codec.SCHEMA_TEXT)
    assert [f["name"] for f in schema["fields"]] == list(ev.JobEvent.__struct_fields__)
    facts = schema["fields"][-1]["type"]
    kinds: dict[str, Any] = {ev.fact_name(kind): kind for kind in ev.Fact.__args__}
    assert [r["name"] for r in facts] == list(kinds)
    for record in codec._records(schema)[1:]:
        kind = kinds.get(record["name"]) or getattr(ev, record["name"])
        assert [f["name"] for f in record["fields"]] == list(kind.__struct_fields__)
        assert all(f.get("doc") for f in record["fields"]), f"{record['name']}: a field is not explained"


def test_no_fact_has_the_name_of_an_exception() -> None:
    """A program can import the facts and the exceptions by their own names. The names of facts in the log stay."""
    names = {kind.__name__: ev.fact_name(kind) for kind in ev.Fact.__args__}
    assert not names.keys() & vars(errors).keys()
    assert {name: short for name, short in names.items() if name != short} == {
        "JobFailedFact": "JobFailed",
        "JobCancelledFact": "JobCancelled",
        "JobExpiredFact": "JobExpired",
    }
    assert ev.fact_name(ev.JobExpiredFact(1)) == "JobExpired"


def test_every_released_schema_can_be_read() -> None:
    """The current types read events of every released schema (BACKWARD_TRANSITIVE)."""
    from importlib.resources import files

    released = sorted(
        p.name for p in files("jobledger.schemas").joinpath("released").iterdir() if p.name.endswith("avsc")
    )
    assert released
    for name in released:
        text = files("jobledger.schemas").joinpath("released", name).read_text()
        schema = fastavro.parse_schema(codec._plain(json.loads(text)))
        out = io.BytesIO()
        event = an_event()
        datum = {f: getattr(event, f) for f in event.__struct_fields__}
        datum["fact"] = ("jobledger.JobSubmitted", {"spec": {"args": b"{}", "tags": {}, "parent": None}})
        fastavro.schemaless_writer(out, schema, datum)
        framed = codec.MAGIC + codec.fingerprint(text) + out.getvalue()
        assert codec.Decoder({codec.fingerprint(text): text}.get).decode(framed).job_id == "j"


@given(st.binary(max_size=200))
def test_bytes_that_are_no_event_raise_a_schema_error(raw: bytes) -> None:
    """Such bytes raise `SchemaError`, and no other exception."""
    with pytest.raises(SchemaError):
        codec.decode(raw)


@given(EVENTS, st.data())
def test_a_truncated_event_raises_a_schema_error(event: ev.JobEvent, data: st.DataObject) -> None:
    """An event that is cut at any byte raises no other exception."""
    raw = codec.encode(event)
    cut = data.draw(st.integers(min_value=0, max_value=len(raw) - 1))
    with pytest.raises(SchemaError):
        codec.decode(raw[:cut])


def test_a_missing_value_and_an_unknown_schema_raise_different_errors() -> None:
    """A missing value raises `NotAnEvent`. An unpublished fingerprint raises `UnknownSchema` with the fingerprint."""
    with pytest.raises(NotAnEvent, match="no value"):
        codec.decode(None)
    with pytest.raises(UnknownSchema, match="0102030405060708"):
        codec.decode(b"\xc3\x01" + bytes(range(1, 9)) + b"rest")


def future_schema() -> dict[str, Any]:
    """Return the schema of a later version: with a new header field, a new field in a fact, and a new fact."""
    schema: dict[str, Any] = json.loads(codec.SCHEMA_TEXT)
    schema["fields"].insert(3, {"name": "region", "type": "string"})
    facts = schema["fields"][-1]["type"]
    facts[0]["fields"].append({"name": "weight", "type": ["null", "int"], "default": None})
    facts.append({"type": "record", "name": "JobTeleported", "fields": [{"name": "to", "type": "string"}]})
    return schema


def in_future(fact: tuple[str, dict[str, Any]]) -> tuple[bytes, dict[bytes, str]]:
    """Return an event of the later version with its frame, and the published schemas."""
    schema = future_schema()
    text = json.dumps(schema)
    event = an_event()
    datum = {f: getattr(event, f) for f in event.__struct_fields__} | {"region": "north", "fact": fact}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(json.dumps(codec._plain(schema)))), datum)
    mark = codec.fingerprint(text)
    return codec.MAGIC + mark + out.getvalue(), {mark: text}


def test_an_event_of_a_later_schema_is_read() -> None:
    """Fields this version does not know are dropped, the rest is kept."""
    spec = {"args": b"{}", "tags": {"a": "b"}, "parent": None}
    raw, published = in_future(("jobledger.JobSubmitted", {"spec": spec, "delay_ms": 5, "weight": 3}))
    event = codec.Decoder(published.get).decode(raw)
    assert event == an_event(ev.JobSubmitted(ev.JobSpec(b"{}", {"a": "b"}), 5))


def test_an_unknown_fact_raises_an_error_with_its_name() -> None:
    """A fact of a later version raises `UnknownFact`."""
    raw, published = in_future(("jobledger.JobTeleported", {"to": "Mars"}))
    with pytest.raises(UnknownFact, match="JobTeleported") as caught:
        codec.Decoder(published.get).decode(raw)
    assert caught.value.fact == "JobTeleported"


def domain_event(schema: dict[str, Any], datum: dict[str, Any]) -> tuple[bytes, dict[bytes, str]]:
    """Return a datum of another schema with its frame, and the published schemas."""
    text = json.dumps(schema)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(text)), datum)
    mark = codec.fingerprint(text)
    return codec.MAGIC + mark + out.getvalue(), {mark: text}


def record(name: str, *fields: tuple[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"name": n, "type": t} for n, t in fields]}


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize(
    ("schema", "datum"),
    [
        (record("OrderPlaced", ("order", "string")), {"order": "x"}),
        (record("OrderPlaced", ("job_id", "string")), {"job_id": "x"}),
        (record("Note", ("job_id", "string"), ("fact", "string")), {"job_id": "x", "fact": "y"}),
        (record("Note", ("job_id", "string"), ("fact", ["null", "string"])), {"job_id": "x", "fact": None}),
    ],
)
def test_a_domain_event_is_no_fact_of_a_later_version(
    schema: dict[str, Any], datum: dict[str, Any], framed: bool
) -> None:
    """The schema of a domain event is published, too. The error is `NotAnEvent` in either frame, and does not ask for
    an upgrade."""
    raw, published = domain_event(schema, datum)
    decoder = codec.Decoder(published.get, lambda number, likely: json.dumps(schema))
    if framed:
        raw = confluent_frame.head(7) + raw[10:]
    for _ in range(2):
        with pytest.raises(NotAnEvent):
            decoder.decode(raw)


@pytest.mark.parametrize("field", ["job_id", "release", "key"])
def test_a_field_with_a_type_of_no_version_raises_a_schema_error(field: str) -> None:
    """Otherwise the code that uses the event would fail at the wrong type."""
    schema = future_schema()
    next(f for f in schema["fields"] if f["name"] == field)["type"] = ["null", "double"]
    event = an_event()
    fact = ("jobledger.JobSucceeded", {"result": None, "duration_us": 1})
    datum = {f: getattr(event, f) for f in event.__struct_fields__} | {"region": "n", "fact": fact, field: 1.5}
    raw, published = domain_event(codec._plain(schema), datum)
    with pytest.raises(SchemaError, match=field):
        codec.Decoder(published.get).decode(raw)


def test_a_schema_published_later_is_found() -> None:
    """The decoder asks again for a fingerprint that was unknown, because the schema may have been published since
    then."""
    raw, published = in_future(("jobledger.JobSubmitted", {"spec": {"args": b"{}", "tags": {}, "parent": None}}))
    shelf: dict[bytes, str] = {}
    decoder = codec.Decoder(shelf.get)
    with pytest.raises(UnknownSchema):
        decoder.decode(raw)
    shelf.update(published)
    assert decoder.decode(raw).task == "send"


def test_the_error_of_a_wrong_value_names_fact_and_job() -> None:
    """An event whose field does not fit the schema is refused before anything is sent."""
    wrong: Any = "not bytes"
    with pytest.raises(SchemaError, match="JobSubmitted of job j"):
        codec.encode(an_event(ev.JobSubmitted(ev.JobSpec(wrong))))
    with pytest.raises(SchemaError, match="JobProgressed of job j"):
        codec.encode(an_event(ev.JobProgressed(1, 2**70)))


@given(TEXT.filter(lambda t: "[" not in t), st.integers(0, 2**31), st.integers(0, 2**62))
def test_a_position_can_be_written_as_text_and_read_back(topic: str, partition: int, offset: int) -> None:
    """The position that is read is the one that was written."""
    position = ev.Position(topic, partition, offset)
    assert ev.Position.parse(str(position)) == position


def test_text_that_is_no_position_is_refused() -> None:
    """The error has the text."""
    with pytest.raises(ValueError, match="'nonsense' is not a position"):
        ev.Position.parse("nonsense")
