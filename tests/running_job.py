"""Creates the context of a running job, for tests of what a job's code can read and report."""

from __future__ import annotations

from collections.abc import Callable

from jobledger.definitions.context import JobContext
from jobledger.schemas.events import JobProgressed


def running_job(
    job_id: str, task: str = "parent", report: Callable[[JobContext, JobProgressed], None] | None = lambda *_: None
) -> JobContext:
    """Return the context of a first attempt. ``report``: receives the job's reports."""
    return JobContext(
        job_id=job_id,
        task=task,
        queue="mail",
        run=1,
        attempt=1,
        release=1,
        tags={},
        parent=None,
        trace=None,
        report=report,
    )
