"""What every status database must do when rows of ended jobs are removed."""

# the fixtures are imported, and parameters have their names

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from jobledger import job
from jobledger.errors import JobNotFound, LeaseLost
from jobledger.job import Life, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.streams.status.remover import Order, Remover
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import Changes, StatusReader, Store, copy
from jobledger.streams.status.store.reader import SqlReader
from jobledger.streams.status.store.removal import Reread, Walk
from jobledger.streams.status.store.sqlite import open_reader as open_sqlite
from tests.contract.test_store import BAD, NAMESPACE, SPEC, Backend, Clock, life, write

TAGGED = ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "acme"}))


def ended(number: int, fact: ev.Fact | None = None) -> Life:
    """Return the life of a job that was submitted at ``number`` seconds and ended one millisecond later."""
    return life(TAGGED, fact or ev.JobSucceeded(), ms=1_000 * number, offset=10 * number)


def fill(store: Store, count: int = 10) -> None:
    """Write jobs that succeed, fail and do not end, in turn, one each second."""
    facts = (ev.JobSucceeded(), ev.JobFailedFact("exhausted", BAD), None)
    lives = {}
    for n in range(count):
        lives[f"{n:03}"] = ended(n, facts[n % 3]) if facts[n % 3] else life(TAGGED, ms=1_000 * n, offset=10 * n)
    write(store, lives)


def remove_all(store: Store, walk: Walk, most: int = 2) -> list[str]:
    """Carry out a walk in pieces, and return the ids of the removed rows."""
    gone: list[str] = []
    while True:
        piece = store.remove(walk, most)
        assert piece.read <= most
        gone += piece.removed
        if piece.after is None:
            return gone
        walk = replace(walk, after=piece.after)


def left(reader: StatusReader) -> list[str]:
    return sorted(each.job_id for each in reader.jobs())


def test_rows_go_in_pieces_with_their_tags_and_counters(store: Store, reader: StatusReader) -> None:
    """Each piece reads a bounded number of rows. Only jobs of the walk's state that ended before its limit go. After each
    piece tags and counters match the rows."""
    assert isinstance(reader, SqlReader)
    fill(store)
    walk = Walk(State.SUCCEEDED, 6_001)
    piece = store.remove(walk, 4)
    assert (list(piece.removed), piece.read, piece.after) == (["000", "003"], 4, (3_000, "003"))
    assert reader.counters_hold()
    assert sorted(each.job_id for each in reader.jobs(tag=("tenant", "acme"))) == left(reader)
    assert remove_all(store, walk) == [], "006 ended at the limit, and not before it"
    assert remove_all(store, replace(walk, before_ms=6_002)) == ["006"]
    assert left(reader) == ["001", "002", "004", "005", "007", "008", "009"]
    assert remove_all(store, Walk(State.FAILED, 100_000)) == ["001", "004", "007"]
    assert left(reader) == ["002", "005", "008", "009"]
    assert reader.counters_hold()
    assert reader.counts_by_state() == dict.fromkeys(State, 0) | {"queued": 3, "succeeded": 1}
    assert sorted(each.job_id for each in reader.jobs(tag=("tenant", "acme"))) == left(reader)


def test_the_table_knows_up_to_which_time_rows_were_removed(
    backend: Backend, store: Store, reader: StatusReader, tmp_path: Path
) -> None:
    """The limit of each state is stored with the first removal, never becomes smaller, and is in a copy, too."""
    fill(store)
    assert store.removed() == reader.removed() == {}
    assert remove_all(store, Walk(State.SUCCEEDED, 0)) == []
    assert reader.removed() == {}
    remove_all(store, Walk(State.SUCCEEDED, 5_000))
    remove_all(store, Walk(State.FAILED, 2_000))
    write(store, {"late": ended(1)})
    remove_all(store, Walk(State.SUCCEEDED, 3_000))
    assert store.removed() == reader.removed() == {"succeeded": 5_000, "failed": 2_000}
    copy(backend.url, NAMESPACE, tmp_path / "copy.db")
    with closing(open_sqlite(f"sqlite:///{tmp_path / 'copy.db'}", NAMESPACE)) as copied:
        assert copied.removed() == reader.removed()
        assert copied.counters_hold()
    store.write(Changes(removed={"succeeded": 7_000}))
    assert reader.removed() == {"succeeded": 7_000, "failed": 2_000}


