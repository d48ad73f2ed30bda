"""What only PostgreSQL has: users and their rights, tables of other programs, broken connections, and servers that
crash."""

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
from tests.contract.test_store import BAD, NAMESPACE, SPEC, life, write
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
def user_with_grants(postgres: Databases, url: str, *grants: str) -> Iterator[str]:
    """Yield the URL of a new user with these rights in the database. Each grant is a statement with ``{role}``. The
    rights are removed with the user."""
    with postgres.role(PASSWORD) as role:
        name = sqlalchemy.make_url(url).database
        for grant in grants:
            postgres.execute(grant.format(role=role, database=name), url)
        try:
            yield sqlalchemy.make_url(url).set(username=role, password=PASSWORD).render_as_string(hide_password=False)
        finally:
            postgres.execute(f"DROP OWNED BY {role} CASCADE", url)


def break_connections(postgres: Databases, url: str) -> None:
    """End every session on a database, as a stopped server or a failed network does."""
    name = sqlalchemy.make_url(url).database
    ended = "pg_terminate_backend(pid, 5000)"  # waits until they have ended
    postgres.execute(
        f"SELECT {ended} FROM pg_stat_activity WHERE datname = '{name}' AND backend_type = 'client backend'"
    )


def assert_refused(url: str, *words: str, by: type[StoreError] = StoreError) -> None:
    """Check that opening this URL, for reading and for writing, is an error with these words. Neither the error nor its
    traceback contains the password."""
    for opens in (open_reader, open_store):
        with pytest.raises(StoreError) as found:
            opens(url, NAMESPACE)
        assert type(found.value) is by
        said = str(found.value)
        assert [word for word in words if word not in said] == [], said
        everything = "".join(traceback.format_exception(found.value))
        assert "s3cret" not in everything.replace(f'PASSWORD = "{PASSWORD}"', "")


def test_the_error_of_a_wrong_password_names_the_user_and_no_password(postgres: Databases, url: str) -> None:
    """The error comes at once and names host, database and user, but no password."""
    with user_with_grants(postgres, url) as right:
        wrong = sqlalchemy.make_url(right).set(password="s3cret-but-wrong").render_as_string(hide_password=False)
        database = sqlalchemy.make_url(url).database
        assert_refused(wrong, "127.0.0.1", f"database '{database}'", "the user or the password", "jl_")
        nowhere = sqlalchemy.make_url(right).set(database="none_here").render_as_string(hide_password=False)
        assert_refused(nowhere, "there is no such database", "none_here")
        postgres.execute(f"REVOKE CONNECT ON DATABASE {database} FROM PUBLIC")
        assert_refused(right, "GRANT CONNECT ON DATABASE")
        assert PASSWORD not in shown(right)
        assert "s3cret" not in shown(f"postgresql://host/db?user=me&password={PASSWORD}")


def test_settings_do_not_show_a_password() -> None:
    """The text of the settings in a log or a debugger contains no password."""
    assert "s3cret" not in repr(Settings(status_url="postgresql://me:s3cret@host/db"))


