"""The ASGI app: routes, headers of answers, and what is closed at its end."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.app import App
from jobledger.errors import ConfigError
from jobledger.web import control, events, insight, jobs, plans, problems, system
from jobledger.web.access import ROUTES, Access, Guard, Permit, TrustedProxy, UserOf, admitted
from jobledger.web.dashboard import RULES, Dashboard, add_dashboard
from jobledger.web.documents import describe, parameters
from jobledger.web.problems import Problem
from jobledger.web.services import Services
from jobledger.web.tokens import TokenFile

#: Headers of every answer. The dashboard's pages set their own policy.
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


#: The path of each route as a regular expression.
_PATTERNS = {
    key: re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(key.partition(" ")[2]))) for key in (*ROUTES, *RULES)
}

#: The routers of the API.
ROUTERS = (system.router, jobs.router, insight.router, plans.router, control.router, events.router)


def create_app(
    app: App,
    *,
    prefix: str = "",
    user: UserOf | None = None,
    permit: Permit | None = None,
    tokens: TokenFile | None = None,
    proxy: TrustedProxy | None = None,
    local: bool = False,
    origins: Collection[str] = (),
    dashboard: Dashboard | None = Dashboard(),  # noqa: B008  # frozen
) -> FastAPI:
    """Return the HTTP API and the pages of an app as an ASGI app, to be served alone or mounted in another one.

    ``prefix``: the path at which clients find it, such as ``/jobs``; links begin with it. ``user``: returns the `User`
    of a request, or None. ``permit(user, action, target)``: returns whether a user may do something that the user's
    role allows. ``tokens``: bearer tokens. ``proxy``: a proxy that names the user in a header. ``local``: everybody who
    reaches the service is this machine's user, as an admin; only for a server that listens on a loopback address.
    ``origins``: origins such as ``https://jobs.example.org``, in addition to the address in the header ``Host``, whose
    pages may change something. ``dashboard``: options of the pages; None: no pages. Raises `ConfigError` if there is no
    login.

    The API uses the app's connections; close them with `App.close` after the server has stopped.
    """
    if prefix and (not prefix.startswith("/") or prefix.endswith("/") or "?" in prefix or "#" in prefix):
        raise ConfigError(f"prefix={prefix!r} must begin with a slash and not end with one, for example /jobs")
    guard = Guard(Access(tokens, proxy, user, permit, local, origins), ROUTES, RULES)
    shared = Services(app, guard)
    closers: list[Callable[[], None]] = [shared.records.close]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for close in closers:
            close()

    api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    api.state.services, api.state.guard = shared, guard
    problems.install(api)
    api.add_exception_handler(405, _wrong_method)
    # The routers have their whole paths themselves, because the tables of roles name whole paths.
    for router in ROUTERS:
        api.include_router(router, dependencies=[Depends(admitted), Depends(_known_parameters)])
    if dashboard is not None:
        closers.append(add_dashboard(api, app, guard, prefix, dashboard))
    api.openapi = _document  # type: ignore[method-assign]  # how FastAPI's documentation replaces it
    api.add_middleware(_Edge, prefix=prefix)
    return api


async def _wrong_method(request: Request, error: Exception) -> Response:
    """Answer a request with a method that the path does not have. Starlette names the methods of one route only."""
    path = request.url.path.removeprefix(str(request.scope.get("root_path", "")))
    allowed = sorted(key.partition(" ")[0] for key, pattern in _PATTERNS.items() if pattern.fullmatch(path))
    detail = f"{path} cannot be asked with {request.method}, but with {' and '.join(allowed)}"
    return Problem(405, detail, headers={"Allow": ", ".join(allowed)}).response()


@cache
def _document() -> dict[str, Any]:
    """Return the OpenAPI document, which is the same for every app."""
    bare = FastAPI(openapi_url=None)
    for router in ROUTERS:
        bare.include_router(router)
    return describe(bare.routes, ROUTES)


@cache
def _parameters() -> Mapping[str, frozenset[str]]:
    return parameters(_document())


async def _known_parameters(request: Request) -> None:
    """Refuse a parameter that the route does not have: a mistyped filter would otherwise show all jobs."""
    if not request.scope["query_string"]:
        return
    known = _parameters().get(f"{request.method} {request.scope['route'].path}")
    if known is None:
        return
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise Problem(422, f"{unknown[0][:100]!r} is not a parameter of this route; its parameters: {names}")


class _Edge:
    """Sets the path at which clients find the routes, and adds each of `HEADERS` to every answer that does not have
    it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._prefix and not scope.get("root_path"):  # an app in which this one is mounted has set it
            scope["root_path"] = self._prefix

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)
