"""The import's own SQLite database: one row for each airport, from the last attempt that saved the row.

A save is an upsert by ``icao``, so a job that runs twice has the effect of one run. Saves of jobs that run at the same
time share a transaction (group commit): each save waits until its transaction is on disk.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SCHEMA = """
CREATE TABLE IF NOT EXISTS airport (
    icao TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL,
    country TEXT NOT NULL,
    tz TEXT NOT NULL,
    lat REAL NOT NULL,
    lon REAL NOT NULL,
    elevation_m REAL NOT NULL,
    zone_distance_m INTEGER NOT NULL
) WITHOUT ROWID
"""
COLUMNS = ("icao", "name", "city", "country", "tz", "lat", "lon", "elevation_m", "zone_distance_m")
UPSERT = (
    f"INSERT INTO airport ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    f"ON CONFLICT (icao) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in COLUMNS[1:])}"
)
#: Maximum number of rows in one transaction.
BATCH = 500
#: Seconds to wait for another process's transaction.
BUSY_S = 30.0


class Row(NamedTuple):
    """One imported airport: ``elevation_m`` and ``zone_distance_m`` in metres, ``lat`` and ``lon`` in degrees."""

    icao: str
    name: str
    city: str
    country: str
    tz: str
    lat: float
    lon: float
    elevation_m: float
    zone_distance_m: int


class Database:
    """Saves rows from asyncio. A thread of the object writes. Use the object from one event loop only, and close it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: queue.SimpleQueue[tuple[Row, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write, name="airports-database", daemon=True)
        self._thread.start()

    async def save(self, row: Row) -> None:
        """Save ``row``, and return once it is committed. Raises `sqlite3.Error`."""
        future = self._loop.create_future()
        self._waiting.put((row, future))
        await future

    def close(self) -> None:
        """Commit the rows that wait, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _write(self) -> None:
        connection: sqlite3.Connection | None = None
        try:
            while batch := self._next():
                error: Exception | None = None
                try:
                    connection = connection or open_database(self.path)
                    with connection:
                        connection.executemany(UPSERT, [row for row, _ in batch])
                except sqlite3.Error as exc:
                    error = exc
                self._loop.call_soon_threadsafe(_settle, [future for _, future in batch], error)
        finally:
            if connection is not None:
                connection.close()

    def _next(self) -> list[tuple[Row, asyncio.Future[None]]]:
        # Returns the rows that arrived while the last transaction was written; none after `close`.
        batch: list[tuple[Row, asyncio.Future[None]]] = []
        while len(batch) < BATCH:
            try:
                item = self._waiting.get(block=not batch)
            except queue.Empty:
                break
            if item is None:
                if batch:
                    self._waiting.put(None)
                break
            batch.append(item)
        return batch


def _settle(futures: Sequence[asyncio.Future[None]], error: Exception | None) -> None:
    for future in futures:
        if future.done():  # the job's time limit is over; the row is saved nevertheless
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def open_database(path: Path) -> sqlite3.Connection:
    """Open a connection to the database, and create the database if it does not exist. The journal mode is WAL, and a
    commit is on disk when it returns."""
    connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(SCHEMA)
    return connection


def saved_rows(path: Path) -> list[Row]:
    """Return every imported airport, ordered by ``icao``; empty if there is no database yet."""
    if not path.exists():
        return []
    connection = open_database(path)
    try:
        return [Row(*row) for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM airport ORDER BY icao")]
    finally:
        connection.close()
