"""A Schema Registry that was replaced, or restored with other ids: for Jobledger's own records, the ids in the log
count."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from jobledger import App, ConfigError
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.topics import ensure
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.schemas.events import JobSucceeded
from tests.integration.worker_app import build, closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka

OTHER = json.dumps({"type": "record", "name": "Invoice", "namespace": "elsewhere", "fields": []})


class SmallRegistry:
    """A registry in memory. ``held``: the schemas that it has after a restore; new schemas get ids from ``first`` on."""

    def __init__(self, held: dict[int, str] | None = None, first: int = 1) -> None:
        known: dict[int, str] = dict(held or {})
        subjects: dict[str, set[int]] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = known.get(int(self.path.rpartition("/")[2]))
                self.answer(*((200, {"schema": text}) if text else (404, {"error_code": 40403})))

            def do_PUT(self) -> None:
                self.body()
                self.answer(200, {})

            def do_POST(self) -> None:
                subject, text = unquote(self.path.split("/")[2]), self.body()["schema"]
                number = next((n for n, its in known.items() if its == text), None)
                if self.path.endswith("/versions"):
                    if number is None:
                        number = max([first - 1, *(n for n in known if n >= first)]) + 1
                        known[number] = text
                    subjects.setdefault(subject, set()).add(number)
                elif subject not in subjects or number not in subjects[subject]:
                    self.answer(404, {"error_code": 40403 if subject in subjects else 40401})
                    return
                self.answer(200, {"id": number})

            def body(self) -> Any:
                return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def answer(self, status: int, body: Any) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Paid:
    """A domain event."""

    cents: int


@dataclass
class Lab:
    """A namespace whose records were written with one registry. The schema of job events has the id 1 there, and that
    of `Paid` the id 2."""

    app: App
    registries: list[SmallRegistry]

    def with_other_registry(self, registry: SmallRegistry) -> App:
        """Return the app with another registry."""
        self.registries.append(registry)
        settings = self.app.settings
        again = build(self.app.names.namespace, settings.resolve_bootstrap(), schema_registry=registry.url)
        again.event(Paid)
        return again


@pytest.fixture
def lab(broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    first = SmallRegistry()
    app = build(namespace, broker, schema_registry=first.url)
    app.event(Paid)
    ensure(app, app.settings)
    app.tasks["add"].submit(0)
    app.emit(Paid(1))
    found = Lab(app, [first])
    yield found
    app.close()
    for each in found.registries:
        each.close()


def test_jobs_are_read_with_the_schema_that_the_log_has_for_their_id(lab: Lab) -> None:
    """The registry has another schema with the id of acknowledged jobs. These jobs run, and none becomes a dead letter."""
    jobs = [lab.app.tasks["add"].submit(n).job_id for n in range(1, 4)]
    restored = lab.with_other_registry(SmallRegistry({1: OTHER, 2: OTHER}, first=100))
    with working(restored):
        until(lambda: set(jobs) <= set(closings(restored)))
        later = restored.tasks["add"].submit(7).job_id
        until(lambda: later in closings(restored))
    for job in [*jobs, later]:
        assert isinstance(facts_of(restored, job)[-1], JobSucceeded)
    assert log_of(restored, restored.names.dead_letter) == []
    restored.close()


def test_a_registry_that_contradicts_the_log_stops_writers(lab: Lab) -> None:
    """The registry gives the schema of job events an id that belongs to another schema in the log. Nothing is sent, and
    the error names both schemas."""
    restored = lab.with_other_registry(SmallRegistry(first=2))
    before = len(log_of(lab.app, lab.app.names.jobs("default")))
    said = r"schema id 2 is JobEvent.*127\.0\.0\.1.*and Paid.*\.schemas.*JOBLEDGER_SCHEMA_REGISTRY"
    with pytest.raises(ConfigError, match=said):
        restored.tasks["add"].submit(1)
    with pytest.raises(ConfigError, match=said):
        restored.submit_many([restored.tasks["add"].job(1)])
    with pytest.raises(ConfigError, match=said):
        Worker(restored.registry, restored.settings, WorkerOptions()).run()
    restored.close()
    assert len(log_of(lab.app, lab.app.names.jobs("default"))) == before


def test_a_registry_that_contradicts_the_log_stops_emitters(lab: Lab) -> None:
    """An event whose schema gets the id of another schema is not emitted."""
    restored = lab.with_other_registry(SmallRegistry())
    with pytest.raises(ConfigError, match=r"schema id 1 is Paid.*127\.0\.0\.1.*and JobEvent.*\.schemas"):
        restored.emit(Paid(2))
    restored.close()


def test_records_of_other_systems_are_read_only_with_the_registry(lab: Lab) -> None:
    """Only the registry can explain these records. An id that contradicts the log stops their reader, an id that the
    log lacks does not."""
    restored = lab.with_other_registry(SmallRegistry({2: OTHER, 50: OTHER}))
    lookup = SchemaLookup(restored.settings, restored.names)
    try:
        assert lookup.of_others(50, True) == OTHER
        assert "Paid" in (lookup.by_id(2, True) or "")
        with pytest.raises(ConfigError, match=r"schema id 2 is Invoice.*and Paid"):
            lookup.of_others(2, True)
    finally:
        lookup.close()
        restored.close()
