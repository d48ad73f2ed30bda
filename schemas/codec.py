"""Encodes events as bytes, and decodes them. Functions of this module write the most frequent facts; fastavro writes
the other facts and reads all facts. Framing, types and schema lookup are Jobledger's own code.

Without a registry the framing is Avro single-object encoding: ``C3 01``, the CRC-64-AVRO fingerprint of the writer's
schema in little endian, the datum (Avro specification, "Single-object encoding"). `encode` writes this form. With a
Schema Registry the senders replace this head with the Confluent frame (`jobledger.log.framing`). Readers always accept
both forms.

Events are read with the writer's schema. Fields that this version does not know are dropped, fields that the writer did
not know get their defaults, and a fact that this version does not know raises `UnknownFact` with the fact's name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, get_type_hints

import fastavro
import fastavro.schema
import msgspec
from fastavro import schemaless_reader as _read
from fastavro import schemaless_writer as _write

from jobledger.errors import NotAnEvent, RegistryNeeded, SchemaError, UnknownFact, UnknownSchema
from jobledger.schemas import confluent_frame
from jobledger.schemas import events as ev

MAGIC = b"\xc3\x01"
_HEAD = 10  # magic and fingerprint

#: The text of this version's schema, as it is published to other processes.
SCHEMA_TEXT: str = files("jobledger.schemas").joinpath("job_event.avsc").read_text(encoding="utf-8")

_FACTS: dict[str, type[Any]] = {"jobledger." + ev.fact_name(cls): cls for cls in ev.Fact.__args__}
_HAS_SPEC = frozenset(c for c in _FACTS.values() if "spec" in c.__struct_fields__)
_HAS_ERROR_INFO = frozenset({ev.JobRetried, ev.JobFailedFact, ev.DeadLettered})
#: Facts with lists of records. They are rare, so msgspec converts them.
_HAS_LISTS = frozenset({ev.PlanListed, ev.WorkerReported})

_asdict = msgspec.structs.asdict
#: The end of a plain `JobSubmitted`'s body: no tags, parent, expiry (two fields), priority, links, delay, due time,
#: redrive.
PLAIN_END = b"\0" * 9
_JobEvent, _JobSpec, _ErrorInfo = ev.JobEvent, ev.JobSpec, ev.ErrorInfo


def fingerprint(schema_text: str) -> bytes:
    """Return the 8-byte little-endian CRC-64-AVRO fingerprint of a schema's parsing canonical form.

    Raises `SchemaError` if the text is not an Avro schema.
    """
    try:
        canonical = fastavro.schema.to_parsing_canonical_form(json.loads(schema_text))
        return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    except Exception as exc:
        raise SchemaError(f"not an Avro schema: {exc}") from exc


def _plain(node: Any) -> Any:
    """Return the schema without logical types and docs. The bytes are the same, but fastavro then returns integers and
    not datetimes."""
    if isinstance(node, list):
        return [_plain(n) for n in node]
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items() if k not in ("logicalType", "doc")}
    return node


def _parse(schema_text: str) -> Any:
    try:
        return fastavro.parse_schema(_plain(json.loads(schema_text)))
    except Exception as exc:
        raise SchemaError(f"not an Avro schema: {exc}") from exc


def _records(node: Any) -> list[Any]:
    """Return every record defined in a schema, outermost first."""
    if isinstance(node, list):
        return [r for n in node for r in _records(n)]
    if isinstance(node, dict) and node.get("type") == "record":
        return [node, *(r for f in node["fields"] for r in _records(f["type"]))]
    return []


def _inlined(record: Any, named: Mapping[str, Any]) -> Any:
    """Return ``record`` with references by name replaced by their definitions, so that it can be used alone."""
    fields = [
        {**f, "type": named.get(f["type"], f["type"]) if isinstance(f["type"], str) else f["type"]}
        for f in record["fields"]
    ]
    return {**record, "fields": fields}


_SCHEMA = _parse(SCHEMA_TEXT)
FINGERPRINT = fingerprint(SCHEMA_TEXT)
_PREFIX = MAGIC + FINGERPRINT


def _pieces() -> tuple[Any, dict[type[Any], int], dict[type[Any], Any]]:
    """Split the schema into parts whose bytes follow one another: Avro encodes a record as its fields in their order,
    and a union as the branch index and then the datum. So numbers, names, branch and fact can be encoded separately,
    and parts that are the same for many events are encoded once. Return the schema of the numbers, and for each fact
    its branch and the schema of its body."""
    root = json.loads(SCHEMA_TEXT)
    fields = {f["name"]: f for f in root["fields"]}
    facts = fields["fact"]["type"]
    defined = {r["name"]: r for r in _records(facts)}
    numbers = _record("numbers", [fields[n] for n in ("run", "attempt", "release")])
    branches, bodies = {}, {}
    for branch, fact in enumerate(facts):
        kind = _FACTS["jobledger." + fact["name"]]
        branches[kind] = branch
        bodies[kind] = _parse(json.dumps(_inlined(fact, defined)))
    return numbers, branches, bodies


def _record(name: str, fields: list[Any]) -> Any:
    return _parse(json.dumps({"type": "record", "name": name, "fields": fields}))


_NUMBERS, _BRANCHES, _BODIES = _pieces()
_UUID_CHARS = 36
_UUID_LENGTH = b"H"  # 36 as an Avro long
_LEAD = _PREFIX + _UUID_LENGTH
#: Encoded parts between the ids and the fact, without the time and the parts that differ between jobs: (numbers; task
#: and queue; source; the union's branch), with the names in one part for events without key, home and trace. Bounded;
#: emptied when full.
_heads: dict[tuple[Any, ...], tuple[bytes, bytes, bytes, bytes, bytes]] = {}
_HEADS_MOST = 4096
#: Encoded worker, version, no waits, and work topic, with which the body of most start facts begins. Bounded as well.
_begins: dict[tuple[str, str | None, str], bytes] = {}
#: The last high part of an encoded time: it changes once a second.
_time_high: tuple[int, bytes] = (-1, b"")


def _avro(schema: Any, datum: Any) -> bytes:
    out = io.BytesIO()
    _write(out, schema, datum)
    return out.getvalue()


def _encode_head(event: ev.JobEvent, kind: type[Any]) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    numbers = {"run": event.run, "attempt": event.attempt, "release": event.release}
    named, source, branch = _text(event.task) + _text(event.queue), _text(event.source), _long(_BRANCHES[kind])
    names = b"".join((named, b"\0\0", source, b"\0", branch))  # no key, home and trace
    return _avro(_NUMBERS, numbers), named, source, branch, names


def _option(text: str | None) -> bytes:
    """Encode a nullable text."""
    if text is None:
        return b"\0"
    raw = text.encode()
    return b"\2" + _long(len(raw)) + raw


def _text(text: str) -> bytes:
    raw = text.encode()
    return _long(len(raw)) + raw


def _encode_time(micros: int) -> bytes:
    """Encode a time (µs) as an Avro long: zigzag, then groups of seven bits, the low ones first."""
    global _time_high
    zigzag = micros << 1
    high = zigzag >> 21
    if not 1 << 28 <= high < 1 << 35:  # not eight groups of bits: before December 1978 or after the year 3110
        return _avro("long", micros)
    known = _time_high
    if known[0] != high:
        groups = [(high >> shift & 127) | 128 for shift in (0, 7, 14, 21)]
        known = _time_high = (high, bytes([*groups, high >> 28]))
    return bytes((zigzag & 127 | 128, zigzag >> 7 & 127 | 128, zigzag >> 14 & 127 | 128)) + known[1]


def _long(value: int) -> bytes:
    """Encode an Avro long: zigzag, then groups of seven bits, the low ones first. Raises `ValueError` for a number that
    does not fit into 64 bits."""
    zigzag = value << 1 ^ value >> 63
    if zigzag < 1 << 7 and value >= -64:
        return bytes((zigzag,))
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{value} does not fit into 64 bits")
    groups = []
    while zigzag > 127:
        groups.append(zigzag & 127 | 128)
        zigzag >>= 7
    groups.append(zigzag)
    return bytes(groups)


def _submitted(fact: ev.JobSubmitted) -> bytes | None:
    spec = fact.spec
    if fact.delay_ms is not None or fact.due_at is not None or fact.redrive is not None:
        return None
    if spec.expires_in_ms is not None or spec.expires_at is not None or spec.priority is not None:
        return None
    if spec.links is not None:
        return None
    args, tags = spec.args, spec.tags
    if not tags and spec.parent is None:
        return _long(len(args)) + args + PLAIN_END
    block = b"\0"
    if tags:
        block = b"".join((_long(len(tags)), *[_text(name) + _text(value) for name, value in tags.items()], b"\0"))
    return b"".join((_long(len(args)), args, block, _option(spec.parent), PLAIN_END[2:]))


def _started(fact: ev.JobStarted) -> bytes:
    ends = _long(fact.work_offset) + (_long(fact.takeover) if fact.takeover else b"\0")
    if fact.waits:
        waits = b"".join(
            (_long(len(fact.waits)), *[_text(cause) + _long(ms) for cause, ms in fact.waits.items()], b"\0")
        )
        return b"".join((_text(fact.worker), _option(fact.version), waits, _text(fact.work_topic), ends))
    mark = (fact.worker, fact.version, fact.work_topic)
    begins = _begins.get(mark)
    if begins is None:
        if len(_begins) >= _HEADS_MOST:
            _begins.clear()
        no_waits = b"\0"
        begins = _text(fact.worker) + _option(fact.version) + no_waits + _text(fact.work_topic)
        _begins[mark] = begins
    return begins + ends


def _succeeded(fact: ev.JobSucceeded) -> bytes:
    if fact.result is None:
        return b"\0" + _long(fact.duration_us)
    return b"\2" + _long(len(fact.result)) + fact.result + _long(fact.duration_us)


#: Functions that encode the bodies of a plain job's three facts, which are nearly all facts written. They return None
#: for a body that they cannot encode. A test with Hypothesis compares their bytes with those of fastavro
#: (docs/adr/0001-encoding-by-pieces.md has the figures).
_BY_HAND: dict[type[Any], Callable[[Any], bytes | None]] = {
    ev.JobSubmitted: _submitted,
    ev.JobStarted: _started,
    ev.JobSucceeded: _succeeded,
}


def _body(fact: Any, kind: type[Any]) -> bytes:
    by_hand = _BY_HAND.get(kind)
    if by_hand is not None and (written := by_hand(fact)) is not None:
        return written
    return _avro(_BODIES[kind], msgspec.to_builtins(fact, builtin_types=(bytes,)))


def encode(event: ev.JobEvent) -> bytes:
    """Encode one event as single-object Avro. Raises `SchemaError` if a field's value does not fit the schema.

    The header's constant parts are encoded once and cached, so an event costs little more than its fact.
    """
    fact = event.fact
    kind = fact.__class__
    try:
        mark = (kind, event.release, event.attempt, event.task, event.queue, event.source, event.run)
        head = _heads.get(mark)
        if head is None:
            if len(_heads) >= _HEADS_MOST:
                _heads.clear()
            head = _heads[mark] = _encode_head(event, kind)
        names = head[4]
        if event.key is not None or event.home is not None or event.trace is not None:
            _, named, source, branch, _ = head
            names = b"".join((named, _option(event.key), _option(event.home), source, _option(event.trace), branch))
        event_id, job_id = event.event_id.encode(), event.job_id.encode()
        if len(event_id) == _UUID_CHARS and len(job_id) == _UUID_CHARS:
            lead = _LEAD + event_id + _UUID_LENGTH + job_id
        else:
            lead = _PREFIX + _avro("string", event.event_id) + _avro("string", event.job_id)
        return b"".join((lead, head[0], _encode_time(event.occurred_at), names, _body(fact, kind)))
    except Exception as exc:
        raise SchemaError(f"{ev.fact_name(kind)} of job {event.job_id} does not fit the schema: {exc}") from exc


def build(datum: dict[str, Any]) -> ev.JobEvent:
    """Return an event from Avro's decoded data, with the fact as (name, fields). Raises `UnknownFact`."""
    name, body = datum["fact"]
    kind = _FACTS.get(name)
    if kind is None:
        raise UnknownFact(name.rpartition(".")[2])
    if kind in _HAS_SPEC:
        # fastavro returns a record of a union as a pair of its name and its fields.
        spec = body["spec"]
        if spec["links"] is not None:
            spec["links"] = ev.JobLinks(**spec["links"][1])
        body["spec"] = _JobSpec(**spec)
        if kind is ev.JobSubmitted and body["redrive"] is not None:
            body["redrive"] = ev.Redrive(**body["redrive"][1])
    elif kind in _HAS_LISTS:
        datum["fact"] = _lenient(body, kind)
        return _JobEvent(**datum)
    if kind in _HAS_ERROR_INFO:
        body["error"] = _ErrorInfo(**body["error"])
    datum["fact"] = kind(**body)
    return _JobEvent(**datum)


