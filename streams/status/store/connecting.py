"""Connections to PostgreSQL: parses the URL, retries for a limited time, and explains errors with a remedy and without
a password."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import psycopg
import sqlalchemy
from psycopg import errors
from sqlalchemy import URL
from sqlalchemy.dialects.postgresql import psycopg as dialect
from sqlalchemy.exc import ArgumentError, DBAPIError

from jobledger.errors import ConfigError, StoreError, StoreTooSlow, StoreUnavailable
from jobledger.process.retrying import retry_until
from jobledger.streams.status.store.address import shown
from jobledger.streams.status.store.time_limit import ADVICE

#: First and longest pause in seconds between two attempts.
PAUSE_FIRST_S, PAUSE_MOST_S = 0.1, 1.0
#: Settings of a connection that the URL may override. One attempt takes at most five seconds. A peer that vanished
#: without closing the connection is detected after about half a minute, not after the system's two hours.
_DEFAULTS = {
    "client_encoding": "utf8",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
#: Largest length in bytes of a name in PostgreSQL.
_NAME_BYTES = 63

#: Messages with which a server refuses a connection and for which a retry does not help, with their remedies. The
#: driver passes on no code for such a refusal, so the text is compared. A message in another language is shown as it
#: is, and the connection is retried.
_REFUSALS = (
    ("password authentication failed", "the user or the password in JOBLEDGER_STATUS_URL is wrong"),
    (
        "no password supplied",
        "the server asks for a password: write the password into JOBLEDGER_STATUS_URL or ~/.pgpass",
    ),
    (
        "no pg_hba.conf entry",
        "allow this user from this host in the server's pg_hba.conf, or use TLS (?sslmode=require)",
    ),
    ("CONNECT privilege", "this user may not connect to this database: GRANT CONNECT ON DATABASE helps"),
    ("is not permitted to log in", "this user may not log in: ALTER ROLE … LOGIN helps"),
)
_MISSING_DATABASE = "create it with `createdb`, or correct JOBLEDGER_STATUS_URL"


class Address:
    """The server, database and schema of a ``postgresql://`` URL and a namespace. Raises `ConfigError`."""

    def __init__(self, url: str, namespace: str) -> None:
        try:
            parsed = sqlalchemy.make_url(url)
        except (ArgumentError, ValueError):
            # Leave out the cause's message: it may quote a part of the password.
            raise _unusable(url) from None
        if not parsed.database:
            raise _unusable(url)
        self._url = parsed.set(drivername="postgresql+psycopg")
        self.shown, self.schema = shown(url), schema_of(namespace)
        self.user = parsed.username
        where = parsed.host or parsed.query.get("host") or "the local socket"
        self.place = f"database {parsed.database!r} on {where}{f':{parsed.port}' if parsed.port else ''}"

    @property
    def url(self) -> URL:
        """The URL for an engine. It includes the password."""
        return self._url

    def connect(self, patience: float = 0.0, *, shared: bool = False) -> psycopg.Connection[Any]:
        """Return a new connection; retry for ``patience`` seconds. Raises `StoreUnavailable`, `StoreError`.

        ``shared``: use no prepared statements, because a pooler may use another server connection for each transaction.
        """
        # Use the arguments with which an engine would connect, and retry. The dialect has no type annotations.
        options = dialect.PGDialect_psycopg().create_connect_args(self._url)[1]  # type: ignore[no-untyped-call]
        more = {"prepare_threshold": None} if shared else {}

        def connected() -> psycopg.Connection[Any]:
            try:
                return psycopg.connect(**{**_DEFAULTS, **options, **more})
            except psycopg.Error as exc:
                raise self.explain(exc, "reached") from exc

        deadline = time.monotonic() + patience
        return retry_until(deadline, connected, StoreUnavailable, pause=PAUSE_FIRST_S, pause_most=PAUSE_MOST_S)

    def explain(self, exc: BaseException, doing: str) -> StoreError:
        """Turn the driver's error into a `StoreError`. ``doing``: a participle that says what cannot be done to the
        status table."""
        cause: BaseException = getattr(exc, "orig", None) or exc
        if isinstance(cause, StoreError):
            return cause
        # The end of some messages asks whether the server is running, and names host and port again.
        message = " ".join(str(cause).split("\n\tIs the server")[0].split())
        head = f"the status table in {self.place} cannot be {doing}"
        for phrase, remedy in _REFUSALS:
            if phrase in message:
                return StoreError(f"{head} by user {self.user!r}: {remedy} ({message})")
        if isinstance(cause, errors.InvalidCatalogName) or (
            "database" in message and message.endswith("does not exist")
        ):
            return StoreError(f"{head}: there is no such database; {_MISSING_DATABASE} ({message})")
        if isinstance(cause, errors.InsufficientPrivilege):
            return StoreError(
                f"{head} by user {self.user!r}: {message}. The user of `jobledger streams` must own the schema "
                f"{self.schema!r} (CREATE SCHEMA … AUTHORIZATION, or GRANT CREATE ON DATABASE); a user who only reads needs "
                "USAGE on it and SELECT on its tables"
            )
        if isinstance(cause, errors.ReadOnlySqlTransaction):
            return StoreError(
                f"{head}: the server is a read-only standby, or transactions of user {self.user!r} are read-only "
                f"({message}): "
                "name the primary server or another user in JOBLEDGER_STATUS_URL"
            )
        if isinstance(cause, errors.LockNotAvailable):
            return StoreUnavailable(
                f"{head}: another session holds a lock on its tables and did not release it in time ({message}). "
                "pg_locks and pg_stat_activity show which one: it may be a transaction that was left open"
            )
        if isinstance(cause, errors.QueryCanceled):
            fewer = f"{ADVICE}. " if doing == "read" else ""
            return StoreTooSlow(
                f"{head}: the server cancelled a statement of user {self.user!r} ({message}). {fewer}If statements need "
                "longer, "
                "give that user more time: ALTER ROLE … SET statement_timeout = '60s'"
            )
        if isinstance(cause, ImportError):
            return StoreError(f"{head}: {cause}")
        if _is_away(exc, cause):
            return StoreUnavailable(f"{head}: the server does not answer ({message})")
        return StoreError(f"{head}: {message}")


