"""Domain events without a broker: schemas of classes, encoding and decoding, evolution, handlers and their jobs."""

from __future__ import annotations

import datetime
import decimal
import enum
import io
import json
import math
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import avro.io
import avro.schema
import fastavro
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, BadEvent, ConfigError, IncompatibleEvent, Queue, Settings, UnknownTask
from jobledger.consumers.router.initial_offsets import began_with, note
from jobledger.definitions.event_types import EventType, earlier_of, event_id_of
from jobledger.errors import BadTags, NotAnEvent, UnknownSchema
from jobledger.kafka.topic_names import Names
from jobledger.schemas.derive import check_evolution, derive


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclass
class Line:
    sku: str
    count: int = 1


@dataclass
class OrderPlaced:
    """A customer has ordered."""

    order_id: uuid.UUID
    at: datetime.datetime
    day: datetime.date
    colour: Colour
    kind: Literal["shop", "phone"]
    first: Line
    lines: list[Line] = field(default_factory=list)
    note: str | None = None
    rating: int | None = 3
    counts: dict[str, int] = field(default_factory=dict)
    amount: decimal.Decimal = decimal.Decimal("1.50")
    raw: bytes = b"\xff"
    share: float = 0.5
    gift: bool = False


class Shipped(msgspec.Struct, frozen=True):
    order_id: str
    weight: float = 0.0


def kind_of(cls: type[Any], **options: Any) -> EventType:
    given_options = {"name": cls.__name__, "key": None, "topic": None, "format": "jobledger", "partitions": None}
    return EventType(cls, names=Names("shop-eu"), **{**given_options, **options})


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
numbers = st.integers(-(2**63), 2**63 - 1)
lines = st.builds(Line, texts, numbers)
moments = st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1), timezones=st.just(datetime.UTC))
orders = st.builds(
    OrderPlaced, st.uuids(), moments, st.dates(), st.sampled_from(Colour), st.sampled_from(["shop", "phone"]), lines,
    st.lists(lines, max_size=3), st.none() | texts, st.none() | numbers, st.dictionaries(texts, numbers, max_size=3),
    st.decimals(allow_nan=False, allow_infinity=False), st.binary(max_size=20),
    st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
)  # fmt: skip


@given(orders)
def test_an_event_reaches_the_handler_unchanged(order: OrderPlaced) -> None:
    """The event is encoded as Avro, then as the job's arguments in JSON, and is then equal to the emitted object."""
    kind = kind_of(OrderPlaced, key="order_id")
    value, key = kind.encode(order)
    assert key == str(order.order_id)
    raw = msgspec.json.encode({"event": kind.decode(value, lambda mark: None)})
    assert msgspec.json.decode(raw, type=dict[str, OrderPlaced])["event"] == order


def test_the_schema_has_the_names_types_defaults_and_docs_of_the_class() -> None:
    """The schema is plain Avro, so other programs can read it."""
    schema = json.loads(derive(OrderPlaced, "OrderPlaced", "shop.events"))
    assert (schema["name"], schema["namespace"], schema["doc"]) == (
        "OrderPlaced", "shop.events", "A customer has ordered.",
    )  # fmt: skip
    fields = {f["name"]: f for f in schema["fields"]}
    assert fields["at"]["type"] == {"type": "long", "logicalType": "timestamp-micros"}
    assert fields["note"] == {"name": "note", "type": ["null", "string"], "default": None}
    assert fields["rating"] == {"name": "rating", "type": ["long", "null"], "default": 3}
    assert fields["lines"] == {
        "name": "lines", "type": {"type": "array", "items": "shop.events.Line"}, "default": [],
    }  # fmt: skip
    assert fields["colour"]["type"] == "string"
    assert fields["amount"] == {"name": "amount", "type": "string", "default": "1.50"}
    assert fields["raw"] == {"name": "raw", "type": "bytes", "default": "\u00ff"}
    assert "default" not in fields["order_id"]
    fields = {f["name"]: f for f in json.loads(kind_of(Registered).schema)["fields"]}
    assert fields["lines"]["default"] == []
    assert "default" not in fields["made"]
    fastavro.parse_schema(schema)
    assert kind_of(OrderPlaced).fullname == "shop_eu.events.OrderPlaced"


