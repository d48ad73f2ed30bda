"""Results: what a task's function returned is what whoever asks gets, by the return annotation."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypedDict

import msgspec
import pydantic
import pytest

from jobledger import App, JobledgerError, ResultMismatch

DAY = dt.date(2026, 1, 2)


@dataclass(frozen=True)
class Line:
    """A record in a record."""

    sku: str
    on: dt.date


@dataclass(frozen=True)
class Order:
    """A dataclass."""

    lines: list[Line]
    total: decimal.Decimal


class Point(msgspec.Struct, frozen=True):
    """A msgspec Struct."""

    at: dt.datetime


class Extra(TypedDict):
    """A TypedDict."""

    day: dt.date


class Model(pydantic.BaseModel):
    """A pydantic model."""

    day: dt.date


class Colour(enum.Enum):
    """An enum."""

    RED = "red"


class Opaque:
    """What no JSON can be read as."""


class Strict(pydantic.BaseModel):
    """A model that judges."""

    rows: int = pydantic.Field(gt=0)


def returning(annotation: Any) -> Callable[[], Any]:
    """A function with this return annotation."""

    def work() -> Any:
        """A task's function."""

    work.__annotations__["return"] = annotation
    return work


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Order, Order([Line("a", DAY)], decimal.Decimal("1.10"))),
        (Point, Point(dt.datetime(2026, 1, 2, 3, 4, 5, 678901, dt.UTC))),
        (Extra, Extra(day=DAY)),
        (Model, Model(day=DAY)),
        (list[Model], [Model(day=DAY), Model(day=DAY)]),
        (dict[str, Order], {"a": Order([], decimal.Decimal("-0.00"))}),
        (list[dt.date], [DAY]),
        (tuple[int, dt.date], (1, DAY)),
        (Mapping[str, int], {"a": 1}),
        (dict[int, str], {1: "a"}),
        (dt.date | None, DAY),
        (dt.date | None, None),
        (dt.datetime, dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone(dt.timedelta(hours=2)))),
        (dt.timedelta, dt.timedelta(days=-1, microseconds=5)),
        (decimal.Decimal, decimal.Decimal("123456789012345678901234567890.1")),
        (uuid.UUID, uuid.UUID(int=7)),
        (Colour, Colour.RED),
        (Literal["a", "b"], "b"),
        (bytes, b"\x00\xff"),
        (float, 3.0),
        (int, 2**63),
        (bool, False),
        (None, None),
        (str, ""),
    ],
)
def test_a_result_comes_back_as_the_annotation_says(annotation: Any, value: Any) -> None:
    """What the function returned and what `JobHandle.result` gives are equal and of one type."""
    task = App("shop").task(returning(annotation))
    raw = None if value is None else task.encode_result(value)
    found = task.decode_result(None if raw is None else msgspec.json.decode(raw), "1")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (dict[str, object], {"n": 1, "of": [None, {"a": 1.5}]}),
        (list[object], [1, "a", None]),
        (dict[str, object] | None, {"n": 1}),
        (Mapping[str, list[object]], {"n": [1]}),
    ],
)
def test_object_inside_an_annotation_is_plain_json(annotation: Any, value: Any) -> None:
    """``object`` stands for any JSON value, in a result and in an argument, as ``Any`` does."""

    def work(given):  # type: ignore[no-untyped-def]  # annotated below
        """Takes and returns one type."""

    work.__annotations__ = {"given": annotation, "return": annotation}
    task = App("shop").task(work)
    assert task.decode_result(value, "1") == value
    assert task.decode_args(task.job(value).args) == {"given": value}


@pytest.mark.parametrize("annotation", [Any, object, NoReturn])
def test_without_a_telling_annotation_a_result_is_plain_json(annotation: Any) -> None:
    """``Any``, ``object`` and no annotation at all give what JSON holds."""

    def bare():  # type: ignore[no-untyped-def]  # the point of the test
        """A function that says nothing of its result."""

    app = App("shop")
    for task in (app.task(returning(annotation)), app.task(bare)):
        assert task.decode_result({"day": "2026-01-02"}, "1") == {"day": "2026-01-02"}


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        (Order, {"lines": [{"sku": 1, "on": "2026-01-02"}], "total": "1"}, r"Expected `str`, got `int` - at `\$.lines"),
        (dt.date, "yesterday", "Invalid RFC3339"),
        (int, None, "Expected `int`, got `null`"),
        (None, 7, "Expected `null`, got `int`"),
        (Strict, {"rows": 0}, "greater than 0"),
        (str, ["x" * 10_000], "Expected `str`, got `array`"),
    ],
)
def test_a_result_that_does_not_fit_says_what_it_got(annotation: Any, value: Any, why: str) -> None:
    """The error is one of ours: it names the job, the task, the annotation, the reason and the value; it is short, and
    the value itself is on it."""
    task = App("shop").task(name="report")(returning(annotation))
    with pytest.raises(ResultMismatch, match=why) as caught:
        task.decode_result(value, "01890a5d")
    said = str(caught.value)
    assert isinstance(caught.value, JobledgerError)
    assert "job 01890a5d" in said
    assert "report() -> " in said
    assert repr(value)[:100] in said
    assert len(said) < 1_500
    assert (caught.value.value, caught.value.job_id, caught.value.task) == (value, "01890a5d", "report")


@pytest.mark.parametrize(
    ("annotation", "named"),
    [
        (Opaque, "Opaque"),
        (Opaque | None, "Opaque"),
        (list[Opaque], "Opaque"),
        (dict[str, tuple[int, Opaque]], "Opaque"),
        (Iterable[int], "Iterable"),
        (Iterator[int], "Iterator"),
        (Order | Line, "more than one dataclass"),
    ],
)
def test_an_annotation_that_no_json_can_be_read_as_gives_plain_json_and_a_warning(annotation: Any, named: str) -> None:
    """A task whose result cannot come back as its annotation says is taken: the warning names the way out, once, when it is
    declared."""
    with pytest.warns(RuntimeWarning, match=rf"(?s)'work'.*result.*{named}.*Any to get plain JSON"):
        task = App("shop").task(returning(annotation))
    assert task.decode_result({"plain": 1}, "job-1") == {"plain": 1}


def test_a_fallback_and_a_handler_give_results_of_their_own() -> None:
    """Each task reads results by its own annotation, the one that stands in for another, too."""
    app = App("shop")
    other = app.task(name="other")(returning(Line))
    task = app.task(name="first", fallback=other)(returning(Extra))
    app.check()
    assert other.decode_result({"sku": "a", "on": "2026-01-02"}, "1") == Line("a", DAY)
    assert task.decode_result({"day": "2026-01-02"}, "1") == {"day": DAY}