def test_the_error_about_an_unreachable_server_names_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no server listens, the error comes after a limited time, names host, port and database, and is one after which
    a retry makes sense."""
    monkeypatch.setattr("jobledger.streams.status.store.postgres_reader.READ_PATIENCE_S", 0.3)
    port = free_port()
    assert_refused(f"postgresql://me:s3cret@127.0.0.1:{port}/db", f"127.0.0.1:{port}", "'db'", by=StoreUnavailable)


def test_the_error_about_a_missing_right_names_the_right(postgres: Databases, url: str) -> None:
    """If the user of a writer may not create the schema, the error says that the user must own it. Once the table
    exists, a reader only needs USAGE and SELECT, which the error names."""
    with user_with_grants(postgres, url) as reads:
        with pytest.raises(StoreError, match="must own the schema"):
            open_store(reads, NAMESPACE)
        with pytest.raises(StoreNotFound):
            open_reader(reads, NAMESPACE)
        with PostgresStore(url, NAMESPACE) as store:
            assert store.acquire()
            write(store, {"a": life(ev.JobSubmitted(SPEC))})
            assert_refused(reads, "permission denied for", "USAGE", SCHEMA)
            role = sqlalchemy.make_url(reads).username
            postgres.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role}", url)
            postgres.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {role}", url)
            reader = open_reader(reads, NAMESPACE)
            assert [each.job_id for each in reader.jobs()] == ["a"]
            with store.beside() as new:
                store.replace_with(new)
            assert reader.jobs() == []  # the rights also hold for the new table
            reader.close()
        with open_store(reads, NAMESPACE) as other, pytest.raises(StoreError, match="permission denied"):
            other.acquire()


def test_a_read_only_database_is_refused_for_writing(postgres: Databases, url: str) -> None:
    """A writer refuses a standby, or a user whose transactions are read-only, with an error that says so."""
    only = "ALTER ROLE {role} SET default_transaction_read_only = on"
    with user_with_grants(postgres, url, only) as reads, pytest.raises(StoreError, match="read-only standby"):
        open_store(reads, NAMESPACE)


def test_a_user_who_owns_the_schema_needs_no_other_right(postgres: Databases, url: str) -> None:
    """The owner of the schema needs no right on the database. Only a rebuild does, because it creates another schema."""
    with user_with_grants(postgres, url, f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {{role}}") as owner:
        with open_store(owner, NAMESPACE) as store:
            assert store.acquire()
            write(store, {"a": life(ev.JobSubmitted(SPEC))})
            with pytest.raises(StoreError, match="CREATE ON DATABASE"), store.beside():
                pass
        open_reader(owner, NAMESPACE).close()


def test_namespaces_share_a_database_with_other_tables(postgres: Databases, url: str) -> None:
    """Each namespace has its own tables, also beside tables of other programs with the same names."""
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


def test_a_schema_of_another_program_is_refused(postgres: Databases, url: str) -> None:
    """A schema with the namespace's name but with tables of another program is not changed."""
    postgres.execute(f"CREATE SCHEMA {SCHEMA} CREATE TABLE meals (name text)", url)
    assert_refused(url, "another program")


def test_a_database_that_cannot_hold_every_text_is_refused(postgres: Databases) -> None:
    """A database with another encoding than UTF-8 is refused at the start, not at the first text that it cannot store."""
    name = f"jl_latin_{os.getpid()}"
    postgres.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(StoreError, match="encoded in LATIN1"):
            open_store(postgres.at(database=name), NAMESPACE)
    finally:
        postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_writers_that_create_the_table_at_once_create_one(url: str) -> None:
    """Materializers that start together with an empty database all open the same table, and one of them writes it."""
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
    """The next writer does not wait for a dead writer, on whatever machine. A writer that lives and writes nothing
    keeps its lease."""
    with PostgresStore(url, NAMESPACE, holder="there:1") as one, PostgresStore(url, NAMESPACE, holder="two:2") as two:
        assert one.acquire()
        assert not two.acquire()
        break_connections(postgres, url)
        with pytest.raises(StoreUnavailable):
            two.acquire()  # this writer's connection is broken, too; the next attempt has a new one
        assert two.acquire()
        with pytest.raises(StoreUnavailable):
            one.renew()
        with pytest.raises(LeaseLost, match="two:2"):
            one.renew()


def test_a_connection_that_breaks_between_batches_costs_nothing(postgres: Databases, url: str) -> None:
    """A writer whose connection broke continues with a new one, and keeps its lease."""
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
    """The commit may end when the writer has a new connection already. The changes are not written twice, neither by a
    writer that continues nor by one that begins again at the table's offsets."""
    with PostgresStore(url, NAMESPACE) as store, psycopg.connect(url) as old:
        assert store.acquire()
        store.offsets()
        write(store, {"a": life(ev.JobSubmitted(SPEC))}, {("t", 0): 5})
        # The state of the transaction on the server while its commit is under way, on a connection that the writer has
        # lost.
        old.execute(f"SET search_path = {SCHEMA}")
        old.execute("UPDATE lease SET until_ms = until_ms")
        old.execute("UPDATE counters SET jobs = jobs + 1")
        old.execute("UPDATE offsets SET next_offset = 6")
        close_connection(store)
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


