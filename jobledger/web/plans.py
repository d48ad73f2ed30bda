"""The routes of plans: make, list, show, pause, resume, abort."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from jobledger.definitions.handles import Plan
from jobledger.errors import PlanNotFound
from jobledger.plan import PlanState, PlanStatus
from jobledger.views.jobs import plan_json
from jobledger.web import models
from jobledger.web.access import API, Caller
from jobledger.web.answers import SMALL_BODY, Integers, answer, body_of, read_as
from jobledger.web.documents import body, problems
from jobledger.web.paging import LIMIT, After, AtLeast, Limit, link, moment_of, next_page, position_of, position_text
from jobledger.web.problems import Problem
from jobledger.web.services import services

#: Largest body of a new plan, in bytes: it may list ids.
PLAN_BODY = 1024 * 1024

router = APIRouter(prefix=API, tags=["plans"])


@router.get("/plans", response_model=models.PlanPage)
async def list_plans(
    request: Request,
    user: Caller,
    after: After = None,
    limit: Limit = LIMIT,
    at_least: AtLeast = None,
    integers: Integers = "string",
) -> Response:
    """List plans, newest first."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    try:
        found: list[PlanStatus] = await shared.table(lambda table: table.plans(limit + 1, after=after))
    except PlanNotFound as exc:
        raise Problem(422, f"{exc}: begin with the first page again") from None
    page = found[:limit]
    following = next_page(request, f"{API}/plans", page[-1].plan) if len(found) > limit else None
    return answer({"plans": [plan_json(each) for each in page], "next": following}, integers)


@router.post(
    "/plans",
    status_code=202,
    response_model=models.MadePlan,
    responses={
        200: {"description": "The result of a dry run.", "model": models.MadePlan},
        **problems(400, 404, 413, 415),
    },
    openapi_extra=body(models.NewPlan),
)
async def make(request: Request, user: Caller, integers: Integers = "string") -> Response:
    """Make a plan: run jobs again, or cancel them. The jobs are those that match now. The list of the jobs is in the log
    before anything is done, and the stream processor carries the plan out.

    Without a filter and without ids the answer is 422, never a plan for all jobs.
    """
    shared = services(request)
    app = shared.app
    wanted = read_as(models.NewPlan, await body_of(request, PLAN_BODY))
    if wanted.where is not None and wanted.ids is not None:
        raise Problem(422, "give where or ids, not both")
    where = None if wanted.where is None else _filter(wanted.where)
    asked: dict[str, Any] = {
        "where": where,
        "ids": wanted.ids,
        "rate": wanted.rate,
        "dry_run": wanted.dry_run,
        "by": user.name,
        "reason": wanted.reason,
    }
    if wanted.action == "redrive":
        plan = await shared.change(lambda: app.redrive(queue=wanted.queue, **asked))
    else:
        if wanted.queue is not None:
            raise Problem(422, f"queue={wanted.queue!r}: cancelled jobs go to no queue")
        plan = await shared.change(lambda: app.cancel_many(**asked))
    return made(request, plan, integers)


@router.get("/plans/{plan_id}", response_model=models.Plan, responses=problems(404))
async def show(
    request: Request, user: Caller, plan_id: str, at_least: AtLeast = None, integers: Integers = "string"
) -> Response:
    """Return a plan."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    return answer(plan_json(await shared.table(lambda table: table.plan(plan_id))), integers)


def _steering(verb: str, to: PlanState, text: str) -> None:
    @router.post(
        f"/plans/{{plan_id}}:{verb}",
        status_code=202,
        response_model=models.Steered,
        responses=problems(400, 404, 409, 413, 415),
        openapi_extra=body(models.Reason, required=False),
        name=f"{verb}_plan",
        description=text,
    )
    async def steer(request: Request, user: Caller, plan_id: str, integers: Integers = "string") -> Response:
        shared = services(request)
        given = await body_of(request, SMALL_BODY)
        wanted = read_as(models.Reason, given) if given else models.Reason()
        status: PlanStatus = await shared.table(lambda table: table.plan(plan_id))
        if status.state.ended:
            raise Problem(409, f"plan {status.plan} has ended: {status.state.value}")
        await shared.change(lambda: shared.app.client.plans.steer(status.plan, to, wanted.reason, user.name))
        shown = {"plan": status.plan, "requested": to.value, "state": status.state.value}
        return answer(shown, integers, status=202)


_steering("pause", PlanState.PAUSED, "Take no further action by a plan until it is resumed.")
_steering("resume", PlanState.RUNNING, "Resume a paused plan.")
_steering("abort", PlanState.ABORTED, "End a plan. What was done is not undone.")


def made(request: Request, plan: Plan, integers: str) -> Response:
    """Return the answer for a plan that was made, or counted by a dry run."""
    shown = {
        "plan": plan.plan,
        "matched": plan.matched,
        "examples": list(plan.examples),
        "position": None if plan.position is None else position_text(plan.position),
    }
    if plan.plan is None:
        return answer(shown, integers)
    return answer(shown, integers, status=202, headers={"Location": link(request, f"{API}/plans/{plan.plan}")})


def _filter(where: models.Where) -> dict[str, Any]:
    """Return the filters that are given, as `JobFilter` names them."""
    given: dict[str, Any] = msgspec.structs.asdict(where)
    for name in ("since", "until"):
        if given[name] is not None:
            given[name] = moment_of(given[name], name)
    return {name: value for name, value in given.items() if value not in (None, [], {})}
