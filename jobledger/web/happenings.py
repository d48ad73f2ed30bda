"""Facts of jobs as they are shown in event streams, and filters for them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobledger.job import State
from jobledger.schemas import events as ev
from jobledger.schemas.events import Position, Recorded
from jobledger.views.values import iso
from jobledger.web.answers import encoded
from jobledger.web.paging import position_text

#: The state of a job after each fact that streams show; None: the fact itself does not change the state.
_STATES: Mapping[type[Any], State | None] = {
    ev.JobSubmitted: State.QUEUED,
    ev.JobDue: State.QUEUED,
    ev.JobStarted: State.RUNNING,
    ev.JobLeased: State.RUNNING,
    ev.JobProgressed: State.RUNNING,
    ev.JobRetried: State.RETRYING,
    ev.JobSnoozed: State.SCHEDULED,
    ev.JobSucceeded: State.SUCCEEDED,
    ev.JobFailedFact: State.FAILED,
    ev.JobCancelledFact: State.CANCELLED,
    ev.JobExpiredFact: State.EXPIRED,
    ev.CancelRequested: None,
}


class Happening:
    """A fact of a job in a stream. ``data``: the event as it is sent. ``tags``: None if they are not known."""

    __slots__ = ("appended_ms", "data", "event_id", "job_id", "queue", "state", "tags", "task")

    def __init__(self, record: Recorded, state: State | None, tags: Mapping[str, str] | None) -> None:
        event = record.event
        self.job_id, self.task, self.queue, self.state, self.tags = event.job_id, event.task, event.queue, state, tags
        self.appended_ms = record.appended_ms
        self.event_id = id_of(record.position, record.appended_ms)
        shown: dict[str, Any] = {
            "event": ev.fact_name(event.fact),
            "job_id": event.job_id,
            "run": event.run,
            "attempt": event.attempt,
            "task": event.task,
            "queue": event.queue,
            "state": None if state is None else state.value,
            "position": position_text(record.position),
            "appended_at": iso(record.appended_ms * 1000),
        }
        if isinstance(event.fact, ev.JobProgressed):
            progress = event.fact
            shown["progress"] = {"done": progress.done, "total": progress.total, "message": progress.message}
        self.data = message("job", encoded(shown), self.event_id)


@dataclass(frozen=True)
class Filter:
    """What a listener wants; None: everything. An event must match all conditions. An event whose tags are not known
    matches every filter by tags, so that no wanted event is missing."""

    jobs: frozenset[str] | None = None
    tasks: Collection[str] | None = None
    queues: Collection[str] | None = None
    states: Collection[State] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def wants(self, event: Happening) -> bool:
        """Return whether an event matches."""
        return (
            (self.jobs is None or event.job_id in self.jobs)
            and (self.tasks is None or event.task in self.tasks)
            and (self.queues is None or event.queue in self.queues)
            and (self.states is None or event.state in self.states)
            and (not self.tags or event.tags is None or self.tags.items() <= event.tags.items())
        )


def happening_of(record: Recorded) -> Happening | None:
    """Return a record as streams show it; None if streams do not show such a record."""
    fact = record.event.fact
    if type(fact) not in _STATES:
        return None
    state = _STATES[type(fact)]
    if isinstance(fact, ev.JobSubmitted) and fact.conditioned:
        state = State.SCHEDULED
    spec = getattr(fact, "spec", None)
    return Happening(record, state, None if spec is None else spec.tags)


def message(kind: str, data: bytes, event_id: str | None = None) -> bytes:
    """Return a server-sent event. ``data``: JSON, which has no line ends."""
    head = b"" if event_id is None else f"id: {event_id}\n".encode()
    return head + f"event: {kind}\n".encode() + b"data: " + data + b"\n\n"


def id_of(position: Position, appended_ms: int) -> str:
    """Return the id of an event: its append time and its position."""
    return f"{appended_ms}-{position_text(position)}"


def place_of(event_id: str) -> tuple[Position, int] | None:
    """Return the position and the append time of an id; None if it is not one."""
    time, dash, where = event_id.partition("-")
    parts = where.rsplit(":", 2)
    if not dash or len(parts) != 3 or not parts[0] or len(event_id) > 300:
        return None
    if not all(each.isascii() and each.isdecimal() and len(each) <= 19 for each in (time, parts[1], parts[2])):
        return None
    numbers = [int(parts[1]), int(parts[2]), int(time)]
    return None if max(numbers) >= 1 << 63 else (Position(parts[0], *numbers[:2]), numbers[2])
