"""A value arrives as it was sent. A value that JSON would change is refused at the call, with its path."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import io
import json
import math
import uuid
import zoneinfo
from typing import Any, NamedTuple, TypedDict

import fastavro
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App
from jobledger.config import Settings
from jobledger.definitions.event_types import Handler
from jobledger.definitions.task import Task
from jobledger.errors import BadArguments, BadEvent, ConfigError, NotAnEvent
from jobledger.schemas import exact

NAN = math.nan
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
#: A time in the repeated hour at the end of summer time, in its second pass.
TWICE = dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1)
#: Local mean time: an offset of 53 minutes and 28 seconds.
OLD = dt.datetime(1880, 1, 1, tzinfo=BERLIN)


class Colour(enum.Enum):
    RED = 1


class Plan(enum.StrEnum):
    FREE = "free"


class Seconds(float):
    """A user's subclass of float, like numpy's."""


class Name(str):
    """A user's subclass of str."""

    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class Count(int):
    """A user's subclass of int."""


class Pair(NamedTuple):
    left: int
    right: int


@dataclasses.dataclass
class Item:
    sku: str
    price: float = 1.0
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Gift(Item):
    to: str = ""


class Line(msgspec.Struct, rename="camel", tag="line"):
    item_code: str
    due: dt.datetime | None = None


class Extra(TypedDict, total=False):
    note: str
    item: Item


class Model(pydantic.BaseModel):
    x: float
    sizes: tuple[int, ...] = ()


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")

    x: int


class Closed(pydantic.BaseModel):
    password: pydantic.SecretStr


class Hidden(pydantic.BaseModel):
    _cache: list[int] = pydantic.PrivateAttr(default_factory=list)
    x: int = 0


def task(annotation: Any) -> Task[Any, Any]:
    """Return a task with one parameter ``x``. If ``annotation`` is None, the parameter has none."""

    def take(x): ...  # type: ignore[no-untyped-def]  # annotated next

    if annotation is not None:
        take.__annotations__ = {"x": annotation}
    made: Task[Any, Any] = App("shop", settings=Settings()).task(take)
    return made


