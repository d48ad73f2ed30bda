"""The forms: each is one action of the app, with its author and reason in the log. After the action the browser is
redirected to a page that shows the result.

The application has checked the origin of the request (the dependencies of the router).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from jobledger.errors import ConfigError
from jobledger.plan import PlanState
from jobledger.web.pages.filters import parse
from jobledger.web.pages.forms import fields_of
from jobledger.web.pages.joblist import preview, refusal, scoped
from jobledger.web.pages.problem_pages import refused
from jobledger.web.pages.render import HEADERS, Renderer, base_of, job_path
from jobledger.web.pages.services import PageServices
from jobledger.web.pages.sources import Sources

#: The message of a page after an action. The address has only the key, so no link can make a page show another text.
SAID: Mapping[str, str] = {
    "cancel": "The cancel was requested. A waiting job is not started, and a running job is asked to stop.",
    "copy": "This is the copy. It was submitted just now.",
    "pause": "The pause is in force. Running jobs continue.",
    "resume": "The pause has ended.",
    "limit": "The limits are set.",
    "plan": "The plan is in the log, and the stream processor carries it out.",
    "steered": "The request is in the log. It takes effect after the present part of the plan.",
}
#: The actions on a plan.
STEERS: Mapping[str, PlanState] = {
    "pause": PlanState.PAUSED,
    "resume": PlanState.RUNNING,
    "abort": PlanState.ABORTED,
}
_DIGITS_MOST = 10
#: The role for every form, and for the limits of queues and tasks.
ROLE, LIMITS_ROLE = "operate", "admin"

Form = Annotated[Mapping[str, str], Depends(fields_of)]


def add_actions(router: APIRouter, services: PageServices, sources: Sources, renderer: Renderer) -> None:
    """Add the forms' routes. Their functions run in threads, because they wait for the log."""
    _add_jobs(router, services, sources)
    _add_bulk(router, services, sources, renderer)
    _add_steering(router, services, sources)


def _asked(
    request: Request,
    services: PageServices,
    form: Mapping[str, str],
    action: str,
    target: str | None = None,
    role: str = ROLE,
) -> dict[str, Any]:
    """Return author and reason of an action, after the check of the role and of what the app permits."""
    services.require(request, role)
    if services.permit is not None:
        services.permit(request, action, target)
    return {"by": services.user(request).name, "reason": form.get("reason")}


def _led(request: Request, services: PageServices, path: str, said: str) -> Response:
    """Redirect the browser to a page. A reload of that page does not repeat the action."""
    sign = "&" if "?" in path else "?"
    address = f"{base_of(request, services)}{path}{sign}{urlencode({'said': said})}"
    return RedirectResponse(address, 303, headers=dict(HEADERS))


def _field(form: Mapping[str, str], name: str) -> str:
    if name not in form:
        raise refused(f"the form has no value for {name!r}")
    return form[name]


def _number(form: Mapping[str, str], name: str) -> int | None:
    """Return a whole number from 1 up; None if the form has none."""
    text = form.get(name)
    if text is None:
        return None
    # The number of digits comes first: Python refuses to read thousands of them.
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MOST and 0 < int(text) < 1 << 31):
        raise refused(f"{name}={text[:50]!r} is not a whole number from 1 to {(1 << 31) - 1}")
    return int(text)


def _job(request: Request) -> str:
    """Return the job's id from the form's address, in which any character is possible."""
    job_id = request.query_params.get("job")
    if not job_id:
        raise refused("the address of the form has no parameter 'job'")
    return job_id


def _add_jobs(router: APIRouter, services: PageServices, sources: Sources) -> None:
    app = services.app

    @router.post("/job/cancel")
    def cancel(request: Request, form: Form) -> Response:
        job_id, run = _job(request), _number(form, "run")
        asked = _asked(request, services, form, "jobs.cancel", job_id)
        app.cancel(job_id, asked["reason"], run=run, by=asked["by"])
        return _led(request, services, job_path(job_id), "cancel")

    @router.post("/job/redrive")
    def redrive(request: Request, form: Form) -> Response:
        job_id = _job(request)
        asked = _asked(request, services, form, "jobs.redrive", job_id)
        plan = app.redrive(ids=[job_id], queue=form.get("queue"), **asked)
        return _led(request, services, f"/plans/{quote(plan.plan or '', safe='')}", "plan")

    @router.post("/job/copy")
    def copy(request: Request, form: Form) -> Response:
        job_id = _job(request)
        services.require(request, ROLE)  # before the table says whether there is such a job
        asked = _asked(request, services, form, "jobs.submit", sources.table.job(job_id).task)
        changes = _object(form.get("args", "{}"))
        without: list[str] = []
        if form.get("whole"):
            # The form had all arguments, so an argument that is missing now was removed by the user.
            known = _known_arguments(services, sources, job_id)
            without = [name for name in known if name not in changes]
        handle = app.copy(job_id, args=changes, without=without, **asked)
        return _led(request, services, job_path(handle.job_id), "copy")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"the arguments are not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError('the arguments are not a JSON object: write {"name": value}')
    return value


