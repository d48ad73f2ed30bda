"""Domain events and their handlers, as an app declares them.

An event type is a class of domain events, with fields, an Avro schema and a topic. A handler is a task that takes one
event. For each pair of event and handler there is one job, whose id is derived from both.
"""

from __future__ import annotations

import codecs
import dataclasses
import datetime as dt
import inspect
import io
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import fastavro
import fastavro.schema
import msgspec

from jobledger.definitions.durations import in_seconds
from jobledger.definitions.task import check_tags
from jobledger.errors import (
    BadEvent,
    BadTags,
    ConfigError,
    IncompatibleEvent,
    NotAnEvent,
    RegistryNeeded,
    SchemaError,
    UnknownSchema,
    text_of,
)
from jobledger.kafka.topic_names import Names, check_name, check_topic
from jobledger.schemas import avro_defaults, codec, confluent_frame, exact
from jobledger.schemas.derive import check_evolution, derive, dumper, is_pydantic, read_nested
from jobledger.schemas.foreign import ForeignSchema

if TYPE_CHECKING:
    from jobledger.definitions.task import Task

#: The tags of a handler's jobs: fixed, or computed from the event.
HandlerTags = Mapping[str, str] | Callable[[Any], Mapping[str, str] | None] | None
#: Format of a topic's values: Jobledger's own, JSON, or Avro in a Schema Registry's frame.
Format = Literal["jobledger", "json", "avro"]
FORMATS: tuple[str, ...] = ("jobledger", "json", "avro")
#: Where the router begins on a topic that it has not read before.
Start = Literal["earliest", "latest"]

_SINGLE_OBJECT = 10  # bytes before the datum in the single-object encoding

#: The header that carries an event's id (text).
EVENT_HEADER = "jl-event"
#: The tag with the event's id, by which the jobs of an event are found.
EVENT_TAG = "event"


def as_event_class(cls: type[Any]) -> type[Any]:
    """Return ``cls`` itself if it is a dataclass, msgspec Struct or pydantic model; else ``cls`` as a frozen dataclass.
    Raises `ConfigError` if ``cls`` is not a class."""
    if not isinstance(cls, type):
        raise ConfigError(f"@app.event is for classes, and {cls!r} is not a class")
    if "__dataclass_fields__" in cls.__dict__ or issubclass(cls, msgspec.Struct) or is_pydantic(cls):
        return cls
    return dataclasses.dataclass(frozen=True)(cls)


