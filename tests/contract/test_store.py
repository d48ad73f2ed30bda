"""What every status database must do, of any kind. `BACKENDS` has one entry for each kind."""

from __future__ import annotations

import datetime as dt
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import psycopg
import pytest
import sqlalchemy

from jobledger import job
from jobledger.errors import ConfigError, JobNotFound, LeaseLost, PlanNotFound, StoreError, StoreNotFound
from jobledger.fingerprint import fingerprint
from jobledger.job import Life, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Position
from jobledger.streams.projections.projection_store import ProjectionStore, offsets_table
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import (
    Changes,
    Count,
    StatusReader,
    Store,
    copy,
    namespaces_in,
    open_reader,
    open_store,
)
from jobledger.streams.status.store.connecting import schema_of
from jobledger.streams.status.store.postgres import PostgresStore
from jobledger.streams.status.store.protocol import Overdue
from jobledger.streams.status.store.rows import key_text
from jobledger.streams.status.store.sqlite import SqliteStore, path_of
from jobledger.worker_status import WorkerStatus
from tests.postgres import Databases

NAMESPACE = "shop"


class Clock:
    """A clock that changes only when a test moves it."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Backend:
    """One kind of database, empty at first: its URL, and the class that writes it."""

    def __init__(self, url: str, kind: type[SqliteStore | PostgresStore]) -> None:
        self.url, self._kind = url, kind

    def store(self, holder: str = "elsewhere:1", clock: Callable[[], float] | None = None) -> Store:
        """Open a writer of the table."""
        return self._kind(self.url, NAMESPACE, holder=holder, clock=clock or Clock())

    def execute(self, statement: str) -> None:
        """Change the table directly in the database."""
        if self._kind is SqliteStore:
            with closing(sqlite3.connect(path_of(self.url))) as file, file:
                file.execute(statement)
            return
        with psycopg.connect(self.url) as db:
            db.execute(f"SET search_path = {schema_of(NAMESPACE)}")
            db.execute(statement)


@contextmanager
def sqlite_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    folder: Path = request.getfixturevalue("tmp_path")
    yield Backend(f"sqlite:///{folder / 'sub folder' / 'status.db'}", SqliteStore)


@contextmanager
def postgres_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    server: Databases = request.getfixturevalue("postgres")
    with server.database() as url:
        yield Backend(url, PostgresStore)


BACKENDS = {"sqlite": sqlite_backend, "postgresql": postgres_backend}


BAD = ev.ErrorInfo("builtins.ValueError", "no", "trace")
SPEC = ev.JobSpec(b"{}")


def life(
    *facts: ev.Fact,
    ms: int = 1_000,
    offset: int = 0,
    release: int = 1,
    task: str = "send",
    queue: str = "mail",
    topic: str = "shop.lifecycle",
) -> Life:
    """Return the life of a job with these facts, one after the other in the same release."""
    found: Life | None = None
    for number, fact in enumerate(facts):
        found = job.join(
            found, job.of(1, release, 1, task, queue, None, fact, (ms + number, topic, 0, offset + number))
        )
    assert found is not None
    return found


def write(store: Store, lives: dict[str, Life], offsets: dict[tuple[str, int], int] | None = None) -> RowFolder:
    """Merge lives into the table in one transaction."""
    projector = RowFolder(store, Decoder())
    folded = projector.merge(lives.items())
    folded.changes.offsets.update(offsets or {})
    store.write(folded.changes)
    projector.committed(folded)
    return projector


def test_a_written_job_is_read_back_completely(store: Store, reader: StatusReader) -> None:
    """A query and the next writer both get the whole folded life, with result, error and tags."""
    tagged = ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "acme"}, "parent"))
    lives = {
        "a": life(
            tagged,
            ev.JobStarted("h:1", None, {}, "t", 0),
            ev.JobProgressed(1, 1, 2, "half"),
            ev.JobSucceeded(b'{"n": 1}', 5),
        ),
        "b": life(tagged, ev.JobStarted("h:1", None, {}, "t", 0), ev.JobFailedFact("exhausted", BAD, 2_000_000)),
    }
    write(store, lives)
    for job_id, each in lives.items():
        assert reader.job(job_id) == job.status(job_id, each)
    assert reader.job("a").result == {"n": 1}
    assert reader.job("b").error == BAD
    assert store.load(["a", "b", "c"]) == lives
    assert dict(reader.lives()) == lives


def test_an_unknown_job_is_not_found(reader: StatusReader) -> None:
    """A job that is not in the table is an error that names the job, and never a pending job."""
    with pytest.raises(JobNotFound, match="no job nobody"):
        reader.job("nobody")


def test_many_jobs_can_be_queried_at_once(store: Store, reader: StatusReader) -> None:
    """The states and statuses of several ids are the same as in single queries. Unknown ids are left out."""
    ids = [f"{n:04}" for n in range(1_200)]
    write(store, {each: life(ev.JobSubmitted(SPEC), ev.JobSucceeded(b"1", 5)) for each in ids[::2]})
    known = reader.states(ids)
    assert known == dict.fromkeys(ids[::2], State.SUCCEEDED)
    assert reader.statuses(ids[:7]) == {each: reader.job(each) for each in ids[:7:2]}
    assert reader.states([]) == {}
    assert "no job nobody" in str(reader.unknown("nobody"))


def test_writing_again_replaces_the_row(store: Store, reader: StatusReader) -> None:
    """A job has one row, however often it is written, and the row has the latest state."""
    write(store, {"a": life(ev.JobSubmitted(SPEC))})
    write(store, {"a": life(ev.JobStarted("h:1", None, {}, "t", 0), ms=2_000, offset=9)})
    assert [each.state for each in reader.jobs()] == [State.RUNNING]
    assert reader.job("a").submitted_at is not None
    assert [p.offset for p in reader.job("a").positions] == [0, 9]


def test_counters_agree_with_the_rows(store: Store, reader: StatusReader) -> None:
    """After every transaction, the counters are the same as the number of rows. A repeated fact is not counted again."""
    projector = write(
        store, {n: life(ev.JobSubmitted(SPEC), queue=q) for n, q in [("a", "mail"), ("b", "mail"), ("c", "sms")]}
    )
    assert reader.counts() == [Count("send", "mail", State.QUEUED, 2), Count("send", "sms", State.QUEUED, 1)]
    for _ in range(2):
        folded = projector.merge([("a", life(ev.JobSucceeded(), offset=5))])
        store.write(folded.changes)
        projector.committed(folded)
    assert reader.counts() == [
        Count("send", "mail", State.QUEUED, 1),
        Count("send", "mail", State.SUCCEEDED, 1),
        Count("send", "sms", State.QUEUED, 1),
    ]
    assert reader.counts_by_state() == dict.fromkeys(State, 0) | {"queued": 2, "succeeded": 1}


def test_pages_are_newest_first_and_complete(store: Store, reader: StatusReader) -> None:
    """The pages are sorted by the time of submission, the newest first, and contain every job once, also jobs of the
    same time."""
    write(store, {f"{(n * 7) % 25:02}": life(ev.JobSubmitted(SPEC), ms=1_000 + n // 4, offset=n) for n in range(25)})
    found: list[str] = []
    after = None
    while page := reader.jobs(after=after, limit=4):
        found += [each.job_id for each in page]
        after = found[-1]
    everything = [reader.job(job_id) for job_id in found]
    keys = [(each.submitted_at, each.job_id) for each in everything]
    assert len(set(found)) == 25
    assert keys == sorted(keys, reverse=True)


def test_filters_combine(store: Store, reader: StatusReader) -> None:
    """State, task, queue and tag restrict a list together, page by page."""
    lives = {}
    for n in range(24):
        facts: list[ev.Fact] = [ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": f"t{n % 3}", "n": str(n)}))]
        if n % 2:
            facts.append(ev.JobFailedFact("exhausted", BAD))
        lives[f"{n:02}"] = life(
            *facts, ms=1_000 * n, offset=10 * n, task="send" if n % 4 < 2 else "call", queue=f"q{n % 2}"
        )
    write(store, lives)

    def ids(**asked: object) -> list[int]:
        return [int(each.job_id) for each in reader.jobs(**asked)]  # type: ignore[arg-type]

    down = range(23, -1, -1)
    assert ids(state="failed") == [n for n in down if n % 2]
    assert ids(state=State.QUEUED, task="call") == [n for n in down if n % 2 == 0 and n % 4 >= 2]
    assert ids(queue="q1", task="send") == [n for n in down if n % 2 and n % 4 < 2]
    assert ids(tag=("tenant", "t1")) == [n for n in down if n % 3 == 1]
    assert ids(tag=("tenant", "t1"), state="failed", after="13", limit=2) == [7, 1]
    assert ids(tag=("tenant", "nobody")) == []
    assert ids(state="succeeded") == []
    assert ids(state=["queued", State.FAILED]) == list(down)
    assert ids(state=["failed", "succeeded"], task=["send", "nobody"]) == [n for n in down if n % 2 and n % 4 < 2]
    assert ids(queue=["q0", "q1"], since_ms=20_000) == [23, 22, 21, 20]
    assert ids(state=[]) == []
    assert ids(tag={"tenant": "t1", "n": "13"}) == [13]
    assert ids(tag={"n": "13", "tenant": "t1"}, since_ms=13_000) == [13]
    assert ids(tag={"tenant": "t1", "n": "12"}) == []
    assert ids(tag={"tenant": "t1"}, since_ms=10_001, after="22") == [19, 16, 13]
    assert ids(tag={}, limit=1) == [23]
    with pytest.raises(ConfigError, match="'lost' is not a state"):
        ids(state=["queued", "lost"])
    with pytest.raises(ConfigError, match="'broken' is not a state"):
        ids(state="broken")
    with pytest.raises(JobNotFound, match="after='nobody'"):
        ids(after="nobody")


def test_late_jobs_are_those_that_could_have_started(store: Store, reader: StatusReader) -> None:
    """Jobs are late if their due time has passed, or if they are queued and were due or submitted before. Jobs that
    run, have ended or wait for a retry in place are not late."""
    submitted, delayed = ev.JobSubmitted(SPEC), ev.JobSubmitted(SPEC, 5_000)
    retried = ev.JobRetried(BAD, 5_000)
    write(
        store,
        {
            "scheduled": life(delayed, release=0, ms=1_000),
            "queued": life(submitted, ms=2_000, offset=10),
            "retrying": life(submitted, ev.JobStarted("h:1", None, {}, "t", 0), retried, ms=3_000, offset=20),
            "due": life(delayed, ev.JobDue(SPEC, 6_500_000), release=1, ms=1_500, offset=30),
            "in place": life(submitted, ev.JobRetried(BAD, 1, in_place=True), ms=1_000, offset=40),
            "running": life(submitted, ev.JobStarted("h:1", None, {}, "t", 0), ms=1_000, offset=50),
            "failed": life(submitted, ev.JobFailedFact("exhausted", BAD), ms=1_000, offset=60),
        },
    )

    def late(at: int) -> set[str]:
        return {each.job_id for each in reader.jobs(late_ms=at)}

    assert late(1_999) == set()
    assert late(2_000) == {"queued"}
    assert late(6_000) == {"queued", "scheduled"}
    assert late(100_000) == {"queued", "scheduled", "retrying", "due"}
    assert {each.job_id for each in reader.jobs(late_ms=100_000, state=["retrying", "running"])} == {"retrying"}


def test_ids_are_found_by_their_beginning(store: Store, reader: StatusReader) -> None:
    """A prefix returns the ids that begin with it, in order. No character of the prefix is a wildcard."""
    write(
        store, {name: life(ev.JobSubmitted(SPEC), offset=n) for n, name in enumerate(("a%b", "a_b", "ab", "abc", "b"))}
    )
    assert reader.ids("ab") == ["ab", "abc"]
    assert reader.ids("a", limit=2) == ["a%b", "a_b"]
    assert reader.ids("a_") == ["a_b"]
    assert reader.ids("A") == []
    assert reader.ids("a\0") == []


def test_tags_are_those_of_the_submission(store: Store, reader: StatusReader) -> None:
    """A job is found by the tags of its submission as soon as the submission is known, and by no others."""
    write(store, {"a": life(ev.JobStarted("h:1", None, {}, "t", 0), ms=5_000)})
    assert reader.jobs(tag=("tenant", "acme")) == []
    write(store, {"a": life(ev.JobDue(ev.JobSpec(b"", {"tenant": "old"}), 1), ms=4_000, offset=50)})
    assert len(reader.jobs(tag=("tenant", "old"))) == 1
    write(store, {"a": life(ev.JobSubmitted(ev.JobSpec(b"", {"tenant": "acme"})), ms=1_000, offset=70)})
    assert [each.job_id for each in reader.jobs(tag=("tenant", "acme"))] == ["a"]
    assert reader.jobs(tag=("tenant", "old")) == []


def test_a_position_is_reached_when_a_higher_offset_is_written(store: Store, reader: StatusReader) -> None:
    """A position is reached when a transaction has written a higher offset, and not before."""
    place = Position("shop.jobs.mail", 2, 41)
    assert not reader.reached(place)
    store.write(Changes(offsets={("shop.jobs.mail", 2): 41}))
    assert not reader.reached(place)
    store.write(Changes(offsets={("shop.jobs.mail", 2): 42}))
    assert reader.reached(place)
    assert store.offsets() == reader.offsets() == {("shop.jobs.mail", 2): 42}
    store.write(Changes(resets={("shop.jobs.mail", 2): 7}))
    assert not reader.reached(place)


def test_offsets_are_stored_with_the_ids_of_their_topics(store: Store, reader: StatusReader) -> None:
    """The ids of topics are written with the offsets, and a later id replaces an earlier one. At first there are no
    ids."""
    assert store.topics() == reader.topics() == {}
    store.write(Changes(offsets={("t", 0): 1}, topics={"t": "one", "u": "two"}))
    store.write(Changes(resets={("t", 0): 0}, topics={"t": "three"}))
    assert store.topics() == reader.topics() == {"t": "three", "u": "two"}
    assert reader.offsets() == {("t", 0): 0}


def test_overdue_jobs_are_found(store: Store, reader: StatusReader) -> None:
    """Only scheduled and retrying jobs can be overdue. Each has the release for which it waits, and the position of its
    spec."""
    lives = {
        "delayed": life(ev.JobSubmitted(SPEC, 5_000), ms=1_000, release=0, topic="shop.coordination"),
        "retried": life(ev.JobRetried(BAD, 4_000), ms=1_000, release=3),
        "later": life(ev.JobSubmitted(SPEC, 60_000), ms=1_000, release=0),
        "done": life(ev.JobSubmitted(SPEC, 5_000), ev.JobSucceeded(), ms=1_000, release=0),
        "let go": job.join(
            life(ev.JobSubmitted(SPEC, 5_000), ms=1_000, release=0),
            life(ev.JobDue(SPEC, 6_000_000), ms=6_000, offset=9),
        ),
    }
    write(store, lives)
    found = reader.overdue(16_000, 10_000)
    assert [(o.job_id, o.release, o.attempt, o.due_ms, o.spec_at) for o in found] == [
        ("retried", 4, 2, 5_000, None),
        ("delayed", 1, 1, 6_000, Position("shop.coordination", 0, 0)),
    ]
    assert [o.job_id for o in reader.overdue(15_999, 10_000)] == ["retried"]


def test_overdue_jobs_are_paged_in_order(store: Store, reader: StatusReader) -> None:
    """The jobs that are overdue for the longest time come first. Each job is returned once, also among jobs of the same
    time."""
    write(store, {f"{(n * 7) % 25:02}": life(ev.JobSubmitted(SPEC, 10 * (n // 4)), release=0) for n in range(25)})
    found: list[Overdue] = []
    while page := reader.overdue(10_000, 0, 4, found[-1] if found else None):
        found += page
    keys = [(o.due_ms, o.job_id) for o in found]
    assert len({o.job_id for o in found}) == 25
    assert keys == sorted(keys)


def test_a_transaction_is_whole_or_not_at_all(store: Store, reader: StatusReader) -> None:
    """If any part of a batch cannot be written, no rows, counters and offsets are written."""
    folded = RowFolder(store, Decoder()).merge([("a", life(ev.JobSubmitted(SPEC)))])
    folded.changes.offsets[("shop.jobs.mail", 0)] = None  # type: ignore[assignment]  # a value that no column accepts
    with pytest.raises(StoreError, match="cannot be written"):
        store.write(folded.changes)
    assert reader.counts() == []
    assert reader.jobs() == []
    assert reader.offsets() == {}
    write(store, {"a": life(ev.JobSubmitted(SPEC))})
    assert reader.counts_by_state()["queued"] == 1


def test_only_one_writer_has_the_lease_at_a_time(backend: Backend) -> None:
    """While the lease of a writer is valid, no other writer gets it. When it has expired, another writer gets it, and
    the first one cannot write."""
    clock = Clock()
    with backend.store("one:1", clock) as one, backend.store("two:2", clock) as two:
        assert one.acquire()
        assert not two.acquire()
        clock.now += 8
        one.renew()
        clock.now += 8
        assert not two.acquire()
        clock.now += 8
        assert two.acquire()
        with pytest.raises(LeaseLost, match="two:2"):
            one.write(Changes(offsets={("t", 0): 1}))
        with pytest.raises(LeaseLost):
            one.renew()
        assert two.offsets() == {}
        two.write(Changes(offsets={("t", 0): 2}))
        assert one.offsets() == {("t", 0): 2}


def test_a_writer_with_an_expired_lease_still_writes_if_no_other_took_it(backend: Backend) -> None:
    """A writer that was paused beyond its lease continues if no other writer took the lease, because it cannot have
    missed a change."""
    clock = Clock()
    with backend.store("one:1", clock) as one:
        assert one.acquire()
        clock.now += 3600
        one.write(Changes(offsets={("t", 0): 1}))


def test_a_released_lease_is_free_at_once(backend: Backend) -> None:
    """After a clean stop of a writer, the next one does not wait."""
    clock = Clock()
    with backend.store("two:2", clock) as two:
        with backend.store("one:1", clock) as one:
            assert one.acquire()
        assert two.acquire()


def test_states_of_the_previous_writer_are_loaded(backend: Backend) -> None:
    """The next writer folds onto the states that the previous writer wrote."""
    with backend.store() as one:
        assert one.acquire()
        write(one, {"a": life(ev.JobSubmitted(SPEC)), "c": life(ev.JobSubmitted(SPEC))})
    with backend.store() as two:
        assert two.acquire()
        assert set(two.load(["a", "b", "c", "d"])) == {"a", "c"}
        write(two, {"b": life(ev.JobSubmitted(SPEC)), "d": life(ev.JobSubmitted(SPEC))})
        assert set(two.load(["a", "b", "c", "d", "e"])) == {"a", "b", "c", "d"}


def test_readers_work_while_a_writer_writes(backend: Backend, store: Store) -> None:
    """Readers in other threads never fail and never see half a transaction."""
    reader = open_reader(backend.url, NAMESPACE)
    done = threading.Event()
    seen: list[tuple[int, int]] = []

    def read() -> None:
        # pytest reports errors of this thread: an exception that ends a thread is a warning, and warnings are errors.
        while not done.is_set():
            position = reader.offsets().get(("t", 0), 0)
            seen.append((position, sum(reader.counts_by_state().values())))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(60):
        write(store, {f"{n:03}-{m}": life(ev.JobSubmitted(SPEC)) for m in range(10)}, {("t", 0): 10 * (n + 1)})
    done.set()
    for thread in threads:
        thread.join()
    reader.close()
    assert seen
    assert all(position <= jobs for position, jobs in seen), "rows came later than the offsets that stand for them"


def test_writers_that_create_a_file_at_once_create_one_table(tmp_path: Path) -> None:
    """Materializers that start together without a table all open the same one, and one of them writes it."""
    for number in range(30):
        url = f"sqlite:///{tmp_path / str(number) / 'status.db'}"
        stores: list[SqliteStore] = []
        together = threading.Barrier(4)

        def make(url: str = url, stores: list[SqliteStore] = stores, together: threading.Barrier = together) -> None:
            together.wait()
            stores.append(SqliteStore(url, NAMESPACE, holder="elsewhere:1"))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(stores) == 4
        assert sum([store.acquire() for store in stores]) == 1
        for store in stores:
            store.close()


def test_a_missing_table_is_an_error(backend: Backend) -> None:
    """Before the first materializer there is no table, and a reader creates none."""
    for _ in range(2):
        with pytest.raises(StoreNotFound, match="JOBLEDGER_STATUS_URL"):
            open_reader(backend.url, NAMESPACE)


def test_another_namespaces_table_is_refused(backend: Backend, store: Store) -> None:
    """A table of another app is neither read nor written."""
    backend.execute("UPDATE meta SET value = 'other' WHERE key = 'namespace'")
    for opens in (open_reader, open_store):
        with pytest.raises(StoreError, match="'other', not of 'shop'"):
            opens(backend.url, NAMESPACE)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:secret@host/1",
        "status.db",
        "postgresql://me:secret@host",
        "postgresql://me:pw@host:secret/db",
        "sqlite:",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_an_unsupported_url_is_refused(url: str) -> None:
    """A URL that names no supported database is refused, with an error that names the setting and not the password."""
    for opens in (open_reader, open_store):
        with pytest.raises(ConfigError, match="JOBLEDGER_STATUS_URL") as found:
            opens(url, NAMESPACE)
        assert "secret" not in str(found.value)


def test_a_new_table_replaces_the_old_one_at_once(backend: Backend, store: Store, reader: StatusReader) -> None:
    """Open readers see either the old or the new table. Writers of the old table have lost their lease."""
    write(store, {"a": life(ev.JobSubmitted(SPEC))}, {("t", 0): 1})
    with store.beside() as new:
        write(new, {"b": life(ev.JobSubmitted(SPEC)), "c": life(ev.JobSubmitted(SPEC))}, {("t", 0): 5})
        assert [each.job_id for each in reader.jobs()] == ["a"]
        assert new.size() == 2
        store.replace_with(new)
        assert sorted(each.job_id for each in reader.jobs()) == ["b", "c"]
        with pytest.raises(LeaseLost):
            new.write(Changes())
    with pytest.raises(LeaseLost):
        store.write(Changes())
    assert (store.size(), store.holder(), store.offsets()) == (2, "", {("t", 0): 5})
    assert store.acquire()
    assert set(store.load(["a", "b", "c"])) == {"b", "c"}
    with backend.store("two:2") as two:
        assert not two.acquire()


def test_an_unused_new_table_leaves_nothing_behind(store: Store, reader: StatusReader) -> None:
    """If a rebuild fails, the table is unchanged, its writer keeps the lease, and the next rebuild starts with an empty
    table."""
    write(store, {"a": life(ev.JobSubmitted(SPEC))})
    for job_id in ("b", "c"):
        with store.beside() as new:
            write(new, {job_id: life(ev.JobSubmitted(SPEC))})
            assert new.size() == 1
    write(store, {"d": life(ev.JobSubmitted(SPEC))})
    assert sorted(each.job_id for each in reader.jobs()) == ["a", "d"]


def test_a_copy_is_the_table_as_it_was(backend: Backend, store: Store, tmp_path: Path) -> None:
    """A copy has every row, counter, tag and offset, and does not change with later writes."""
    tagged = ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "acme"}))
    lives = {"a": life(tagged), "b": life(tagged, ev.JobSucceeded(b"7"))}
    write(store, lives, {("t", 3): 9})
    store.carry(["b"])
    store.write(Changes(topics={"t": "id%_1"}))
    copy(backend.url, NAMESPACE, tmp_path / "copy.db")
    write(store, {"c": life(tagged)}, {("t", 3): 10})
    copied = open_reader(f"sqlite:///{tmp_path / 'copy.db'}", NAMESPACE)
    assert dict(copied.lives()) == lives
    assert copied.offsets() == {("t", 3): 9}
    assert copied.topics() == {"t": "id%_1"}
    assert [each.job_id for each in copied.jobs(tag=("tenant", "acme"))] == ["b", "a"]
    assert copied.counts_by_state() == dict.fromkeys(State, 0) | {"queued": 1, "succeeded": 1}
    copied.close()


def test_texts_of_any_kind_are_stored(store: Store, reader: StatusReader) -> None:
    """Texts in events of other writers may be too long or contain a zero byte. They stop no table, and their jobs are
    found by the same texts."""
    long, zero = "ü" * 5_000, "a\0b"
    error = ev.ErrorInfo(zero, zero + long, "trace\0")
    for number, text in enumerate((long, zero, "\u2028 '\"\\N\t\n%s ?")):
        facts = (ev.JobSubmitted(ev.JobSpec(b"\0", {text: text, "n": text})), ev.JobFailedFact("exhausted", error))
        each = life(*facts, task=text, queue=text, offset=10 * number)
        write(store, {key_text(text): each})
        assert reader.job(text) == job.status(key_text(text), each)
        for found in (reader.jobs(tag=("n", text)), reader.jobs(tag=(text, text)), reader.jobs(task=text, queue=text)):
            assert [status.job_id for status in found] == [key_text(text)]
        assert store.load([key_text(text)]) == {key_text(text): each}
    assert reader.counts_by_state()["failed"] == 3
    write(store, {key_text(long): life(ev.JobSucceeded(), offset=99)})
    assert reader.counts_by_state()["succeeded"] == 1
    assert len({key_text(long), key_text(long + "x"), key_text(long[:-1])}) == 3


# -- only SQLite ----------------------------------------------------------------------------------------------------


def test_sqlite_a_dead_writer_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    """After a kill -9, the next materializer on the machine does not wait until the lease expires."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    url, clock = f"sqlite:///{tmp_path / 's.db'}", Clock()
    one = SqliteStore(url, NAMESPACE, holder=f"{socket.gethostname()}:{ended.pid}", clock=clock)
    assert one.acquire()
    with SqliteStore(url, NAMESPACE, holder="two:2", clock=clock) as two:
        assert two.acquire()
    one.close()


