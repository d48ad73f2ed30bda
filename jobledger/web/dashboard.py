"""Joins the pages with the API: the same users, the same roles, the same check of a request's origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.from_thread
from fastapi import Depends, FastAPI, Request

from jobledger.app import App
from jobledger.web.access import API, Action, Guard, Role, User, role_of
from jobledger.web.pages.router import OF_ONE_JOB, READS, ROUTES, make_router, rates_of
from jobledger.web.pages.services import PageServices
from jobledger.web.problems import Problem


@dataclass(frozen=True)
class Dashboard:
    """Options of the pages.

    ``redact(task, value)``: returns arguments (a dict by name) or a result as they may be shown; both are JSON builtins.
    None: everything may be shown. ``show_arguments``: False: arguments and results are shown only when a person asks
    for them.
    """

    redact: Callable[[str, Any], Any] | None = None
    show_arguments: bool = True


def _rule(route: str, role: str | None) -> Action | None:
    if role is None:
        return None
    if role == "read":
        return Action(READS.get(route, "read"), Role.READ, in_body=route in OF_ONE_JOB)
    return Action("steer", role_of(role), in_body=True)


#: The rule for each route of the pages. The pages ask the app's `Permit` themselves about one job and about a form.
RULES: Mapping[str, Action | None] = {route: _rule(route, role) for route, role in ROUTES.items()}


def add_dashboard(api: FastAPI, app: App, guard: Guard, prefix: str, options: Dashboard) -> Callable[[], None]:
    """Add the pages to the API. The guard's tables must have `RULES`. Return a function that stops the thread of
    the pages."""

    async def admitted(request: Request) -> None:
        try:
            request.state.user = await guard.admit(request)
        except Problem as problem:
            if problem.status == 401 and guard.asks_for_tokens:
                problem.headers["WWW-Authenticate"] = (
                    'Basic realm="jobledger: a token as the password", charset="UTF-8"'
                )
            raise

    def user_of(request: Request) -> User:
        user: User | None = getattr(request.state, "user", None)
        return user or User("nobody", Role.READ)

    def require(request: Request, role: str) -> None:
        user = user_of(request)
        if user.role < role_of(role):
            raise Problem(403, f"{user.name} has the role {user.role.name.lower()}, and this needs the role {role}")

    def permit(request: Request, action: str, target: str | None) -> None:
        anyio.from_thread.run(guard.permit, user_of(request), action, target)

    services = PageServices(
        app, prefix, user_of, require, permit, options.redact, options.show_arguments, f"{API}/events"
    )
    rates = rates_of(app)
    api.include_router(make_router(services, rates), dependencies=[Depends(admitted)])
    return rates.close