def test_the_error_for_an_unknown_job_says_that_rows_are_removed(store: Store, reader: StatusReader) -> None:
    """Whoever asks for a job whose row is gone learns from the error which setting removes rows."""
    with pytest.raises(JobNotFound, match=r"knows no job nobody$"):
        reader.job("nobody")
    write(store, {"a": ended(1)})
    assert remove_all(store, Walk(State.SUCCEEDED, 5_000)) == ["a"]
    with pytest.raises(JobNotFound, match="JOBLEDGER_TABLE_RETENTION"):
        reader.job("a")


def test_spared_rows_stay(store: Store, reader: StatusReader) -> None:
    """A caller can keep rows that would go."""
    fill(store)
    piece = store.remove(Walk(State.SUCCEEDED, 100_000), 100, lambda ids: {"003"}.intersection(ids))
    assert list(piece.removed) == ["000", "006", "009"]
    assert reader.states(["003"]) == {"003": State.SUCCEEDED}


def test_a_writer_that_lost_its_lease_removes_nothing(backend: Backend, store: Store, reader: StatusReader) -> None:
    """When another writer has taken over, the removal of the first one fails, and every row is still there."""
    clock = Clock()
    fill(store)
    clock.now += 3600
    with backend.store("two:2", clock) as two:
        assert two.acquire()
        with pytest.raises(LeaseLost, match="two:2"):
            store.remove(Walk(State.SUCCEEDED, 100_000), 100)
        assert len(left(reader)) == 10
        assert reader.removed() == {}
        assert len(two.remove(Walk(State.SUCCEEDED, 100_000), 100).removed) == 4


def test_a_row_that_a_late_fact_began_again_goes(store: Store, reader: StatusReader) -> None:
    """Of jobs that have not ended, only rows without a submission go, and only when their last fact is old."""
    started = ev.JobStarted("h:1", None, {}, "t", 0)
    write(
        store,
        {
            "old start": life(started, ms=1_000),
            "new start": life(started, ms=9_000),
            "old release": life(ev.JobDue(SPEC, 1), ms=1_000, offset=20),
            "old job": life(TAGGED, ms=1_000, offset=30),
            "retried": life(ev.JobRetried(BAD, 5), ms=1_000, offset=40),
            "reported": job.join(life(started, ms=1_000), life(ev.JobProgressed(1, 1, 2, None), ms=8_000, offset=50)),
        },
    )
    gone = [job_id for state in State if not state.ended for job_id in remove_all(store, Walk(state, 5_000))]
    assert sorted(gone) == ["old release", "old start", "retried"]
    assert left(reader) == ["new start", "old job", "reported"]
    assert isinstance(reader, SqlReader)
    assert reader.counters_hold()
    assert reader.removed() == {}


def plan(state: PlanState, opened_ms: int = 1_000) -> PlanStatus:
    return PlanStatus("p", "redrive", "{}", None, None, "ann", None, opened_ms, state)


@pytest.mark.parametrize("state", list(PlanState))
def test_open_plans_are_known_to_the_writer_and_to_readers(
    store: Store, reader: StatusReader, state: PlanState
) -> None:
    """A plan is open until it is done or aborted. One whose caller died while it was listed counts only for some time."""
    assert not store.plan_is_open(0)
    assert reader.open_plans() == []
    store.write(Changes(plans=[plan(state)]))
    assert store.plan_is_open(1_000) == (not state.ended)
    assert store.plan_is_open(1_001) == (state in (PlanState.RUNNING, PlanState.PAUSED))
    assert [each.plan for each in reader.open_plans()] == ([] if state.ended else ["p"])


