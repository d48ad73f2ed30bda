"""Jobs, plans and events as JSON builtins."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from jobledger.views.values import iso, jsonable

if TYPE_CHECKING:
    from jobledger.job import JobStatus
    from jobledger.plan import PlanStatus
    from jobledger.schemas.events import Fact, Recorded


def status_json(status: JobStatus) -> dict[str, Any]:
    """Convert a status to JSON builtins; positions become text."""
    shown: dict[str, Any] = jsonable(status)
    shown["positions"] = [str(p) for p in status.positions]
    return shown


def args_json(args: bytes | str | None) -> dict[str, Any]:
    """Return arguments for JSON output, or the reason why they are not known. ``args``: as `records.submissions`
    returns them."""
    if args is None or isinstance(args, str):
        return {"args": None, "args_error": args}
    return {"args": jsonable(args)}


def plan_json(plan: PlanStatus) -> dict[str, Any]:
    """Convert a plan to JSON builtins."""
    return {
        "plan": plan.plan,
        "action": plan.action,
        "state": plan.state.value,
        "position": None if plan.position is None else str(plan.position),
        "where": json.loads(plan.where),
        "queue": plan.queue,
        "rate": plan.rate,
        "matched": plan.matched,
        "done": plan.done,
        "skipped": plan.skipped,
        "failed": plan.failed,
        "error": plan.error,
        "by": plan.by,
        "reason": plan.reason,
        "steered": plan.steered,
        "opened_at": jsonable(_moment(plan.opened_ms)),
        "ended_at": None if plan.ended_ms is None else jsonable(_moment(plan.ended_ms)),
    }


def fact_json(fact: Fact) -> dict[str, Any]:
    """Convert a fact to JSON builtins, with its name as ``type``; arguments and results become the JSON they
    contain."""
    from jobledger.schemas.events import fact_name

    return {"type": fact_name(fact), **jsonable(fact)}


def event_json(recorded: Recorded) -> dict[str, Any]:
    """Convert an event to JSON builtins, with its position and the time when the broker appended it (UTC, ISO 8601)."""
    event = recorded.event
    header = {name: getattr(event, name) for name in event.__struct_fields__ if name not in ("fact", "occurred_at")}
    return {
        "position": str(recorded.position),
        "appended_at": iso(recorded.appended_ms * 1000),
        "occurred_at": iso(event.occurred_at),
        **header,
        "fact": fact_json(event.fact),
    }


def _moment(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)