def schema_of(namespace: str) -> str:
    """Return the schema of a namespace's tables. A name that is too long for PostgreSQL is cut and ends with a
    digest."""
    name = f"jobledger_{namespace}"
    if len(name) > _NAME_BYTES:
        name = f"{name[: _NAME_BYTES - 17]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def schema_beside(schema: str) -> str:
    """Return the schema in which a rebuild creates the new tables. No namespace contains a dot, so no namespace has
    this schema."""
    return f"{schema[: _NAME_BYTES - 4]}.new"


def _is_away(exc: BaseException, cause: BaseException) -> bool:
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return True
    if not isinstance(cause, psycopg.OperationalError):
        return False
    # No code: the connection broke or was never established. 08: connection error, 57P: the server stops, starts or
    # disconnects its clients, 53300: too many clients.
    code = cause.sqlstate or ""
    return not code or code.startswith(("08", "57P")) or code == "53300"


def _unusable(url: str) -> ConfigError:
    return ConfigError(
        f"JOBLEDGER_STATUS_URL={shown(url)!r} names no database: write postgresql://user:password@host/database, with "
        "characters other than letters and digits in the password percent-encoded, such as %40 for @"
    )


def bounded(**bounds: str) -> str:
    """Return a statement that sets limits (``statement_timeout="5s"``) for its transaction, unless role, database or
    URL set them. The limits are not set for the session: behind a pooler another client uses the session next."""
    return "SELECT " + ", ".join(
        f"CASE current_setting('{name}') WHEN '0' THEN set_config('{name}', '{value}', true) END"
        for name, value in bounds.items()
    )


def lock_number(name: str) -> int:
    """Return a 63-bit number for an advisory lock of this name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
