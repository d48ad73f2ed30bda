"""A plan: one action on many jobs, and the fold of its facts. Pure: no Kafka, no Avro, no database, no clock.

All facts of all plans are in one partition, so they are folded in the order of the log. A plan lists its jobs in parts,
and the parts are carried out one after the other. The log may hold two facts about the same part, because a process may
write the first one and die, and the next process writes the second one. The first one counts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from jobledger.job import State
from jobledger.schemas import events as ev
from jobledger.schemas.events import Position, Recorded


class PlanState(enum.StrEnum):
    """The state of a plan. ``listing``: the caller has not completed the list of jobs, because the caller still writes
    the list or has died. In this state nothing is done with the jobs."""

    LISTING = "listing"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by the plan."""
        return self in (PlanState.DONE, PlanState.ABORTED)


class Scope(NamedTuple):
    """The jobs that an action can be about. ``states``: their states. ``default``: the states that a filter chooses if
    the filter names none. ``refusal``: the text of the error for another state."""

    states: tuple[State, ...]
    default: tuple[State, ...]
    refusal: str


_OPEN = tuple(state for state in State if not state.ended)
#: The scope of each action.
SCOPES: Mapping[str, Scope] = {
    "redrive": Scope(
        (State.FAILED, State.CANCELLED, State.EXPIRED),
        (State.FAILED,),
        "only jobs that failed, were cancelled or expired can be redriven",
    ),
    "cancel": Scope(_OPEN, _OPEN, "jobs in this state have ended and cannot be cancelled"),
}


class PlanStatus(msgspec.Struct, frozen=True):
    """What the log says about a plan.

    ``plan``: the plan's id. ``action``: ``redrive`` or ``cancel``. ``where``: the conditions that chose the jobs, as a JSON
    object. ``queue``: where redriven jobs go; None: to their own queues. ``rate``: jobs per second; None: no limit.
    ``opened_ms``, ``ended_ms``: append times, in ms of the broker's clock. ``matched``: the number of jobs in the list.
    ``parts``: the number of parts; None until the list is complete. ``listed``: the number of parts in the log.
    ``next_part``: the number of the part that is carried out next; the first part has number 0.

    ``done``, ``skipped``, ``failed``: numbers of jobs in the parts that were carried out. ``done``: the next run was
    submitted, or the cancel was requested; how the job ends then is not counted. ``skipped``: the job had changed since
    it was listed, so nothing was done. ``failed``: the action was not possible. ``error``: the first job that failed,
    and why.

    ``position``: the position of the fact that made the list complete. ``steered``: the last person who paused, resumed
    or aborted the plan, and the reason. ``offset``: the offset of the last fact that was folded.
    """

    plan: str
    action: str
    where: str
    queue: str | None
    rate: float | None
    by: str
    reason: str | None
    opened_ms: int
    state: PlanState = PlanState.LISTING
    matched: int = 0
    parts: int | None = None
    listed: int = 0
    next_part: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    error: str | None = None
    position: Position | None = None
    steered: str | None = None
    ended_ms: int | None = None
    offset: int = -1

    @property
    def left(self) -> int:
        """The number of jobs in the parts that were not carried out yet."""
        return self.matched - self.done - self.skipped - self.failed


#: The facts of plans.
FACTS = (ev.PlanOpened, ev.PlanListed, ev.PlanSealed, ev.PlanAdvanced, ev.PlanSteered)

_replace = msgspec.structs.replace


def apply(plan: PlanStatus | None, record: Recorded) -> PlanStatus | None:
    """Return the plan with one more fact. ``plan`` None: no fact of the plan was known before. A fact at or below the
    last folded offset changes nothing, and neither does a fact that is not possible in the plan's state."""
    event, offset = record.event, record.position.offset
    fact = event.fact
    if plan is None:
        if not isinstance(fact, ev.PlanOpened):
            return None  # its beginning was deleted from the log
        return PlanStatus(
            event.job_id,
            *(fact.action, fact.where, fact.queue, fact.rate, fact.by, fact.reason, record.appended_ms),
            offset=offset,
        )
    if offset <= plan.offset or not isinstance(fact, FACTS):
        return plan
    plan = _replace(plan, offset=offset)
    match fact:
        case ev.PlanListed() if plan.state is PlanState.LISTING and fact.part == plan.listed:
            return _replace(plan, listed=plan.listed + 1, matched=plan.matched + len(fact.jobs))
        case ev.PlanSealed() if plan.state is PlanState.LISTING and fact.parts == plan.listed:
            sealed = _replace(plan, state=PlanState.RUNNING, parts=fact.parts, position=record.position)
            return _ended(sealed, record.appended_ms)
        case ev.PlanAdvanced() if not plan.state.ended and plan.parts is not None and fact.part == plan.next_part:
            advanced = _replace(
                plan,
                next_part=plan.next_part + 1,
                done=plan.done + fact.done,
                skipped=plan.skipped + fact.skipped,
                failed=plan.failed + fact.failed,
                error=plan.error or fact.error,
            )
            return _ended(advanced, record.appended_ms)
        case ev.PlanSteered() if not plan.state.ended:
            return _steered(plan, fact, record.appended_ms)
    return plan


def _ended(plan: PlanStatus, appended_ms: int) -> PlanStatus:
    if plan.next_part == plan.parts:
        return _replace(plan, state=PlanState.DONE, ended_ms=appended_ms)
    return plan


def _steered(plan: PlanStatus, fact: ev.PlanSteered, appended_ms: int) -> PlanStatus:
    who = f"by {fact.by}" + (f": {fact.reason}" if fact.reason else "")
    if fact.to == PlanState.ABORTED:
        return _replace(plan, state=PlanState.ABORTED, steered=who, ended_ms=appended_ms)
    if fact.to in (PlanState.PAUSED, PlanState.RUNNING) and plan.state in (PlanState.PAUSED, PlanState.RUNNING):
        return _replace(plan, state=PlanState(fact.to), steered=who)
    return plan
