"""The routes about the service itself: whether it runs, whether it is ready, the user, and the OpenAPI document."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jobledger.process.logger import get_logger
from jobledger.web import models
from jobledger.web.access import API, Caller
from jobledger.web.answers import answer
from jobledger.web.documents import problems
from jobledger.web.paging import link
from jobledger.web.problems import Problem
from jobledger.web.services import services

LOG = get_logger("jobledger.web")

router = APIRouter(prefix=API, tags=["system"])


@router.get("/healthz", response_model=models.Health)
async def healthz(request: Request, user: Caller) -> Response:
    """Return that this process answers. Needs no login."""
    return answer({"status": "ok"})


@router.get("/readyz", response_model=models.Ready, responses={503: problems()[503]})
async def readyz(request: Request, user: Caller) -> Response:
    """Return whether jobs can be shown: whether the status table can be read. Needs no login, so it gives no reasons;
    they are in the log of the service.

    Without Kafka the answer is still 200, with `broker` false: all instances are then in the same state, and jobs can be
    shown.
    """
    table, broker = await services(request).ready.get()
    for what, why in (("the status table", table), ("Kafka", broker)):
        if why is not None:
            LOG.warning("not ready: %s: %s", what, why)
    if table is not None:
        more = {"table": False, "broker": broker is None}
        raise Problem(
            503, "the status table cannot be read", title="Not ready", headers={"Retry-After": "5"}, more=more
        )
    return answer({"status": "ok", "table": True, "broker": broker is None})


@router.get("/me", response_model=models.Me)
async def me(request: Request, user: Caller) -> Response:
    """Return the user of this request, and the user's role."""
    return answer({"name": user.name, "role": user.role.name.lower()})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, user: Caller) -> Response:
    """Return this document."""
    base = link(request, "")
    return answer({**request.app.openapi(), **({"servers": [{"url": base}]} if base else {})}, "number")