def test_a_plain_class_becomes_a_frozen_dataclass_and_a_struct_is_not_changed() -> None:
    """`@app.event` turns a class with annotations into a dataclass. A second event with the same name is refused."""
    app = App("shop", settings=Settings())

    @app.event
    class UserRegistered:
        user_id: str
        plan: str = "free"

    made = UserRegistered("u-1")  # type: ignore[call-arg]  # mypy does not follow dataclass_transform of a method
    assert (made.user_id, made.plan) == ("u-1", "free")
    with pytest.raises(AttributeError):
        made.plan = "paid"
    assert app.event(Shipped) is Shipped
    assert app.events["UserRegistered"].topic == "shop.events.UserRegistered"

    with pytest.raises(ConfigError, match="already registered"):

        @app.event(name="Shipped")
        class Other:
            x: int


class Inner(pydantic.BaseModel):
    n: int
    day: datetime.date = datetime.date(2026, 1, 2)


class Registered(pydantic.BaseModel):
    """Somebody has signed up."""

    who: str = pydantic.Field(alias="userName")
    inner: Inner
    at: datetime.datetime
    amount: decimal.Decimal = decimal.Decimal("1.50")
    note: str | None = None
    lines: list[Inner] = pydantic.Field(default_factory=list)
    made: str = pydantic.Field(default_factory=lambda: "now")


MOMENT = datetime.datetime(2026, 11, 26, 8, 30, 0, 123, datetime.UTC)


class Packed(msgspec.Struct, frozen=True):
    raw: bytes
    more: list[bytes] = []
    at: datetime.datetime = MOMENT


@pytest.mark.parametrize(
    "event",
    [
        Packed(b"\xff\x00", [b"", b"\xfe"]),
        OrderPlaced(uuid.uuid4(), MOMENT, MOMENT.date(), Colour.RED, "shop", Line("a"), raw=b"\x80\xff"),
        Registered(userName="a", inner=Inner(n=2), at=MOMENT, lines=[Inner(n=1)]),
    ],
    ids=lambda event: type(event).__name__,
)
def test_a_handler_gets_the_event_whatever_kind_of_class_it_is(event: Any) -> None:
    """The event may be a dataclass, a Struct or a pydantic model. It is decoded from the topic, encoded as the job's
    arguments, and decoded again for the function."""
    app = App("shop", settings=Settings())
    app.event(type(event))

    def handle(event: Any) -> None: ...

    handle.__annotations__["event"] = type(event)
    app.on(type(event))(handle)
    (handler,) = app.registry.handlers[type(event).__name__]
    value, _ = handler.event.encode(event)
    raw = handler.args(handler.event.decode(value, lambda mark: None))
    assert handler.task.arguments.decode(raw) == {"event": event}
    assert handler.event.of(handler.event.decode(value, lambda mark: None)) == event


@dataclass
class Enclosed:
    data: bytes


class Direct(pydantic.BaseModel):
    raw: bytes | None = None


class Around(pydantic.BaseModel):
    parts: dict[str, list[Enclosed]]


class Both(msgspec.Struct):
    good: Enclosed
    bad: Around


@pytest.mark.parametrize(
    ("cls", "where"), [(Direct, "Direct.raw"), (Around, "Around.parts.data"), (Both, "Both.bad.parts.data")]
)
def test_bytes_in_a_pydantic_model_are_refused(cls: type[Any], where: str) -> None:
    """Otherwise the bytes would change. The rule also holds for nested classes, and for a class that is nested
    twice."""
    with pytest.raises(ConfigError, match=f"{where}: bytes in a pydantic model"):
        kind_of(cls)


def test_an_alias_is_the_name_on_the_wire() -> None:
    """The alias of a field is its name in the schema, and the name under which the model reads the field."""
    kind = kind_of(Registered, key="userName")
    assert [f["name"] for f in json.loads(kind.schema)["fields"]][:2] == ["userName", "inner"]
    value, key = kind.encode(Registered(userName="a", inner=Inner(n=2), at=MOMENT))
    assert key == "a"
    assert kind.decode(value, lambda mark: None)["userName"] == "a"

    class Generated(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(alias_generator=lambda name: name.title().replace("_", ""))
        user_id: str

    value, _ = kind_of(Generated).encode(Generated(UserId="u"))  # type: ignore[call-arg]  # the alias is made at run time
    assert kind_of(Generated).of(kind_of(Generated).decode(value, lambda mark: None)).user_id == "u"


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"validation_alias": "read"}, {}),
        ({"serialization_alias": "written"}, {}),
        ({"validation_alias": pydantic.AliasChoices("x", "y")}, {}),
        ({"validation_alias": pydantic.AliasPath("x", 0)}, {}),
        ({"alias": "a", "serialization_alias": "b"}, {}),
        ({"alias": "a"}, {"validate_by_alias": False, "validate_by_name": True}),
    ],
)
def test_a_field_with_different_names_for_reading_and_writing_is_refused(
    options: dict[str, Any], config: dict[str, Any]
) -> None:
    """An event of such a model could not be read."""
    made = pydantic.create_model("Torn", __config__=config, x=(str, pydantic.Field(**options)))  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"Torn\.x: it is written as"):
        kind_of(made)


