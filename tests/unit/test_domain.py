"""Domain events without a broker: the schemas of classes, values there and back, evolution, handlers and their jobs."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import fastavro
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, BadEvent, ConfigError, IncompatibleEvent, Queue, Settings, UnknownTask
from jobledger.domain import EventType, earlier_of, event_id_of
from jobledger.errors import NotAnEvent, UnknownSchema
from jobledger.names import Names
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
def test_what_a_handler_gets_is_what_was_emitted(order: OrderPlaced) -> None:
    """From the class over Avro and the job's JSON arguments back to the class: nothing is lost or changed."""
    kind = kind_of(OrderPlaced, key="order_id")
    value, key = kind.encode(order)
    assert key == str(order.order_id)
    raw = msgspec.json.encode({"event": kind.decode(value, lambda mark: None)})
    assert msgspec.json.decode(raw, type=dict[str, OrderPlaced])["event"] == order


def test_the_schema_says_what_the_class_says() -> None:
    """Names, types, defaults and documentation; a reader that knows Avro and nothing of us understands it."""
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
    fastavro.parse_schema(schema)
    assert kind_of(OrderPlaced).fullname == "shop_eu.events.OrderPlaced"


def test_a_plain_class_becomes_a_frozen_dataclass_and_others_stay() -> None:
    """`@app.event` on a class with annotations is enough; Structs are taken as they are;
    the same name twice is refused."""
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


def test_pydantic_models_are_events_where_pydantic_is() -> None:
    """With aliases and nested models."""
    pydantic = pytest.importorskip("pydantic")

    class Inner(pydantic.BaseModel):  # type: ignore[name-defined,misc]  # imported above, if it is there
        n: int

    class Outer(pydantic.BaseModel):  # type: ignore[name-defined,misc]  # as above
        who: str
        inner: Inner
        note: str | None = None

    kind = kind_of(Outer)
    value, _ = kind.encode(Outer(who="a", inner=Inner(n=2)))
    assert kind.decode(value, lambda mark: None) == {"who": "a", "inner": {"n": 2}, "note": None}


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
def test_what_avro_cannot_say_is_refused_with_its_name(cls: type[Any]) -> None:
    """When the class is declared, not when the first event is emitted."""
    with pytest.raises(ConfigError, match=cls.__name__):
        kind_of(cls)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"key": "nope"}, "no field"), ({"format": "json"}, "topic="), ({"format": "xml", "topic": "t"}, "none of"),
     ({"name": "a.b"}, "not usable"), ({"retention_days": 0}, "above 0")],
)  # fmt: skip
def test_options_that_cannot_hold_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind_of(Shipped, **options)


@pytest.mark.parametrize("bad", [Shipped(5), Shipped("a", "heavy"), Line("a"), object()])  # type: ignore[arg-type]  # the point
def test_values_that_do_not_fit_are_refused_before_anything_is_sent(bad: Any) -> None:
    with pytest.raises(BadEvent, match="Shipped"):
        kind_of(Shipped).encode(bad)


def renamed(cls: type[Any], name: str = "Shipped") -> EventType:
    return kind_of(cls, name=name)


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
    """New fields take their defaults, dropped ones are passed over."""
    earlier, later = kind_of(Shipped), renamed(WithMore)
    texts_by = {earlier.fingerprint: earlier.schema, later.fingerprint: later.schema}
    value, _ = earlier.encode(Shipped("a", 2.5))
    assert later.decode(value, texts_by.get) == {"order_id": "a", "weight": 2.5, "carrier": "post"}
    value, _ = later.encode(WithMore("b", 1.5, "ship"))
    assert earlier.decode(value, texts_by.get) == {"order_id": "b", "weight": 1.5}
    with pytest.raises(UnknownSchema):
        kind_of(Shipped).decode(value, lambda mark: None)


