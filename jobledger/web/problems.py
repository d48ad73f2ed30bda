"""Errors as problem documents (RFC 9457). `TABLE` has the status of every error of Jobledger."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jobledger import errors
from jobledger.errors import JobledgerError, text_of
from jobledger.process.logger import get_logger
from jobledger.views.words import one_line

LOG = get_logger("jobledger.web")

MEDIA_TYPE = "application/problem+json"
#: Number of validation errors that a problem names.
_SHOWN = 5


class Status(NamedTuple):
    """The status and the title of a problem. ``retry_after``: seconds after which a client may try again; None: a retry
    does not help."""

    status: int
    title: str
    retry_after: int | None = None


#: The problem of each error. An error without an entry has that of its nearest base class.
TABLE: Mapping[type[JobledgerError], Status] = {
    JobledgerError: Status(500, "Internal error"),
    errors.ConfigError: Status(422, "Not acceptable"),
    errors.UnknownTask: Status(422, "Unknown task"),
    errors.UnknownQueue: Status(422, "Unknown queue"),
    errors.BadArguments: Status(422, "Arguments do not fit"),
    errors.RegistryNeeded: Status(503, "Schema Registry not configured", 60),
    errors.SchemaRefused: Status(503, "Schema Registry refused the schema", 60),
    errors.BrokerUnavailable: Status(503, "Kafka not available", 5),
    errors.AccessDenied: Status(503, "Kafka refuses this service", 60),
    errors.ConnectionUnusable: Status(503, "Connection closed", 1),
    errors.PayloadTooLarge: Status(413, "Too large"),
    errors.TopicMissing: Status(503, "Topic missing", 30),
    errors.PortTaken: Status(500, "Internal error"),
    errors.KafkaStartFailed: Status(500, "Internal error"),
    errors.ResourceFailed: Status(500, "Internal error"),
    errors.StoreError: Status(503, "Status table not usable", 30),
    errors.StoreNotFound: Status(503, "No status table", 10),
    errors.StoreUnavailable: Status(503, "Status table not available", 5),
    errors.StatusTimeout: Status(503, "Status table behind", 1),
    errors.JobNotFound: Status(404, "Job not found"),
    errors.PlanNotFound: Status(404, "Plan not found"),
    errors.JobFailed: Status(500, "Internal error"),
    errors.JobCancelled: Status(500, "Internal error"),
    errors.JobExpired: Status(500, "Internal error"),
    errors.ResultMismatch: Status(500, "Internal error"),
    errors.ResultInsideJob: Status(500, "Internal error"),
    errors.JobEnded: Status(500, "Internal error"),
    errors.SchemaError: Status(500, "Unreadable record"),
}

_TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    421: "Misdirected request",
    422: "Not acceptable",
    503: "Not available",
}


class Problem(Exception):
    """An answer that is a problem. ``detail``: a sentence for people. ``kind``: the end of the problem's type; None:
    derived from the title. ``more``: further members of the document."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.title = status, detail, title or _TITLES.get(status, "Error")
        self.kind, self.headers, self.more = kind or _dashed(self.title), dict(headers or {}), dict(more or {})

    def response(self) -> Response:
        """Return the problem as a response."""
        document = {
            "type": f"urn:jobledger:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }
        body = msgspec.json.encode(_encodable(document))
        return Response(body, self.status, {"Cache-Control": "no-store", **self.headers}, MEDIA_TYPE)


def problem_of(error: JobledgerError) -> Problem:
    """Return the problem for an error of Jobledger."""
    known = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    headers = {} if known.retry_after is None else {"Retry-After": str(known.retry_after)}
    kind = _dashed(re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__))
    more = {"failed": list(error.failed)} if error.failed else {}
    return Problem(known.status, text_of(error), title=known.title, kind=kind, headers=headers, more=more)


def install(api: FastAPI) -> None:
    """Let an app answer every error with a problem."""
    # Starlette's types know only handlers of the base class.
    api.add_exception_handler(Problem, _of_problem)
    api.add_exception_handler(JobledgerError, _of_jobledger)
    api.add_exception_handler(RequestValidationError, _of_validation)
    api.add_exception_handler(HTTPException, _of_http)
    api.add_exception_handler(Exception, _of_bug)


async def _of_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _of_jobledger(request: Request, error: Exception) -> Response:
    assert isinstance(error, JobledgerError)
    problem = problem_of(error)
    if problem.status >= 500:
        # The path is decoded, so it may have any character, as may the error. (`request.url` leaves some of them out.)
        path, text = one_line(request.scope["path"]), one_line(text_of(error))
        LOG.warning("%s %s: %s: %s", one_line(request.method), path, type(error).__name__, text)
    return problem.response()


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return Problem(422, "; ".join(_sentences(error.errors()))).response()


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path}"
    return Problem(error.status_code, detail, headers=error.headers).response()


async def _of_bug(request: Request, error: Exception) -> Response:
    # The server logs the error with its traceback: Starlette raises it again after this answer.
    detail = "an unexpected error; the log of this service has the details"
    return Problem(500, detail, title="Internal error").response()


def _sentences(found: Sequence[Any]) -> list[str]:
    """Return validation errors as text: where, what, and the value."""
    texts = []
    for each in found[:_SHOWN]:
        where = ".".join(str(part) for part in each["loc"][1:]) or "the request"
        value = "" if each["type"] == "missing" else f" (given: {str(each['input'])[:100]!r})"
        texts.append(f"{where}: {each['msg']}{value}")
    return texts + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def _dashed(text: str) -> str:
    return re.sub(r"[^a-z]+", "-", text.lower()).strip("-")


def _encodable(value: Any) -> Any:
    """Return the document with ``?`` for halves of surrogate pairs, which UTF-8 cannot encode."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list | tuple) else value
