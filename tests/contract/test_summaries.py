"""What the summaries of the status table must do on every database: counts, queues, groups of errors, last successes."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg
import pytest
import sqlalchemy

from jobledger import job
from jobledger.errors import ConfigError, StoreError
from jobledger.fingerprint import fingerprint
from jobledger.job import Life, State
from jobledger.schemas import events as ev
from jobledger.streams.status.store import StatusReader, Store, open_reader, summaries
from jobledger.streams.status.store.postgres import PostgresStore
from jobledger.streams.status.store.protocol import Counted, LastSuccess, QueueSummary
from jobledger.streams.status.store.sqlite import SqliteStore
from tests.contract.test_store import BAD, NAMESPACE, SPEC, Backend, life, write
from tests.postgres import Databases

OTHER = ev.ErrorInfo("builtins.KeyError", "'x'", "trace")
SUBMITTED = ev.JobSubmitted(SPEC)


def started(version: str) -> ev.JobStarted:
    return ev.JobStarted("h:1", version, {}, "t", 0)


def failed(number: int, error: ev.ErrorInfo = BAD, version: str = "1.0", task: str = "send") -> Life:
    """Return a job that was submitted at ``number`` seconds and failed."""
    facts = (SUBMITTED, started(version), ev.JobFailedFact("exhausted", error))
    return life(*facts, ms=1_000 * number, offset=10 * number, task=task)


def test_counts_come_from_the_counters_or_from_the_rows(store: Store, reader: StatusReader) -> None:
    """Both kinds of counts are exact, for any combination of filters."""
    lives = {f"{n:02}": failed(n, task="send" if n % 2 else "call") for n in range(20)}
    tagged = ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "acme"}))
    lives |= {f"{n}": life(tagged, ms=1_000 * n, offset=10 * n, queue="slow") for n in range(20, 25)}
    write(store, lives)

    def counted(**filters: Any) -> int:
        number = reader.count(**filters)
        assert number.exact
        assert number.jobs == len(list(reader.chosen(**filters)))
        return number.jobs

    assert counted() == counted(state=None, tag={}) == 25
    assert counted(state="failed") == counted(state=[State.FAILED, "expired"]) == 20
    assert counted(task="send", queue=["mail"]) == 10
    assert counted(state=[]) == counted(task="none") == 0
    assert counted(tag=("tenant", "acme")) == counted(tag={"tenant": "acme"}, state="queued", task="send") == 5
    assert counted(error=BAD.type, task="call", since_ms=10_000) == 5
    assert counted(version="1.0") == counted(fingerprint=fingerprint(BAD)) == 20
    assert counted(since_ms=5_000, until_ms=8_000) == 3
    assert counted(late_ms=22_000) == 3
    assert counted(id_prefix="0", task="call") == 5
    with pytest.raises(ConfigError, match="'lost' is not a state"):
        reader.count(state="lost")


def test_a_count_ends_at_its_limit(store: Store, reader: StatusReader) -> None:
    """Beyond the limit, or the number of rows that are compared, a count is not exact."""
    write(store, {f"{n:02}": failed(n, version=f"{n // 10}") for n in range(20)})
    assert reader.count(limit=5, since_ms=0) == Counted(5, False)
    assert reader.count(limit=20, since_ms=0) == Counted(20, True)
    assert reader.count(limit=5) == Counted(20, True)
    assert reader.count(version="1", most=10) == Counted(10, False)
    assert reader.count(version="0", most=10) == Counted(0, False)
    assert reader.count(version="0", most=20) == Counted(10, True)


def test_jobs_are_found_by_the_beginning_of_their_ids(store: Store, reader: StatusReader) -> None:
    """The jobs are in descending order of ids, page by page, also with other filters."""
    write(store, {f"{n:02}": failed(30 - n, task="send" if n % 2 else "call") for n in range(20)})
    assert [each.job_id for each in reader.jobs(id_prefix="1", limit=3)] == ["19", "18", "17"]
    assert [each.job_id for each in reader.jobs(id_prefix="1", limit=3, after="17")] == ["16", "15", "14"]
    assert [each.job_id for each in reader.jobs(id_prefix="1", task="send", state="failed", after="15")] == ["13", "11"]
    assert [each.job_id for each in reader.jobs(id_prefix="1", since_ms=20_000)] == ["10"]
    newest = reader.jobs(id_prefix="1", fingerprint=fingerprint(BAD), limit=2)
    assert [each.job_id for each in newest] == ["10", "11"]
    assert reader.jobs(id_prefix="%") == []


def test_jobs_are_found_by_the_number_of_their_attempt(store: Store, reader: StatusReader) -> None:
    """Without a state only jobs that wait for a retry are returned."""
    lives: dict[str, Life] = {}
    for attempt in (1, 2, 3):
        for name, fact in (("retrying", ev.JobRetried(BAD, 5_000)), ("failed", ev.JobFailedFact("exhausted", BAD))):
            at = (1_000, "shop.lifecycle", 0, 10 * attempt)
            made = job.of(1, 1, attempt, "send", "mail", None, fact, at)
            assert made is not None
            lives[f"{name} {attempt}"] = made
    write(store, lives)
    assert {each.job_id for each in reader.jobs(attempts_least=2)} == {"retrying 2", "retrying 3"}
    assert {each.job_id for each in reader.jobs(attempts_least=3, state="failed")} == {"failed 3"}
    assert reader.count(attempts_least=1) == Counted(3, True)
    with pytest.raises(ConfigError, match="attempts_least=0 is too small"):
        reader.jobs(attempts_least=0)


def test_a_group_of_errors_counts_the_jobs_that_had_the_error_again(store: Store, reader: StatusReader) -> None:
    """These are the jobs in a later run than the first one."""
    lives = {f"{n}": failed(n) for n in range(3)}
    again = job.of(2, 1, 1, "send", "mail", None, ev.JobFailedFact("exhausted", BAD), (9_000, "shop.lifecycle", 0, 90))
    assert again is not None
    write(store, {**lives, "redriven": again})
    (group,) = reader.errors()
    assert (group.jobs, group.again) == (4, 1)


def test_queues_have_their_numbers_and_their_oldest_job(
    store: Store, reader: StatusReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest job is the one that could start first. A job that was due later than others were submitted is not."""
    assert reader.queues() == []
    delayed = ev.JobSubmitted(SPEC, 5_000)
    write(
        store,
        {
            "a": life(delayed, ev.JobDue(SPEC, 90_000_000), ms=1_000),
            "b": life(SUBMITTED, ms=60_000, offset=10),
            "c": life(SUBMITTED, ms=70_000, offset=20),
            "d": life(SUBMITTED, started("1"), ms=2_000, offset=30),
            "e": life(delayed, release=0, ms=3_000, offset=40),
            "f": failed(5),
            "g": life(SUBMITTED, ms=80_000, offset=60, queue="slow"),
            "h": life(SUBMITTED, started("1"), ms=80_000, offset=70, queue="busy"),
        },
    )
    assert reader.queues() == [
        QueueSummary("busy", 0, 0, 1, 0, 0, 0, 0, 0),
        QueueSummary("mail", 1, 3, 1, 0, 0, 1, 0, 0, oldest_ms=60_000),
        QueueSummary("slow", 0, 1, 0, 0, 0, 0, 0, 0, oldest_ms=80_000),
    ]
    monkeypatch.setattr(summaries, "_SCAN_FIRST", 1)
    assert [each.oldest_ms for each in reader.queues()] == [None, 60_000, 80_000]
    monkeypatch.setattr(summaries, "SCAN_MOST", 3)
    assert [each.oldest_ms for each in reader.queues()] == [None, 60_000, None]


