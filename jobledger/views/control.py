"""Queues and tasks with their limits and the commands in force, as JSON builtins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobledger.client.commands import Standing
    from jobledger.definitions.policy import Limits
    from jobledger.definitions.queues import Queue


def queue_json(
    name: str, queue: Queue | None, partitions: int, limits: Limits, standing: Standing | None
) -> dict[str, Any]:
    """Return a queue. ``queue`` None: only commands name it. ``partitions``: the number of partitions of a queue that does
    not set one. ``limits``: those in the code."""
    about: dict[str, Any] = {
        "partitions": None if queue is None else queue.partitions or partitions,
        "priorities": queue is not None and queue.priorities,
    }
    return {"queue": name, **about, **_in_force(limits, standing)}


def task_json(name: str, queue: str | None, limits: Limits, standing: Standing | None) -> dict[str, Any]:
    """Return a task. ``queue``: the name of the task's queue; None: only commands name the task. ``limits``: those in the
    code."""
    return {"task": name, "queue": queue, **_in_force(limits, standing)}


def _in_force(limits: Limits, standing: Standing | None) -> dict[str, Any]:
    if standing is not None and standing.limits is not None:
        limits = standing.limits
    return {
        "paused": None if standing is None else standing.paused,
        "rate": limits.rate,
        "concurrency": limits.concurrency,
        "limited": None if standing is None else standing.limited,
    }
