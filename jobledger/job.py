"""States and the status of a job. Pure."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Any

import msgspec

from jobledger.schemas.events import ErrorInfo, Position


class State(enum.StrEnum):
    """Where a job is in its life."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether nothing follows in this run."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED)


class Progress(msgspec.Struct, frozen=True):
    """How far a job said it is."""

    done: int
    total: int | None = None
    message: str | None = None


class JobStatus(msgspec.Struct, frozen=True):
    """One job as the status table knows it."""

    job_id: str
    task: str
    queue: str
    state: State
    run: int
    attempt: int
    release: int
    tags: dict[str, str] = {}
    parent: str | None = None
    submitted_at: dt.datetime | None = None
    due_at: dt.datetime | None = None
    started_at: dt.datetime | None = None
    ended_at: dt.datetime | None = None
    progress: Progress | None = None
    result: Any = None
    error: ErrorInfo | None = None
    reason: str | None = None
    duration: float | None = None
    positions: tuple[Position, ...] = ()