@dataclass
class Twofold:
    x: str | Line


@dataclass
class Loose:
    x: Any


@dataclass
class Mapped:
    x: dict[int, str]


class Arrayed(msgspec.Struct, array_like=True):
    x: int


@pytest.mark.parametrize("cls", [Twofold, Loose, Mapped, Arrayed, int])
def test_a_class_without_an_avro_schema_is_refused_by_name(cls: type[Any]) -> None:
    """The error is raised when the class is declared, and not when the first event is emitted."""
    with pytest.raises(ConfigError, match=cls.__name__):
        kind_of(cls)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"key": "nope"}, "not a field"), ({"format": "json"}, "topic="), ({"format": "xml", "topic": "t"}, "not one of"),
     ({"name": "a.b"}, "not usable"), ({"retention_days": 0}, "above 0"), ({"retention_days": math.inf}, "above 0"),
     ({"start": "now"}, "neither 'earliest'")],
)  # fmt: skip
def test_wrong_options_of_an_event_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        kind_of(Shipped, **options)


@pytest.mark.parametrize("bad", [Shipped(5), Shipped("a", "heavy"), Line("a"), object()])  # type: ignore[arg-type]  # wrong on purpose
def test_values_that_do_not_fit_are_refused_before_anything_is_sent(bad: Any) -> None:
    with pytest.raises(BadEvent, match="Shipped"):
        kind_of(Shipped).encode(bad)


def renamed(cls: type[Any], name: str = "Shipped") -> EventType:
    return kind_of(cls, name=name)


EARLIER = kind_of(Shipped)


@dataclass
class WithMore:
    order_id: str
    weight: float = 0.0
    carrier: str = "post"


@dataclass
class WithLess:
    order_id: str


@dataclass
class WithAnother:
    order_id: int
    weight: float = 0.0


@dataclass
class WithoutDefault:
    order_id: str
    weight: float
    carrier: str


def test_a_later_class_reads_what_an_earlier_one_wrote_and_the_other_way_round() -> None:
    """A new field takes its default, and a dropped field is ignored."""
    earlier, later = kind_of(Shipped), renamed(WithMore)
    texts_by = {earlier.fingerprint: earlier.schema, later.fingerprint: later.schema}
    value, _ = earlier.encode(Shipped("a", 2.5))
    assert later.decode(value, texts_by.get) == {"order_id": "a", "weight": 2.5, "carrier": "post"}
    value, _ = later.encode(WithMore("b", 1.5, "ship"))
    assert earlier.decode(value, texts_by.get) == {"order_id": "b", "weight": 1.5}
    with pytest.raises(UnknownSchema):
        kind_of(Shipped).decode(value, lambda mark: None)


def test_an_event_of_an_incompatible_later_class_stops_the_reader() -> None:
    """The error is `IncompatibleEvent`, so the reader stops and does not reject the event."""
    later = renamed(WithAnother)
    value, _ = later.encode(WithAnother(5))
    for _ in range(2):
        with pytest.raises(IncompatibleEvent, match=later.fingerprint.hex()):
            EARLIER.decode(value, {later.fingerprint: later.schema}.get)
    with pytest.raises(IncompatibleEvent, match="order_id"):  # also on a foreign topic
        kind_of(Shipped, topic="warehouse.shipped").decode(value, {later.fingerprint: later.schema}.get)


