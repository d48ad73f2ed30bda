"""The routes of the pages. `make_router` joins them with the services of an application."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobledger.app import App
from jobledger.job import JobStatus
from jobledger.web.pages.actions import SAID, add_actions, check_action
from jobledger.web.pages.assets import by_address
from jobledger.web.pages.filters import parse
from jobledger.web.pages.joblist import job_list, preview
from jobledger.web.pages.jobpage import as_shown, job_page, key_of
from jobledger.web.pages.overview import chart, overview
from jobledger.web.pages.problem_pages import route_class
from jobledger.web.pages.rates import Rates
from jobledger.web.pages.render import HEADERS, Renderer
from jobledger.web.pages.services import PageServices
from jobledger.web.pages.sources import GROUPS_MOST, Outcome, Sources
from jobledger.web.pages.steering import PERIODS, PLANS_MOST, control, errors, letters, plan_page
from jobledger.web.pages.workers import worker_rows

#: The least role for each route, for the application's table of roles; None: the route needs no user. The action and the
#: target of a form are in its fields, so the pages call `PageServices.permit` themselves.
ROUTES: Mapping[str, str | None] = {
    "GET /static/{name}": None,
    **dict.fromkeys(
        (
            *("GET /", "GET /overview/rates", "GET /lag", "GET /jobs", "GET /jobs/{job_id}", "GET /job"),
            *("GET /errors", "GET /queues", "GET /workers", "GET /dead-letters", "GET /plans", "GET /plans/{plan_id}"),
        ),
        "read",
    ),
    **dict.fromkeys(
        (
            *("GET /bulk/{action}", "POST /bulk/{action}", "POST /job/cancel", "POST /job/redrive", "POST /job/copy"),
            *("POST /control/{verb}", "POST /plan/{verb}"),
        ),
        "operate",
    ),
}

#: The pages that show what a route of the API shows, with the action of that route. The others show only numbers.
READS: Mapping[str, str] = {
    **dict.fromkeys(("GET /jobs", "GET /errors", "GET /dead-letters"), "jobs.read"),
    "GET /queues": "queues.read",
    "GET /workers": "workers.read",
    **dict.fromkeys(("GET /plans", "GET /plans/{plan_id}"), "plans.read"),
}
#: The page of one job, whose id may be in a parameter: the page asks `PageServices.permit` for ``jobs.read`` itself.
OF_ONE_JOB = ("GET /jobs/{job_id}", "GET /job")


def make_router(services: PageServices, rates: Rates | None = None) -> APIRouter:
    """Return the pages of an app as a router. Its paths begin with ``/``: include it without a prefix in an application
    that is served below ``services.prefix``.

    The application's dependencies check the user and the origin of a request. The pages themselves check the role:
    each page needs ``read``, each form ``operate``. ``rates``: measures the throughput; close it at the end.
    """
    renderer = Renderer(services)

    def shown(request: Request, status: int, title: str, text: str, advice: str) -> Response:
        back = request.headers.get("referer") if request.method == "POST" else None
        return renderer.page(
            request, "problem.html", status, title=title, text=text, advice=advice, back=_own(request, back)
        )

    router = APIRouter(route_class=route_class(shown), include_in_schema=False, default_response_class=Response)
    sources = Sources(services.app)
    rates = rates or rates_of(services.app)
    _add_static(router)
    _add_overview(router, services, sources, rates, renderer)
    _add_jobs(router, services, sources, renderer)
    _add_lists(router, services, sources, renderer)
    _add_plans(router, services, sources, renderer)
    add_actions(router, services, sources, renderer)
    return router


def rates_of(app: App) -> Rates:
    """Return what measures the throughput of an app, from the counters of its status table."""
    return Rates(lambda: app.status_table().counts_by_state())


def _own(request: Request, address: str | None) -> str | None:
    """Return the path of an address of this site; None for another site's address. A path never begins with two
    slashes: a browser would take it for the address of another site."""
    if address is None:
        return None
    start = f"{request.url.scheme}://{request.headers.get('host', '')}/"
    return "/" + address[len(start) :].lstrip("/\\") if address.startswith(start) else None


def _permit(services: PageServices, request: Request, action: str, target: str | None) -> None:
    """Raise an HTTP error 403 if the app does not permit this."""
    if services.permit is not None:
        services.permit(request, action, target)


def _said(request: Request) -> str:
    return SAID.get(request.query_params.get("said", ""), "")


def _now_ms() -> int:
    return round(time.time() * 1000)


def _add_static(router: APIRouter) -> None:
    @router.get("/static/{name}")
    def static(name: str) -> Response:
        asset = by_address().get(name)
        if asset is None:
            return Response("There is no such file; the address of a file changes with its content.", 404)
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(asset.content, media_type=asset.type, headers=headers)


def _add_overview(
    router: APIRouter, services: PageServices, sources: Sources, rates: Rates, renderer: Renderer
) -> None:
    @router.get("/")
    def home(request: Request) -> Response:
        services.require(request, "read")
        view = overview(sources, rates)
        rates.look()
        return renderer.page(request, "overview.html", view=view)

    @router.get("/overview/rates")
    def series(request: Request) -> Response:
        services.require(request, "read")
        rates.look()
        return JSONResponse(chart(rates), headers=dict(HEADERS))

    @router.get("/lag")
    def lag(request: Request) -> Response:
        from jobledger.web.pages.lags import lags

        services.require(request, "read")
        offsets = sources.table.offsets()
        outcome: Outcome = sources.from_log(lambda: lags(services.app, offsets))
        return renderer.page(request, "lag.html", outcome=outcome)


def _add_jobs(router: APIRouter, services: PageServices, sources: Sources, renderer: Renderer) -> None:
    def shown(job: JobStatus, args: Any) -> Any:
        return as_shown(services, job.task, args)[0]

    @router.get("/jobs")
    def jobs(request: Request) -> Response:
        services.require(request, "read")
        now_ms = _now_ms()
        filters = parse(request.query_params.multi_items(), now_ms)
        if filters.arguments and not services.show_arguments:
            hidden = "Arguments are hidden on these pages, so jobs cannot be chosen by them."
            filters = replace(filters, arguments={}, problems={**filters.problems, "arg": hidden})
        view = job_list(sources, filters, request.query_params.get("after"), now_ms, shown)
        return renderer.page(request, "jobs.html", view=view)

    @router.get("/bulk/{action}")
    def bulk(request: Request, action: str) -> Response:
        services.require(request, "operate")
        check_action(action)
        _permit(services, request, "plans.make", None)
        now_ms = _now_ms()
        filters = parse(request.query_params.multi_items(), now_ms)
        return renderer.page(request, "bulk.html", view=preview(sources, action, filters, now_ms))

    @router.get("/jobs/{job_id}")
    def job(request: Request, job_id: str) -> Response:
        return _job(request, job_id)

    @router.get("/job")
    def job_by_parameter(request: Request) -> Response:
        return _job(request, request.query_params.get("id", ""))

    def _job(request: Request, job_id: str) -> Response:
        services.require(request, "read")
        _permit(services, request, "jobs.read", job_id)
        status = sources.table.job(job_id)
        seen, answer = renderer.unchanged(request, key_of(status, _now_ms()))
        if answer is not None:
            return answer
        asked = request.query_params.get("show") == "1"
        view = job_page(sources, services, status, shown=asked, now_ms=_now_ms(), said=_said(request))
        return renderer.page(request, "job.html", view=view, seen=seen)


def _add_lists(router: APIRouter, services: PageServices, sources: Sources, renderer: Renderer) -> None:
    @router.get("/errors")
    def error_groups(request: Request) -> Response:
        from jobledger.definitions.durations import age_of

        services.require(request, "read")
        period, problem = request.query_params.get("since", "24h"), ""
        age = age_of(period)
        if age is None and period != "all":
            problem = f"since={period!r} is no period such as 1h or 24h. These are the errors of 24 hours."
            period, age = "24h", 86_400.0
        known = {value for value, _ in PERIODS}
        since_ms = None if age is None else max(0, round(_now_ms() - age * 1000))
        view = errors(sources, period if period in known else "", since_ms, GROUPS_MOST, problem)
        return renderer.page(request, "errors.html", view=view)

    @router.get("/queues")
    def queues(request: Request) -> Response:
        services.require(request, "read")
        return renderer.page(request, "queues.html", view=control(sources, _said(request)))

    @router.get("/workers")
    def workers(request: Request) -> Response:
        services.require(request, "read")
        view: dict[str, Any] = {"workers": worker_rows(sources.workers())}
        return renderer.page(request, "workers.html", view=view)

    @router.get("/dead-letters")
    def dead_letters(request: Request) -> Response:
        services.require(request, "read")
        return renderer.page(request, "letters.html", view=letters(sources))


def _add_plans(router: APIRouter, services: PageServices, sources: Sources, renderer: Renderer) -> None:
    @router.get("/plans")
    def plans(request: Request) -> Response:
        services.require(request, "read")
        view: dict[str, Any] = {"plans": sources.table.plans(PLANS_MOST)}
        return renderer.page(request, "plans.html", view=view)

    @router.get("/plans/{plan_id}")
    def plan(request: Request, plan_id: str) -> Response:
        services.require(request, "read")
        said = _said(request)
        view = plan_page(sources, plan_id, new=bool(said), said=said)
        return renderer.page(request, "plan.html", view=view)
