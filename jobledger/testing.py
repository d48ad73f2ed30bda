"""Helpers for the tests of your own tasks: inside `job_context`, `current_job()` works in a test that calls a task.
They need no broker and no worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uuid_utils

from jobledger.definitions.context import JobContext, entered
from jobledger.definitions.task import Task, check_job_id, check_tags
from jobledger.errors import ConfigError
from jobledger.schemas.events import JobProgressed

__all__ = ["TestedJob", "job_context"]


class TestedJob(JobContext):
    """The job of a test. ``reports``: the task's `progress` reports in order, each with ``done``, ``total`` and
    ``message``."""

    __slots__ = ("reports",)
    __test__ = False  # pytest must not collect this class

    def __init__(self, **options: Any) -> None:
        self.reports: list[JobProgressed] = []
        super().__init__(**options, report=lambda _, report: self.reports.append(report))


@contextmanager
def job_context(
    task: Task[Any, Any] | str = "test",
    *,
    job_id: str | None = None,
    attempt: int = 1,
    run: int = 1,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Iterator[TestedJob]:
    """Run the block as an attempt of a job: `current_job()` returns this job, also in coroutines and tasks started in
    the block.

    ``task``: the task, or its name. ``job_id``: a UUID, by default a new one. ``parent``: the id of the job that
    submitted this one. When the block is left, the attempt has ended, as in a worker: code that still runs can report
    no progress. Raises `ConfigError` for an invalid value. For example::

        with job_context(send_mail, attempt=2) as job:
            assert send_mail("a@example.org") == "sent"
        assert [report.done for report in job.reports] == [1]
    """
    for name, value in (("attempt", attempt), ("run", run)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"job_context({name}={value!r}) is not a whole number from 1 up")
    job = TestedJob(
        job_id=str(uuid_utils.uuid7()) if job_id is None else check_job_id(job_id, "job_context: job_id"),
        task=task.name if isinstance(task, Task) else task,
        queue=task.queue if isinstance(task, Task) else "default",
        run=run,
        attempt=attempt,
        release=attempt,
        tags=check_tags(tags),
        parent=None if parent is None else check_job_id(parent, "job_context: parent"),
        trace=None,
    )
    with entered(job):
        try:
            yield job
        finally:
            job.ended = True
