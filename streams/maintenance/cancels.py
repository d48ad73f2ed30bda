"""Finds cancels of runs that have ended, and cancels of jobs whose rows were removed. These cancels are removed from the
control topic, so that workers need not keep them for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobledger.errors import JobNotFound, SchemaError
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader, recorded
from jobledger.log.writer import Outgoing
from jobledger.schemas.events import CancelRequested, JobEvent, Recorded
from jobledger.streams.status.store.protocol import StatusReader


def standing(log: LogReader, names: Names, decode: Callable[[bytes | None], JobEvent]) -> dict[str, Recorded]:
    """Return the cancels on the control topic that no tombstone has removed, by key."""
    cancels: dict[str, Recorded] = {}
    for message in log.read(names.control, 0, 0):
        key, value = message.key(), message.value()
        name = key.decode(errors="replace") if isinstance(key, bytes) else str(key or "")
        if not name.startswith("cancel:"):
            continue
        if value is None:
            cancels.pop(name, None)
            continue
        try:
            record = recorded(message, decode)
        except SchemaError:
            continue
        if isinstance(record.event.fact, CancelRequested):
            cancels[name] = record
    return cancels


def tombstones(
    cancels: dict[str, Recorded], names: Names, table: StatusReader, included_ms: int = 0
) -> Iterator[Outgoing]:
    """Yield tombstones for the cancels whose run has ended in the table, or was followed by a later run, and for cancels
    of jobs whose rows were removed.

    ``included_ms``: the table has included every record from before this time, in ms, so a job that was cancelled then
    and that the table does not know has ended.
    """
    for key, record in cancels.items():
        event = record.event
        try:
            status = table.job(event.job_id)
        except JobNotFound:
            if record.appended_ms < included_ms:
                yield Outgoing(names.control, None, key, 0)
            continue  # not in the table yet, or trimmed: a cancel that remains does no harm
        if status.run > event.run or (status.run == event.run and status.state.ended):
            yield Outgoing(names.control, None, key, 0)