def test_sqlite_foreign_files_are_refused(tmp_path: Path) -> None:
    """A file that is not a database, or a database of another program or version, is refused and not changed."""
    (tmp_path / "text.db").write_bytes(b"not a database, but long enough to be looked at" * 10)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE meals (name TEXT)")
    other.close()
    SqliteStore(f"sqlite:///{tmp_path / 'old.db'}", NAMESPACE).close()
    with sqlite3.connect(tmp_path / "old.db") as old:
        old.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    old.close()
    for name, text in (("text", "not a database"), ("other", "another program"), ("old", "schema version 99")):
        url = f"sqlite:///{tmp_path / name}.db"
        for opens in (open_reader, open_store):
            with pytest.raises(StoreError, match=text):
                opens(url, NAMESPACE)


def test_sqlite_namespaces_are_read_from_the_content_of_files(tmp_path: Path) -> None:
    """The namespaces of a folder are those of its status tables. Files of projections, copies, empty and broken files
    do not count."""
    for namespace in ("orders", "stock", "bare-projections"):
        url = f"sqlite:///{tmp_path / namespace}.db"
        SqliteStore(url, namespace).close()
    projections = ProjectionStore(f"sqlite:///{tmp_path / 'orders.db'}", "orders")
    projections.make(offsets_table)
    projections.close()
    copy(f"sqlite:///{tmp_path / 'stock.db'}", "stock", tmp_path / "stock-before.db")
    (tmp_path / "touched.db").touch()
    (tmp_path / "text.db").write_bytes(b"not a database, but long enough to be looked at" * 10)
    (tmp_path / "folder.db").mkdir()
    assert (tmp_path / "orders-projections.db").exists()
    assert namespaces_in(tmp_path) == ["bare-projections", "orders", "stock"]
    assert namespaces_in(tmp_path / "none") == []


