"""Results: a caller gets the value that the task's function returned, by the return annotation."""

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
    """A class that cannot be read from JSON."""


class Strict(pydantic.BaseModel):
    """A model that checks its values."""

    rows: int = pydantic.Field(gt=0)


def returning(annotation: Any) -> Callable[[], Any]:
    """Return a function with this return annotation."""

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
def test_a_result_is_decoded_by_the_return_annotation(annotation: Any, value: Any) -> None:
    """The decoded result is equal to the returned value, and has the same type."""
    task = App("shop").task(returning(annotation))
    raw = None if value is None else task.encode_result(value)
    decoded = task.decode_result(None if raw is None else msgspec.json.decode(raw), "1")
    assert decoded == value
    assert type(decoded) is type(value)


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
    """Like ``Any``, ``object`` means any JSON value, in a result and in an argument."""

    def work(given):  # type: ignore[no-untyped-def]  # annotated below
        """Takes and returns one type."""

    work.__annotations__ = {"given": annotation, "return": annotation}
    task = App("shop").task(work)
    assert task.decode_result(value, "1") == value
    assert task.decode_args(task.job(value).args) == {"given": value}


@pytest.mark.parametrize("annotation", [Any, object, NoReturn])
def test_without_a_specific_annotation_a_result_is_plain_json(annotation: Any) -> None:
    """With ``Any``, with ``object`` and without an annotation, the result is the JSON value."""

    def bare():  # type: ignore[no-untyped-def]  # without an annotation on purpose
        """A function without a return annotation."""

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
def test_the_error_of_a_result_that_does_not_fit_shows_the_value(annotation: Any, value: Any, why: str) -> None:
    """The error names the job, the task, the annotation, the reason and the value. Its message is short, and the whole
    value is an attribute."""
    task = App("shop").task(name="report")(returning(annotation))
    with pytest.raises(ResultMismatch, match=why) as caught:
        task.decode_result(value, "01890a5d")
    message = str(caught.value)
    assert isinstance(caught.value, JobledgerError)
    assert "job 01890a5d" in message
    assert "report() -> " in message
    assert repr(value)[:100] in message
    assert len(message) < 1_500
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
def test_an_annotation_that_json_cannot_become_gives_a_warning_and_plain_json(annotation: Any, named: str) -> None:
    """The task is accepted. The warning has a remedy, and is shown once, when the task is declared."""
    with pytest.warns(RuntimeWarning, match=rf"(?s)'work'.*result.*{named}.*Any to get plain JSON"):
        task = App("shop").task(returning(annotation))
    assert task.decode_result({"plain": 1}, "job-1") == {"plain": 1}


def test_the_result_of_a_fallback_is_read_by_the_fallbacks_annotation() -> None:
    """Each task reads results by its own annotation."""
    app = App("shop")
    other = app.task(name="other")(returning(Line))
    task = app.task(name="first", fallback=other)(returning(Extra))
    app.check()
    assert other.decode_result({"sku": "a", "on": "2026-01-02"}, "1") == Line("a", DAY)
    assert task.decode_result({"day": "2026-01-02"}, "1") == {"day": DAY}