@pytest.mark.parametrize(
    ("cls", "fits"), [(WithMore, True), (WithLess, True), (WithAnother, False), (WithoutDefault, False)]
)
def test_evolution_is_judged_against_every_earlier_schema(cls: type[Any], fits: bool) -> None:
    """A field may be added with a default, and may be removed, but its type may not change. Schemas of other events do
    not matter."""
    earlier, later = kind_of(Shipped), renamed(cls)
    other = kind_of(OrderPlaced)
    known = {k.fingerprint: k.schema for k in (earlier, later, other)}
    known_earlier = earlier_of(later, known)
    assert list(known_earlier) == [earlier.fingerprint.hex()]
    if fits:
        check_evolution(later.name, later.schema, known_earlier)
    else:
        with pytest.raises(IncompatibleEvent, match=earlier.fingerprint.hex()):
            check_evolution(later.name, later.schema, known_earlier)


@dataclass(frozen=True)
class Weighed:
    """A class with its own defaults, nested in `Grown`."""

    grams: int = 5
    unit: str | None = "g"


SEVEN = uuid.UUID(int=7)


@dataclass
class Grown:
    """`Shipped` with new fields of every type that can have a default."""

    order_id: str
    weight: float = 1
    day: datetime.date = datetime.date(2026, 11, 26)
    last: datetime.date | None = datetime.date(1969, 12, 31)
    never: datetime.date | None = None
    at: datetime.datetime = MOMENT
    seen: datetime.datetime | None = datetime.datetime(1969, 7, 20, 20, 17, 40, tzinfo=datetime.UTC)
    batch: uuid.UUID = SEVEN
    other: uuid.UUID | None = SEVEN
    price: decimal.Decimal = decimal.Decimal("9.90")
    colour: Colour | None = Colour.GREEN
    raw: bytes = b"\xff\x00"
    number: int | str | None = "a"
    measured: int | float = 0.5
    flag: bool | None = False
    names: tuple[str, ...] = ("b", "a")
    days: tuple[datetime.date, ...] = (datetime.date(2026, 1, 1), datetime.date(1969, 12, 30))
    stamps: frozenset[datetime.datetime] = frozenset({MOMENT})
    chosen: frozenset[str] = frozenset({"z", "y", "x"})
    ids: tuple[uuid.UUID, ...] | None = (uuid.UUID(int=9),)
    counts: dict[str, int] = field(default_factory=dict)
    scale: Weighed = Weighed(7)
    tare: Weighed | None = Weighed(3)


def test_a_new_field_may_have_any_default() -> None:
    """The default is written in Avro's form, and the type of the default is the first type of a union. The check of the
    evolution, Apache Avro's reader and fastavro's reader accept all of them."""
    earlier, later = kind_of(Shipped), renamed(Grown)
    check_evolution(later.name, later.schema, {"old": earlier.schema})
    value, _ = earlier.encode(Shipped("a", 2.5))
    assert later.of(later.decode(value, {earlier.fingerprint: earlier.schema}.get)) == Grown("a", 2.5)
    # Other Avro libraries read the same values.
    reader = avro.schema.parse(later.schema)
    by_apache: Any = avro.io.DatumReader(avro.schema.parse(earlier.schema), reader).read(
        avro.io.BinaryDecoder(io.BytesIO(value[10:]))
    )
    fields = {f["name"]: f for f in json.loads(later.schema)["fields"]}
    assert {name for name, f in fields.items() if "default" not in f} == {"order_id"}
    for name in ("day", "at", "last", "seen", "number", "measured", "days", "scale", "tare", "names"):
        assert by_apache[name] == fields[name]["default"], name
    parsed = fastavro.parse_schema(json.loads(later.schema))
    old = fastavro.parse_schema(json.loads(earlier.schema))
    by_fastavro: Any = fastavro.schemaless_reader(io.BytesIO(value[10:]), old, parsed)
    assert {n: v for n, v in by_fastavro.items() if n not in ("order_id", "weight")} == {
        n: f["default"] for n, f in fields.items() if n not in ("order_id", "weight")
    }
    assert (fields["day"]["default"], fields["last"]["default"], fields["seen"]["default"]) == (
        20783,
        -1,
        -14182940000000,
    )
    assert fields["last"]["type"] == [{"type": "int", "logicalType": "date"}, "null"]
    assert fields["never"]["type"] == ["null", {"type": "int", "logicalType": "date"}]
    assert fields["number"]["type"] == ["string", "long", "null"]
    assert fields["measured"]["type"] == ["double", "long"]
    assert fields["chosen"]["default"] == ["x", "y", "z"]  # sorted, as the order of a set varies
    assert fields["scale"]["default"] == {"grams": 7, "unit": "g"}
    value, _ = later.encode(Grown("b"))
    assert later.of(later.decode(value, lambda mark: None)) == Grown("b")