def test_sqlite_projections_and_a_status_table_never_share_a_file(tmp_path: Path) -> None:
    """A namespace's projections and the status table of ``<namespace>-projections`` would have the same file. The
    second one is refused."""
    for first in ("table", "projections"):
        beside = f"sqlite:///{tmp_path / first}-projections.db"
        projections = ProjectionStore(f"sqlite:///{tmp_path / first}.db", "shop")
        if first == "table":
            SqliteStore(beside, "shop-projections").close()
            with pytest.raises(
                StoreError, match=r"status table of namespace 'shop-projections': set JOBLEDGER_STATUS_URL"
            ):
                projections.make(offsets_table)
        else:
            projections.make(offsets_table)
            with pytest.raises(StoreError, match=r"another program.*Set JOBLEDGER_STATUS_URL"):
                SqliteStore(beside, "shop-projections")
        projections.close()


def test_sqlite_an_empty_file_is_no_table_yet(tmp_path: Path) -> None:
    """An empty file counts as a missing table. A writer creates the table in it."""
    (tmp_path / "s.db").touch()
    with pytest.raises(StoreNotFound):
        open_reader(f"sqlite:///{tmp_path / 's.db'}", NAMESPACE)
    open_store(f"sqlite:///{tmp_path / 's.db'}", NAMESPACE).close()
    open_reader(f"sqlite:///{tmp_path / 's.db'}", NAMESPACE).close()