#: The fields of an event except its fact, with the required types. Another writer's schema may have other types.
_Header = msgspec.defstruct(
    "JobEvent", [(n, t) for n, t in get_type_hints(_JobEvent).items() if n != "fact"], frozen=True, gc=False
)


def _lenient(datum: Mapping[str, Any], cls: type[Any]) -> Any:
    """Return an instance of ``cls`` from a datum of another schema version, without unknown fields and with defaults
    for missing ones. Raises `SchemaError` if a value does not fit."""
    try:
        return msgspec.convert(datum, cls, builtin_types=(bytes,))
    except msgspec.ValidationError as exc:
        raise SchemaError(f"{ev.fact_name(cls)} of another schema does not fit this version's: {exc}") from exc


def _build_foreign(datum: dict[str, Any], schema: Any) -> ev.JobEvent:
    fact = datum["fact"]
    # If the schema has only one fact, fastavro does not return its name.
    name, body = fact if isinstance(fact, tuple) else (_only_fact(schema), fact)
    if not isinstance(body, dict):
        raise NotAnEvent(f"framed as an event, but its fact is not a record: {type(body).__name__}")
    short = name.rpartition(".")[2]
    kind = _FACTS.get("jobledger." + short)
    if kind is None:
        raise UnknownFact(short)
    return _JobEvent(**_asdict(_lenient(datum, _Header)), fact=_lenient(_without_names(body), kind))