NAIVE = datetime.datetime(2026, 1, 1)  # without a time zone on purpose


@pytest.mark.parametrize(
    ("kind", "default", "why"),
    [
        (datetime.datetime, NAIVE, "time zone"),
        (datetime.datetime | None, NAIVE, "time zone"),
        (float, float("nan"), "nan"),
        (str, None, "None is not of type string"),
        (int, True, "True is not of type long"),
        (int, 2**63, "is not of type long"),
        (int | None, "a", "'a' is not of type long"),
        (datetime.date, MOMENT, "is not of type date"),
        (tuple[int | None, ...], (1,), "first of several"),
        (str, object(), "has no Avro form"),
    ],
)
def test_a_default_without_an_avro_form_is_refused(kind: Any, default: Any, why: str) -> None:
    """The error has the field, the value and the remedy: a default factory, which is not part of the schema."""
    made = msgspec.defstruct("Bad", [("x", kind, default)], frozen=True)
    with pytest.raises(ConfigError, match=rf"Bad\.x: its default .*{why}.*default_factory"):
        kind_of(made)
    factory = msgspec.defstruct("Bad", [("x", kind, msgspec.field(default_factory=lambda: default))])
    assert "default" not in json.loads(kind_of(factory).schema)["fields"][0]


@pytest.mark.parametrize("value", [None, b"", b"\xc3\x01short", b"garbage" * 5, b"\x00\x00\x00\x00\x01abc"])
def test_bytes_that_are_no_event_raise_an_error(value: bytes | None) -> None:
    with pytest.raises((NotAnEvent, UnknownSchema)):
        kind_of(Shipped).decode(value, lambda mark: None)


def test_a_truncated_event_is_no_event() -> None:
    kind = kind_of(Shipped)
    value, _ = kind.encode(Shipped("a-long-order-id", 2.0))
    with pytest.raises(NotAnEvent):
        kind.decode(value[:-12], lambda mark: None)


def test_json_objects_on_a_foreign_topic_are_events() -> None:
    """Any other JSON value is not an event."""
    kind = kind_of(Shipped, topic="warehouse.shipped", format="json")
    assert kind.decode(b'{"order_id": "a", "weight": 1.0}', lambda mark: None) == {"order_id": "a", "weight": 1.0}
    for nested in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(NotAnEvent, match="the value is not JSON"):
            kind.decode(nested, lambda mark: None)
    for value in (b"[1]", b"{", b"7"):
        with pytest.raises(NotAnEvent):
            kind.decode(value, lambda mark: None)


def test_json_on_a_foreign_topic_may_begin_with_a_byte_order_mark() -> None:
    kind = kind_of(Shipped, topic="warehouse.shipped", format="json")
    assert kind.decode(b'\xef\xbb\xbf{"order_id": "a"}', lambda mark: None) == {"order_id": "a"}


def test_a_tombstone_is_ignored_only_on_a_foreign_topic() -> None:
    theirs = kind_of(Shipped, topic="warehouse.shipped", format="json")
    assert (theirs.passes(None), theirs.passes(b"{}"), kind_of(Shipped).passes(None)) == (True, False, False)


# -- Avro on foreign topics ------------------------------------------------------------------------------------------


def record(name: str, **fields: Any) -> dict[str, Any]:
    """Return the schema of a record of another program."""
    return {"type": "record", "name": name, "fields": [{"name": n, "type": kind} for n, kind in fields.items()]}


STATUS = {"type": "enum", "name": "StatusEnum", "symbols": ["NEW", "PAID"], "default": "NEW"}
MONEY = {"type": "fixed", "name": "Money", "size": 6, "logicalType": "decimal", "precision": 12, "scale": 2}
WHEN = datetime.datetime(2026, 7, 1, 12, 0, 0, 5_000, datetime.UTC)
RECURSIVE = {
    "type": "record", "name": "Node",
    "fields": [{"name": "label", "type": STATUS}, {"name": "next", "type": ["null", "Node"]}],
}  # fmt: skip


@dataclass
class Chain:
    label: str
    next: Chain | None = None


