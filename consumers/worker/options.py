"""Defines the options of a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobledger.definitions.retry import Retry
from jobledger.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of a worker.

    ``queues``: the queues to serve; None: all queues of the app. ``concurrency``: jobs that may run at once in this
    process. ``threads``: how many of these jobs may be plain functions in threads; None: 32, or ``concurrency`` if that
    is less. ``children``: child processes for tasks with ``isolation="process"``; each runs one job at a time; None: as
    many as this process has CPUs. ``jobs_per_child``: a child process is replaced after this many jobs. ``grace``:
    seconds in which running jobs may end after SIGTERM. ``prefetch``: records that may wait in memory, for each queue
    or each of its priorities; None: twice the concurrency, at least 1,000.

    ``lookahead``: jobs that may wait for their turn, their key or a limit, in all queues together. ``lookahead_bytes``:
    bytes of memory for further waiting jobs, which are kept as records only. ``lease``: the ownership lease in seconds:
    jobs are started only within this time after the request of the last commit that the group coordinator accepted; use
    less than the group's session timeout. ``linger_ms``: milliseconds that a fact may wait to be sent together with
    others. ``unknown_task``: the backoff of jobs whose task this worker does not know, and how often such a job is
    snoozed before it fails. ``start_timeout``: seconds that the broker may take to answer at the start. Raises
    `ConfigError` for an invalid value.
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
        """The number of threads for plain functions."""
        return min(32, self.concurrency) if self.threads is None else min(self.threads, self.concurrency)

    @property
    def job_children(self) -> int:
        """The number of child processes for isolated tasks."""
        if self.children is not None:
            return self.children
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def prefetched(self) -> int:
        """The number of records that may wait in memory, for each queue or each of its priorities."""
        return max(1_000, 2 * self.concurrency) if self.prefetch is None else self.prefetch