@pytest.mark.parametrize(
    ("cls", "fits"), [(WithMore, True), (WithLess, True), (WithAnother, False), (WithoutDefault, False)]
)
def test_evolution_is_judged_against_every_earlier_schema(cls: type[Any], fits: bool) -> None:
    """A field may come with a default and may go; its type may not change. Other events' schemas are not looked at."""
    earlier, later = kind_of(Shipped), renamed(cls)
    other = kind_of(OrderPlaced)
    known = {k.fingerprint: k.schema for k in (earlier, later, other)}
    found = earlier_of(later, known)
    assert list(found) == [earlier.fingerprint.hex()]
    if fits:
        check_evolution(later.name, later.schema, found)
    else:
        with pytest.raises(IncompatibleEvent, match=earlier.fingerprint.hex()):
            check_evolution(later.name, later.schema, found)


@pytest.mark.parametrize("value", [None, b"", b"\xc3\x01short", b"garbage" * 5, b"\x00\x00\x00\x00\x01abc"])
def test_bytes_that_are_no_event_are_said_to_be_none(value: bytes | None) -> None:
    with pytest.raises((NotAnEvent, UnknownSchema)):
        kind_of(Shipped).decode(value, lambda mark: None)


def test_half_an_event_is_none() -> None:
    kind = kind_of(Shipped)
    value, _ = kind.encode(Shipped("a-long-order-id", 2.0))
    with pytest.raises(NotAnEvent):
        kind.decode(value[:-12], lambda mark: None)


def test_json_of_others_is_read_by_the_same_class() -> None:
    """An object is taken; what else is JSON is none."""
    kind = kind_of(Shipped, topic="warehouse.shipped", format="json")
    assert kind.decode(b'{"order_id": "a", "weight": 1.0}', lambda mark: None) == {"order_id": "a", "weight": 1.0}
    for value in (b"[1]", b"{", b"7"):
        with pytest.raises(NotAnEvent):
            kind.decode(value, lambda mark: None)


@given(st.uuids())
def test_a_job_of_an_event_and_a_handler_has_one_id_for_ever(event_id: uuid.UUID) -> None:
    """The ids are a contract: a replay next year must find the same jobs."""
    app = App("shop", settings=Settings())
    app.event(Shipped)

    @app.on(Shipped)
    def bill(event: Shipped) -> None: ...

    @app.on(Shipped)
    def mail(event: Shipped, template: str = "shipped") -> None: ...

    ids = [handler.job_id(str(event_id)) for handler in app.registry.handlers["Shipped"]]
    assert ids == [str(uuid.uuid5(event_id, "bill")), str(uuid.uuid5(event_id, "mail"))]


def test_a_handler_takes_the_event_and_nothing_else_that_is_needed() -> None:
    """Judged when it is registered, and then it is no task, either."""
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


def test_an_event_without_our_header_is_known_by_its_place() -> None:
    """Two readers of one record agree; two records never do."""
    known = str(uuid.uuid4())
    assert event_id_of({"jl-event": known.encode()}, "t", 0, 1) == known
    assert event_id_of({"jl-event": b"nonsense"}, "t", 0, 1) == event_id_of({}, "t", 0, 1)
    assert len({event_id_of({}, *where) for where in (("t", 0, 1), ("t", 0, 2), ("t", 1, 1), ("u", 0, 1))}) == 4


def test_a_handler_takes_a_tasks_options() -> None:
    """Priority, isolation, leases, limits, expiry; a key is the event's own."""
    app = App("handlers", settings=Settings(bootstrap="127.0.0.1:1"), queues=[Queue("crm", priorities=True)])

    app.event(Shipped)

    @app.on(Shipped, queue="crm", priority="high", isolation="process", timeout=90, max_memory="64MiB", expires_in=5)
    def sync(event: Shipped) -> None: ...

    policy = app.tasks["sync"].policy
    assert (policy.priority, policy.isolation, policy.long, policy.expires_in) == ("high", "process", True, 5.0)
    with pytest.raises(TypeError, match="key"):
        app.on(Shipped, key="n")  # type: ignore[call-arg]  # the point of the test