@dataclass
class Item:
    sku: str
    price: decimal.Decimal = decimal.Decimal(0)


class Status(enum.Enum):
    NEW = "NEW"
    PAID = "PAID"


@pytest.mark.parametrize(
    ("kind", "theirs", "written", "read"),
    [
        (str, STATUS, "PAID", "PAID"),
        (Status, STATUS, "PAID", Status.PAID),
        (Literal["NEW", "PAID"], STATUS, "NEW", "NEW"),
        (Status | None, ["null", STATUS], "PAID", Status.PAID),
        (Status | None, ["null", STATUS], None, None),
        (Status, ["null", STATUS], "NEW", Status.NEW),
        (Item, record("com.acme.OrderLine", sku="string", note="string"), {"sku": "a", "note": "n"}, Item("a")),
        (
            list[Item],
            {"type": "array", "items": record("OrderLine", sku="string", price=MONEY)},
            [{"sku": "a", "price": decimal.Decimal("2.50")}],
            [Item("a", decimal.Decimal("2.50"))],
        ),
        (
            dict[str, Item],
            {"type": "map", "values": record("OrderLine", sku="string")},
            {"x": {"sku": "a"}},
            {"x": Item("a")},
        ),
        (Item | None, ["null", record("OrderLine", sku=["null", "string"])], {"sku": "a"}, Item("a")),
        (decimal.Decimal, MONEY, decimal.Decimal("12.34"), decimal.Decimal("12.34")),
        (
            decimal.Decimal,
            {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 3},
            decimal.Decimal("-1.005"),
            decimal.Decimal("-1.005"),
        ),
        (str, MONEY, decimal.Decimal("12.34"), "12.34"),
        (datetime.datetime, {"type": "long", "logicalType": "timestamp-millis"}, WHEN, WHEN),
        (int, {"type": "long", "logicalType": "timestamp-millis"}, WHEN, int(WHEN.timestamp() * 1000)),
        (int, {"type": "long", "logicalType": "timestamp-nanos"}, 5, 5),
        (datetime.date, {"type": "int", "logicalType": "date"}, WHEN.date(), WHEN.date()),
        (int, {"type": "int", "logicalType": "time-millis"}, datetime.time(0, 0, 1), 1_000),
        (uuid.UUID, {"type": "string", "logicalType": "uuid"}, uuid.UUID(int=5), uuid.UUID(int=5)),
        (
            uuid.UUID,
            {"type": "fixed", "name": "Id", "size": 16, "logicalType": "uuid"},
            bytes(15) + b"\5",
            uuid.UUID(int=5),
        ),
        (str, {"type": "string", "logicalType": "uuid"}, uuid.UUID(int=5), str(uuid.UUID(int=5))),
        (bytes, {"type": "fixed", "name": "Hash", "size": 2}, b"\0\xff", b"\0\xff"),
        (float, "int", 3, 3.0),
        (int | None, ["null", "int", "long"], 7, 7),
        (int | str, ["string", "long"], 7, 7),
        (int | str, ["string", "long"], "7", "7"),
        (Chain, RECURSIVE, {"label": "NEW", "next": {"label": "PAID", "next": None}}, Chain("NEW", Chain("PAID"))),
    ],
)
def test_avro_on_a_foreign_topic_is_read_with_the_writers_schema(
    kind: Any, theirs: Any, written: Any, read: Any
) -> None:
    """The writer's names of records, enums and fixed types do not matter. A handler and a projection get the written
    values."""
    ours = kind_of(msgspec.defstruct("Order", [("value", kind), ("more", int, 3)]), topic="theirs", format="avro")
    schema = record("com.acme.OrderPlacedV2", ignored="double", value=theirs)
    value = framed(schema, {"ignored": 0.5, "value": written})
    plain = ours.decode(value, lambda mark: None, lambda schema_id, likely: json.dumps(schema))
    for made in (ours.of(plain), msgspec.json.decode(msgspec.json.encode(plain), type=ours.cls)):
        assert (made.value, made.more) == (read, 3)