def close_connection(store: PostgresStore) -> None:
    """Close a writer's connection."""
    assert store._db is not None
    store._db.close()


@pytest.mark.parametrize("found", [None, 1, 9])
def test_offsets_that_differ_from_the_last_commit_are_noticed(postgres: Databases, url: str, found: int | None) -> None:
    """After a broken connection, a writer may find other offsets, because commits were lost, or because a commit that
    seemed to fail has succeeded. It writes nothing before it has begun again at these offsets."""
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


def test_a_crash_loses_only_whole_transactions(postgres_server: Server) -> None:
    """After a crash of the server, rows, counters and offsets are those of one moment. The epoch of the lease is never
    lost."""
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
        except CommitUnknown:  # the usual case: transactions that were not on disk are lost
            assert store.offsets()[("t", 0)] < 50
        offset = store.offsets().get(("t", 0), 0)
        assert store.size() == offset
        reader = open_reader(url, NAMESPACE)
        assert reader.counts_by_state()[State.QUEUED] == offset
        reader.close()
        write(store, {f"{n:03}": life(ev.JobSubmitted(SPEC)) for n in range(offset, 50)}, {("t", 0): 50})
        assert store.size() == 50


def test_a_view_of_another_program_stops_the_replacement_of_the_table(postgres: Databases, url: str) -> None:
    """A rebuild drops no view of another program. It names the view and leaves the table unchanged."""
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
    """No query for the newest jobs, for a state, for a tag or for overdue jobs reads the whole table."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        tagged = ev.JobSubmitted(ev.JobSpec(b"{}", {"a": "b"}))
        for begin in range(0, 6_000, 2_000):
            write(store, {f"{n:06}": life(tagged, ev.JobSucceeded(), ms=n) for n in range(begin, begin + 2_000)})
        later = ev.JobSubmitted(SPEC, 3_600_000)
        write(store, {f"later {n:06}": life(later, release=0, ms=n * 1_000) for n in range(2_000)})
        bad = ev.JobFailedFact("exhausted", BAD)
        write(store, {f"bad {n:06}": life(ev.JobSubmitted(SPEC), bad, ms=n * 100) for n in range(60)})
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
        for index, ask in (
            ("jobs_by_time", reader.jobs),
            ("jobs_by_time", lambda: reader.jobs(version="1")),
            ("jobs_by_state", lambda: reader.jobs(state="failed", version="1")),
            ("tags_pkey", lambda: reader.jobs(tag=("a", "b"), version="1")),
            ("jobs_due", lambda: reader.overdue(10, 1)),
            ("jobs_pkey", lambda: reader.job("000001")),
        ):
            plans.clear()
            ask()
            text = "\n".join(plans)
            # In a table of this size the rows of a step may be found faster by reading the table; the index that has the
            # order of the page gives them in any case.
            assert index in text, text
            assert "Seq Scan on tags" not in text
        reader.close()


def test_a_missing_driver_names_the_extra() -> None:
    """Without psycopg, a PostgreSQL URL is an error that says what to install."""
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


# -- limits -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """Hold the strongest lock on a table in another session until the end of the block."""
    with psycopg.connect(url) as db:
        db.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        db.rollback()


def test_readers_do_not_wait_forever_behind_a_lock(
    postgres: Databases, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another session locks the tables, every query of a reader raises an error within seconds that says so."""
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