def test_sqlite_queries_use_their_indexes(tmp_path: Path) -> None:
    """No query for the newest jobs, for a state or for overdue jobs reads the whole table."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    asked: list[tuple[str, tuple[object, ...]]] = []
    with SqliteStore(url, NAMESPACE) as store, closing(open_reader(url, NAMESPACE)) as reader:
        assert store.acquire()
        submitted = ev.JobSubmitted(ev.JobSpec(b"{}"))
        lives = {f"done {n}": life(submitted, ev.JobSucceeded(), ms=n) for n in range(3)}
        lives |= {f"failed {n}": life(submitted, ev.JobFailedFact("exhausted", BAD), ms=n) for n in range(2)}
        write(store, lives | {"other": life(submitted, ev.JobSucceeded(), ms=9, task="other"), "open": life(submitted)})
        sqlalchemy.event.listen(
            reader._engine,  # type: ignore[attr-defined]
            "before_cursor_execute",
            lambda c, cur, sql, params, *_: asked.append((sql, params)),
        )

        def plan(ask: Callable[[], object]) -> str:
            asked.clear()
            ask()
            lines = [row[3] for sql, params in asked for row in store._db.execute("EXPLAIN QUERY PLAN " + sql, params)]
            return " ".join(lines)

        by_tag = "PRIMARY KEY (name=? AND value=?"
        for index, ask in (
            ("jobs_by_time", reader.jobs),
            ("jobs_by_time", lambda: reader.jobs(version="1")),
            ("jobs_by_state", lambda: reader.jobs(state="failed")),
            ("jobs_by_state", lambda: reader.jobs(state="failed", task="send")),
            ("jobs_by_state", lambda: reader.jobs(error="x")),
            ("jobs_by_state", lambda: reader.jobs(late_ms=10)),
            ("jobs_by_task", lambda: reader.jobs(task="other")),
            ("jobs_by_task", lambda: reader.count(task="other", version="1")),
            ("jobs_due", lambda: reader.overdue(10, 1)),
            ("PRIMARY KEY (job_id>? AND job_id<?)", lambda: reader.ids("01a2")),
            (by_tag, lambda: list(reader.chosen(tag=("a", "b")))),
        ):
            text = plan(ask)
            assert index in text
            assert "TEMP B-TREE" not in text or "MATERIALIZE" in text or "CO-ROUTINE" in text, text
        assert plan(lambda: list(reader.chosen(tag={"a": "b", "c": "d"}))).count(by_tag) == 2


def test_a_value_that_sqlite_cannot_store_is_an_error_that_names_the_projection(tmp_path: Path) -> None:
    """Python's own error for such a value has no error code of SQLite."""
    store = ProjectionStore(f"sqlite:///{tmp_path / 'orders.db'}", "orders")
    with closing(store), store.engine.connect() as db, pytest.raises(sqlalchemy.exc.SQLAlchemyError) as caught:
        db.exec_driver_sql("SELECT ?", (object(),))
    error = store.explain(caught.value, "projection totals")
    assert type(error) is StoreError
    assert str(error).startswith("projection totals: ")