@pytest.mark.parametrize(
    ("kind", "theirs", "expected"),
    [
        (int, "string", r"Order.value: the topic's records have string there, but its class takes long"),
        (datetime.datetime, "long", r"Order.value: .* long there, but its class takes long \(timestamp-micros\)"),
        (list[Item], {"type": "array", "items": record("L", sku="long")}, r"Order.value\[\].sku: .* have long"),
        (Item, record("L", code="string"), r"Order.value.sku: .*no such field.*: code"),
        (Item, {"type": "array", "items": "string"}, r"Order.value: .* have array there, but its class takes record"),
        (dict[str, int], {"type": "map", "values": STATUS}, r"Order.value\{\}: .* have enum"),
        (Item | None, ["null", record("L", sku="string"), record("M", sku="string")], r"Order.value: .*one of 2 types"),
        (decimal.Decimal, "double", r"Order.value: .* have double"),
    ],
)
def test_a_foreign_avro_schema_that_does_not_fit_the_class_stops_the_reader(
    kind: Any, theirs: Any, expected: str
) -> None:
    """The error names the field. Otherwise all events of the topic would become dead letters, one by one."""
    ours = kind_of(msgspec.defstruct("Order", [("value", kind)]), topic="theirs", format="avro")
    schema = json.dumps(record("OrderPlaced", value=theirs))
    with pytest.raises(IncompatibleEvent, match=expected):
        ours.decode(b"\0\0\0\0\5x", lambda mark: None, lambda schema_id, likely: schema)


def test_a_null_that_the_class_does_not_allow_makes_one_record_unreadable() -> None:
    """A schema may allow null although no record has it. Only a record with null is not an event."""
    ours = kind_of(msgspec.defstruct("Order", [("value", str)]), topic="theirs", format="avro")
    schema = record("OrderPlaced", value=["null", "string"])

    def decode(value: str | None) -> dict[str, Any]:
        return ours.decode(framed(schema, {"value": value}), lambda mark: None, lambda *_: json.dumps(schema))

    assert decode("a") == {"value": "a"}
    with pytest.raises(NotAnEvent, match=r"Order\.value is null"):
        decode(None)


def test_records_of_another_kind_on_a_topic_are_no_event() -> None:
    """If one type of the topic's records fits the class, a record of another type does not stop the reader. A later
    form of the fitting type that does not fit any more stops the reader."""
    ours = kind_of(msgspec.defstruct("Order", [("value", str)]), topic="theirs", format="avro")
    schemas = {1: record("Placed", value="string"), 2: record("Left", who="string"), 3: record("Placed", value="long")}

    def decode(schema_id: int, values: dict[str, Any]) -> dict[str, Any]:
        value = framed(schemas[schema_id], values, schema_id)
        return ours.decode(value, lambda mark: None, lambda schema_id, _: json.dumps(schemas[schema_id]))

    assert decode(1, {"value": "a"}) == {"value": "a"}
    for _ in range(2):
        with pytest.raises(NotAnEvent, match=r"Order\.value"):
            decode(2, {"who": "b"})
    with pytest.raises(IncompatibleEvent, match=r"Order\.value"):
        decode(3, {"value": 7})


@pytest.mark.parametrize(
    "text", ['"string"', "[]", '{"type": "record", "name": "R", "fields": [{"name": "value", "type": "Other"}]}']
)
def test_a_foreign_schema_that_cannot_be_used_stops_the_reader(text: str) -> None:
    ours = kind_of(msgspec.defstruct("Order", [("value", str)]), topic="theirs", format="avro")
    with pytest.raises(IncompatibleEvent, match="theirs"):
        ours.decode(b"\0\0\0\0\5x", lambda mark: None, lambda schema_id, likely: text)


