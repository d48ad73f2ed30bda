"""Errors as pages: the text of the error, and what the user can do."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jobledger.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigError,
    JobledgerError,
    JobNotFound,
    PlanNotFound,
    StatusTimeout,
    StoreError,
    StoreNotFound,
    TopicMissing,
    text_of,
)

#: For each kind of error: status, title, and advice. The first entry that fits is used.
KINDS: tuple[tuple[type[JobledgerError], int, str, str], ...] = (
    (
        StoreNotFound,
        503,
        "There is no status table yet",
        (
            "Start the stream processor of this app: `jobledger streams MODULE:APP`. It creates the table, and fills it from "
            "the log. This page shows the jobs as soon as the table is there."
        ),
    ),
    (
        StoreError,
        503,
        "The status table cannot be read",
        (
            "Check that the database runs, and that JOBLEDGER_STATUS_URL is the same here and for `jobledger streams`. "
            "Nothing is lost: the jobs are in the log."
        ),
    ),
    (JobNotFound, 404, "This job is not known", "A job appears when the stream processor has read its submission."),
    (PlanNotFound, 404, "This plan is not known", "A plan appears when the stream processor has read it."),
    (ConfigError, 400, "This cannot be done", "Nothing was changed. Go back, and change what the sentence names."),
    (
        BrokerUnavailable,
        503,
        "No broker answers",
        (
            "Check that Kafka runs, and that JOBLEDGER_BOOTSTRAP is right. It is not known whether an action that was being "
            "sent has reached the log: look at the job before you send the action again."
        ),
    ),
    (
        AccessDenied,
        503,
        "The cluster refuses this web process",
        "`jobledger topics acls` lists the rights that it needs.",
    ),
    (TopicMissing, 503, "A topic is missing", "`jobledger topics apply MODULE:APP` creates the topics of this app."),
    (StatusTimeout, 503, "This took too long", "Try again, and check that `jobledger streams` runs."),
    (JobledgerError, 409, "This cannot be done now", ""),
)
#: Titles of errors that are no errors of Jobledger, by status.
TITLES: Mapping[int, str] = {
    400: "The request is not valid",
    403: "This is not allowed",
    404: "There is no such page",
    413: "The form is too large",
}

#: Makes the page of an error: request, status, title, text, advice.
Show = Callable[[Request, int, str, str, str], Response]


def route_class(show: Show) -> type[APIRoute]:
    """Return a class of routes whose errors are shown as pages. An error 401 is left to the application."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                try:
                    return await handle(request)
                except JobledgerError as exc:
                    for kind, status, title, advice in KINDS:
                        if isinstance(exc, kind):
                            return show(request, status, title, text_of(exc), advice)
                    raise
                except Exception as exc:
                    # Of Starlette, or a problem of the application.
                    code = getattr(exc, "status_code", None) or getattr(exc, "status", None)
                    if not isinstance(code, int) or code == 401 or not hasattr(exc, "detail"):
                        raise
                    return show(
                        request, code, TITLES.get(code, "This cannot be done now"), str(getattr(exc, "detail", "")), ""
                    )

            return handled

    return PageRoute


def refused(detail: str, status: int = 400) -> HTTPException:
    """Return the error for a request that is not valid."""
    return HTTPException(status, detail)