PLAN = PlanStatus("p", "redrive", '{"task": ["send"]}', None, 5.0, "ann", None, 1_000, PlanState.RUNNING, 3, 1, 1)


def test_plans_are_written_and_read(store: Store, reader: StatusReader) -> None:
    """A plan is replaced as a whole. The last one comes first."""
    assert (reader.plans(), store.load_plans(["p"])) == ([], {})
    store.write(Changes(plans=[PLAN, msgspec.structs.replace(PLAN, plan="q", opened_ms=2_000)]))
    done = msgspec.structs.replace(PLAN, state=PlanState.DONE, done=3, next_part=1, ended_ms=3_000, error="a\0: gone")
    store.write(Changes(plans=[done]))
    assert [plan.plan for plan in reader.plans()] == ["q", "p"]
    assert [plan.plan for plan in reader.plans(limit=1)] == ["q"]
    assert [plan.plan for plan in reader.plans(after="q")] == ["p"]
    assert reader.plans(after="p") == []
    with pytest.raises(PlanNotFound, match="no plan nobody"):
        reader.plans(after="nobody")
    assert reader.plan("p") == done == store.load_plans(["p"])["p"]
    with pytest.raises(PlanNotFound, match="no plan r"):
        reader.plan("r")


def worker(name: str, seconds: float) -> WorkerStatus:
    """Return the status of a worker that reported this many seconds after the beginning of 1970."""
    at = dt.datetime.fromtimestamp(seconds, dt.UTC)
    jobs = {"00000000-0000-7000-8000-000000000000": at}
    return WorkerStatus(name, "h", 2**62, "1\0", "0.1", at, at, ("mail",), 1, ("send",), 2, 100, 3, jobs, 2**40, 8)