def test_the_remover_carries_out_an_order_piece_by_piece(store: Store, reader: StatusReader) -> None:
    """Each step removes a piece, and pauses for four times as long as the piece took. At the end the order is done."""
    fill(store, 30)
    counted: list[tuple[str, int]] = []
    now = [100.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    remover = Remover(lambda state, rows: counted.append((state, rows)))
    assert remover.step(store, clock) == ((), {})
    order = Order({"succeeded": 20_000, "failed": 10_000}, 100_000)
    assert remover.ask(order)
    assert not remover.ask(order), "one order at a time"
    removed, limits = remover.step(store, clock)
    assert (list(removed), limits) == ([f"{n:03}" for n in range(0, 20, 3)], order.limits)
    assert remover.wait(now[0]) == pytest.approx(0.004)
    assert remover.step(store, clock) == ((), {}), "it pauses"
    for _ in range(20):
        now[0] += 1.0
        remover.step(store, clock)
    assert not remover.busy
    assert counted == [("succeeded", 7), ("failed", 3)]
    assert sum(reader.counts_by_state().values()) == 20


def test_no_row_goes_while_a_plan_is_open(store: Store, reader: StatusReader) -> None:
    """The writer itself looks for open plans when it begins an order, because a plan may have been opened since the
    order was given."""
    fill(store)
    store.write(Changes(plans=[plan(PlanState.PAUSED)]))
    remover = Remover(lambda state, rows: None)
    assert remover.ask(Order({"succeeded": 20_000}, 100_000))
    remover.step(store, lambda: 1.0)
    assert not remover.busy
    assert len(left(reader)) == 10


def test_facts_that_are_read_again_do_not_bring_removed_rows_back(store: Store, reader: StatusReader) -> None:
    """If a partition is read again from its start, facts of removed jobs are dropped. Facts of jobs that the table knows,
    and new facts, are folded."""
    fill(store, 4)
    assert remove_all(store, Walk(State.SUCCEEDED, 3_000)) == ["000"]
    store.write(Changes(resets={("shop.lifecycle", 0): 0}))
    assert store.reread() == {("shop.lifecycle", 0)}
    reread = Reread(max(store.removed().values()), store.reread())
    folder = RowFolder(store, Decoder(), reread=reread)
    again = {
        "000": life(TAGGED, ms=0),
        "001": life(TAGGED, ms=1_000, offset=10),
        "elsewhere": life(TAGGED, ms=100, topic="shop.jobs.mail"),
        "new": life(TAGGED, ms=3_000, offset=40),
    }
    store.write(folder.merge(again.items()).changes)
    assert left(reader) == ["001", "002", "003", "elsewhere", "new"]
    assert reader.states(["001"]) == {"001": State.FAILED}
    assert isinstance(reader, SqlReader)
    assert reader.counters_hold()


def test_a_removed_state_is_not_cached(store: Store, reader: StatusReader) -> None:
    """After the removal of a row whose state was cached, the job's next fact begins a new row, and the counters hold."""
    folder = write(store, {"a": life(ev.JobStarted("h:1", None, {}, "t", 0), ms=1_000)})
    gone = remove_all(store, Walk(State.RUNNING, 5_000))
    assert gone == ["a"]
    folder.forget(gone)
    folded = folder.merge([("a", life(ev.JobSucceeded(), ms=9_000, offset=5))])
    store.write(folded.changes)
    assert reader.job("a").started_at is None
    assert isinstance(reader, SqlReader)
    assert reader.counters_hold()


def test_the_walks_use_indexes(backend: Backend, store: Store) -> None:
    """SQLite reads a walk's page from an index in its order, so a page costs the same in a table of any size."""
    if not backend.url.startswith("sqlite"):
        pytest.skip("PostgreSQL chooses its plans by the size of the table")
    from jobledger.streams.status.store import writer

    place = ("5000", "0", "''", "10")

    def explained(sql: str, *values: str) -> str:
        for value in values:
            sql = sql.replace("?", value, 1)
        return " ".join(str(row) for row in store._db.execute("EXPLAIN QUERY PLAN " + sql))  # type: ignore[attr-defined]

    for text, index in (
        (explained(writer._WALK_ALL, *place), "jobs_by_time"),
        (explained(writer._WALK_STATE, "'failed'", *place), "jobs_by_state"),
    ):
        assert index in text
        assert "TEMP B-TREE" not in text