def _known_arguments(services: PageServices, sources: Sources, job_id: str) -> Mapping[str, Any]:
    from jobledger.views.records import submissions
    from jobledger.views.values import jsonable

    job = sources.table.job(job_id)
    raw = submissions(services.app.settings, services.app.names, [job])[job.job_id]
    if isinstance(raw, str):
        raise ConfigError(f"the arguments of the job are {raw}")
    value = jsonable(raw)
    return value if isinstance(value, dict) else {}


def _add_bulk(router: APIRouter, services: PageServices, sources: Sources, renderer: Renderer) -> None:
    app = services.app

    @router.post("/bulk/{action}")
    def bulk(request: Request, action: str, form: Form) -> Response:
        asked = _asked(request, services, form, "plans.make")
        now_ms = round(time.time() * 1000)
        filters = parse(request.query_params.multi_items(), now_ms)
        check_action(action)
        problem = refusal(filters, action)
        if not problem:
            where, _ = scoped(filters, action, now_ms)
            options = {**asked, "rate": form.get("rate")}
            try:
                if action == "redrive":
                    plan = app.redrive(where=where, queue=form.get("queue"), **options)  # type: ignore[arg-type]  # checked by `App`
                else:
                    plan = app.cancel_many(where=where, **options)  # type: ignore[arg-type]  # as above
            except ConfigError as exc:  # the form is shown again, with this error
                problem = str(exc)
            else:
                return _led(request, services, f"/plans/{quote(plan.plan or '', safe='')}", "plan")
        view = replace(
            preview(sources, action, filters, now_ms, problem),
            rate=form.get("rate", ""),
            chosen_queue=form.get("queue", ""),
        )
        return renderer.page(request, "bulk.html", 400, view=view)


def check_action(action: str) -> None:
    """Raise an HTTP error 404 unless the name is that of an action on many jobs."""
    if action not in ("redrive", "cancel"):
        raise refused(f"{action!r} is not an action on many jobs", 404)


def _add_steering(router: APIRouter, services: PageServices, sources: Sources) -> None:
    app = services.app

    @router.post("/control/{verb}")
    def control(request: Request, verb: str, form: Form) -> Response:
        kind, name = _field(form, "kind"), _field(form, "name")
        if kind not in ("queue", "task"):
            raise refused(f"kind={kind!r} is neither queue nor task")
        role = LIMITS_ROLE if verb == "limit" else ROLE
        asked = _asked(request, services, form, f"{kind}s.{verb}", name, role)
        target: dict[str, Any] = {kind: name}
        does: Mapping[str, Callable[[], None]] = {
            "pause": lambda: app.pause(**target, **asked),
            "resume": lambda: app.resume(**target, **asked),
            "limit": lambda: app.limit(**target, **_limits(form), **asked),
        }
        if verb not in does:
            raise refused(f"{verb!r} is not a command", 404)
        does[verb]()
        sources.forget()
        return _led(request, services, "/queues", verb)

    @router.post("/plan/{verb}")
    def plan(request: Request, verb: str, form: Form) -> Response:
        asked = _asked(request, services, form, "plans.steer", _field(form, "plan"))
        if verb not in STEERS:
            raise refused(f"{verb!r} is not an action on a plan", 404)
        status = app.plan(_field(form, "plan"))  # raises an error for an unknown plan
        if not status.state.ended:
            app.client.plans.steer(status.plan, STEERS[verb], asked["reason"], asked["by"])
        return _led(request, services, f"/plans/{quote(status.plan, safe='')}", "steered")


def _limits(form: Mapping[str, str]) -> dict[str, Any]:
    return {"rate": form.get("rate"), "concurrency": _number(form, "concurrency")}
