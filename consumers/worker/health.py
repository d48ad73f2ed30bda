"""Reports a worker's health to its operator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobledger.consumers.isolation.pool import ChildPool
from jobledger.consumers.partitions.fetcher import Fetcher
from jobledger.consumers.scheduling.dispatcher import Dispatcher


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a worker at one moment.

    ``dispatcher``: None while the worker starts. ``problems``: reasons why the worker is not healthy, without the
    reasons of its fetchers. ``unacknowledged``: number of unacknowledged records. ``leases``: number of job leases.
    """

    identity: str
    started_at: float
    stopping: bool
    problems: Sequence[str]
    fetchers: Sequence[Fetcher]
    dispatcher: Dispatcher | None
    children: ChildPool | None
    unacknowledged: int
    leases: int


def health_of(worker: Parts) -> dict[str, Any]:
    """Return the worker's health: ``status`` is ok, starting, stopping or unhealthy, with ``reasons``, and counts."""
    dispatcher, reasons = worker.dispatcher, list(worker.problems)
    queues: dict[str, Any] = {}
    for fetcher in worker.fetchers:
        parts = fetcher.owned()
        reasons += [p.stopped for p in parts if p.stopped is not None]
        if fetcher.error is not None:
            reasons.append(f"lane {fetcher.lane}: {fetcher.error}")
        if fetcher.probe.problem is not None:
            reasons.append(f"lane {fetcher.lane}: {fetcher.probe.problem}")
        queues[fetcher.lane] = {
            "partitions": [p.number for p in parts],
            "ready": sum(p.ready for p in parts),
            "held": fetcher.held,
            "braked": [p.number for p in parts if p.braked],
            "fetched": fetcher.fetched,
            "commits": fetcher.committer.commits,
        }
        silent = time.monotonic() - fetcher.lease.until
        if fetcher.lease.wanted and silent > 1.0:
            reasons.append(
                f"lane {fetcher.lane}: the group coordinator has not confirmed this worker for "
                f"{silent + fetcher.lease.seconds:.0f} s, so nothing is begun"
            )
        if fetcher.committer.last_error is not None:
            reasons.append(f"commits are refused: {fetcher.committer.last_error}")
    status = "unhealthy" if reasons else "stopping" if worker.stopping else "ok"
    if dispatcher is None:
        return {"status": "unhealthy" if reasons else "starting", "reasons": reasons, "worker": worker.identity}
    counts = dispatcher.admission.counts
    return {
        "status": status,
        "reasons": reasons,
        "worker": worker.identity,
        "uptime": round(time.monotonic() - worker.started_at, 1),
        "queues": queues,
        "running": len(dispatcher.running_jobs.jobs),
        "unacknowledged": worker.unacknowledged,
        "started": dispatcher.running_jobs.begun,
        "children": _children(worker.children),
        "leases": worker.leases,
        **{
            name: sum(getattr(runtime, name) for runtime in dispatcher.pipe.tasks.runtimes.values())
            for name in ("succeeded", "retried", "snoozed", "failed")
        },
        "duplicates": counts.duplicates,
        "found_closed": counts.found_settled,
        "rejected": counts.rejected,
    }


def _children(children: ChildPool | None) -> dict[str, int]:
    if children is None:
        return {"processes": 0, "died": 0, "killed": 0}
    return {"processes": children.count, "died": children.deaths, "killed": children.killed}
