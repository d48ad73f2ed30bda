"""The routes of jobs: submit, show, list, count, cancel, redrive."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from jobledger.app import App, JobFilter, filters_of
from jobledger.definitions.task import JobRequest
from jobledger.errors import BadArguments, ConfigError, JobNotFound, StatusTimeout, StoreNotFound, text_of
from jobledger.job import JobStatus, State
from jobledger.plan import SCOPES
from jobledger.schemas.events import Position
from jobledger.schemas.ids import derived_id
from jobledger.views import bounds
from jobledger.views.arguments import WINDOW, choose
from jobledger.views.jobs import args_json, event_json, status_json
from jobledger.views.values import iso
from jobledger.web import models
from jobledger.web.access import API, Caller
from jobledger.web.answers import SMALL_BODY, Integers, answer, body_of, encoded, read_as
from jobledger.web.documents import body, problems
from jobledger.web.paging import (
    LIMIT,
    After,
    AtLeast,
    Limit,
    filters,
    link,
    next_page,
    position_of,
    position_text,
    wanted_arguments,
)
from jobledger.web.plans import made
from jobledger.web.problems import Problem
from jobledger.web.services import Services, services

#: Longest time that a request waits for the end of a job, in seconds.
WAIT_MOST = 60.0
#: Largest number of bytes of a request in addition to the arguments, and of a batch.
OVERHEAD, BATCH_BYTES = 64 * 1024, 16 * 1024 * 1024
#: Number of rows that are read at once, and bytes of results after which a page ends.
ROWS_AT_ONCE, PAGE_BYTES = 100, 8 * 1024 * 1024
#: Largest number of arguments in one filter.
ARGUMENTS_MOST = 5
#: Longest idempotency key, in characters.
KEY_MOST = 200

#: The options of a submission, as `Task.using` takes them.
_OPTIONS = ("delay", "tags", "queue", "key", "priority", "expires_in", "job_id")
_UNASKED = "not asked for: add args=true"

router = APIRouter(prefix=API, tags=["jobs"])
WithArgs = Annotated[bool, Query(description="Also read the arguments, from the log.")]


@router.post(
    "/jobs",
    status_code=202,
    response_model=models.Submitted,
    responses=problems(400, 409, 413, 415),
    openapi_extra=body(models.Submission),
)
async def submit(
    request: Request,
    user: Caller,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="A second request with the same key and task is the same job. Workers recognise a copy for about "
            "ten minutes, and the status table afterwards, as long as it has the job."
        ),
    ] = None,
    integers: Integers = "string",
) -> Response:
    """Submit a job. The answer comes when the log has acknowledged it."""
    shared = services(request)
    app = shared.app
    wanted = read_as(models.Submission, await body_of(request, app.settings.max_record_bytes + OVERHEAD))
    await shared.guard.permit(user, "jobs.submit", wanted.task)
    if idempotency_key is not None:
        _choose_id(app, wanted, idempotency_key)
    job = _request(app, wanted)
    if idempotency_key is not None:
        known = await _submitted_before(shared, job)
        if known is not None:
            return _accepted(request, job, known, integers)
    handle = await app.client.submit_async(job)
    return _accepted(request, job, handle.position, integers, handle.job_id)


@router.post(
    "/jobs:batch",
    status_code=202,
    response_model=models.SubmittedBatch,
    responses=problems(400, 413, 415),
    openapi_extra=body(models.Batch),
)
async def submit_batch(request: Request, user: Caller, integers: Integers = "string") -> Response:
    """Submit several jobs. All of them are checked before the first one is sent. If the log does not acknowledge some of
    them, the problem has their indexes, from 0, in `failed`."""
    shared = services(request)
    app = shared.app
    wanted = read_as(models.Batch, await body_of(request, BATCH_BYTES))
    for task in {each.task for each in wanted.jobs}:
        await shared.guard.permit(user, "jobs.submit", task)
    jobs = _all_of(app, wanted)
    handles = await shared.change(lambda: app.submit_many(jobs))
    accepted = [_submitted(job, handle.position, handle.job_id) for job, handle in zip(jobs, handles, strict=True)]
    return answer({"jobs": accepted}, integers, status=202)


@router.get("/jobs", response_model=models.JobPage)
async def list_jobs(
    request: Request,
    user: Caller,
    chosen: Annotated[JobFilter, Depends(filters)],
    after: After = None,
    limit: Limit = LIMIT,
    at_least: AtLeast = None,
    args: WithArgs = False,
    arg: Annotated[
        list[str],
        Query(
            max_length=ARGUMENTS_MOST,
            description="All of these arguments, each PATH=VALUE such as user.id=1. They are read from the log, for the "
            f"newest {WINDOW} jobs that match the other filters.",
        ),
    ] = [],  # noqa: B006  # FastAPI copies it
    integers: Integers = "string",
) -> Response:
    """List jobs, newest first.

    Only a limited number of jobs is compared with the filters. So a page can have fewer jobs than `limit`, also none,
    although there is a `next` page: `searched_to` is then the time of submission up to which jobs were compared.
    """
    shared = services(request)
    await shared.reached(position_of(at_least))
    conditions = filters_of(**chosen)
    try:
        if arg:
            found, last, searched_ms = await _with_arguments(shared, conditions, wanted_arguments(arg), after, limit)
        else:
            found, last, searched_ms = await shared.table(lambda table: _page(table, conditions, after, limit))
    except JobNotFound as exc:
        raise Problem(422, f"{exc}: begin with the first page again") from None
    following = None if last is None else next_page(request, f"{API}/jobs", last)
    searched_to = None if searched_ms is None else iso(searched_ms * 1000)
    shown = {"jobs": await _shown(shared, found, args), "next": following, "searched_to": searched_to}
    return answer(shown, integers)


@router.get("/jobs:count", response_model=models.Count)
async def count(
    request: Request,
    user: Caller,
    chosen: Annotated[JobFilter, Depends(filters)],
    at_least: AtLeast = None,
    integers: Integers = "string",
) -> Response:
    """Count jobs. With only the filters `state`, `task` and `queue` the number is exact; with others, jobs are counted up to
    10,000."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    if chosen.keys() <= {"state", "task", "queue"}:
        counts = await shared.table(lambda table: table.counts())
        states = dict.fromkeys((state.value for state in State), 0)
        for each in counts:
            if all(getattr(each, name) in wanted for name, wanted in chosen.items()):  # type: ignore[operator]  # lists
                states[each.state.value] += each.jobs
        return answer({"count": sum(states.values()), "exact": True, "states": states}, integers)
    conditions = filters_of(**chosen)
    counted = await shared.table(
        lambda table: table.count(bounds.COUNT_MOST, most=bounds.COUNT_ROWS_MOST, **conditions)
    )
    return answer({"count": counted.jobs, "exact": counted.exact, "states": None}, integers)