class EventType:
    """A class of events of one namespace. ``key``: the field whose value keeps events in order; None: no order is kept.

    ``topic``: another program's topic, which Jobledger reads and never writes; None: the event's own topic.
    ``partitions``: the partition count of the event's own topic; None: the app's default. ``retention_days``: how long
    the event's own topic keeps events; None: forever. ``start``: None means ``"latest"`` on another program's topic,
    and ``"earliest"`` on the event's own topic, so that events emitted before the router's first start are not lost.
    """

    def __init__(
        self,
        cls: type[Any],
        *,
        names: Names,
        name: str,
        key: str | None,
        topic: str | None,
        format: Format,
        partitions: int | None,
        retention_days: float | dt.timedelta | None = None,
        start: Start | None = None,
    ) -> None:
        name = check_name("event", name)
        self.retention_days = None if retention_days is None else _days(retention_days, name)
        if format not in FORMATS:
            raise ConfigError(f"event {name!r}: format={format!r} is not one of {', '.join(FORMATS)}")
        if topic is None and format != "jobledger":
            raise ConfigError(
                f"event {name!r}: format={format!r} is for topics of other programs; give topic=… as well"
            )
        self.cls, self.name, self.key, self.format, self.partitions = cls, name, key, format, partitions
        self.foreign = topic is not None
        if start not in (None, "earliest", "latest"):
            raise ConfigError(f"event {name!r}: start={start!r} is neither 'earliest' nor 'latest'")
        self.start: Start = start or ("latest" if self.foreign else "earliest")
        self.topic = names.events(name) if topic is None else check_topic(f"event {name!r}: topic", topic)
        record_namespace = f"{names.namespace.replace('-', '_')}.events"
        if record_namespace[0].isdigit():
            record_namespace = f"_{record_namespace}"
        #: The Avro full name of the event's record.
        self.fullname = f"{record_namespace}.{name}"
        self.schema = derive(cls, name, record_namespace)
        self.fingerprint = codec.fingerprint(self.schema)
        self._parsed = avro_defaults.understood(fastavro.parse_schema(json.loads(self.schema)))
        self._dump = dumper(cls)
        #: Whether the event has numbers or times that some readers would not receive unchanged.
        self._delicate = '"double"' in self.schema or '"timestamp-micros"' in self.schema
        self._readers: dict[bytes, Any] = {}
        #: Names of other programs' records that fit this class.
        self._fitting: set[str] = set()
        if key is not None and key not in {f["name"] for f in json.loads(self.schema)["fields"]}:
            raise ConfigError(f"event {name!r}: key={key!r} is not a field of {cls.__qualname__}")

    def __repr__(self) -> str:
        return f"<event {self.name} on {self.topic}>"

    def encode(self, event: Any) -> tuple[bytes, str | None]:
        """Return an instance as bytes (Avro single-object encoding), and its key. Raises `BadEvent` that names what
        does not fit."""
        plain: Any = None
        try:
            plain = self._dump(event)
            if self._delicate and (why := exact.unsound(plain, self.name)) is not None:
                raise ValueError(why)
            out = io.BytesIO()
            out.write(codec.MAGIC + self.fingerprint)
            fastavro.schemaless_writer(out, self._parsed, plain, disable_tuple_notation=True)
        except Exception as exc:
            reason = exact.unsound(plain, self.name) if isinstance(exc, UnicodeEncodeError) else None
            raise BadEvent(f"{event!r} does not fit event {self.name!r}: {reason or text_of(exc)}") from exc
        key = None if self.key is None else plain[self.key]
        return out.getvalue(), None if key is None else str(key)

    def of(self, values: Mapping[str, Any]) -> Any:
        """Return an instance from JSON values by field. Raises `BadEvent` that names what does not fit."""
        try:
            if is_pydantic(self.cls):
                return self.cls.model_validate(values)
            return msgspec.convert(values, self.cls, dec_hook=read_nested)
        except Exception as exc:  # the class's own checks may raise anything
            raise BadEvent(f"{dict(values)!r} does not fit event {self.name!r}: {text_of(exc)}") from exc

    def passes(self, value: bytes | None) -> bool:
        """Return whether a record can be skipped: a tombstone on another program's topic, which may be compacted."""
        return value is None and self.foreign

    def decode(
        self,
        value: bytes | None,
        lookup: Callable[[bytes], str | None],
        by_id: Callable[[int, bool], str | None] | None = None,
    ) -> dict[str, Any]:
        """Return a record's value as plain values by field, resolved to this class's schema. Raises `SchemaError`.

        ``lookup``: returns the schema's text for an unknown fingerprint, or None if the schema is not published.
        ``by_id``: the same for the id in a Schema Registry's frame, see `jobledger.log.schema_lookup.SchemaLookup`.
        Raises `IncompatibleEvent` for an event that a later version of this class wrote and this version cannot read,
        and for records of other programs whose schema does not fit the class: these are events, and must not be skipped
        as garbage.
        """
        if value is None:
            raise NotAnEvent("the record has no value")
        if self.format == "json":
            try:
                values = msgspec.json.decode(value.removeprefix(codecs.BOM_UTF8))
            except (msgspec.DecodeError, RecursionError) as exc:  # a RecursionError for [[[[…
                raise NotAnEvent(f"the value is not JSON: {exc}") from exc
            if not isinstance(values, dict):
                raise NotAnEvent("the JSON is not an object")
            return values
        if by_id is not None and confluent_frame.is_framed(value):
            head, at = value[: confluent_frame.HEAD], confluent_frame.HEAD
        elif self.format == "jobledger" and value.startswith(codec.MAGIC) and len(value) >= _SINGLE_OBJECT:
            head, at = value[2:_SINGLE_OBJECT], _SINGLE_OBJECT
        else:
            raise NotAnEvent(f"the value has no Avro head: it begins with {value[:8].hex() or 'nothing'}")
        earlier: Any = None
        if head != self.fingerprint and (earlier := self._readers.get(head)) is None:
            text = lookup(head) if at == _SINGLE_OBJECT else self._by_id(by_id, value)
            earlier = self._readers[head] = self._foreign(text, head) if self.foreign else self._writer(text, head)
        if isinstance(earlier, str):
            raise NotAnEvent(earlier)
        try:
            if isinstance(earlier, ForeignSchema):
                return earlier.read(value[at:])
            data = io.BytesIO(value[at:])
            plain: Any = fastavro.schemaless_reader(data, earlier or self._parsed, self._parsed if earlier else None)
        except NotAnEvent:
            raise
        except Exception as exc:
            raise NotAnEvent(f"the bytes are not an event {self.name!r}: {exc}") from exc
        return plain  # type: ignore[no-any-return]  # a record is a dict

    def _by_id(self, by_id: Callable[[int, bool], str | None] | None, value: bytes) -> str | None:
        assert by_id is not None
        try:
            return by_id(confluent_frame.id_of(value), True)
        except RegistryNeeded as exc:
            if self.format == "avro":
                raise
            # Jobledger's emitters publish their schema ids on the log. So none of them wrote this record: it is
            # garbage.
            raise NotAnEvent(f"{exc}, or the record is not an event") from None
        except SchemaError as exc:  # the schema exists, but cannot be used
            if not self.foreign:
                raise
            raise IncompatibleEvent(f"event {self.name!r} cannot be read from {self.topic}: {exc}") from exc

    def _foreign(self, text: str | None, head: bytes) -> ForeignSchema | str:
        """Return the reader of another program's schema, or a text with the reason why its records are not events.

        The text is returned if the schema does not fit the class, but records of another name on the topic do: then the
        record is of another kind. Otherwise raises `IncompatibleEvent` for a schema that does not fit. Raises
        `UnknownSchema` if ``text`` is None.
        """
        if text is None:
            raise UnknownSchema(f"the schema {head.hex()} is published nowhere")
        called = ""
        try:
            written = json.loads(text)
            if not isinstance(written, dict) or written.get("type") != "record":
                raise IncompatibleEvent(
                    f"event {self.name!r}: the values on {self.topic} are not Avro records ({text:.100})"
                )
            called = _fullname(written)
            fits = ForeignSchema(self.name, written, json.loads(self.schema))
        except (ValueError, fastavro.schema.SchemaParseException) as exc:
            problem = IncompatibleEvent(
                f"event {self.name!r}: a schema on {self.topic} cannot be used: {exc!r}. References to other schemas of a "
                "Schema Registry are not supported"
            )
        except IncompatibleEvent as exc:
            problem = IncompatibleEvent(f"event {self.name!r} cannot be read from {self.topic}: {exc}")
        else:
            self._fitting.add(called)
            return fits
        if self._fitting and called not in self._fitting:
            return str(problem)
        raise problem

    def _writer(self, text: str | None, head: bytes) -> Any:
        """Return the writer's schema under this event's Avro name: other programs may use another name for the same
        record. Raises `SchemaError`, and `IncompatibleEvent` if this class cannot read the schema's events."""
        if text is None:
            raise UnknownSchema(f"the schema {head.hex()} is published nowhere")
        try:
            written = json.loads(text)
            if not isinstance(written, dict) or written.get("type") != "record":
                raise NotAnEvent(f"the schema {head.hex()} is not a record")
            if not self.foreign and _fullname(written) == self.fullname:
                check_evolution(self.name, self.schema, {head.hex(): text})
            ours = json.loads(self.schema)
            return fastavro.parse_schema({**written, "name": ours["name"], "namespace": ours["namespace"]})
        except (ValueError, fastavro.schema.SchemaParseException) as exc:
            raise SchemaError(f"the schema {head.hex()} is not an Avro schema: {exc}") from exc


