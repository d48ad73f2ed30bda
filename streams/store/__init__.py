"""Status databases: `open_reader` for those who ask, `open_store` for the one who writes, by URL."""

from __future__ import annotations

from jobledger.errors import ConfigError
from jobledger.streams.store.protocol import Changes, Count, Overdue, Partition, StatusReader, Store

__all__ = ["Changes", "Count", "Overdue", "Partition", "StatusReader", "Store", "open_reader", "open_store"]


def open_reader(url: str, namespace: str) -> StatusReader:
    """The read side of the status database at ``url``.

    Raises `StoreNotFound` if there is none yet, `StoreError` if it is of another namespace or version, `ConfigError`
    for a URL of a kind that is not known.
    """
    _check(url)
    from jobledger.streams.store import sqlite

    return sqlite.open_reader(url, namespace)


def open_store(url: str, namespace: str) -> Store:
    """The write side of the status database at ``url``, made if it is missing. Raises as `open_reader` does."""
    _check(url)
    from jobledger.streams.store import sqlite

    return sqlite.SqliteStore(url, namespace)


def _check(url: str) -> None:
    scheme, found, _ = url.partition(":")
    if not found or scheme != "sqlite":
        raise ConfigError(
            f"JOBLEDGER_STATUS_URL={url!r} is of a kind that is not known: write sqlite:///folder/status.db"
        )
