"""Which job a log line is about: for every line that code writes while a job runs, whoever's logger it is.

`JobFilter` belongs on a handler of ``logging``, `add_job` among the processors of ``structlog``; ``jobledger`` commands
put both in place where nobody else has set logging up. Never arguments, results or tags: they may be secret.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from jobledger.context import maybe_current_job

#: What is told of a job.
FIELDS = ("job_id", "task", "queue", "run", "attempt")


def job_fields() -> dict[str, Any]:
    """`FIELDS` of the job this code runs in; empty outside of one."""
    job = maybe_current_job()
    return {} if job is None else {name: getattr(job, name) for name in FIELDS}


class JobFilter(logging.Filter):
    """Adds the current job's fields to each record, as ``extra`` would; what the record
    says itself wins. Lets all pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields. Runs in the thread and the context that log."""
        for name, value in job_fields().items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True


def add_job(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog that does the same."""
    for name, value in job_fields().items():
        event.setdefault(name, value)
    return event