def test_workers_are_written_and_read(store: Store, reader: StatusReader) -> None:
    """The last report replaces the earlier ones. A worker is removed by its tombstone, or by the age of its report."""
    assert reader.workers() == []
    long = "w" * 300
    first = {name: worker(name, number) for number, name in enumerate(["h:1", "h:2", "h:3", long], 1)}
    store.write(Changes(workers=dict(first)))
    assert reader.workers() == list(first.values())
    assert [status.worker for status in reader.workers(2)] == ["h:3", long]  # those that reported last
    assert [status.worker for status in reader.workers(before_ms=2_000)] == ["h:1"]
    store.write(Changes(workers={"h:1": worker("h:1", 10.5), "h:2": None, "none": None}))
    assert reader.workers() == [worker("h:1", 10.5), first["h:3"], first[long]]
    store.write(Changes(workers={long: None}, workers_before_ms=10_500))
    assert reader.workers() == [worker("h:1", 10.5)]
    store.write(Changes(workers={"h:4": worker("h:4", 1)}, workers_before_ms=10_501))
    assert reader.workers() == [worker("h:4", 1)]  # written in the same transaction, after the removal


def test_a_rebuilt_table_has_no_workers_until_their_reports_are_read(store: Store, reader: StatusReader) -> None:
    """The new table replaces all of the old one."""
    store.write(Changes(workers={"h:1": worker("h:1", 1)}))
    with store.beside() as new:
        store.replace_with(new)
    assert reader.workers() == []