def test_errors_are_grouped_by_fingerprint(store: Store, reader: StatusReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group has an example, its numbers, and the first and last submission. The last group comes first."""
    assert reader.errors() == []
    lives = {f"{n:02}": failed(n, version=f"{n // 5}", task="send" if n % 2 else "call") for n in range(10)}
    retried = life(SUBMITTED, ev.JobRetried(OTHER, 5_000), ms=20_000, offset=200)
    write(store, {**lives, "20": retried, "30": life(SUBMITTED, ms=30_000, offset=300)})
    other, bad = reader.errors()
    assert (other.fingerprint, other.type, other.message, other.job_id) == (
        *(fingerprint(OTHER), OTHER.type, OTHER.message, "20"),
    )
    assert (other.jobs, other.exact, other.first_ms, other.last_ms, other.versions) == (
        1,
        True,
        20_000,
        20_000,
        {"": 1},
    )
    assert (bad.job_id, bad.jobs, bad.exact, bad.first_ms, bad.last_ms) == ("09", 10, True, 0, 9_000)
    assert (bad.tasks, bad.versions) == ({"send": 5, "call": 5}, {"0": 5, "1": 5})
    assert reader.errors(limit=1) == [other]
    assert [group.jobs for group in reader.errors(since_ms=7_000)] == [1, 3]
    assert reader.errors(since_ms=20_001) == []
    monkeypatch.setattr(summaries, "GROUP_MOST", 4)
    bounded = reader.errors()[1]
    assert (bounded.jobs, bounded.exact, bounded.first_ms) == (4, False, 0)
    monkeypatch.setattr(summaries, "_GROUPS_A_QUERY", 1)
    assert [group.fingerprint for group in reader.errors()] == [fingerprint(OTHER), fingerprint(BAD)]
    monkeypatch.setattr(summaries, "FINGERPRINTS_MOST", 1)
    assert len(reader.errors()) == 1


def test_a_job_that_recovers_leaves_its_group(store: Store, reader: StatusReader) -> None:
    """A group counts only jobs that failed or wait for a retry."""
    retried = life(SUBMITTED, ev.JobRetried(BAD, 5_000))
    projector = write(store, {"a": retried})
    assert [group.jobs for group in reader.errors()] == [1]
    folded = projector.merge([("a", life(ev.JobSucceeded(), offset=9, release=2))])
    store.write(folded.changes)
    assert reader.errors() == []


def test_the_last_success_of_a_task_is_found(
    store: Store, reader: StatusReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is that of the job that was submitted last and has succeeded, among the jobs that are looked at."""
    lives = {
        f"{n:02}": life(SUBMITTED, started(f"v{n}"), ev.JobSucceeded(), ms=1_000 * n, offset=10 * n, task=f"t{n % 3}")
        for n in range(9)
    }
    write(store, {**lives, "20": failed(20, task="t0")})
    assert reader.last_success("t0", "t2", "none") == {
        "t0": LastSuccess("v6", 6_002, "06"),
        "t2": LastSuccess("v8", 8_002, "08"),
    }
    assert reader.last_success() == {}
    monkeypatch.setattr(summaries, "_SCAN_FIRST", 2)
    assert set(reader.last_success("t0", "t1", "t2")) == {"t0", "t1", "t2"}
    monkeypatch.setattr(summaries, "SCAN_MOST", 2)
    assert set(reader.last_success("t0", "t1", "t2")) == {"t2"}


def test_a_table_of_the_first_revision_has_counts_and_queues_only(backend: Backend) -> None:
    """What needs a column that the table lacks is an error that says how the table gets the column."""
    with backend.store() as store:
        assert store.acquire()
        write(store, {"a": failed(1), "b": life(SUBMITTED, offset=50)})
    for statement in (
        "DROP INDEX jobs_by_error",
        "DROP INDEX jobs_by_key",
        "DROP INDEX jobs_by_task",
        *(f"ALTER TABLE jobs DROP COLUMN {name}" for name in ("fingerprint", "key", "version", "actor")),
        "DELETE FROM meta WHERE key = 'revision'",
    ):
        backend.execute(statement)
    with closing(open_reader(backend.url, NAMESPACE)) as old:
        assert old.count(error=BAD.type) == Counted(1, True)
        assert [(each.queue, each.depth, each.failed) for each in old.queues()] == [("mail", 1, 1)]
        for ask in (old.errors, lambda: old.last_success("send"), lambda: old.count(version="1")):
            with pytest.raises(StoreError, match="jobledger streams"):
                ask()


def test_sqlite_summaries_use_their_indexes(tmp_path: Any) -> None:
    """No summary and no new filter reads the whole table, or sorts it."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    with SqliteStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(
            store,
            {
                "a": failed(1),
                "b": life(SUBMITTED, offset=50),
                "c": failed(2, OTHER),
                "d": life(SUBMITTED, ev.JobSucceeded(), ms=9),
                "e": life(SUBMITTED, ev.JobRetried(BAD, 5), ms=7),
            },
        )
        reader = open_reader(url, NAMESPACE)
        asked: list[tuple[str, Any]] = []
        engine = reader._engine  # type: ignore[attr-defined]
        sqlalchemy.event.listen(
            engine, "before_cursor_execute", lambda c, cur, sql, params, *_: asked.append((sql, params))
        )

        def plan(ask: Any) -> str:
            asked.clear()
            ask()
            lines = [row[3] for sql, params in asked for row in store._db.execute("EXPLAIN QUERY PLAN " + sql, params)]
            return "\n".join(lines)

        errors = plan(reader.errors)
        queues = plan(reader.queues)
        plans = {
            "jobs_by_time": [
                plan(lambda: reader.last_success("send")),
                plan(lambda: reader.jobs(until_ms=5)),
                plan(lambda: reader.count(version="1")),
            ],
            "jobs_by_state": [
                queues,
                plan(lambda: reader.jobs(attempts_least=2)),
                plan(lambda: reader.count(state="failed", error="x")),
                plan(lambda: reader.count(late_ms=5)),
            ],
            "jobs_by_error": [errors, plan(lambda: reader.count(fingerprint="x"))],
            "jobs_by_key": [plan(lambda: reader.count(key="k"))],
            "PRIMARY KEY (job_id>? AND job_id<?)": [
                plan(lambda: reader.jobs(id_prefix="01a2")),
                plan(lambda: reader.jobs(id_prefix="01a2", state="failed", until_ms=5)),
                plan(lambda: reader.count(id_prefix="01a2")),
            ],
        }
        reader.close()
    for index, several in plans.items():
        for text in several:
            assert index in text
            assert "SCAN jobs\n" not in f"{text}\n"
            if text not in (errors, queues):
                # Only the rows of a subquery, whose number has a limit, are sorted.
                assert "TEMP B-TREE" not in text or "MATERIALIZE" in text or "CO-ROUTINE" in text
    # Only the rows of a group and of the counters, which are few, are grouped.
    assert [line for line in queues.splitlines() if "TEMP" in line] == ["USE TEMP B-TREE FOR GROUP BY"]
    assert {line.strip() for line in errors.splitlines() if "TEMP" in line} == {"USE TEMP B-TREE FOR GROUP BY"}


def test_postgres_summaries_use_their_indexes(postgres: Databases) -> None:
    """No summary and no new filter reads all jobs, if the server knows how many there are."""
    plans: list[str] = []

    def explain(connection: object, cursor: psycopg.Cursor[tuple[str]], sql: str, params: Any, *_: object) -> None:
        if "set_config" not in sql:
            with cursor.connection.cursor() as asking:
                plans.append("\n".join(line for (line,) in asking.execute("EXPLAIN " + sql, params)))

    with postgres.database() as url, PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        for begin in range(0, 6_000, 2_000):
            numbers = range(begin, begin + 2_000)
            write(store, {f"{n:06}": life(SUBMITTED, ev.JobSucceeded(), ms=n) for n in numbers})
        errors = [ev.ErrorInfo(f"Error{n}", "", "") for n in range(10)]
        write(store, {f"failed {n:04}": failed(n, errors[n % 10]) for n in range(2_000)})
        write(store, {f"queued {n:04}": life(SUBMITTED, ms=n) for n in range(500)})
        postgres.execute("ANALYZE", url)
        with closing(open_reader(url, NAMESPACE)) as reader:
            sqlalchemy.event.listen(reader._engine, "before_cursor_execute", explain)  # type: ignore[attr-defined]
            assert len(reader.errors()) == 10
            steps, *others = plans
            assert "jobs_by_error" in steps
            assert "jobs_by_error" in others[0]
            assert len(reader.queues()) == 1
            reader.jobs(id_prefix="0001")
            reader.jobs(attempts_least=2)
            reader.last_success("send")
            reader.count(fingerprint=fingerprint(errors[0]))
            reader.count(state="queued", since_ms=100)
    assert [plan for plan in plans if "Seq Scan on jobs" in plan] == []
