"""The context of a job that runs, for tests of what its code can ask and say."""

from __future__ import annotations

from collections.abc import Callable

from jobledger.definitions.context import JobContext
from jobledger.schemas.events import JobProgressed


def running_job(
    job_id: str, task: str = "parent", report: Callable[[JobContext, JobProgressed], None] | None = lambda *_: None
) -> JobContext:
    """A first attempt. ``report``: gets its reports."""
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