ARRIVES = [
    (None, -0.0, -0.0),
    (None, (1, (2,)), [1, [2]]),
    (None, 2**70, 2**70),
    (None, {"a": Name("b")}, {"a": "b"}),
    (None, Plan.FREE, "free"),
    (str, Name("a"), "a"),
    (int, Count(3), 3),
    (float, Seconds(1.5), 1.5),
    (float, 2**53, float(2**53)),
    (set[int], {1, 2}, {1, 2}),
    (set[int], [1, 1], {1}),
    (dict[int, str], {1: "a"}, {1: "a"}),
    (dict[int, str], {"1": "a"}, {1: "a"}),
    (dt.datetime, "2026-01-01T00:00:00Z", dt.datetime(2026, 1, 1, tzinfo=dt.UTC)),
    (dt.datetime, dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1)),
    (dt.datetime, dt.datetime(2026, 7, 1, tzinfo=BERLIN), dt.datetime(2026, 7, 1, tzinfo=BERLIN)),
    (dt.time, dt.time(1, 2, tzinfo=dt.UTC), dt.time(1, 2, tzinfo=dt.UTC)),
    (dt.timedelta, dt.timedelta(days=1, microseconds=1), dt.timedelta(days=1, microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.50"), decimal.Decimal("1.50")),
    (bytes, b"ab", b"ab"),
    (uuid.UUID, uuid.UUID(int=1), uuid.UUID(int=1)),
    (Colour, Colour.RED, Colour.RED),
    (Pair, Pair(1, 2), Pair(1, 2)),
    (Item, Item("a", tags=("b",)), Item("a", tags=["b"])),  # type: ignore[arg-type]  # a tuple for a list
    (Item, {"sku": "a"}, Item("a")),
    (Line, {"type": "line", "itemCode": "a"}, Line("a")),
    (Extra, {"item": {"sku": "a"}}, {"item": Item("a")}),
    (Model, Model(x=1, sizes=(1, 2)), Model(x=1, sizes=(1, 2))),
    (Model, {"x": 1, "yy": 2}, Model(x=1)),  # this model ignores unknown fields
    (Open, Open(x=1, y=2), Open(x=1, y=2)),  # type: ignore[call-arg]  # this model keeps unknown fields
]


@pytest.mark.parametrize(("annotation", "value", "arrives"), ARRIVES, ids=lambda v: str(v)[:40])
def test_a_value_that_arrives_equal_is_sent(annotation: Any, value: Any, arrives: Any) -> None:
    """A tuple arrives as a list, an object of a subclass as the plain type, and an annotated argument as its annotation
    says."""
    made = task(annotation)
    received = made.decode_args(made.encode_args((value,), {}))["x"]
    assert received == arrives
    assert type(received) is type(arrives)


def test_a_time_in_a_repeated_hour_is_sent() -> None:
    """Python treats this time as unequal to every time of another zone, but the received time is the same moment."""
    made = task(dt.datetime)
    received = made.decode_args(made.encode_args((TWICE,), {}))["x"]
    assert received.astimezone(dt.UTC) == TWICE.astimezone(dt.UTC)


def test_private_attributes_of_a_model_are_ignored() -> None:
    """A private attribute is no field, so a lost one does not count as a changed value."""
    made, model = task(Hidden), Hidden(x=1)
    model._cache.append(1)
    assert made.decode_args(made.encode_args((model,), {}))["x"].x == 1


REFUSED = [
    (None, NAN, r"x is nan"),
    (float, NAN, r"x is nan"),
    (float | None, math.inf, r"x is inf"),
    (float, Seconds("-inf"), r"x is -inf"),
    (None, {"a": [1, (2, NAN)]}, r"x\['a'\]\[1\]\[1\] is nan"),
    (Item, Item("a", NAN), r"x\.price is nan"),
    (Item, {"sku": "a", "price": NAN}, r"x\['price'\] is nan"),
    (Model, Model(x=NAN), r"x\.x is nan"),
    (Open, {"x": 1, "y": NAN}, r"x\['y'\] is nan"),
    (None, {1, 2}, r"x is \{1, 2\} .*annotation.*list"),
    (list[int], frozenset({1}), r"frozenset"),
    (None, {1: "a"}, r"key 1.*dict\[int"),
    (None, {"a": {1: 2, "1": 3}}, r"x\['a'\] has the key 1"),
    (None, {Colour.RED: 1}, r"dict\[Colour"),
    (None, dt.datetime(2026, 1, 1), r"datetime in the annotation.*isoformat"),
    (str, dt.date(2026, 1, 1), r"date in the annotation"),
    (None, dt.timedelta(1), r"total_seconds"),
    (None, decimal.Decimal("1.5"), r"Decimal in the annotation"),
    (None, b"ab", r"bytes in the annotation.*base64"),
    (str, uuid.UUID(int=1), r"UUID in the annotation.*str"),
    (None, Colour.RED, r"Colour in the annotation"),
    (None, Item("a"), r"Item in the annotation"),
    (None, [Line("a")], r"x\[0\] is Line.*annotation"),
    (None, Model(x=1), r"Model in the annotation"),
    (None, Pair(1, 2), r"Pair in the annotation"),
    (Item, Gift("a", to="b"), r"Gift in the annotation"),
    (dt.datetime, OLD, r"would arrive as .*isoformat"),
    (dt.time, dt.time(1, 2, tzinfo=BERLIN), r"would arrive as datetime.time\(1, 2\)"),
    (list[dt.time], [dt.time(1, 2, tzinfo=BERLIN)], r"x\[0\] is datetime.time"),
    (float, 2**53 + 1, r"9007199254740993 and would arrive as 9007199254740992"),
    (Closed, Closed(password=pydantic.SecretStr("s")), r"x\.password"),
]


@pytest.mark.parametrize(("annotation", "value", "expected"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_value_that_would_arrive_changed_is_refused_with_its_path(annotation: Any, value: Any, expected: str) -> None:
    """The error names the task, the path, the value and a remedy."""
    with pytest.raises(BadArguments, match=expected) as caught:
        task(annotation).encode_args((value,), {})
    assert "take()" in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Item, {"sku": "a", "pricce": 2}, r"x: 'pricce' is not a field of Item, which has sku, price, tags"),
        (list[Item], [{"sku": "a", "pricce": 2}], r"x\[0\]: 'pricce'"),
        (dict[str, Item], {"k": {"sku": "a", "pricce": 2}}, r"x\['k'\]: 'pricce'"),
        (Item | None, {"sku": "a", "pricce": 2}, "'pricce'"),
        (
            Line,
            {"itemCode": "a", "item_code": "b"},
            r"'item_code' is not a field of Line, which has type, itemCode, due",
        ),
        (Extra, {"note": "a", "nott": "b"}, "'nott'"),
        (Extra, {"item": {"sku": "a", "pricce": 2}}, r"x\['item'\]: 'pricce'"),
    ],
)
def test_a_typo_inside_an_argument_is_refused(annotation: Any, value: Any, expected: str) -> None:
    """Otherwise a misspelled field of the annotated class, at any depth, would be dropped."""
    with pytest.raises(BadArguments, match=expected):
        task(annotation).encode_args((value,), {})