def _without_names(value: Any) -> Any:
    """Return Avro's decoded data with the fields of each record of a union, without its name."""
    if isinstance(value, dict):
        return {name: _without_names(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_names(each) for each in value]
    return _without_names(value[1]) if isinstance(value, tuple) else value


class Decoder:
    """Reads events of any published writer's schema, in either framing.

    ``lookup(fingerprint) -> schema text | None`` is called for a fingerprint that is not known yet, and reads the
    schemas topic to its end. Without ``lookup`` only this version's own schema is known. A fingerprint that was not
    found is looked up again at the next record with this fingerprint, because its schema may have been published
    meanwhile.

    ``by_id(id, likely) -> schema text | None`` is the same for the ids in Confluent frames. ``likely``: the datum looks
    like an event, so an answer of None must be certain. ``by_id`` raises `RegistryNeeded` if only a registry can know
    the id and none is configured. Without ``by_id`` a value in such a frame raises `NotAnEvent`.
    """

    def __init__(
        self,
        lookup: Callable[[bytes], str | None] | None = None,
        by_id: Callable[[int, bool], str | None] | None = None,
    ) -> None:
        self._lookup, self._by_id = lookup, by_id
        #: Other writers' schemas, by fingerprint or by the frame's head.
        self._foreign: dict[bytes, Any] = {}
        #: Heads of frames whose id is one of this version's schema: a registry may give one schema several ids.
        self._own_heads: set[bytes] = set()

    def own_form(self, value: bytes) -> bytes | None:
        """Return a framed value in the form that `encode` writes, if its id is known to be one of this version's
        schema; else None.

        Makes no lookup, so that `glance` and the code that uses it can handle both framings.
        """
        return _PREFIX + value[confluent_frame.HEAD :] if value[: confluent_frame.HEAD] in self._own_heads else None

    def asks(self, value: bytes | None) -> bool:
        """Return whether `decode` must look up this value's schema, and may have to wait for that."""
        if value is None or value[:_HEAD] == _PREFIX:
            return False
        if self._by_id is not None and confluent_frame.is_framed(value):
            return (
                value[: confluent_frame.HEAD] not in self._own_heads
                and value[: confluent_frame.HEAD] not in self._foreign
            )
        return value[:2] == MAGIC and len(value) >= _HEAD and value[2:_HEAD] not in self._foreign

    def decode(self, value: bytes | None) -> ev.JobEvent:
        """Decode one event. Raises `NotAnEvent`, `UnknownSchema` or `UnknownFact`, which are all `SchemaError`, and
        `RegistryNeeded` for a value that may be a valid event whose schema only a registry knows."""
        if value is None:
            raise NotAnEvent("the record has no value")
        if value[:_HEAD] == _PREFIX:
            return build(_datum(value, _HEAD, _SCHEMA))
        if self._by_id is not None and confluent_frame.is_framed(value):
            return self._decode_framed(value)
        return self._decode_foreign(value)

    def _decode_foreign(self, value: bytes) -> ev.JobEvent:
        if value[:2] != MAGIC or len(value) < _HEAD:
            raise NotAnEvent(f"no event framing: the first bytes are {value[:8].hex() or 'missing'}")
        fingerprint_bytes = value[2:_HEAD]
        schema = self._foreign.get(fingerprint_bytes)
        if schema is None:
            text = self._lookup(fingerprint_bytes) if self._lookup is not None else None
            if text is None:
                raise UnknownSchema(f"no schema with fingerprint {fingerprint_bytes.hex()} is published")
            schema = self._foreign[fingerprint_bytes] = _event_schema(text, f"schema {fingerprint_bytes.hex()}")
        return _build_foreign(_datum(value, _HEAD, schema), schema)

    def _decode_framed(self, value: bytes) -> ev.JobEvent:
        head = value[: confluent_frame.HEAD]
        if head not in self._own_heads and head not in self._foreign:
            self._learn(head, value)
        if head in self._own_heads:
            return build(_datum(value, confluent_frame.HEAD, _SCHEMA))
        schema = self._foreign[head]
        return _build_foreign(_datum(value, confluent_frame.HEAD, schema), schema)

    def _learn(self, head: bytes, value: bytes) -> None:
        assert self._by_id is not None
        number, likely = confluent_frame.id_of(value), confluent_frame.looks_like_an_event(value)
        try:
            text = self._by_id(number, likely)
        except RegistryNeeded:
            if likely:
                raise
            raise NotAnEvent(f"begins with a zero byte, but no event follows: {value[:8].hex()}") from None
        if text is None:
            raise UnknownSchema(f"no schema with id {number} is registered")
        if fingerprint(text) == FINGERPRINT:
            self._own_heads.add(head)
            return
        self._foreign[head] = _event_schema(text, f"schema id {number}")


def _event_schema(text: str, what: str) -> Any:
    """Return the parsed schema of a writer of events. Raises `NotAnEvent` for any other schema: a registry and
    ``<ns>.schemas`` also contain domain events' schemas, whose records are not job events in any version."""
    schema = _parse(text)
    fields = {f["name"] for f in schema.get("fields", ())} if isinstance(schema, dict) else set()
    if not {"job_id", "fact"} <= fields:
        named = schema.get("name", "?") if isinstance(schema, dict) else "?"
        raise NotAnEvent(f"{what} is {str(named)[:200]}, which is not a JobEvent")
    return schema


def _only_fact(schema: Any) -> str:
    kind = next(f["type"] for f in schema["fields"] if f["name"] == "fact")
    kind = next((k for k in kind if k != "null"), "?") if isinstance(kind, list) else kind
    return str(kind.get("name", "?") if isinstance(kind, dict) else kind)


def _datum(value: bytes, at: int, schema: Any) -> Any:
    stream = io.BytesIO(value)
    stream.seek(at)
    try:
        return _read(stream, schema, None, True)
    except Exception as exc:
        raise NotAnEvent(f"framed as an event, but damaged: {exc!r}") from exc


_own = Decoder()


def decode(value: bytes | None) -> ev.JobEvent:
    """Decode one event written with this version's schema; see `Decoder.decode`."""
    return _own.decode(value)
