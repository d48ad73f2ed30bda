"""Finds cancels of runs that have ended. These cancels are removed from the control topic, so that workers need not
keep them for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobledger.errors import JobNotFound, SchemaError
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.writer import Outgoing
from jobledger.schemas.events import CancelRequested, JobEvent
from jobledger.streams.status.store.protocol import StatusReader


def standing(log: LogReader, names: Names, decode: Callable[[bytes | None], JobEvent]) -> dict[str, JobEvent]:
    """Return the cancels on the control topic that no tombstone has removed, by key."""
    cancels: dict[str, JobEvent] = {}
    for message in log.read(names.control, 0, 0):
        key, value = message.key(), message.value()
        name = key.decode(errors="replace") if isinstance(key, bytes) else str(key or "")
        if not name.startswith("cancel:"):
            continue
        if value is None:
            cancels.pop(name, None)
            continue
        try:
            event = decode(value if isinstance(value, bytes) else None)
        except SchemaError:
            continue
        if isinstance(event.fact, CancelRequested):
            cancels[name] = event
    return cancels


def tombstones(cancels: dict[str, JobEvent], names: Names, table: StatusReader) -> Iterator[Outgoing]:
    """Yield tombstones for the cancels whose run has ended in the table, or was followed by a later run."""
    for key, event in cancels.items():
        try:
            status = table.job(event.job_id)
        except JobNotFound:
            continue  # not in the table yet, or trimmed: a cancel that remains does no harm
        if status.run > event.run or (status.run == event.run and status.state.ended):
            yield Outgoing(names.control, None, key, 0)
