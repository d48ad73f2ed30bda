"""Groups the records by job, in bounded memory, however long the log is.

The fields of each record that the rules need are written to a SQLite file. SQLite's external sort then returns the
records job by job. So memory holds only SQLite's cache and the records of one job. The turns of keyed jobs are sorted
in the same file, in a table of their own. SQLite sorts in a second file, which is in SQLITE_TMPDIR, else in TMPDIR,
else in /var/tmp. Fields that no rule needs (arguments, tags, tracebacks, messages), and each `JobProgressed` after the
first of an attempt, are left out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from jobledger.audit.order import Turn
from jobledger.audit.records import Record
from jobledger.audit.rules import belongs
from jobledger.audit.table import result_text, stored

#: Kilobytes of memory for SQLite's cache and for SQLite's sorting.
CACHE_KB = 32 * 1024
#: Number of records that are written in one batch.
CHUNK = 5_000
#: Prefix of the key of a position. No stored job id contains this character.
PLACE = "\0"

_HEAD = ("event_id", "job_id", "run", "release", "attempt", "task", "queue", "key", "source", "occurred_at")
#: Fields of facts that a rule, or the comparison with the status table, needs.
_BODY = frozenset(
    (
        "delay_ms",
        "due_at",
        "in_place",
        "worker",
        "lease_ms",
        "topic",
        "partition",
        "offset",
        "raw_value",
        "by",
        "reason",
    )
)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Any]).decode


def keys_of(record: Record, work_prefix: str) -> list[str]:
    """Return the keys of the groups in which a record is checked: its job, or a position, or both.

    A position is a key of a record that is not an event or has no job id, of a record that is on a work topic and does
    not hand over a job, and of a dead letter that reports a rejected record.
    """
    if record.fact == "RecordRejected":
        body = record.body
        return [f"{PLACE}{body['topic']}/{body['partition']}/{body['offset']}"]
    job = None if record.fact is None else record.head["job_id"]
    position_key = f"{PLACE}{record.topic}/{record.partition}/{record.offset}"
    if not job:
        return [position_key]
    if record.topic.startswith(work_prefix) and not belongs(record):
        return [position_key, stored(job)]
    return [stored(job)]


def slim(record: Record, *, whole: bool) -> Record:
    """Return the record with only the fields that the rules need. ``whole``: keep the bytes of the value, too."""
    if record.fact is None:
        return record
    body = {name: value for name, value in record.body.items() if name in _BODY}
    if "error" in record.body:
        error = record.body["error"]
        body["error"] = {"type": error["type"]} if isinstance(error, dict) else error
    if "result" in record.body:
        text = result_text(record.body["result"])
        body["result"] = None if text is None else text.encode()
    head = {name: record.head[name] for name in _HEAD}
    return record._replace(head=head, body=body, raw=record.raw if whole else None)


class Spill:
    """A scratch file of records. Close the file after use; the caller deletes it.

    First `add` all records. Then read the `groups`, and `keep` the turns of each group. Then read the `turns`.
    ``count``: the number of records that were added.
    """

    def __init__(self, folder: Path) -> None:
        self._file = sqlite3.connect(folder / "records.db", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{CACHE_KB}"):
            self._file.execute(f"PRAGMA {pragma}")
        self._file.execute("CREATE TABLE records (key BLOB NOT NULL, record BLOB NOT NULL)")
        self._file.execute("CREATE TABLE turns (line BLOB NOT NULL, place INTEGER NOT NULL, turn BLOB NOT NULL)")
        self._file.execute("BEGIN")
        self._topics: dict[str, int] = {}
        self._unwritten: list[tuple[bytes, bytes]] = []
        self._turns: list[tuple[bytes, int, bytes]] = []
        self.count = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, record: Record, work_prefix: str) -> None:
        """Store the fields of a record that the rules need, once for each of its keys."""
        keys = keys_of(record, work_prefix)
        slimmed = slim(record, whole=len(keys) > 1)
        head = slimmed.head
        topic = self._topics.setdefault(slimmed.topic, len(self._topics))
        fields = [head[name] for name in _HEAD] if slimmed.fact is not None else None
        packed = _encode(
            [
                topic,
                slimmed.partition,
                slimmed.offset,
                slimmed.at,
                slimmed.fact,
                fields,
                slimmed.body,
                slimmed.raw,
                slimmed.why,
                slimmed.timed,
            ]
        )
        self._unwritten += [(key.encode(), packed) for key in keys]
        self.count += 1
        if len(self._unwritten) >= CHUNK:
            self._write()

    def _write(self) -> None:
        self._file.executemany("INSERT INTO records VALUES (?, ?)", self._unwritten)
        self._unwritten.clear()

    def groups(self) -> Iterator[tuple[str, list[Record]]]:
        """Yield each key with its records. The keys are sorted by their bytes."""
        self._write()
        self._file.execute("COMMIT")
        names = list(self._topics)
        current: bytes | None = None
        records: list[Record] = []
        attempts: set[tuple[int, int, int]] = set()
        for key, packed in self._file.execute("SELECT key, record FROM records ORDER BY key"):
            if key != current:
                if current is not None:
                    yield current.decode(), records
                current, records = key, []
                attempts.clear()
            topic, partition, offset, at, fact, fields, body, raw, why, timed = _decode(packed)
            if fact == "JobProgressed":
                attempt = (fields[2], fields[3], fields[4])
                if attempt in attempts:
                    continue
                attempts.add(attempt)
            head = {} if fields is None else dict(zip(_HEAD, fields, strict=True))
            records.append(Record(names[topic], partition, offset, at, fact, head, body, raw, why, timed))
        if current is not None:
            yield current.decode(), records

    def keep(self, turn: Turn) -> None:
        """Store the turn of a keyed job. May be called while the groups are read."""
        work = turn.work
        line = _encode([self._topics[work.topic], work.partition, turn.key])
        packed = _encode([work.head["job_id"], work.at, self._fact(turn.started), self._fact(turn.closed), turn.holds])
        self._turns.append((line, work.offset, packed))
        if len(self._turns) >= CHUNK:
            self._write_turns()

    def _write_turns(self) -> None:
        self._file.execute("BEGIN")
        self._file.executemany("INSERT INTO turns VALUES (?, ?, ?)", self._turns)
        self._file.execute("COMMIT")
        self._turns.clear()

    def _fact(self, record: Record | None) -> list[Any] | None:
        return None if record is None else [self._topics[record.topic], record.offset, record.at, record.fact]

    def turns(self) -> Iterator[Turn]:
        """Yield the stored turns, grouped by `Turn.line`, and in each group by the offset of their work records.

        All groups of records must have been read before.
        """
        self._write_turns()
        names = list(self._topics)

        def fact(kept: list[Any] | None, partition: int) -> Record | None:
            return None if kept is None else Record(names[kept[0]], partition, *kept[1:])

        for line, offset, packed in self._file.execute("SELECT line, place, turn FROM turns ORDER BY line, place"):
            topic, partition, key = _decode(line)
            job_id, at, started, closed, holds = _decode(packed)
            work = Record(names[topic], partition, offset, at, head={"job_id": job_id})
            yield Turn(key, work, fact(started, partition), fact(closed, partition), holds)