def test_a_default_of_nan_is_allowed() -> None:
    """A default is not sent: the worker takes it from the function."""
    made = App("shop", settings=Settings()).task(lambda x, limit=NAN: (x, limit))
    assert made.decode_args(made.encode_args((1,), {})) == {"x": 1}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab", max_size=2) | st.integers(0, 3), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers(0, 3), max_size=2)
    ),
    max_leaves=8,
)


def same(given: Any, back: Any) -> bool:
    """Return whether two values are equal, if a list counts as equal to a tuple."""
    if isinstance(given, list | tuple):
        return isinstance(back, list) and len(given) == len(back) and all(map(same, given, back))
    if isinstance(given, dict):
        return isinstance(back, dict) and given.keys() == back.keys() and all(same(given[k], back[k]) for k in given)
    return (
        type(given) is type(back) and given == back and math.copysign(1, given or 0) == math.copysign(1, back or 0)
        if isinstance(given, float)
        else type(given) is type(back) and bool(given == back)
    )


@given(PLAIN)
def test_an_argument_is_refused_or_arrives_as_it_was(value: Any) -> None:
    """For any value, no argument arrives changed, and no argument that would arrive unchanged is refused."""
    made = ANY
    try:
        raw = made.encode_args((value,), {})
    except BadArguments:
        assert not same(value, exact.as_json(value))
    else:
        assert same(value, made.decode_args(raw)["x"])


