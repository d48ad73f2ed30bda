"""What can be chosen about a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobledger.errors import ConfigError
from jobledger.retry import Retry


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker runs.

    ``queues``: to serve; None: all of the app. ``concurrency``: jobs that may run at once in this process.
    ``threads``: how many of them may be plain functions; None: 32, or ``concurrency`` if that is less. ``children``:
    processes for tasks with ``isolation="process"``, one job at a time in each; None: as many as there are CPUs for
    this process. ``jobs_per_child``: after so many a child is replaced. ``grace``: seconds that running jobs get to
    end after SIGTERM. ``prefetch``: records per queue that may wait in memory; None: twice the concurrency, at least
    1,000. ``lookahead``: jobs that may wait for their turn, their key or a limit, in all; ``lookahead_bytes``: what
    further ones may take, which wait as bare records. ``lease``: seconds after
    the coordinator's last answer in which jobs may be begun; keep it below the group's session timeout. ``linger_ms``:
    how long a fact may wait for company before it is sent. ``unknown_task``: backoff, and how often a job is snoozed
    whose task this worker does not know, before it fails. ``start_timeout``: seconds the broker may take to answer at
    the start. Raises `ConfigError`.
    """

    queues: Sequence[str] | None = None
    concurrency: int = 100
    threads: int | None = None
    children: int | None = None
    jobs_per_child: int = 10_000
    grace: float = 30.0
    prefetch: int | None = None
    lookahead: int = 10_000
    lookahead_bytes: int = 64 << 20
    lease: float = 3.0
    linger_ms: float = 2.0
    unknown_task: Retry = field(default_factory=lambda: Retry(max_attempts=10, initial=10.0, factor=2.0, cap=600.0))
    start_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (
            ("concurrency", 1),
            ("threads", 0),
            ("children", 1),
            ("jobs_per_child", 1),
            ("prefetch", 1),
            ("lookahead", 1),
            ("lookahead_bytes", 0),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}={value!r} is not a whole number from {least} up")
        for name in ("grace", "lease", "linger_ms", "start_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name}={value!r} is not a number from 0 up")

    @property
    def job_threads(self) -> int:
        """Threads for plain functions."""
        return min(32, self.concurrency) if self.threads is None else min(self.threads, self.concurrency)

    @property
    def job_children(self) -> int:
        """Child processes for isolated tasks."""
        if self.children is not None:
            return self.children
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def prefetched(self) -> int:
        """Records per queue that may wait in memory."""
        return max(1_000, 2 * self.concurrency) if self.prefetch is None else self.prefetch
