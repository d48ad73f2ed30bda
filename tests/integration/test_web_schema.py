"""Requests that schemathesis makes from the OpenAPI document, with a real log: no error of the service, and no status
or document that the OpenAPI does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jobledger import App
from jobledger.kafka.topics import ensure
from jobledger.web import Role, User, create_app
from tests.web import FAILED, STARTED, SUBMITTED, Table, build

pytestmark = [pytest.mark.kafka, pytest.mark.extended]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
#: Number of requests of each route.
EXAMPLES = 40


@pytest.fixture
def app(broker: str, tmp_path: Path) -> Iterator[App]:
    """An app with a few jobs and a plan in its table, and with topics."""
    table = Table(tmp_path)
    with closing(table.store):
        table.write({"job-1": [SUBMITTED, STARTED], "job-2": [SUBMITTED, STARTED, FAILED], "job-3": [SUBMITTED]})
        table.plan()
        made = build(table.url, broker)
        made.settings = replace(made.settings.with_bootstrap(broker), submit_timeout=60.0)
        ensure(made, made.settings)
        yield made
        made.close()


def test_no_request_from_the_document_breaks_the_service(app: App) -> None:
    """Every route is asked with values that fit the document and values that do not. A stream of events does not end,
    and a wait takes its time, so both are left out."""
    api = create_app(app, user=lambda request: User("ann", Role.ADMIN))
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", api)
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # an operation that is not valid raises
        if operation.path.endswith("/events"):
            continue
        asked += 1

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            for name in ("wait", "at_least"):
                (case.query or {}).pop(name, None)
            case.validate_response(case.call(), checks=CHECKS)

        one()
    assert asked >= 24
