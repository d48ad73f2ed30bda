"""Holds a task as the worker runs it: its function, its gates and slots, and its counts."""

from __future__ import annotations

from typing import Any

from jobledger.consumers.state.limiters import AdaptiveGate, BreakerGate, Gate, Limiter, Slots
from jobledger.definitions.middleware import Hooks, runner
from jobledger.definitions.task import Task

#: Upper bounds of the histograms: how long jobs waited, in milliseconds, and how long attempts ran, in seconds.
WAIT_BOUNDS_MS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3, 300e3, 1800e3, 7200e3)
ATTEMPT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0,
)  # fmt: skip


class TaskRuntime:
    """A task as the worker runs it, and its counts."""

    __slots__ = (
        "adaptive",
        "attempt_counts",
        "blocked",
        "breaker",
        "cancelled",
        "decode_args",
        "expired",
        "failed",
        "fn",
        "gates",
        "is_async",
        "limiter",
        "name",
        "retried",
        "seconds",
        "slots",
        "snoozed",
        "started",
        "succeeded",
        "task",
    )

    def __init__(self, task: Task[Any, Any], hooks: Hooks) -> None:
        self.task = task
        self.name, self.fn, self.is_async = task.name, runner(task, hooks), task.is_async
        self.decode_args = task.decode_args
        self.started = self.succeeded = self.retried = self.snoozed = self.failed = self.cancelled = self.expired = 0
        self.attempt_counts = [0] * (len(ATTEMPT_BOUNDS_S) + 1)  # number of ended attempts, by `ATTEMPT_BOUNDS_S`
        self.seconds = 0.0
        self.blocked = 0  # how often its code blocked the event loop
        policy = task.policy
        self.limiter = Limiter(f"task {task.name}", policy.limits)
        self.adaptive = None if policy.adaptive is None else AdaptiveGate(f"task {task.name}", policy.adaptive)
        self.breaker = None if policy.breaker is None else BreakerGate(f"task {task.name}", policy.breaker)
        self.gates: tuple[Gate, ...] = ()
        self.slots: Slots | None = None  # the slots that its jobs need; None: the task runs on the event loop
        self.regate()

    def regate(self) -> None:
        """Choose the gates again, after limits or pauses have changed."""
        gates = (self.limiter if self.limiter.active else None, self.adaptive, self.breaker)
        self.gates = tuple(gate for gate in gates if gate is not None)
