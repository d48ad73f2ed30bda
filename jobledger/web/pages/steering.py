"""The contents of the pages of queues, tasks, plans, errors and dead letters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobledger.client.commands import Standing
from jobledger.definitions.policy import Limits
from jobledger.errors import PlanNotFound
from jobledger.plan import PlanStatus
from jobledger.process.wording import counted
from jobledger.streams.status.store.protocol import ErrorGroup
from jobledger.views.letters import Letter, last_letters
from jobledger.web.pages.sources import Outcome, Sources

#: Number of plans and of dead letters on a page.
PLANS_MOST, LETTERS_MOST = 100, 50
#: The periods of the page of errors.
PERIODS = (("1h", "1 hour"), ("24h", "24 hours"), ("7d", "7 days"), ("all", "All"))


@dataclass(frozen=True)
class ControlRow:
    """A queue or a task. ``rate``, ``concurrency``: the limits in force, for the form. ``declared``: this app has it, so
    commands about it are possible."""

    name: str
    queue: str | None
    queued: int
    running: int
    retrying: int
    failed: int
    oldest_ms: int | None
    limits: str
    limited: str | None
    paused: str | None
    rate: str
    concurrency: str
    declared: bool


@dataclass(frozen=True)
class Control:
    """The page of queues and tasks. ``problem``: why the commands in force are not known."""

    queues: Sequence[ControlRow]
    tasks: Sequence[ControlRow]
    problem: str | None
    said: str = ""


def control(sources: Sources, said: str = "") -> Control:
    """Return the page of queues and tasks, from two queries of the status table and one read of the control topic."""
    app, outcome = sources.app, sources.standing()
    standing: Mapping[tuple[str, str], Standing] = outcome.value or {}
    queues = []
    known_queues = {each.queue: each for each in sources.queues()}
    for name in sorted({*known_queues, *(n for kind, n in standing if kind == "queue")}):
        summary = known_queues.get(name)
        numbers = {"depth": 0, "running": 0, "retrying": 0, "failed": 0}
        if summary is not None:
            numbers = {each: getattr(summary, each) for each in numbers}
        in_code = app.queues[name].limits if name in app.queues else Limits()
        queues.append(
            _row(
                name,
                None,
                (numbers["depth"], numbers["running"], numbers["retrying"], numbers["failed"]),
                None if summary is None else summary.oldest_ms,
                in_code,
                standing.get(("queue", name)),
                name in app.queues,
            )
        )
    return Control(queues, _tasks(sources, standing), outcome.problem, said)


def _tasks(sources: Sources, standing: Mapping[tuple[str, str], Standing]) -> list[ControlRow]:
    app = sources.app
    numbers: dict[str, dict[str, int]] = {name: {} for name in app.tasks}
    queue_of: dict[str, str] = {name: task.queue for name, task in app.tasks.items()}
    for each in sources.table.counts():
        states = numbers.setdefault(each.task, {})
        states[each.state.value] = states.get(each.state.value, 0) + each.jobs
        queue_of.setdefault(each.task, each.queue)
    for kind, name in standing:
        if kind == "task":
            numbers.setdefault(name, {})
    return [
        _row(
            name,
            queue_of.get(name),
            (states.get("queued", 0), states.get("running", 0), states.get("retrying", 0), states.get("failed", 0)),
            None,
            app.tasks[name].policy.limits if name in app.tasks else Limits(),
            standing.get(("task", name)),
            name in app.tasks,
        )
        for name, states in sorted(numbers.items())
    ]


def _row(
    name: str,
    queue: str | None,
    numbers: tuple[int, int, int, int],
    oldest_ms: int | None,
    in_code: Limits,
    standing: Standing | None,
    declared: bool,
) -> ControlRow:
    queued, running, retrying, failed = numbers
    limits = standing.limits if standing is not None and standing.limits is not None else in_code
    parts = []
    if limits.rate is not None:
        parts.append(f"{limits.rate:g} starts/s")
    if limits.concurrency is not None:
        parts.append(f"{counted(limits.concurrency, 'job')} at once")
    return ControlRow(
        name,
        queue,
        queued,
        running,
        retrying,
        failed,
        oldest_ms,
        ", ".join(parts),
        None if standing is None else standing.limited,
        None if standing is None else standing.paused,
        "" if limits.rate is None else f"{limits.rate:g}/s",
        "" if limits.concurrency is None else str(limits.concurrency),
        declared,
    )


@dataclass(frozen=True)
class PlanPage:
    """The page of one plan. ``plan``: None while the status table has not read it. ``where``: its conditions."""

    id: str
    plan: PlanStatus | None
    where: Any
    said: str = ""


def plan_page(sources: Sources, plan_id: str, *, new: bool, said: str = "") -> PlanPage:
    """Return the page of a plan. ``new``: the plan was made just now, so the table may not have it yet. Raises
    `PlanNotFound`."""
    try:
        plan = sources.table.plan(plan_id)
    except PlanNotFound:
        if not new:
            raise
        return PlanPage(plan_id, None, None, said)
    return PlanPage(plan_id, plan, conditions_of(plan), said)


@dataclass(frozen=True)
class Errors:
    """The page of errors. ``successes``: the last success of each task. ``redrives``: the plans that redrove the jobs of a
    group, by its fingerprint; the last plan comes first."""

    groups: Sequence[ErrorGroup]
    successes: Mapping[str, Any]
    redrives: Mapping[str, Sequence[PlanStatus]]
    period: str
    full: bool
    problem: str = ""
    periods: Sequence[tuple[str, str]] = PERIODS


def errors(sources: Sources, period: str, since_ms: int | None, most: int, problem: str = "") -> Errors:
    """Return the page of errors. Raises `StoreError`."""
    groups = sources.errors(since_ms)
    tasks = sorted({task for group in groups for task in group.tasks})
    redrives = redrives_of(groups, sources.table.plans(PLANS_MOST))
    return Errors(groups, sources.last_success(tasks), redrives, period, len(groups) >= most, problem)


def redrives_of(groups: Sequence[ErrorGroup], plans: Sequence[PlanStatus]) -> dict[str, list[PlanStatus]]:
    """Return the plans that redrove jobs of each group, by its fingerprint: those whose conditions name the fingerprint or
    the type of the error."""
    found: dict[str, list[PlanStatus]] = {}
    for plan in plans:
        where = conditions_of(plan)
        if plan.action != "redrive" or not isinstance(where, dict):
            continue
        fingerprints, types = _values(where.get("fingerprint")), _values(where.get("error"))
        for group in groups:
            named = group.fingerprint in fingerprints if fingerprints else group.type in types
            if named and (not types or group.type in types):
                found.setdefault(group.fingerprint, []).append(plan)
    return found


def conditions_of(plan: PlanStatus) -> Any:
    """Return the conditions that chose the jobs of a plan, as the log has them: mostly an object by the name of the
    filter."""
    try:
        return json.loads(plan.where)
    except ValueError:
        return plan.where


def _values(condition: Any) -> list[Any]:
    return condition if isinstance(condition, list) else [] if condition is None else [condition]


@dataclass(frozen=True)
class Letters:
    """The page of dead letters. ``most``: how many are shown."""

    letters: Sequence[Letter]
    topic: str
    problem: str | None
    most: int = LETTERS_MOST


def letters(sources: Sources) -> Letters:
    """Return the last dead letters, the newest first: at most `LETTERS_MOST` records of each partition are read."""
    app = sources.app
    outcome: Outcome = sources.from_log(lambda: last_letters(app.settings, app.names, LETTERS_MOST))
    return Letters(outcome.value or [], app.names.dead_letter, outcome.problem)
