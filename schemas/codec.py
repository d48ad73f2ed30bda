"""Bytes ↔ events. fastavro encodes and decodes every event; framing, types and schema lookup are ours.

Framing without a registry is Avro single-object encoding: ``C3 01``, the CRC-64-AVRO fingerprint of the writer's schema
in little endian, the datum (Avro specification, "Single-object encoding").

Reading resolves by the writer's schema: fields this version does not know are dropped, fields the writer did not know
take their defaults, and a fact this version does not know raises `UnknownFact` with its name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import fastavro
import fastavro.schema
import msgspec
from fastavro import schemaless_reader as _read
from fastavro import schemaless_writer as _write

from jobledger.errors import NotAnEvent, SchemaError, UnknownFact, UnknownSchema
from jobledger.schemas import events as ev

MAGIC = b"\xc3\x01"
_HEAD = 10  # magic and fingerprint

#: The published text of the writer's schema.
SCHEMA_TEXT: str = files("jobledger.schemas").joinpath("job_event.avsc").read_text(encoding="utf-8")

_FACTS: dict[str, type[Any]] = {
    "jobledger." + cls.__name__: cls
    for cls in ev.Fact.__args__
}
_HAS_SPEC = frozenset(c for c in _FACTS.values() if "spec" in c.__struct_fields__)
_HAS_ERROR_INFO = frozenset({ev.JobRetried, ev.JobFailed, ev.DeadLettered})

_asdict = msgspec.structs.asdict
_JobEvent, _JobSpec, _ErrorInfo = ev.JobEvent, ev.JobSpec, ev.ErrorInfo


def fingerprint(schema_text: str) -> bytes:
    """The 8-byte little-endian CRC-64-AVRO fingerprint of a schema's parsing canonical form.

    Raises `SchemaError` if the text is no Avro schema.
    """
    try:
        canonical = fastavro.schema.to_parsing_canonical_form(json.loads(schema_text))
        return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    except Exception as exc:
        raise SchemaError(f"not an Avro schema: {exc}") from exc


def _plain(node: Any) -> Any:
    """The schema without logical types: the same bytes, but integers stay integers instead of becoming datetimes."""
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


def _writer_of(branch: int) -> Any:
    """The schema with the union of facts replaced by one branch: its index as a constant, then its record.

    The bytes are the same (Avro writes a union as the branch index, then the datum), but fastavro need not search the
    union for the name: 2-3 µs an event.
    """
    schema = json.loads(SCHEMA_TEXT)
    union = schema["fields"].pop()["type"]
    named = {t["name"]: t for t in _records(union)}
    fact = _inlined(union[branch], named)
    schema["fields"] += [
        {"name": "fact_branch", "type": "long", "default": branch},
        {"name": "fact", "type": fact},
    ]
    return _parse(json.dumps(schema))


def _records(node: Any) -> list[Any]:
    """Every record defined in a schema, outermost first."""
    if isinstance(node, list):
        return [r for n in node for r in _records(n)]
    if isinstance(node, dict) and node.get("type") == "record":
        return [node, *(r for f in node["fields"] for r in _records(f["type"]))]
    return []


def _inlined(record: Any, named: Mapping[str, Any]) -> Any:
    """``record`` with references by name replaced by their definitions: it must stand alone."""
    fields = [
        {**f, "type": named.get(f["type"], f["type"]) if isinstance(f["type"], str) else f["type"]}
        for f in record["fields"]
    ]
    return {**record, "fields": fields}


_SCHEMA = _parse(SCHEMA_TEXT)
_WRITERS: dict[type[Any], Any] = {
    _FACTS["jobledger." + record["name"]]: _writer_of(branch)
    for branch, record in enumerate(json.loads(SCHEMA_TEXT)["fields"][-1]["type"])
}
FINGERPRINT = fingerprint(SCHEMA_TEXT)
_PREFIX = MAGIC + FINGERPRINT


def encode(event: ev.JobEvent) -> bytes:
    """One event as single-object Avro. Raises `SchemaError` if a field's value does not fit the schema."""
    fact = event.fact
    kind = fact.__class__
    body = _asdict(fact)
    if kind in _HAS_SPEC:
        body["spec"] = _asdict(body["spec"])
    if kind in _HAS_ERROR_INFO:
        body["error"] = _asdict(body["error"])
    datum = _asdict(event)
    datum["fact"] = body
    out = io.BytesIO(_PREFIX)
    out.seek(_HEAD)
    try:
        _write(out, _WRITERS[kind], datum)
    except Exception as exc:
        raise SchemaError(f"{kind.__name__} of job {event.job_id} does not fit the schema: {exc}") from exc
    return out.getvalue()


