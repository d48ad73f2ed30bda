"""What only PostgreSQL has: users and their rights, other people's tables, connections
that break, servers that crash."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from jobledger import App
from jobledger.config import Settings
from jobledger.errors import CommitUnknown, LeaseLost, StoreError, StoreNotFound, StoreTooSlow, StoreUnavailable
from jobledger.job import Life, State
from jobledger.kafka.embedded.ports import free_port
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Position
from jobledger.streams.projections.projection_store import ProjectionStore, folded, offsets_table
from jobledger.streams.status.batch_size import CALM, BatchSize, in_batches
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import Changes, StatusReader, copy, open_reader, open_store, shown
from jobledger.streams.status.store.connecting import bounded, schema_beside, schema_of
from jobledger.streams.status.store.postgres import PostgresStore
from jobledger.streams.status.store.reader import SqlReader
from tests.contract.test_store import NAMESPACE, SPEC, life, write
from tests.patience import PATIENCE, wait_until
from tests.pgbouncer import pgbouncer
from tests.postgres import Databases, Server

LOG = logging.getLogger("test")

SCHEMA = f"jobledger_{NAMESPACE}"
PASSWORD = "s3cret/@:%?#"


@pytest.fixture
def url(postgres: Databases) -> Iterator[str]:
    with postgres.database() as made:
        yield made


@contextmanager
def member(postgres: Databases, url: str, *grants: str) -> Iterator[str]:
    """The URL of a user with these rights in the database, each a statement with ``{role}``; they go with the user."""
    with postgres.role(PASSWORD) as role:
        name = sqlalchemy.make_url(url).database
        for grant in grants:
            postgres.execute(grant.format(role=role, database=name), url)
        try:
            yield sqlalchemy.make_url(url).set(username=role, password=PASSWORD).render_as_string(hide_password=False)
        finally:
            postgres.execute(f"DROP OWNED BY {role} CASCADE", url)


def break_connections(postgres: Databases, url: str) -> None:
    """End every session on a database, as a server that stops or a network that fails does."""
    name = sqlalchemy.make_url(url).database
    ended = "pg_terminate_backend(pid, 5000)"  # waits for their ends
    postgres.execute(
        f"SELECT {ended} FROM pg_stat_activity WHERE datname = '{name}' AND backend_type = 'client backend'"
    )


def refused(url: str, *words: str, by: type[StoreError] = StoreError) -> None:
    """Opened for reading or writing it is an error that has these words and not the password, nor has its traceback."""
    for opens in (open_reader, open_store):
        with pytest.raises(StoreError) as found:
            opens(url, NAMESPACE)
        assert type(found.value) is by
        said = str(found.value)
        assert [word for word in words if word not in said] == [], said
        everything = "".join(traceback.format_exception(found.value))
        assert "s3cret" not in everything.replace(f'PASSWORD = "{PASSWORD}"', "")


def test_a_wrong_password_is_said(postgres: Databases, url: str) -> None:
    """A wrong password is an error at once that names host, database and user, and no password."""
    with member(postgres, url) as right:
        wrong = sqlalchemy.make_url(right).set(password="s3cret-but-wrong").render_as_string(hide_password=False)
        database = sqlalchemy.make_url(url).database
        refused(wrong, "127.0.0.1", f"database '{database}'", "the user or the password", "jl_")
        nowhere = sqlalchemy.make_url(right).set(database="none_here").render_as_string(hide_password=False)
        refused(nowhere, "there is no such database", "none_here")
        postgres.execute(f"REVOKE CONNECT ON DATABASE {database} FROM PUBLIC")
        refused(right, "GRANT CONNECT ON DATABASE")
        assert PASSWORD not in shown(right)
        assert "s3cret" not in shown(f"postgresql://host/db?user=me&password={PASSWORD}")


def test_settings_do_not_show_a_password() -> None:
    """What a log or a debugger shows of the settings has no password in it."""
    assert "s3cret" not in repr(Settings(status_url="postgresql://me:s3cret@host/db"))


def test_a_server_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, the error after a bounded time names host, port and database, and may be tried again."""
    monkeypatch.setattr("jobledger.streams.status.store.postgres_reader.READ_PATIENCE_S", 0.3)
    port = free_port()
    refused(f"postgresql://me:s3cret@127.0.0.1:{port}/db", f"127.0.0.1:{port}", "'db'", by=StoreUnavailable)


