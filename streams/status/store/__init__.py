"""Status databases, opened by URL: `open_reader` for queries, `open_store` for the one writer."""

from __future__ import annotations

from pathlib import Path

from jobledger.errors import ConfigError
from jobledger.streams.status.store.address import shown
from jobledger.streams.status.store.protocol import Changes, Count, Overdue, Partition, StatusReader, Store

__all__ = [
    "Changes",
    "Count",
    "Overdue",
    "Partition",
    "StatusReader",
    "Store",
    "copy",
    "namespaces_in",
    "open_reader",
    "open_store",
    "scratch",
    "shown",
]


def open_reader(url: str, namespace: str) -> StatusReader:
    """Return the read side of the status database at ``url``.

    Raises `StoreNotFound` if there is no status table yet, `StoreUnavailable` if the database does not answer,
    `StoreError` if the database refuses access or the table belongs to another namespace or version, `ConfigError` for
    a URL of an unknown kind.
    """
    if _is_postgres(url):
        from jobledger.streams.status.store import postgres_reader

        return postgres_reader.open_reader(url, namespace)
    from jobledger.streams.status.store import sqlite

    return sqlite.open_reader(url, namespace)


def open_store(url: str, namespace: str) -> Store:
    """Return the write side of the status database at ``url``; create the status table if it is missing. Raises as
    `open_reader` does, but not `StoreNotFound`."""
    if _is_postgres(url):
        from jobledger.streams.status.store import postgres

        return postgres.PostgresStore(url, namespace)
    from jobledger.streams.status.store import sqlite

    return sqlite.SqliteStore(url, namespace)


def copy(url: str, namespace: str, path: Path) -> None:
    """Copy the status table, as it is at one moment, into a SQLite file. The table may be written meanwhile.

    Raises as `open_reader` does.
    """
    if _is_postgres(url):
        from jobledger.streams.status.store import postgres_reader

        postgres_reader.copy(url, namespace, path)
        return
    from jobledger.streams.status.store import sqlite

    sqlite.copy(url, namespace, path)


def namespaces_in(folder: Path) -> list[str]:
    """Return the namespaces whose status tables are in the SQLite files of a folder, sorted.

    The content of each file is checked, because files of projections and copies are in the same folder.
    """
    from jobledger.streams.status.store import sqlite

    return sorted(path.stem for path in folder.glob("*.db") if sqlite.namespace_in(path) == path.stem)


def scratch(url: str) -> Path | None:
    """Return a folder with space for a copy of the table at ``url``: the folder of the SQLite file. Return None for
    PostgreSQL: the system's temporary folder is used."""
    if _is_postgres(url):
        return None
    from jobledger.streams.status.store import sqlite

    return sqlite.path_of(url).parent


def _is_postgres(url: str) -> bool:
    scheme, colon, _ = url.partition(":")
    if colon and scheme == "postgresql":
        _needs_driver()
        return True
    if colon and scheme == "sqlite":
        return False
    raise ConfigError(
        f"JOBLEDGER_STATUS_URL={shown(url)!r} is of a kind that is not known: write sqlite:///folder/status.db or "
        "postgresql://user:password@host/database"
    )


def _needs_driver() -> None:
    try:
        import psycopg  # noqa: F401  # without its C library, psycopg is installed but cannot be imported
    except ImportError as exc:
        raise ConfigError(
            "JOBLEDGER_STATUS_URL names a PostgreSQL database, and the driver for it is missing: "
            f"pip install 'jobledger[postgres]' ({exc})"
        ) from exc