@router.get("/jobs/{job_id}/timeline", response_model=models.Timeline, responses=problems(404))
async def timeline(
    request: Request, user: Caller, job_id: str, at_least: AtLeast = None, integers: Integers = "string"
) -> Response:
    """Return a job's events from the log. The status table remembers the positions of the first 64 and the last 192."""
    shared = services(request)
    await shared.reached(position_of(at_least))
    status: JobStatus = await shared.table(lambda table: table.job(job_id))
    records, unreadable = await shared.log(shared.records.facts, status)
    events: list[dict[str, Any]] = [{"position": str(position), "error": why} for position, why in unreadable]
    return answer({"job_id": status.job_id, "events": events + [event_json(each) for each in records]}, integers)


@router.post(
    "/jobs/{job_id}:cancel",
    status_code=202,
    response_model=models.Requested,
    responses=problems(400, 404, 409, 413, 415),
    openapi_extra=body(models.Cancel, required=False),
)
async def cancel(request: Request, user: Caller, job_id: str, integers: Integers = "string") -> Response:
    """Request a job's cancel. A waiting job is not started, and a running job is asked to stop.

    A job that the status table does not know is accepted if its id is a UUID, because it may just have been submitted.
    """
    shared = services(request)
    text = await body_of(request, SMALL_BODY)
    wanted = read_as(models.Cancel, text) if text else models.Cancel()
    try:
        status: JobStatus | None = await shared.table(lambda table: table.job(job_id))
    except (JobNotFound, StoreNotFound):
        if not _is_uuid(job_id):
            raise
        status = None
    if status is not None and status.state.ended and wanted.run in (None, status.run):
        raise Problem(409, f"job {status.job_id} has ended: {status.state.value}")
    run = wanted.run or (1 if status is None else status.run)
    target = job_id if status is None else status.job_id
    await shared.app.cancel_async(target, wanted.reason, run=run, by=user.name)
    return answer({"requested": "cancel", "job_id": target, "run": run}, integers, status=202)


