"""Holds the tasks as this worker runs them, and the slots in which their jobs run."""

from __future__ import annotations

import random
from collections.abc import Mapping

from jobledger.consumers.state.limiters import Slots
from jobledger.consumers.state.outcome import Outcome, unknown_task
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.definitions.retry import Retry
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.schemas.events import JobDue, JobEvent, JobSubmitted


class TaskTable:
    """The app's tasks by name. ``threads``: slots for plain functions; ``children``: slots for isolated jobs;
    ``unknown_backoff``: the backoff of jobs whose task this worker does not know."""

    def __init__(self, registry: TaskRegistry, threads: int, children: int, unknown_backoff: Retry) -> None:
        self._unknown_backoff = unknown_backoff
        self.threads, self.children = Slots("threads", threads), Slots("children", children)
        self.runtimes = {name: TaskRuntime(task, registry.hooks) for name, task in registry.tasks.items()}
        for runtime in self.runtimes.values():
            isolated = runtime.task.policy.isolation is not None
            runtime.slots = self.children if isolated else None if runtime.is_async else self.threads

    def unknown_task_outcome(self, event: JobEvent, jitter: float | None = None) -> Outcome:
        """Return the outcome of a job whose task this worker does not know. The job is snoozed, because another worker
        may know the task. When the backoff is exhausted, the job fails. ``jitter``: from 0 to 1; None: random."""
        share = random.random() if jitter is None else jitter
        return unknown_task(event.task, list(self.runtimes), tags_of(event), self._unknown_backoff, share)


def tags_of(event: JobEvent) -> Mapping[str, str]:
    """Return the tags of the job of a work record."""
    fact = event.fact
    return fact.spec.tags if isinstance(fact, JobSubmitted | JobDue) else {}