def test_a_user_without_rights_is_told_which(postgres: Databases, url: str) -> None:
    """A user who may make no schema is told who must; once the table is there a reader needs no more than SELECT."""
    with member(postgres, url) as reads:
        with pytest.raises(StoreError, match="must own the schema"):
            open_store(reads, NAMESPACE)
        with pytest.raises(StoreNotFound):
            open_reader(reads, NAMESPACE)
        with PostgresStore(url, NAMESPACE) as store:
            assert store.acquire()
            write(store, {"a": life(ev.JobSubmitted(SPEC))})
            refused(reads, "permission denied for", "USAGE", SCHEMA)
            role = sqlalchemy.make_url(reads).username
            postgres.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role}", url)
            postgres.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {role}", url)
            reader = open_reader(reads, NAMESPACE)
            assert [each.job_id for each in reader.jobs()] == ["a"]
            with store.beside() as new:
                store.replace_with(new)
            assert reader.jobs() == []  # what was granted holds for the new table
            reader.close()
        with open_store(reads, NAMESPACE) as other, pytest.raises(StoreError, match="permission denied"):
            other.acquire()


def test_a_database_that_only_reads_is_said(postgres: Databases, url: str) -> None:
    """A standby, or a user for whom transactions only read, is no place for a writer, and the error says so."""
    only = "ALTER ROLE {role} SET default_transaction_read_only = on"
    with member(postgres, url, only) as reads, pytest.raises(StoreError, match="it only reads"):
        open_store(reads, NAMESPACE)