ANY = task(None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NAN, "the result is nan"),
        ({"a": [math.inf]}, r"the result\['a'\]\[0\] is inf"),
        (Item("a", NAN), r"the result\.price is nan"),
        (Model(x=NAN), r"the result\.x is nan"),
        ({1: "a", "1": "b"}, "keys that become equal"),
        ([OLD], r"the result\[0\] is datetime"),
        (dt.time(1, tzinfo=BERLIN), "time"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_result_that_json_cannot_hold_is_refused_with_its_path(value: Any, expected: str) -> None:
    """The job fails as bad-result. A null in place of the value would be another result."""
    with pytest.raises(ValueError, match=expected):
        ANY.encode_result(value)


@pytest.mark.parametrize(
    "value",
    [None, 1, "a", 1.5, (1, 2), {1, 2}, {1: "a"}, Item("a"), Model(x=1), TWICE, decimal.Decimal("NaN"), Colour.RED, b"a",
     Pair(1, 2), Seconds(1.5), [Name("a")], 2**70, Line("a")],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_a_result_that_json_can_hold_is_accepted(value: Any) -> None:
    """A reader gets a dataclass or a set back if the return annotation says so."""
    raw = ANY.encode_result(value)
    assert raw is None or json.loads(raw) is not None


@pytest.mark.parametrize(
    ("value", "sure"),
    [
        ([(1, "a"), (2, None)], True),
        ([[1], [2.5, (True,)]], True),
        ({"a": [Item("a"), {"b": (1.5,)}], "at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}, True),
        (Model(x=1), True),
        ([(1, NAN)], False),
        ([[1], [2.5, (math.inf,)]], False),
        ({"a": Item("a", NAN)}, False),
        ({1: "a", "1": "b"}, False),
        ([OLD], False),
        ({"a": dt.time(1, tzinfo=BERLIN)}, False),
    ],
    ids=lambda v: str(v)[:40],
)
def test_most_results_are_written_without_a_second_check(value: Any, sure: bool) -> None:
    """Only a result that JSON may not hold needs the second check, which builds the path for the error."""
    assert exact.surely_writable(value) is sure
    assert not sure or exact.unwritable(value, "it") is None


@dataclasses.dataclass(frozen=True)
class Measured:
    at: dt.datetime | None = None
    value: float = 0.0
    more: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def measuring() -> tuple[App, Handler]:
    """Return an app with an event that has times and numbers, and the event's handler."""
    app = App("shop", settings=Settings())
    app.event(Measured)

    @app.on(Measured)
    def note(event: Measured) -> None: ...

    return app, app.registry.handler("note")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Measured(dt.datetime(2026, 7, 1, 12)), r"Measured\.at is 2026-07-01T12:00:00, without a time zone.*\+00:00"),
        (Measured(value=NAN), r"Measured\.value is nan"),
        (Measured(more={"a": [1.0, -math.inf]}), r"Measured\.more\.a\[1\] is -inf"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_an_event_with_a_time_without_a_zone_or_with_nan_is_refused(event: Measured, expected: str) -> None:
    """A time without a zone is another moment on another machine. NaN cannot be passed to a handler."""
    app, _ = measuring()
    with pytest.raises(BadEvent, match=expected):
        app.events["Measured"].encode(event)


def test_times_in_events_from_the_command_line_need_a_zone() -> None:
    """Their values are JSON, and are checked when the event is emitted."""
    kind = measuring()[0].events["Measured"]
    with pytest.raises(BadEvent, match="time zone"):
        kind.encode(kind.of({"at": "2026-07-01T12:00:00"}))
    raw, _ = kind.encode(kind.of({"at": "2026-07-01T12:00:00+02:00", "value": -0.0}))
    decoded = kind.decode(raw, lambda mark: None)
    assert decoded["at"] == dt.datetime(2026, 7, 1, 10, tzinfo=dt.UTC)
    assert math.copysign(1, decoded["value"]) == -1


def test_a_default_of_nan_or_of_a_time_without_a_zone_is_refused_at_the_declaration() -> None:
    """Otherwise the schema of the event would contain the default."""
    for default in (NAN, dt.datetime(2026, 7, 1)):
        made = dataclasses.make_dataclass("Made", [("x", type(default), default)])
        with pytest.raises(ConfigError, match=r"Made\.x: its default"):
            App("shop", settings=Settings()).event(made)


def test_a_foreign_event_with_nan_is_rejected() -> None:
    """Another program may write NaN in Avro. The router rejects the event with the path, and passes no null to the
    handler."""
    app, handler = measuring()
    kind = app.events["Measured"]
    out = io.BytesIO()
    out.write(kind.encode(Measured())[0][:10])
    fastavro.schemaless_writer(out, json.loads(kind.schema), {"at": None, "value": NAN, "more": {}})
    with pytest.raises(NotAnEvent, match=r"Measured\['value'\] is nan"):
        handler.args(kind.decode(out.getvalue(), lambda mark: None))
    assert json.loads(handler.args(kind.decode(kind.encode(Measured())[0], lambda mark: None)))["event"]["at"] is None