@router.post(
    "/jobs/{job_id}:redrive",
    status_code=202,
    response_model=models.MadePlan,
    responses=problems(400, 404, 409, 413, 415),
    openapi_extra=body(models.Redrive, required=False),
)
async def redrive(request: Request, user: Caller, job_id: str, integers: Integers = "string") -> Response:
    """Run a job again that failed, was cancelled or expired: as the next run of the same id. The answer is the plan that
    does so."""
    shared = services(request)
    app = shared.app
    text = await body_of(request, SMALL_BODY)
    wanted = read_as(models.Redrive, text) if text else models.Redrive()
    status: JobStatus = await shared.table(lambda table: table.job(job_id))
    if status.state not in SCOPES["redrive"].states:
        raise Problem(
            409,
            f"job {status.job_id} is {status.state.value}: only jobs that failed, were cancelled or expired run again",
        )
    plan = await shared.change(
        lambda: app.redrive(ids=[status.job_id], queue=wanted.queue, by=user.name, reason=wanted.reason)
    )
    return made(request, plan, integers)


@router.get("/jobs/{job_id}", response_model=models.Job, responses=problems(404))
async def show(
    request: Request,
    user: Caller,
    job_id: str,
    wait: Annotated[
        float | None,
        Query(ge=0, le=WAIT_MOST, description="Wait up to this many seconds until the job has ended."),
    ] = None,
    at_least: AtLeast = None,
    args: Annotated[bool, Query(description="Also read the arguments, from the log.")] = True,
    integers: Integers = "string",
) -> Response:
    """Return a job. With `wait` the answer comes when the job has ended, or with its state when the time is over."""
    shared = services(request)
    position = position_of(at_least)
    status: JobStatus | None = None
    if wait is not None:
        try:
            status = await shared.app.client.wait_async(job_id, at_least=position, timeout=wait)
        except (StatusTimeout, StoreNotFound):
            status = None
    if status is None:
        await shared.reached(position)
        status = await shared.table(lambda table: table.job(job_id))
    assert status is not None
    (shown,) = await _shown(shared, [status], args)
    return answer(shown, integers)


def _page(
    table: Any, conditions: dict[str, Any], after: str | None, limit: int
) -> tuple[list[JobStatus], str | None, int | None]:
    """Return a page of jobs, the id after which the next page begins, and the time of submission up to which jobs were
    compared with the filters if these are not all.

    Results may be large: the page has fewer jobs than ``limit`` if their results together have more than `PAGE_BYTES`.
    """
    jobs: list[JobStatus] = []
    size = 0
    while True:
        wanted = min(ROWS_AT_ONCE, limit - len(jobs))
        # One more than wanted shows whether there are more.
        found = table.search(**conditions, after=after, limit=wanted + 1, most=bounds.ROWS_MOST)
        for number, each in enumerate(found.jobs[:wanted], 1):
            jobs.append(each)
            size += 0 if each.result is None else len(encoded(each.result, "number"))
            if size > PAGE_BYTES:
                return jobs, each.job_id if number < len(found.jobs) or found.after is not None else None, None
        if len(found.jobs) <= wanted:
            return jobs, found.after, found.searched_ms
        if len(jobs) == limit:
            return jobs, jobs[-1].job_id, None
        after = jobs[-1].job_id