def test_a_schema_that_was_made_for_the_user_is_enough(postgres: Databases, url: str) -> None:
    """Who owns the schema needs no right on the database, except for a rebuild, which makes one beside it."""
    with member(postgres, url, f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {{role}}") as owner:
        with open_store(owner, NAMESPACE) as store:
            assert store.acquire()
            write(store, {"a": life(ev.JobSubmitted(SPEC))})
            with pytest.raises(StoreError, match="CREATE ON DATABASE"), store.beside():
                pass
        open_reader(owner, NAMESPACE).close()


def test_namespaces_and_others_live_in_one_database(postgres: Databases, url: str) -> None:
    """Each namespace has its own tables, also beside tables of the same names that are somebody else's."""
    postgres.execute("CREATE TABLE jobs (job_id int)", url)
    postgres.execute("CREATE TABLE meta (key int)", url)
    names = ["shop", "Shop", "shop-2", "n" * 100, "n" * 99 + "m"]
    for name in names:
        with open_store(url, name) as store:
            assert store.acquire()
            write(store, {name: life(ev.JobSubmitted(SPEC))})
    for name in names:
        reader = open_reader(url, name)
        assert [each.job_id for each in reader.jobs()] == [name]
        reader.close()
    assert postgres.execute("SELECT count(*) FROM jobs", url) == [(0,)]
    assert len({schema_beside(schema_of(name)) for name in names} | {schema_of(name) for name in names}) == 10


def test_a_schema_of_something_else_is_refused(postgres: Databases, url: str) -> None:
    """A schema of our name with tables that are not ours is left as it is."""
    postgres.execute(f"CREATE SCHEMA {SCHEMA} CREATE TABLE meals (name text)", url)
    refused(url, "something else")


def test_a_database_that_cannot_hold_every_text_is_refused(postgres: Databases) -> None:
    """A database in another encoding than UTF-8 is refused at once, and not by the first name that does not fit."""
    name = f"jl_latin_{os.getpid()}"
    postgres.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(StoreError, match="encoded in LATIN1"):
            open_store(postgres.at(database=name), NAMESPACE)
    finally:
        postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_two_that_make_the_table_at_once_make_one(url: str) -> None:
    """Materializers that start together on an empty database find one table, and one of them writes it."""
    stores: list[PostgresStore] = []
    threads = [threading.Thread(target=lambda: stores.append(PostgresStore(url, NAMESPACE))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    assert sum([store.acquire() for store in stores]) == 1
    for store in stores:
        store.close()


def test_a_writer_whose_connection_ended_is_replaced_at_once(postgres: Databases, url: str) -> None:
    """A writer that died, on whatever machine, need not be waited for; one that lives and is silent keeps its place."""
    with PostgresStore(url, NAMESPACE, holder="there:1") as one, PostgresStore(url, NAMESPACE, holder="two:2") as two:
        assert one.acquire()
        assert not two.acquire()
        break_connections(postgres, url)
        with pytest.raises(StoreUnavailable):
            two.acquire()  # its own connection has broken, too; the next try has a new one
        assert two.acquire()
        with pytest.raises(StoreUnavailable):
            one.renew()
        with pytest.raises(LeaseLost, match="two:2"):
            one.renew()


def test_a_connection_that_breaks_between_batches_costs_nothing(postgres: Databases, url: str) -> None:
    """A writer whose connection broke writes on over a new one, still its lease's holder for the others."""
    with PostgresStore(url, NAMESPACE) as one, PostgresStore(url, NAMESPACE, holder="two:2") as two:
        assert one.acquire()
        assert one.offsets() == {}
        one.write(Changes(offsets={("t", 0): 1}))
        break_connections(postgres, url)
        with pytest.raises(StoreUnavailable):
            one.write(Changes(offsets={("t", 0): 2}))
        one.write(Changes(offsets={("t", 0): 2}))
        with pytest.raises(StoreUnavailable):
            two.acquire()
        assert not two.acquire()
        assert one.offsets() == {("t", 0): 2}


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_commit_that_is_under_way_when_its_connection_breaks_is_awaited(
    postgres: Databases, url: str, forgetful: bool
) -> None:
    """Its end may come when the writer has a new connection: what it wrote is not written a second time, be it by one
    that goes on or by one that begins again at the table's offsets."""
    with PostgresStore(url, NAMESPACE) as store, psycopg.connect(url) as old:
        assert store.acquire()
        store.offsets()
        write(store, {"a": life(ev.JobSubmitted(SPEC))}, {("t", 0): 5})
        # What the server has of the transaction whose commit is under way, on a connection the writer has lost.
        old.execute(f"SET search_path = {SCHEMA}")
        old.execute("UPDATE lease SET until_ms = until_ms")
        old.execute("UPDATE counters SET jobs = jobs + 1")
        old.execute("UPDATE offsets SET next_offset = 6")
        break_off(store)
        failed: list[BaseException] = []
        found: list[dict[tuple[str, int], int]] = []

        def go_on() -> None:
            try:
                if forgetful:
                    found.append(store.offsets())
                else:
                    store.write(Changes(counts={("send", "mail", "queued"): 1}, offsets={("t", 0): 6}))
            except CommitUnknown as exc:
                failed.append(exc)

        thread = threading.Thread(target=go_on)
        thread.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: postgres.execute(waits, url) == [(1,)], 10, "the writer waiting for the lease")
        old.commit()
        thread.join(PATIENCE * 20)
        assert not thread.is_alive()
        assert found == ([{("t", 0): 6}] if forgetful else [])
        assert len(failed) == (not forgetful)
        assert store.offsets() == {("t", 0): 6}
        assert postgres.execute(f"SELECT sum(jobs) FROM {SCHEMA}.counters", url) == [(2,)]


def break_off(store: PostgresStore) -> None:
    """Lose a writer's connection."""
    assert store._db is not None
    store._db.close()


@pytest.mark.parametrize("found", [None, 1, 9])
def test_a_table_that_is_not_where_it_was_left_is_noticed(postgres: Databases, url: str, found: int | None) -> None:
    """After a broken connection a writer that finds other offsets, of lost commits or of one it took for failed, writes
    nothing before it has begun again at the offsets that are there."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        store.offsets()
        write(store, {"b": life(ev.JobSubmitted(SPEC))}, {("t", 0): 5})
        change = "DELETE FROM {}.offsets" if found is None else f"UPDATE {{}}.offsets SET next_offset = {found}"
        postgres.execute(change.format(SCHEMA), url)
        break_connections(postgres, url)
        with pytest.raises(StoreUnavailable):
            store.write(Changes(offsets={("t", 0): 6}))
        for act in (lambda: store.write(Changes(offsets={("t", 0): 6})), store.renew, lambda: store.load(["a"])):
            with pytest.raises(CommitUnknown, match="differs from what this writer committed"):
                act()
        assert store.offsets() == ({} if found is None else {("t", 0): found})
        store.write(Changes(offsets={("t", 0): 6}))
        assert store.offsets() == {("t", 0): 6}


def test_what_a_crash_takes_away_is_whole_transactions(postgres_server: Server) -> None:
    """After a crash of the server rows, counters and offsets are of one moment, and the lease's epoch is never lost."""
    with postgres_server.database() as url, PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        store.offsets()
        for number in range(50):
            write(store, {f"{number:03}": life(ev.JobSubmitted(SPEC))}, {("t", 0): number + 1})
        postgres_server.stop(at_once=True)
        with pytest.raises(StoreUnavailable):
            store.renew()
        postgres_server.start()
        try:
            store.renew()
        except CommitUnknown:  # the usual: what was not yet on disk is gone
            assert store.offsets()[("t", 0)] < 50
        offset = store.offsets().get(("t", 0), 0)
        assert store.size() == offset
        reader = open_reader(url, NAMESPACE)
        assert reader.counts_by_state()[State.QUEUED] == offset
        reader.close()
        write(store, {f"{n:03}": life(ev.JobSubmitted(SPEC)) for n in range(offset, 50)}, {("t", 0): 50})
        assert store.size() == 50


def test_a_view_of_somebody_elses_stops_a_swap(postgres: Databases, url: str) -> None:
    """A rebuild drops nobody's view: it says what is in the way and leaves the table as it was."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(store, {"a": life(ev.JobSubmitted(SPEC))})
        postgres.execute(f"CREATE VIEW mine AS SELECT job_id FROM {SCHEMA}.jobs", url)
        with store.beside() as new, pytest.raises(StoreError, match=r"view public\.mine depends on"):
            store.replace_with(new)
        assert postgres.execute("SELECT * FROM mine", url) == [("a",)]
        write(store, {"b": life(ev.JobSubmitted(SPEC))})
        assert postgres.execute("SELECT count(*) FROM mine", url) == [(2,)]
        assert postgres.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'jobledger%'", url) == [(1,)]


def test_queries_use_their_indexes(postgres: Databases, url: str) -> None:
    """No list of the newest, of a state, of a tag or of the overdue reads the whole table."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        tagged = ev.JobSubmitted(ev.JobSpec(b"{}", {"a": "b"}))
        for begin in range(0, 6_000, 2_000):
            write(store, {f"{n:06}": life(tagged, ev.JobSucceeded(), ms=n) for n in range(begin, begin + 2_000)})
        later = ev.JobSubmitted(SPEC, 3_600_000)
        write(store, {f"later {n:06}": life(later, release=0, ms=n * 1_000) for n in range(2_000)})
        postgres.execute("ANALYZE", url)
        reader = open_reader(url, NAMESPACE)
        plans: list[str] = []
        engine = reader._engine  # type: ignore[attr-defined]

        def explain(connection: object, cursor: psycopg.Cursor[tuple[str]], sql: str, params: Any, *_: object) -> None:
            if "set_config" in sql:
                return
            with cursor.connection.cursor() as asking:
                plans.append("\n".join(line for (line,) in asking.execute("EXPLAIN " + sql, params)))

        sqlalchemy.event.listen(engine, "before_cursor_execute", explain)
        reader.jobs()
        reader.jobs(state="failed", task="send")
        reader.jobs(tag=("a", "b"))
        reader.overdue(10, 1)
        reader.job("000001")
        reader.close()
    for plan, index in zip(plans, ("jobs_by_time", "jobs_by_state", "tags_pkey", "jobs_due", "jobs_pkey"), strict=True):
        assert index in plan
        assert "Seq Scan" not in plan
        assert "Sort" not in plan


def test_a_missing_driver_names_the_extra() -> None:
    """Without psycopg a PostgreSQL URL is an error that says what to install."""
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from jobledger.errors import ConfigError\n"
        "from jobledger.streams.status.store import open_reader, open_store\n"
        "for opens in (open_reader, open_store):\n"
        "    try: opens('postgresql://me:s3cret@host/db', 'shop')\n"
        "    except ConfigError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'jobledger[postgres]'") == 2
    assert "s3cret" not in done.stdout


# -- bounds -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """While the block runs, another session's open transaction holds the strongest lock on a table."""
    with psycopg.connect(url) as db:
        db.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        db.rollback()


def test_readers_do_not_wait_without_end_behind_a_lock(
    postgres: Databases, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a reader asks while another session locks the tables, within seconds it raises that this is so."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(store, {"a": life(ev.JobSubmitted(SPEC))}, {("t", 0): 1})
    folds = ProjectionStore(url, NAMESPACE)
    folds.make(offsets_table)
    folds.close()
    for name in ("_QUESTION", "_WALK"):
        monkeypatch.setattr(f"jobledger.streams.status.store.postgres_reader.{name}", bounded(lock_timeout="700ms"))
    app = App(NAMESPACE, settings=Settings(status_url=url))
    assert app.job("a").state == "queued"
    asking: dict[str, list[Callable[[], object]]] = {
        f"{SCHEMA}.jobs": [
            lambda: app.job("a"),
            lambda: list(app.jobs()),
            lambda: list(app.status_table().lives()),
            lambda: copy(url, NAMESPACE, tmp_path / "copy.db"),
        ],
        f"{SCHEMA}.counters": [lambda: app.status_table().counts()],
        f"{SCHEMA}.offsets": [lambda: app.job("a", at_least=Position("t", 0, 0))],
        f"{SCHEMA}.meta": [lambda: open_reader(url, NAMESPACE)],
        offsets_table.name: [lambda: folded(url, NAMESPACE)],
    }
    for table, questions in asking.items():
        with ThreadPoolExecutor(len(questions)) as pool, locked(url, table):
            for found in [pool.submit(ask) for ask in questions]:
                with pytest.raises(StoreUnavailable, match="another session holds a lock"):
                    found.result(30)
    assert app.job("a", at_least=Position("t", 0, 0)).state == "queued"
    app.close()


def test_a_swap_waits_for_a_long_reader_and_holds_up_no_other(
    postgres: Databases, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While somebody's query reads the table for long, a rebuild's swap tries again and again, and readers are answered in
    between; once the query has ended, the new table is in its place."""
    caplog.set_level(logging.INFO, "jobledger.materializer")
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        reader = open_reader(url, NAMESPACE)
        with store.beside() as new, ThreadPoolExecutor(1) as pool:
            with psycopg.connect(url) as db:
                db.execute(f"SELECT * FROM {SCHEMA}.jobs")
                write(new, {"a": life(ev.JobSubmitted(SPEC))})
                swapped = pool.submit(store.replace_with, new)
                wait_until(lambda: "not in its place yet" in caplog.text, 30, "a try in vain")
                assert reader.jobs() == []
                assert not swapped.done()
                db.rollback()
            swapped.result(60)
        assert [each.job_id for each in reader.jobs()] == ["a"]
        reader.close()


def test_a_readers_statement_is_bounded_unless_its_user_says_otherwise(postgres: Databases, url: str) -> None:
    """A question that takes too long is an error that names the user's setting, which wins over ours; a walk through the
    whole table may take its time."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(store, {f"{n:06}": life(ev.JobSubmitted(SPEC)) for n in range(2_000)})
    grants = (
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO {{role}}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {{role}}",
    )
    show = "SELECT current_setting('statement_timeout') || ' ' || current_setting('lock_timeout')"
    for mine, bounds, walk in (
        ("", "5s 4s", "0 4s"),
        ("ALTER ROLE {role} SET statement_timeout = '20s'", "20s 4s", "20s 4s"),
        ("ALTER ROLE {role} SET lock_timeout = '1s'", "5s 1s", "0 1s"),
    ):
        with member(postgres, url, *grants, *([mine] if mine else [])) as reads:
            reader = open_reader(reads, NAMESPACE)
            assert isinstance(reader, SqlReader)
            for whole, wanted in ((False, bounds), (True, walk)):
                with reader._reading(walk=whole) as db:
                    assert db.exec_driver_sql(show).scalar() == wanted
            reader.close()
    with member(postgres, url, *grants) as reads:
        reader = open_reader(reads, NAMESPACE)
        assert isinstance(reader, SqlReader)
        role = sqlalchemy.make_url(reads).username
        with pytest.raises(StoreTooSlow, match=rf"user '{role}'.*ALTER ROLE"), reader._reading() as db:
            db.exec_driver_sql("SELECT pg_sleep(60)")
        assert len(reader.jobs(limit=10)) == 10
        reader.close()


def test_a_batch_that_takes_too_long_is_made_smaller(postgres: Databases, url: str) -> None:
    """Under a `statement_timeout` of its user a writer's batch is halved until it fits, and nothing is missing or counted
    twice; when the database is fast again, batches grow."""
    # More than 200 rows at once take a minute, fewer take no time: how many fit does not depend on the machine.
    body = "BEGIN IF (SELECT count(*) FROM added) > 200 THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END"
    slow = (
        f"CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        (
            f"CREATE TRIGGER slow AFTER INSERT ON {SCHEMA}.jobs REFERENCING NEW TABLE AS added "
            "FOR EACH STATEMENT EXECUTE FUNCTION slow()"
        ),
    )
    limit = "ALTER ROLE {role} SET statement_timeout = '1s'"
    with member(postgres, url, f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {{role}}", limit) as owner:
        with PostgresStore(owner, NAMESPACE) as store:
            assert store.acquire()
            store.offsets()
            for statement in slow:
                postgres.execute(statement, url)
            projector, size = RowFolder(store, Decoder()), BatchSize(1_000)
            sizes: list[int] = []

            def apply(part: Sequence[tuple[str, Life]]) -> None:
                done = projector.merge(part)
                done.changes.offsets["t", 0] = int(part[-1][0]) + 1
                store.write(done.changes)
                projector.committed(done)
                sizes.append(len(part))

            lives = [(f"{n:06}", life(ev.JobSubmitted(SPEC))) for n in range(1_000)]
            with pytest.raises(StoreTooSlow, match="statement_timeout"):
                apply(lives)
            in_batches(lives, size, apply, LOG)
            assert sum(sizes) == 1_000
            assert max(sizes) == size.now < 250
            assert store.size() == 1_000
            assert store.offsets() == {("t", 0): 1_000}
            postgres.execute(f"DROP TRIGGER slow ON {SCHEMA}.jobs", url)
            with store._transaction():
                store._run("SET statement_timeout = 0")  # it is fast, however busy the machine is
            few = size.now
            for n in range(1_000, 1_000 + CALM):
                in_batches([(f"{n:06}", life(ev.JobSubmitted(SPEC)))], size, apply, LOG)
            assert size.now == 2 * few
        reader = open_reader(owner, NAMESPACE)
        assert reader.counts_by_state()[State.QUEUED] == 1_000 + CALM
        reader.close()


# -- poolers ----------------------------------------------------------------------------------------------------------


def test_readers_work_behind_pgbouncer_in_transaction_mode(postgres: Databases, url: str, tmp_path: Path) -> None:
    """Several readers at once, each transaction on whatever connection PgBouncer has: all answers are right, bounds hold,
    and no setting of a reader stays on a connection."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(store, {f"{n:06}": life(ev.JobSubmitted(SPEC), ms=n) for n in range(3_000)}, {("t", 0): 3_000})
    with pgbouncer(url, pool_mode="transaction", size=2) as behind:
        readers = [open_reader(behind, NAMESPACE) for _ in range(4)]

        def ask(reader: StatusReader) -> None:
            for n in range(0, 3_000, 100):  # well past the number after which a driver prepares
                assert reader.job(f"{n:06}").state == "queued"
                assert [each.job_id for each in reader.jobs(limit=2, after=f"{n + 2:06}")] == [f"{n + 1:06}", f"{n:06}"]
                assert reader.reached(Position("t", 0, n))
            assert sum(1 for _ in reader.lives()) == 3_000

        with ThreadPoolExecutor(len(readers)) as pool:
            for done in [pool.submit(ask, reader) for reader in readers]:
                done.result(120)
        copy(behind, NAMESPACE, tmp_path / "copy.db")
        with ThreadPoolExecutor() as pool, locked(url, f"{SCHEMA}.jobs"):
            refused_by = pool.submit(readers[0].jobs).exception(60)
        assert isinstance(refused_by, StoreUnavailable)
        assert "another session holds a lock" in str(refused_by)
        show = "SELECT current_setting('statement_timeout') || ' ' || current_setting('lock_timeout')"
        with ThreadPoolExecutor(4) as pool:
            assert {row for rows in pool.map(postgres.execute, [show] * 8, [behind] * 8) for (row,) in rows} == {"0 0"}
        for reader in readers:
            reader.close()