def test_a_table_of_the_second_revision_gets_the_table_of_workers(backend: Backend) -> None:
    """Before that it has no workers, and no index by task."""
    with backend.store() as store:
        assert store.acquire()
        store.write(Changes(plans=[PLAN]))
    backend.execute("DROP TABLE workers")
    backend.execute("DROP INDEX jobs_by_task")
    backend.execute("UPDATE meta SET value = '2' WHERE key = 'revision'")
    with closing(open_reader(backend.url, NAMESPACE)) as old:
        assert (old.workers(), old.plans()) == ([], [PLAN])
        with backend.store() as store, closing(open_reader(backend.url, NAMESPACE)) as new:
            assert store.acquire()
            store.write(Changes(workers={"h:1": worker("h:1", 1)}))
            for reader in (new, old):  # also one that was opened before
                assert (reader.workers(), reader.plans()) == ([worker("h:1", 1)], [PLAN])


def test_jobs_are_found_by_key_version_and_error(store: Store, reader: StatusReader) -> None:
    """The ids and runs of the jobs that match are read from one snapshot."""
    started = ev.JobStarted("h:1", "1.0", {}, "t", 0)
    lives = {
        "a": life(ev.JobSubmitted(ev.JobSpec(b"{}")), started, ev.JobFailedFact("exhausted", BAD)),
        "b": life(ev.JobSubmitted(ev.JobSpec(b"{}")), ev.JobStarted("h:1", "2.0", {}, "t", 0)),
    }
    keyed = job.of(1, 1, 1, "send", "mail", "k", ev.JobSubmitted(ev.JobSpec(b"{}")), (9_000, "shop.jobs.mail", 0, 7))
    assert keyed is not None
    write(store, {**lives, "c": keyed})
    found = reader.job("a")
    assert (found.worker, found.version, found.fingerprint) == ("h:1", "1.0", fingerprint(BAD))
    assert list(reader.chosen(version="1.0")) == list(reader.chosen(error=BAD.type)) == [("a", 1)]
    assert list(reader.chosen(fingerprint=[fingerprint(BAD), "x"], state="failed")) == [("a", 1)]
    assert list(reader.chosen(key="k")) == [("c", 1)]
    assert [each.job_id for each in reader.jobs(version=["1.0", "2.0"])] == ["b", "a"]
    assert list(reader.chosen(limit=1)) == [("c", 1)]
    assert set(reader.lives_of(["a", "none"])) == {"a"}


