"""Reports a worker's health to its operator."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobledger.consumers.worker import Worker


def health_of(worker: Worker) -> dict[str, Any]:
    """Return the worker's health: ``status`` is ok, starting, stopping or unhealthy, with ``reasons``, and counts."""
    dispatcher, settler = worker.dispatcher, worker.settler
    reasons = [] if worker.error is None else [str(worker.error)]
    reasons += worker.topics.problems
    queues: dict[str, Any] = {}
    for fetcher in worker.fetchers:
        parts = fetcher.owned()
        reasons += [p.stopped for p in parts if p.stopped is not None]
        if fetcher.error is not None:
            reasons.append(f"queue {fetcher.queue}: {fetcher.error}")
        queues[fetcher.queue] = {
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
                f"queue {fetcher.queue}: the group coordinator has not confirmed this worker for "
                f"{silent + fetcher.lease.seconds:.0f} s, so nothing is begun"
            )
        if fetcher.committer.last_error is not None:
            reasons.append(f"commits are refused: {fetcher.committer.last_error}")
    status = "unhealthy" if reasons else "stopping" if worker.stopping else "ok"
    if dispatcher is None or settler is None:
        return {"status": "unhealthy" if reasons else "starting", "reasons": reasons, "worker": worker.identity}
    counts = dispatcher.intake.counts
    return {
        "status": status,
        "reasons": reasons,
        "worker": worker.identity,
        "uptime": round(time.monotonic() - worker.started_at, 1),
        "queues": queues,
        "running": len(dispatcher.running),
        "unacknowledged": worker.sender.unacknowledged
        if worker.sender is not None and not worker.ended.is_set()
        else 0,
        "started": dispatcher.starter.started,
        "children": _children(worker),
        "leases": 0 if worker.leases is None else worker.leases.count,
        **{
            name: sum(getattr(plan, name) for plan in dispatcher.plans.values())
            for name in ("succeeded", "retried", "snoozed", "failed")
        },
        "duplicates": counts.duplicates,
        "found_closed": counts.found_closed,
        "rejected": counts.rejected,
    }


def _children(worker: Worker) -> dict[str, int]:
    children = worker.children
    if children is None:
        return {"processes": 0, "died": 0, "killed": 0}
    return {"processes": children.count, "died": children.deaths, "killed": children.killed}
