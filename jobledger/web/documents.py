"""The OpenAPI document: request bodies, which are read with msgspec, and the problems that each route can answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from jobledger import __version__
from jobledger.web import models
from jobledger.web.access import Action
from jobledger.web.problems import MEDIA_TYPE

REF = "#/components/schemas/{name}"
#: The request bodies.
BODIES = (
    models.Submission,
    models.Batch,
    models.Reason,
    models.Cancel,
    models.Redrive,
    models.NewLimits,
    models.NewPlan,
)
_WHY = {
    400: "The body is not JSON.",
    401: "The request has no valid login.",
    403: "The user may not do this, or the request is from a page of another site.",
    404: "There is no such thing.",
    409: "The state of the job, or an earlier request, does not allow this.",
    413: "The body or the record is too large.",
    415: "The body is not JSON by its content type.",
    421: "A service without logins was asked under another name than localhost.",
    422: "A parameter or a value does not fit.",
    500: "An error of this service.",
    503: "The status table or Kafka is not available now. Retry-After says when to try again, if that may help.",
}
#: The problems that every route with a user can answer.
COMMON = (401, 403, 421, 422, 500, 503)
DESCRIPTION = (
    "Jobs, plans, queues and tasks of one Jobledger app. Integers beyond ±(2⁵³ - 1), in arguments, results and anywhere "
    "else, are written as text unless `integers=number` is given; requests are read exactly. Errors are problem documents "
    "(RFC 9457). A position in the log is written `topic:partition:offset`."
)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a route that can answer these problems beside `COMMON`."""
    return {
        status: {
            "description": _WHY[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(name="Problem")}}},
        }
        for status in sorted({*statuses, *COMMON})
    }


def body(kind: type[msgspec.Struct], *, required: bool = True) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route with this request body."""
    schema = {"$ref": REF.format(name=kind.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def describe(routes: Sequence[BaseRoute], actions: Mapping[str, Action | None]) -> dict[str, Any]:
    """Return the OpenAPI document of these routes. ``actions``: as `jobledger.web.access.ROUTES`."""
    document = get_openapi(title="Jobledger", version=__version__, description=DESCRIPTION, routes=routes)
    components: dict[str, Any] = document.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _, bodies = msgspec.json.schema_components(BODIES, ref_template=REF)
    schemas.update(bodies)
    schemas["Problem"] = models.Problem.model_json_schema()
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            action = actions.get(f"{method.upper()} {path}")
            if action is None:
                continue
            operation["security"] = [{"token": []}, {}]
            for status, response in problems().items():
                operation["responses"][str(status)] = response
            operation["description"] = (
                f"{operation.get('description', '')}\n\nNeeds the role `{action.role.name.lower()}`."
            )
    return document


def parameters(document: dict[str, Any]) -> dict[str, frozenset[str]]:
    """Return the names of each route's parameters in the query, by method and path."""
    return {
        f"{method.upper()} {path}": frozenset(
            each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