def test_a_table_of_the_first_revision_gets_what_it_lacks(backend: Backend) -> None:
    """Before that it can be read, except by the new columns. Afterwards its rows are as they were."""
    with backend.store() as store:
        assert store.acquire()
        write(store, {"a": life(ev.JobSubmitted(ev.JobSpec(b"{}")), ev.JobFailedFact("exhausted", BAD))})
    for statement in (
        "DROP INDEX jobs_by_error",
        "DROP INDEX jobs_by_key",
        "DROP INDEX jobs_by_task",
        *(f"ALTER TABLE jobs DROP COLUMN {name}" for name in ("fingerprint", "key", "version", "actor")),
        "DROP TABLE plans",
        "DROP TABLE workers",
        "DELETE FROM meta WHERE key = 'revision'",
    ):
        backend.execute(statement)
    with closing(open_reader(backend.url, NAMESPACE)) as old:
        assert [each.job_id for each in old.jobs(state="failed")] == ["a"]
        assert [job_id for job_id, _ in old.lives()] == ["a"]
        assert (old.plans(), old.workers()) == ([], [])
        with pytest.raises(StoreError, match="has no column 'key'"):
            old.jobs(key="k")
    with backend.store() as store, closing(open_reader(backend.url, NAMESPACE)) as new:
        assert store.acquire()
        assert [each.job_id for each in new.jobs(state="failed")] == ["a"]
        assert new.jobs(fingerprint=fingerprint(BAD)) == []
        write(store, {"a": life(ev.JobProgressed(1, 1), offset=50)})
        assert [each.job_id for each in new.jobs(fingerprint=fingerprint(BAD))] == ["a"]
        store.write(Changes(plans=[PLAN]))
        assert new.plan("p") == PLAN
    with backend.store() as store:
        assert store.acquire()