def build(datum: dict[str, Any]) -> ev.JobEvent:
    """An event from what Avro decoded, with the fact as (name, fields). Raises `UnknownFact`."""
    name, body = datum["fact"]
    kind = _FACTS.get(name)
    if kind is None:
        raise UnknownFact(name.rpartition(".")[2])
    if kind in _HAS_SPEC:
        body["spec"] = _JobSpec(**body["spec"])
    if kind in _HAS_ERROR_INFO:
        body["error"] = _ErrorInfo(**body["error"])
    datum["fact"] = kind(**body)
    return _JobEvent(**datum)


def _lenient(datum: Mapping[str, Any], cls: type[Any]) -> Any:
    """``cls`` from a datum of another schema version: unknown fields dropped, missing ones from the defaults."""
    known = {name: datum[name] for name in cls.__struct_fields__ if name in datum}
    try:
        return cls(**known)
    except TypeError as exc:
        raise SchemaError(f"{cls.__name__} of another schema version lacks a field without default: {exc}") from exc


def _build_foreign(datum: dict[str, Any]) -> ev.JobEvent:
    name, body = datum["fact"] if isinstance(datum.get("fact"), tuple) else ("?", {})
    short = name.rpartition(".")[2]
    kind = _FACTS.get("jobledger." + short)
    if kind is None:
        raise UnknownFact(short)
    if kind in _HAS_SPEC and "spec" in body:
        body["spec"] = _lenient(body["spec"], _JobSpec)
    if kind in _HAS_ERROR_INFO and "error" in body:
        body["error"] = _lenient(body["error"], _ErrorInfo)
    datum["fact"] = _lenient(body, kind)
    event: ev.JobEvent = _lenient(datum, _JobEvent)
    return event


class Decoder:
    """Reads events of any published writer's schema.

    ``lookup(fingerprint) -> schema text | None`` is asked once for a fingerprint not seen before; it reads the schemas
    topic to its end. Without it only this version's own schema is known. A fingerprint that was not found is asked for
    again at the next record: it may have been published since.
    """

    def __init__(self, lookup: Callable[[bytes], str | None] | None = None) -> None:
        self._lookup = lookup
        self._foreign: dict[bytes, Any] = {}

    def decode(self, value: bytes | None) -> ev.JobEvent:
        """One event. Raises `NotAnEvent`, `UnknownSchema` or `UnknownFact`, all of them `SchemaError`."""
        if value is None:
            raise NotAnEvent("the record has no value")
        if value[:_HEAD] == _PREFIX:
            stream = io.BytesIO(value)
            stream.seek(_HEAD)
            try:
                datum: Any = _read(stream, _SCHEMA, None, True)
            except Exception as exc:
                raise NotAnEvent(f"framed as an event, but damaged: {exc!r}") from exc
            return build(datum)
        return self._decode_foreign(value)

    def _decode_foreign(self, value: bytes) -> ev.JobEvent:
        if value[:2] != MAGIC or len(value) < _HEAD:
            raise NotAnEvent(f"no event framing: the first bytes are {value[:8].hex() or 'missing'}")
        mark = value[2:_HEAD]
        schema = self._foreign.get(mark)
        if schema is None:
            text = self._lookup(mark) if self._lookup is not None else None
            if text is None:
                raise UnknownSchema(f"no schema with fingerprint {mark.hex()} is published")
            schema = self._foreign[mark] = _parse(text)
        stream = io.BytesIO(value)
        stream.seek(_HEAD)
        try:
            datum: Any = _read(stream, schema, None, True)
        except Exception as exc:
            raise NotAnEvent(f"framed as an event, but damaged: {exc!r}") from exc
        if not isinstance(datum, dict):
            raise NotAnEvent(f"schema {mark.hex()} is not a record")
        return _build_foreign(datum)


_own = Decoder()


def decode(value: bytes | None) -> ev.JobEvent:
    """One event written with this version's schema; see `Decoder.decode`."""
    return _own.decode(value)
