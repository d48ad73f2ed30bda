"""The routes that help to find a cause: explanations, groups of errors, workers, dead letters."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from jobledger.views.groups import explanation_json, group_json, letter_json, worker_json
from jobledger.views.letters import Letter, last_letters
from jobledger.web import models
from jobledger.web.access import API, Caller
from jobledger.web.answers import Integers, answer
from jobledger.web.documents import problems
from jobledger.web.paging import LIMIT, LIMIT_MOST, AtLeast, Limit, moment_of, position_of
from jobledger.web.services import services

#: Largest number of workers in one answer.
WORKERS_MOST = 1_000

router = APIRouter(prefix=API, tags=["insight"])

Newest = Annotated[int, Query(ge=1, le=LIMIT_MOST, description=f"Number of entries, at most {LIMIT_MOST}.")]


@router.get("/jobs/{job_id}/explain", response_model=models.Explanation, responses=problems(404))
async def explain(request: Request, user: Caller, job_id: str, at_least: AtLeast = None) -> Response:
    """Return why a job is where it is, the most decisive cause first, and when the job is likely to start."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    explanation = await shared.log(shared.app.explain, job_id)
    return answer(explanation_json(explanation))


@router.get("/errors", response_model=models.ErrorGroups)
async def errors(
    request: Request,
    user: Caller,
    since: Annotated[
        str | None, Query(max_length=100, description="Only jobs submitted at this time or later, in ISO 8601.")
    ] = None,
    limit: Limit = LIMIT,
    at_least: AtLeast = None,
) -> Response:
    """List the errors of failed and retrying jobs, in groups of the same kind; the group whose last job was submitted
    last comes first."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    since_ms = None if since is None else round(moment_of(since, "since").timestamp() * 1000)

    def read(table: Any) -> list[dict[str, Any]]:
        groups = table.errors(since_ms, limit)
        successes = table.last_success(*dict.fromkeys(task for group in groups for task in group.tasks))
        return [group_json(group, successes) for group in groups]

    return answer({"errors": await shared.table(read)})


@router.get("/workers", response_model=models.Workers)
async def workers(request: Request, user: Caller) -> Response:
    """List the workers, by their last reports. A worker is silent if its last report is older than 15 seconds."""
    found = await services(request).table(lambda table: table.workers(WORKERS_MOST))
    now = dt.datetime.now(dt.UTC)
    return answer({"workers": [worker_json(status, now) for status in found]})


@router.get("/dead-letters", response_model=models.DeadLetters)
async def dead_letters(
    request: Request, user: Caller, limit: Newest = LIMIT, integers: Integers = "string"
) -> Response:
    """List the last dead letters, the newest first: jobs that failed, and records that are not valid events."""
    shared = services(request)
    settings = shared.app.settings.acting_as("reader")
    letters: list[Letter] = await shared.log(last_letters, settings, shared.app.names, limit)
    return answer({"letters": [letter_json(each) for each in letters]}, integers)
