"""Copies of jobs with changed arguments: a copy is a new job that has everything else from the original. Submits nothing
itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import msgspec

from jobledger.client.commands import BY_MOST, REASON_MOST, who
from jobledger.client.whole_jobs import LOST, Whole, WholeJobs
from jobledger.config import Settings
from jobledger.definitions.copy_options import CopyOptions
from jobledger.definitions.task import JobRequest, Task
from jobledger.errors import BadArguments, ConfigError, JobNotFound
from jobledger.kafka.topic_names import Names, check_text
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import JobLinks, JobSubmitted, users_tags


def original(settings: Settings, names: Names, table: Any, job_id: str) -> Whole:
    """Return the record of a job that has its arguments, and the job's specification in it. ``table``: the status table's read side.

    Raises `JobNotFound` if the table does not know the job, or if the log no longer has the arguments, and the errors
    of the broker.
    """
    lives = table.lives_of([job_id])
    if job_id not in lives:
        raise table.unknown(job_id)
    with LogReader(settings) as log:
        whole = WholeJobs(log, settings, names, decoder(settings, names).decode, lives).find(job_id)
    if whole is None:
        raise JobNotFound(f"job {job_id} cannot be copied: {LOST}")
    return whole


def copy_of(whole: Whole, task_of: Callable[[str], Task[Any, Any]], **options: Unpack[CopyOptions]) -> JobRequest[Any]:
    """Return the request for a copy of a job. ``task_of``: returns the task of a name, or raises `UnknownTask`.

    See `App.copy` for the options. Raises `BadArguments`, `ConfigError` or `UnknownQueue`, as a submission does.
    """
    event, spec = whole
    task = task_of(event.task)
    by, reason = options.get("by"), options.get("reason")
    links = JobLinks(
        event.job_id,
        check_text("by", by or who(), BY_MOST),
        None if reason is None else check_text("reason", reason, REASON_MOST),
    )
    without = options.get("without", ())
    args = task.arguments.changed(
        spec.args, options.get("args") or {}, [without] if isinstance(without, str) else list(without)
    )
    queue, key, priority, tags = options.get("queue"), options.get("key"), options.get("priority"), options.get("tags")
    queue = event.queue if queue is None else queue
    # An expiry that is a point in time belonged to the original. Without an expiry in milliseconds, the task's own applies.
    expires_in_ms = spec.expires_in_ms if isinstance(event.fact, JobSubmitted) else None
    bound = task.using(
        queue=queue,
        tags=users_tags(spec.tags) if tags is None else tags,
        priority=(_kept_priority(task, queue, spec.priority) or "normal") if priority is None else priority,  # type: ignore[arg-type]  # checked by `using`
        expires_in=None if expires_in_ms is None else expires_in_ms / 1000,
        key=_own_key(task, event.key, spec.args) if key is None else key,
    )
    return JobRequest(
        task,
        args,
        bound.queue,
        bound.tags,
        None,
        _derived_key(task, args) if bound.key is None else bound.key,
        bound.priority,
        bound.expires_in_ms,
        None,
        links,
    )


def _kept_priority(task: Task[Any, Any], queue: str, priority: str | None) -> str | None:
    """Return the original's priority; None if the queue of the copy has no priorities."""
    if priority is None:
        return None
    try:
        task.registry.check_level(queue, priority)
    except ConfigError:
        return None
    return priority


def _own_key(task: Task[Any, Any], key: str | None, args: bytes) -> str | None:
    """Return the original's key if the submitter chose it; None if the task derives the key from the arguments. Then
    other arguments may have another key."""
    if key is None or task.policy.key is None:
        return key
    try:
        derived = _derived_key(task, args)
    except BadArguments:  # of another version of the task
        return None
    return None if derived == key else key


def _derived_key(task: Task[Any, Any], args: bytes) -> str | None:
    if task.policy.key is None:
        return None
    values = msgspec.json.decode(args) if isinstance(task.policy.key, str) else task.decode_args(args)
    return task.key_of((), values)
