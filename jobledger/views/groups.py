"""Workers, groups of errors, explanations and dead letters as JSON builtins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobledger.views.values import iso, jsonable

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping

    from jobledger.explain import Explanation
    from jobledger.streams.status.store.protocol import ErrorGroup, LastSuccess
    from jobledger.views.letters import Letter
    from jobledger.worker_status import WorkerStatus


def worker_json(status: WorkerStatus, now: dt.datetime) -> dict[str, Any]:
    """Return a worker. ``now``: the present time, for the worker's state."""
    shown: dict[str, Any] = jsonable(status)
    return {**shown, "queues": list(status.queues), "state": status.state(now).value}


def group_json(group: ErrorGroup, successes: Mapping[str, LastSuccess]) -> dict[str, Any]:
    """Return a group of errors. ``successes``: the last success of each task."""
    return {
        "fingerprint": group.fingerprint,
        "type": group.type,
        "message": group.message,
        "job_id": group.job_id,
        "jobs": group.jobs,
        "exact": group.exact,
        "first_seen": iso(group.first_ms * 1000),
        "last_seen": iso(group.last_ms * 1000),
        "tasks": group.tasks,
        "versions": group.versions,
        "again": group.again,
        "last_success": {
            task: {"version": known.version, "ended_at": iso(known.ended_ms * 1000), "job_id": known.job_id}
            for task in group.tasks
            if (known := successes.get(task)) is not None
        },
    }


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation."""
    shown: dict[str, Any] = jsonable(explanation)
    return shown


def letter_json(letter: Letter) -> dict[str, Any]:
    """Return a dead letter. ``job_id`` and ``task`` are null if the dead letter is about a rejected record."""
    return {
        "job_id": letter.job_id or None,
        "task": letter.task or None,
        "what": letter.what,
        "why": letter.why,
        "key": letter.key or None,
        "value": letter.raw or None,
        "appended_at": iso(letter.at * 1000),
        "position": letter.position,
    }
