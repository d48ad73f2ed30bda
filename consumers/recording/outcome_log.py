"""Logs each failed attempt of a worker in one log record, with the error."""

from __future__ import annotations

import logging

from jobledger.consumers.state.outcome import Failed, Outcome, Retried
from jobledger.process.logger import get_logger
from jobledger.schemas.events import JobEvent

LOG = get_logger("jobledger.worker")


def log_outcome(event: JobEvent, outcome: Outcome) -> None:
    """Log an attempt that failed: as a warning if the job is tried again, as info if the task rejected the job, else as
    an error.

    If debug messages are logged, the message includes the traceback. Other outcomes are not logged.
    """
    if isinstance(outcome, Failed):
        # The task's author intended the rejection.
        level = logging.INFO if outcome.reason == "rejected" else logging.ERROR
        what = f"failed ({outcome.reason}), with no further attempt,"
    elif isinstance(outcome, Retried):
        level, what = logging.WARNING, f"is tried again in {outcome.delay_ms / 1000:.1f} s"
    else:
        return
    if not LOG.isEnabledFor(level):
        return
    error = outcome.error
    # The arguments may be confidential: the dead letter contains them, the worker's log does not.
    bare = isinstance(outcome, Failed) and outcome.reason == "bad-arguments"
    message = "the dead letter shows arguments and signature" if bare else error.message
    if error.traceback and not bare and LOG.isEnabledFor(logging.DEBUG):
        message = f"{message}\n{error.traceback.rstrip()}"
    LOG.log(
        level,
        "job %s (%s) %s at attempt %d: %s: %s",
        event.job_id,
        event.task,
        what,
        event.attempt,
        error.type,
        message,
        extra={"job_id": event.job_id, "attempt": event.attempt, "run": event.run, "task": event.task},
    )
