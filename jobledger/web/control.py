"""The routes of queues and tasks: list, pause, resume, limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from jobledger.app import App
from jobledger.client.commands import Kind, Standing
from jobledger.definitions.policy import Limits
from jobledger.views.control import queue_json, task_json
from jobledger.web import models
from jobledger.web.access import API, Caller
from jobledger.web.answers import SMALL_BODY, Integers, answer, body_of, read_as
from jobledger.web.documents import body, problems
from jobledger.web.problems import Problem
from jobledger.web.services import Services, services

F = TypeVar("F", bound=Callable[..., Any])

router = APIRouter(prefix=API)


@router.get("/queues", response_model=models.Queues, tags=["queues"])
async def list_queues(request: Request, user: Caller, integers: Integers = "string") -> Response:
    """List the app's queues, their limits, and the commands in force."""
    return answer({"queues": await _rows(services(request), "queue")}, integers)


@router.get("/tasks", response_model=models.Tasks, tags=["tasks"])
async def list_tasks(request: Request, user: Caller, integers: Integers = "string") -> Response:
    """List the app's tasks, their limits, and the commands in force."""
    return answer({"tasks": await _rows(services(request), "task")}, integers)


async def _rows(shared: Services, kind: Kind) -> list[dict[str, Any]]:
    standing: list[Standing] = await shared.standing.get()
    in_force = {each.name: each for each in standing if each.kind == kind}
    names = shared.app.queues if kind == "queue" else shared.app.tasks
    return [_row(shared.app, kind, name, in_force.get(name)) for name in sorted({*names, *in_force})]


def _row(app: App, kind: Kind, name: str, standing: Standing | None) -> dict[str, Any]:
    if kind == "queue":
        queue = app.queues.get(name)
        return queue_json(name, queue, app.partitions, Limits() if queue is None else queue.limits, standing)
    task = app.tasks.get(name)
    if task is None:
        return task_json(name, None, Limits(), standing)
    return task_json(name, task.queue, task.policy.limits, standing)


def _add(kind: Kind) -> None:
    """Add the routes that change queues, or tasks. The routes for both do the same."""

    def post(verb: str, text: str, kind_of_body: type[Any]) -> Callable[[F], F]:
        return router.post(
            f"/{kind}s/{{name}}:{verb}",
            status_code=202,
            response_model=models.Requested,
            responses=problems(400, 404, 413, 415),
            openapi_extra=body(kind_of_body, required=kind_of_body is models.NewLimits),
            name=f"{verb}_{kind}",
            description=text,
            tags=[f"{kind}s"],
        )

    @post("pause", f"Start no more jobs of a {kind}, on any worker, until it is resumed.", models.Reason)
    async def pause(request: Request, user: Caller, name: str, integers: Integers = "string") -> Response:
        shared, wanted = await _asked(request, kind, name)
        await shared.change(lambda: shared.app.commands.pause(kind, name, wanted.reason, user.name))
        return _done(shared, kind, name, "pause", integers)

    @post("resume", f"Resume a paused {kind}.", models.Reason)
    async def resume(request: Request, user: Caller, name: str, integers: Integers = "string") -> Response:
        shared, wanted = await _asked(request, kind, name)
        await shared.change(lambda: shared.app.commands.resume(kind, name, wanted.reason, user.name))
        return _done(shared, kind, name, "resume", integers)

    @post("limit", f"Limit a {kind} for all workers together, instead of the limits in the code.", models.NewLimits)
    async def limit(request: Request, user: Caller, name: str, integers: Integers = "string") -> Response:
        shared = services(request)
        _check(shared.app, kind, name)
        wanted = read_as(models.NewLimits, await body_of(request, SMALL_BODY))
        target: dict[str, Any] = {kind: name}
        await shared.change(
            lambda: shared.app.limit(
                **target, rate=wanted.rate, concurrency=wanted.concurrency, reason=wanted.reason, by=user.name
            )
        )
        return _done(shared, kind, name, "limit", integers)


async def _asked(request: Request, kind: Kind, name: str) -> tuple[Services, models.Reason]:
    shared = services(request)
    _check(shared.app, kind, name)
    text = await body_of(request, SMALL_BODY)
    return shared, read_as(models.Reason, text) if text else models.Reason()


def _check(app: App, kind: Kind, name: str) -> None:
    """Raise `Problem` for a queue or a task that the app does not have."""
    known = app.queues if kind == "queue" else app.tasks
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise Problem(404, f"app {app.names.namespace!r} has no {kind} {name!r}; its {kind}s: {names}")


def _done(shared: Services, kind: Kind, name: str, verb: str, integers: str) -> Response:
    shared.standing.forget()
    return answer({"requested": verb, kind: name}, integers, status=202)


_add("queue")
_add("task")