class Handler:
    """A task that takes one event of a type. ``parameter``: the parameter for the event. ``tags``: the tags of the
    handler's jobs, or a function that returns the tags for an event. Raises `ConfigError`."""

    def __init__(self, event: EventType, task: Task[Any, Any], tags: HandlerTags = None) -> None:
        parameters = [p for p in inspect.signature(task.fn).parameters.values() if p.name not in task.dependencies]
        needed = [p.name for p in parameters if p.default is p.empty]
        if not parameters or needed not in ([], [parameters[0].name]):
            raise ConfigError(
                f"handler {task.name!r} takes ({', '.join(p.name for p in parameters)}): a handler takes the event, "
                "and its other parameters need defaults"
            )
        self.event, self.task, self.parameter = event, task, parameters[0].name
        if not callable(tags):
            tags = self._checked(tags)
        self._tags = tags

    def __repr__(self) -> str:
        return f"<handler {self.task.name} of {self.event.name}>"

    def job_id(self, event_id: str) -> str:
        """Return the id of the job that handles this event: the same id for every call."""
        return str(uuid.uuid5(uuid.UUID(event_id), self.task.name))

    def tags(self, args: bytes) -> dict[str, str]:
        """Return the tags of the job with these arguments, without the event's id. Raises `BadTags`."""
        if not callable(self._tags):
            return dict(self._tags or {})
        try:
            return self._checked(self._tags(self.task.decode_args(args)[self.parameter]))
        except Exception as exc:  # whatever the app's function raises, other handlers get their jobs
            kind = type(exc).__qualname__
            raise BadTags(
                f"handler {self.task.name!r}: its tags= failed for this event: {kind}: {text_of(exc)}"
            ) from exc

    def _checked(self, tags: object) -> dict[str, str]:
        checked = check_tags(tags)
        if EVENT_TAG in checked:
            raise ConfigError(f"handler {self.task.name!r}: tag {EVENT_TAG!r} is the event's id, and cannot be set")
        return checked

    def args(self, plain: Mapping[str, Any]) -> bytes:
        """Return the job's arguments for an event's plain values. Raises `NotAnEvent` for values nested too deeply, and
        for NaN and infinity, which other programs may write in Avro but JSON does not have."""
        try:
            encoded = msgspec.json.encode({self.parameter: plain})
        except RecursionError as exc:
            raise NotAnEvent(f"the event's values cannot be arguments of a job: {exc}") from exc
        # A number that JSON does not have (NaN, infinity) would be encoded as null.
        if b"null" in encoded and (why := exact.unwritable(plain, self.event.name)) is not None:
            raise NotAnEvent(f"the event's values cannot be arguments of a job: {why}")
        return encoded


