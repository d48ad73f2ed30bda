"""Builds events: the header from the job that an event is about, and the fact. Pure module.

Only this module, the decoders, and two places of the worker call `JobEvent`. These two places build an event for each
job, so that the cost of one more call counts.
"""

from __future__ import annotations

from typing import Protocol

from jobledger.schemas.events import Fact, JobEvent, JobSpec, JobSubmitted, Redrive
from jobledger.schemas.ids import derived_id


class Release(Protocol):
    """What the events of one release have in common. An event has it, and so has a row of the coordinator's table."""

    @property
    def job_id(self) -> str:
        """The job's id."""

    @property
    def run(self) -> int:
        """The number of the run."""

    @property
    def attempt(self) -> int:
        """The number of the attempt."""

    @property
    def release(self) -> int:
        """The number of the release."""

    @property
    def task(self) -> str:
        """The name of the task."""

    @property
    def queue(self) -> str:
        """The name of the queue."""

    @property
    def key(self) -> str | None:
        """The ordering key."""

    @property
    def home(self) -> str | None:
        """The key of the job's records on the coordination topic; None: the job's id."""

    @property
    def trace(self) -> str | None:
        """The trace context of the submission."""


def about(release: Release, fact: Fact, event_id: str, at_us: int, source: str) -> JobEvent:
    """Build an event about a release. ``at_us``: time of the writer's clock, in µs; ``source``: the writer's name."""
    return JobEvent(
        event_id,
        release.job_id,
        release.run,
        release.attempt,
        release.release,
        at_us,
        release.task,
        release.queue,
        release.key,
        release.home,
        source,
        release.trace,
        fact,
    )


def derived(release: Release, what: str, fact: Fact, at_us: int, source: str) -> JobEvent:
    """Build the event of a derived record. ``what``: the record's purpose, such as ``dead-letter``. Every process
    derives the same ``event_id`` from the job, the run, the release and ``what``."""
    event_id = derived_id(release.job_id, f"{release.run}/{release.release}/{what}")
    return about(release, fact, event_id, at_us, source)


def submission(
    job_id: str,
    task: str,
    queue: str,
    key: str | None,
    spec: JobSpec,
    at_us: int,
    source: str,
    trace: str | None,
    delay_ms: int | None = None,
) -> JobEvent:
    """Build the event that submits a job. With ``delay_ms`` the coordinator releases the job first. Then the submission
    has release 0, and belongs on the coordination topic."""
    delayed = delay_ms is not None
    return JobEvent(
        job_id,
        job_id,
        1,
        1,
        0 if delayed else 1,
        at_us,
        task,
        queue,
        key,
        job_id if delayed else None,
        source,
        trace,
        JobSubmitted(spec, delay_ms),
    )


def further_run(
    job: Release, run: int, queue: str, spec: JobSpec, redrive: Redrive, at_us: int, source: str
) -> JobEvent:
    """Build the event that submits run number ``run`` of a job that has ended. ``job``: an event of an earlier run. The
    event belongs on the coordination topic: the coordinator releases the run at once."""
    event_id = derived_id(job.job_id, f"{run}/0/redrive")
    fact = JobSubmitted(spec, 0, None, redrive)
    return JobEvent(event_id, job.job_id, run, 1, 0, at_us, job.task, queue, job.key, job.job_id, source, None, fact)


def standalone(
    fact: Fact,
    event_id: str,
    at_us: int,
    source: str,
    *,
    job_id: str = "",
    run: int = 0,
    task: str = "",
    queue: str = "",
    home: str | None = None,
) -> JobEvent:
    """Build an event that belongs to no release: a control command, or a report of a rejected record."""
    return JobEvent(event_id, job_id, run, 0, 0, at_us, task, queue, None, home, source, None, fact)