async def _with_arguments(
    shared: Services, conditions: dict[str, Any], wanted: dict[str, str], after: str | None, limit: int
) -> tuple[list[JobStatus], str | None, int | None]:
    """Return what `_page` returns, of the jobs with these arguments."""
    part = await shared.table(
        lambda table: table.search(**conditions, after=after, limit=WINDOW, most=bounds.ROWS_MOST)
    )
    known = await shared.log(shared.records.arguments, part.jobs)
    chosen = choose(part.jobs, known, wanted, limit)
    if chosen.compared < len(part.jobs):
        return chosen.jobs, chosen.jobs[-1].job_id, None
    return chosen.jobs, part.after, part.searched_ms


async def _shown(shared: Services, jobs: Sequence[JobStatus], args: bool) -> list[dict[str, Any]]:
    known: dict[str, bytes | str] = {}
    if args and jobs:
        known = await shared.log(shared.records.arguments, jobs)
    return [
        {"args": None, "args_error": None, **status_json(each), **args_json(known.get(each.job_id, _UNASKED))}
        for each in jobs
    ]


def _choose_id(app: App, wanted: models.Submission, key: str) -> None:
    """Set the id that follows from namespace, task and idempotency key."""
    key = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key  # both forms are in use
    if not 0 < len(key) <= KEY_MOST:
        raise Problem(422, f"Idempotency-Key has {len(key)} characters: give 1 to {KEY_MOST}")
    if wanted.job_id is not None:
        raise Problem(422, "give Idempotency-Key or job_id, not both: each of them names the job")
    wanted.job_id = derived_id(derived_id(app.names.namespace, "task", wanted.task), "idempotency-key", key)


def _request(app: App, wanted: models.Submission) -> JobRequest[Any]:
    """Return the job to submit. Raises `ConfigError`."""
    task = app.registry.task(wanted.task)
    if "self" in wanted.args and "self" not in task.arguments.names:  # the methods below have a parameter `self`
        raise BadArguments(f"arguments do not fit {task.name}{task.signature}: there is no parameter 'self'")
    options = {name: value for name in _OPTIONS if (value := getattr(wanted, name)) is not None}
    return task.using(**options).job(**wanted.args) if options else task.job(**wanted.args)


def _all_of(app: App, batch: models.Batch) -> list[JobRequest[Any]]:
    """Return the jobs of a batch. Raises `ConfigError` that names the first job that cannot be submitted."""
    jobs = []
    for number, each in enumerate(batch.jobs):
        try:
            jobs.append(_request(app, each))
        except ConfigError as exc:
            raise type(exc)(f"jobs[{number}]: {text_of(exc)}") from exc
    return jobs


async def _submitted_before(shared: Services, job: JobRequest[Any]) -> Position | None:
    """Return the position of the job with this id, if the status table has it; None if the job must be submitted.
    Raises `Problem` 409 if the job is another one, as far as its arguments are known."""
    job_id = job.job_id or ""
    try:
        known = await shared.table(lambda table: table.statuses([job_id]))
    except StoreNotFound:  # no stream processor has run yet, so no job has been folded
        return None
    status: JobStatus | None = known.get(job_id)
    if status is None or not status.positions:
        return None
    args = (await shared.log(shared.records.arguments, [status]))[job_id]
    if status.task != job.task.name or (isinstance(args, bytes) and not _same(args, job.args)):
        raise Problem(
            409,
            f"this Idempotency-Key was used for job {job_id}, which has other arguments: use another key for another job",
            kind="idempotency-key-reused",
        )
    return status.positions[0]


def _same(one: bytes, other: bytes) -> bool:
    """Return whether two JSON objects are equal. If they cannot be compared, they count as equal."""
    try:
        return one == other or bool(msgspec.json.decode(one) == msgspec.json.decode(other))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True


def _submitted(job: JobRequest[Any], position: Position, job_id: str) -> dict[str, Any]:
    return {"job_id": job_id, "position": position_text(position), "task": job.task.name, "queue": job.queue}


def _accepted(
    request: Request, job: JobRequest[Any], position: Position, integers: str, job_id: str | None = None
) -> Response:
    known = job_id or job.job_id or ""
    headers = {"Location": link(request, f"{API}/jobs/{quote(known, safe='')}")}
    return answer(_submitted(job, position, known), integers, status=202, headers=headers)


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True
