"""The time limit of a reader's queries on SQLite. (That on PostgreSQL is in ``tests/contract/test_postgres.py``.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobledger.errors import StoreTooSlow
from jobledger.schemas import events as ev
from jobledger.streams.status.store import open_reader, time_limit
from jobledger.streams.status.store.reader import SqlReader
from tests.web import NAMESPACE, SUBMITTED, Table

#: A statement of more instructions than SQLite executes between two looks at the clock, and one that never ends.
LONG = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100000) SELECT count(*) FROM n"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[SqlReader]:
    table = Table(tmp_path)
    with closing(table.store):
        table.write({"job-1": [SUBMITTED], "job-2": [SUBMITTED, ev.JobStarted("w", None, {}, "shop.jobs.default", 0)]})
        made = open_reader(table.url, NAMESPACE)
        assert isinstance(made, SqlReader)
        with closing(made):
            yield made


def test_a_query_that_takes_too_long_is_interrupted(reader: SqlReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to ask for instead. The connection stays usable, and the next query has its whole time."""
    with monkeypatch.context() as patched:
        patched.setattr(time_limit, "STATEMENT_S", 0.1)
        error = pytest.raises(StoreTooSlow, match=r"took longer than 0\.1 s\. Ask for fewer jobs.*since=")
        with error, reader._reading() as db:
            db.exec_driver_sql(ENDLESS)
    assert [each.job_id for each in reader.jobs()] == ["job-2", "job-1"]
    with reader._reading() as db:
        assert db.exec_driver_sql(LONG).scalar() == 100_000


def test_reading_the_whole_table_has_no_limit(reader: SqlReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a connection that a query with a limit has used before, and the next query has a limit again."""
    monkeypatch.setattr(time_limit, "STATEMENT_S", -1.0)
    for _ in range(2):
        with pytest.raises(StoreTooSlow), reader._reading() as db:
            db.exec_driver_sql(LONG)
        with reader._reading(walk=True) as db:
            assert db.exec_driver_sql(LONG).scalar() == 100_000
    assert len(list(reader.lives())) == 2


def test_each_statement_of_a_query_has_the_whole_time(reader: SqlReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on PostgreSQL: many short statements are not one long one."""
    now = [0.0]
    monkeypatch.setattr("jobledger.streams.status.store.time_limit.time.monotonic", lambda: now[0])
    with reader._reading() as db:
        for _ in range(3):
            now[0] += time_limit.STATEMENT_S
            assert db.exec_driver_sql(LONG).scalar() == 100_000
