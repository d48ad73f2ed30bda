"""A fold into a table, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import JSON, Column, Engine, Integer, MetaData, String, Table, func, select

from jobledger import App, ConfigError, JobledgerError, Settings
from jobledger.definitions.projection import Projection, Where
from jobledger.schemas.events import Position
from jobledger.streams.projections.fold import Fold


@dataclass(frozen=True)
class Said:
    who: str
    what: int


APP = App("folds", settings=Settings())
APP.event(Said)


def table(*columns: Column[Any], key: Column[Any] | None = None) -> Table:
    key = Column("who", String, primary_key=True) if key is None else key
    return Table("said", MetaData(), key, *columns)


def projection(fold: Callable[..., Any], into: Table) -> Projection:
    return Projection(
        fold, name="said", table=into, key=lambda e: e.who, events=[APP.events["Said"]], facts=(), start=None
    )


def engine_with(into: Table) -> Engine:
    engine = sqlalchemy.create_engine("sqlite://")
    into.metadata.create_all(engine)
    return engine


def items(events: list[Said]) -> list[Any]:
    return [((e.who,), e, Where(str(n), Position("said", 0, n), n)) for n, e in enumerate(events)]


def folded(fold: Callable[..., Any], into: Table, events: list[Said], cuts: list[int]) -> list[dict[str, Any]]:
    """Fold the events in batches that end at ``cuts``; return the table's rows."""
    folding, engine, all_items = Fold(projection(fold, into), into), engine_with(into), items(events)
    ends = sorted({*(min(cut, len(events)) for cut in cuts), len(events)})
    for first, last in zip([0, *ends], ends, strict=False):
        with engine.begin() as db:
            folding.apply(db, all_items[first:last])
    with engine.begin() as db:
        rows = [dict(row._mapping) for row in db.execute(select(into).order_by(into.c.who))]
    engine.dispose()
    return rows


def in_place(row: Any, event: Said) -> Any:
    """A fold that changes the given row and the objects in it."""
    if event.what == 0:
        return None
    row = row or {"total": 0, "seen": []}
    row["total"] += event.what
    row["seen"].append(event.what)
    return row


def in_part(row: Any, event: Said) -> Any:
    """A fold that returns only the changed columns, and reads the other ones."""
    if event.what == 0:
        return None
    if event.what % 2:
        return {"odd": (0 if row is None else row["odd"]) + 1}
    return {"even": ((0 if row is None else row["even"]) or 0) + event.what, "last": None}


def columns() -> list[Column[Any]]:
    return [
        Column("total", Integer), Column("seen", JSON), Column("odd", Integer, nullable=False, default=0),
        Column("even", Integer), Column("last", Integer, default=7),
    ]  # fmt: skip


@pytest.mark.parametrize("fold", [in_place, in_part])
@given(data=st.data())
def test_the_table_does_not_depend_on_the_batches(fold: Callable[..., Any], data: st.DataObject) -> None:
    """The table is the same for any cuts, also if rows are changed in place, columns are left out, and rows are deleted
    and made again."""
    some_event = st.builds(Said, st.sampled_from("ab"), st.integers(0, 4))
    events = data.draw(st.lists(some_event, max_size=20))
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=6))
    one_by_one = folded(fold, table(*columns()), events, list(range(len(events))))
    assert folded(fold, table(*columns()), events, cuts) == one_by_one
    if fold is in_place:  # compare with a second computation
        for row in one_by_one:
            mine = [e.what for e in events if e.who == row["who"]]
            since = mine[len(mine) - mine[::-1].index(0) :] if 0 in mine else mine
            assert (row["seen"], row["total"], row["odd"], row["last"]) == (since, sum(since), 0, 7)


def test_a_key_that_the_database_stores_as_another_value_is_refused() -> None:
    """The fold would not find the row of the key again, so each event would look like the first one."""
    into = table(Column("total", Integer), key=Column("who", Integer, primary_key=True))
    fold = Fold(projection(lambda row, event: {"total": 1 + (row or {"total": 0})["total"]}, into), into)
    engine = engine_with(into)
    with engine.begin() as db:
        fold.apply(db, items([Said("1", 1)]))
    with engine.begin() as db, pytest.raises(JobledgerError, match=r"said\[0\]@0.*'1'.* as \(1,\).*Integer"):
        fold.apply(db, items([Said("1", 1)]))
    engine.dispose()


@pytest.mark.parametrize(
    "options", [{"server_default": "0"}, {"default": lambda: 1}, {"default": func.now()}, {"onupdate": 1}]
)
def test_a_column_with_a_value_from_outside_the_fold_is_refused(options: dict[str, Any]) -> None:
    """Otherwise a second fold of the same log could give another table."""
    with pytest.raises(ConfigError, match=r"said.total .*outside the fold"):
        projection(in_place, table(Column("total", Integer, **options)))