def test_the_replacement_of_the_table_waits_for_a_long_reader_and_blocks_no_other(
    postgres: Databases, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While a long query of another session reads the table, a rebuild tries again and again to replace it, and readers
    are answered in between. When the query has ended, the new table replaces the old one."""
    caplog.set_level(logging.INFO, "jobledger.materializer")
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        reader = open_reader(url, NAMESPACE)
        with store.beside() as new, ThreadPoolExecutor(1) as pool:
            with psycopg.connect(url) as db:
                db.execute(f"SELECT * FROM {SCHEMA}.jobs")
                write(new, {"a": life(ev.JobSubmitted(SPEC))})
                swapped = pool.submit(store.replace_with, new)
                wait_until(lambda: "not replaced the status table yet" in caplog.text, 30, "a try in vain")
                assert reader.jobs() == []
                assert not swapped.done()
                db.rollback()
            swapped.result(60)
        assert [each.job_id for each in reader.jobs()] == ["a"]
        reader.close()


def test_a_readers_statement_has_a_time_limit_unless_its_user_has_another(postgres: Databases, url: str) -> None:
    """A query that takes too long is an error that names the user's setting, which has precedence over Jobledger's
    limit. Reading the whole table has no such limit."""
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
        with user_with_grants(postgres, url, *grants, *([mine] if mine else [])) as reads:
            reader = open_reader(reads, NAMESPACE)
            assert isinstance(reader, SqlReader)
            for whole, wanted in ((False, bounds), (True, walk)):
                with reader._reading(walk=whole) as db:
                    assert db.exec_driver_sql(show).scalar() == wanted
            reader.close()
    with user_with_grants(postgres, url, *grants) as reads:
        reader = open_reader(reads, NAMESPACE)
        assert isinstance(reader, SqlReader)
        role = sqlalchemy.make_url(reads).username
        with pytest.raises(StoreTooSlow, match=rf"user '{role}'.*ALTER ROLE"), reader._reading() as db:
            db.exec_driver_sql("SELECT pg_sleep(60)")
        assert len(reader.jobs(limit=10)) == 10
        reader.close()


def test_a_batch_that_takes_too_long_is_made_smaller(postgres: Databases, url: str) -> None:
    """Under the `statement_timeout` of its user, a writer halves its batch until the batch fits. No row is missing or
    counted twice. When the database is fast again, batches grow."""
    # More than 200 rows at once take a minute, fewer take no time. So the batch size does not depend on the machine.
    body = "BEGIN IF (SELECT count(*) FROM added) > 200 THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END"
    slow = (
        f"CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        (
            f"CREATE TRIGGER slow AFTER INSERT ON {SCHEMA}.jobs REFERENCING NEW TABLE AS added "
            "FOR EACH STATEMENT EXECUTE FUNCTION slow()"
        ),
    )
    limit = "ALTER ROLE {role} SET statement_timeout = '1s'"
    with user_with_grants(postgres, url, f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {{role}}", limit) as owner:
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
                store._run("SET statement_timeout = 0")  # the database is fast, however busy the machine is
            few = size.now
            for n in range(1_000, 1_000 + CALM):
                in_batches([(f"{n:06}", life(ev.JobSubmitted(SPEC)))], size, apply, LOG)
            assert size.now == 2 * few
        reader = open_reader(owner, NAMESPACE)
        assert reader.counts_by_state()[State.QUEUED] == 1_000 + CALM
        reader.close()


# -- poolers ----------------------------------------------------------------------------------------------------------


def test_readers_work_behind_pgbouncer_in_transaction_mode(postgres: Databases, url: str, tmp_path: Path) -> None:
    """Several readers query at once, and PgBouncer chooses a connection for each transaction. All answers are right,
    the limits hold, and no setting of a reader stays on a connection."""
    with PostgresStore(url, NAMESPACE) as store:
        assert store.acquire()
        write(store, {f"{n:06}": life(ev.JobSubmitted(SPEC), ms=n) for n in range(3_000)}, {("t", 0): 3_000})
    with pgbouncer(url, pool_mode="transaction", size=2) as behind:
        readers = [open_reader(behind, NAMESPACE) for _ in range(4)]

        def ask(reader: StatusReader) -> None:
            for n in range(0, 3_000, 100):  # more queries than a driver needs before it prepares a statement
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