def _days(span: object, event: str) -> float:
    days = in_seconds(span)
    if isinstance(span, dt.timedelta):
        days = span / dt.timedelta(days=1)
    if isinstance(days, bool) or not isinstance(days, int | float) or not 0 < days < math.inf:
        raise ConfigError(
            f"event {event!r}: retention_days={span!r} is neither a number of days above 0 nor a timedelta"
        )
    return days


def _fullname(schema: Mapping[str, Any]) -> str:
    return f"{schema.get('namespace')}.{schema.get('name')}"


def earlier_of(kind: EventType, known: Mapping[bytes, str]) -> dict[str, str]:
    """Return, of all published schemas, those of earlier versions of this event, by fingerprint in hex."""
    earlier: dict[str, str] = {}
    for mark, text in known.items():
        head = json.loads(text)
        if isinstance(head, dict) and _fullname(head) == kind.fullname:
            earlier[mark.hex()] = text
    earlier.pop(kind.fingerprint.hex(), None)
    return earlier


def check_classes(kinds: Iterable[EventType], known: Mapping[bytes, str]) -> None:
    """Raise `IncompatibleEvent` unless each of the app's own event classes can read what its earlier versions wrote.

    ``known``: every published schema, see `jobledger.log.schema_lookup.SchemaLookup.all`. Readers of events call this:
    an event that a class cannot read would look like garbage, and would be skipped.
    """
    for kind in kinds:
        if not kind.foreign:
            check_evolution(kind.name, kind.schema, earlier_of(kind, known))


def event_id_of(headers: Mapping[str, Any], topic: str, partition: int, offset: int) -> str:
    """Return an event's id from its header. Without a valid header, as in another program's event, the id is derived
    from topic, partition and offset."""
    header = headers.get(EVENT_HEADER)
    if isinstance(header, bytes):
        try:
            return str(uuid.UUID(header.decode()))
        except ValueError:
            pass
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{topic}/{partition}/{offset}"))
