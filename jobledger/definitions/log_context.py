"""Adds the current job's fields to every log line that code writes while a job runs, with any logger.

Add `JobFilter` to a handler of ``logging``, and `add_job` to the processors of ``structlog``. If the app has not set up
logging, the ``jobledger`` commands add the filter. With ``JOBLEDGER_LOG_FORMAT=json`` they also add the processor, if
``structlog`` is not configured. Arguments, results and tags are never added, because they may be secret.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from jobledger.definitions.context import maybe_current_job

#: The fields of a job that are added.
FIELDS = ("job_id", "task", "queue", "run", "attempt")


def job_fields() -> dict[str, Any]:
    """Return the `FIELDS` of the job in which this code runs; empty outside a job."""
    job = maybe_current_job()
    return {} if job is None else {name: getattr(job, name) for name in FIELDS}


class JobFilter(logging.Filter):
    """Adds the current job's fields to each record, as ``extra`` does. Fields that the record already has are kept.
    Every record passes the filter."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields, and return True. Runs in the thread and context of the logging call."""
        for name, value in job_fields().items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True


def add_job(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the current job's fields to ``event``, and return ``event``. A processor for structlog."""
    for name, value in job_fields().items():
        event.setdefault(name, value)
    return event