def framed(schema: dict[str, Any], values: dict[str, Any], schema_id: int = 5) -> bytes:
    """Return a record of another program, in the frame of a Schema Registry."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(json.dumps(schema))), values)
    return b"\0" + schema_id.to_bytes(4, "big") + out.getvalue()


@given(st.uuids())
def test_the_job_id_is_computed_from_the_event_id_and_the_handler(event_id: uuid.UUID) -> None:
    """The computation may never change: a replay next year must give the same ids."""
    app = App("shop", settings=Settings())
    app.event(Shipped)

    @app.on(Shipped)
    def bill(event: Shipped) -> None: ...

    @app.on(Shipped)
    def mail(event: Shipped, template: str = "shipped") -> None: ...

    ids = [handler.job_id(str(event_id)) for handler in app.registry.handlers["Shipped"]]
    assert ids == [str(uuid.uuid5(event_id, "bill")), str(uuid.uuid5(event_id, "mail"))]


def test_a_handler_takes_the_event_and_no_other_required_argument() -> None:
    """The handler is checked when it is registered. If it is refused, it is no task, either."""
    app = App("shop", settings=Settings())
    app.event(Shipped)

    def two(event: Shipped, more: int) -> None: ...

    with pytest.raises(ConfigError, match="takes the event"):
        app.on(Shipped)(two)
    with pytest.raises(ConfigError, match="takes the event"):
        app.on(Shipped, name="none")(lambda: None)
    assert not app.tasks
    with pytest.raises(BadEvent, match="OrderPlaced"):
        app.on(OrderPlaced)
    with pytest.raises(UnknownTask, match="bill"):
        app.registry.handler("bill")


def test_an_event_without_an_id_header_gets_its_id_from_its_position() -> None:
    """Two readers compute the same id for one record, and two records have different ids."""
    known = str(uuid.uuid4())
    assert event_id_of({"jl-event": known.encode()}, "t", 0, 1) == known
    assert event_id_of({"jl-event": b"nonsense"}, "t", 0, 1) == event_id_of({}, "t", 0, 1)
    assert len({event_id_of({}, *position) for position in (("t", 0, 1), ("t", 0, 2), ("t", 1, 1), ("u", 0, 1))}) == 4


def test_the_router_begins_at_the_end_of_a_foreign_topic() -> None:
    """The router begins at the oldest event of our own topics. The class may set another start."""
    theirs = {"topic": "warehouse.shipped", "format": "json"}
    assert [kind_of(Shipped, **options).start for options in ({}, theirs)] == ["earliest", "latest"]
    assert kind_of(Shipped, start="latest").start == "latest"
    assert kind_of(Shipped, start="earliest", **theirs).start == "earliest"


@pytest.mark.parametrize(
    ("notes", "count"),
    [
        ([], None),
        ([note(3), note(3)], 3),
        ([None, note(3)], 3),
        ([note(4), note(3), ""], 3),
        ([None, "", "nonsense", "[1]", '{"began_with": "x"}'], 0),
    ],
)
def test_commits_tell_how_many_partitions_a_topic_first_had(notes: list[str | None], count: int | None) -> None:
    """If no commit has the number, the topic was read from its beginning, and so are added partitions."""
    assert began_with(notes) == count


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"n": 1}, "'n'=1"),
        ("tenant", "tags='tenant' is not a mapping"),
        ({"event": "mine"}, "handler 'sync': tag 'event' is the event's id"),
    ],
)
def test_tags_of_a_handler_are_checked(tags: Any, expected: str) -> None:
    """Fixed tags are checked when the handler is declared. The tags that a function returns are checked for each event,
    by the same rule; the error is `BadTags` with the handler's name."""
    app = App("handlers", settings=Settings(bootstrap="127.0.0.1:1"))
    app.event(Shipped)

    def sync(event: Shipped) -> None: ...

    with pytest.raises(ConfigError, match=expected):
        app.on(Shipped, tags=tags)(sync)
    assert "sync" not in app.tasks
    app.on(Shipped, tags=lambda event: tags)(sync)
    handler = app.registry.handler("sync")
    args = handler.args({"order_id": "o-1", "weight": 1.5})
    with pytest.raises(BadTags, match=f"handler 'sync': its tags= failed for this event: ConfigError: .*{expected}"):
        handler.tags(args)


def test_a_handler_takes_a_tasks_options() -> None:
    """The options are priority, isolation, leases, limits and expiry. `key=` is refused, because jobs of events have no
    order."""
    app = App("handlers", settings=Settings(bootstrap="127.0.0.1:1"), queues=[Queue("crm", priorities=True)])

    app.event(Shipped)

    @app.on(Shipped, queue="crm", priority="high", isolation="process", timeout=90, max_memory="64MiB", expires_in=5)
    def sync(event: Shipped) -> None: ...

    policy = app.tasks["sync"].policy
    assert (policy.priority, policy.isolation, policy.long, policy.expires_in) == ("high", "process", True, 5.0)
    with pytest.raises(ConfigError, match=r"App.on\(Shipped\) takes no key=: the jobs of events are not ordered"):
        app.on(Shipped, key="n")  # type: ignore[call-arg]  # wrong on purpose
    with pytest.raises(TypeError, match="nonsense"):
        app.on(Shipped, nonsense=1)  # type: ignore[call-arg]  # wrong on purpose
