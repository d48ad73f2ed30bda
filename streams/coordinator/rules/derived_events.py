"""Build the records that the coordinator derives from a row. Every instance derives the same ids. Pure module."""

from __future__ import annotations

from jobledger.schemas.event_factory import derived
from jobledger.schemas.events import DeadLettered, ErrorInfo, JobDue, JobEvent, JobFailedFact, ReleaseDecided
from jobledger.streams.coordinator.rules.schedule_rows import Kept


def job_due(row: Kept, now_us: int, source: str) -> JobEvent:
    """Build the record that releases the job to the workers."""
    return derived(row, "due", JobDue(row.spec, row.due), now_us, source)


def release_decided(row: Kept, now_us: int, source: str) -> JobEvent:
    """Build the record that a timer writes to the log when a release is due."""
    return derived(row, "decided", ReleaseDecided(row.acts_at), now_us, source)


def undeliverable(row: Kept, error: ErrorInfo, now_us: int, source: str) -> tuple[JobEvent, JobEvent]:
    """Build the two records that end a job whose release is too large for its work topic: `JobFailedFact` and the dead
    letter with the whole job."""
    failed = derived(row, "too-large", JobFailedFact("too-large", error), now_us, source)
    return failed, derived(row, "dead-letter", DeadLettered(row.spec, "too-large", error), now_us, source)
