"""What the tests of the HTTP API share: a status table in SQLite, written by the store's own writer, and a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from jobledger import App, Settings, job
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Position
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import Changes, open_store
from jobledger.streams.status.store.sqlite import SqliteStore

NAMESPACE = "shop"
SUBMITTED: ev.Fact = ev.JobSubmitted(ev.JobSpec(b'{"a": 1}', {"tenant": "acme"}))
STARTED: ev.Fact = ev.JobStarted("w:1", "v7", {}, "shop.jobs.default", 0)
FAILED: ev.Fact = ev.JobFailedFact(
    "exhausted", ev.ErrorInfo("builtins.ValueError", "<script>alert(1)</script>", "trace"), 5
)
PLAN = PlanStatus(
    "plan-1",
    *("redrive", '{"task": ["add"]}', None, None, "ann", "mended", 1_000),
    state=PlanState.RUNNING,
    matched=3,
    parts=1,
    position=Position("shop.plans", 0, 2),
)


class Table:
    """A status table that a test fills."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "status.db"
        self.url = f"sqlite:///{self.path}"
        self.store = open_store(self.url, NAMESPACE)
        assert isinstance(self.store, SqliteStore)
        assert self.store.acquire()
        self._folder = RowFolder(self.store, Decoder())

    def write(
        self, jobs: Mapping[str, Sequence[ev.Fact]], *, ms: int = 1_000, read: int = 0, key: str | None = None
    ) -> None:
        """Write the facts of jobs, each fact one millisecond after the one before. ``read``: the next offset of the
        first work partition."""
        lives: dict[str, job.Life] = {}
        for number, (job_id, facts) in enumerate(jobs.items()):
            life: job.Life | None = None
            for offset, fact in enumerate(facts):
                topic = "shop.jobs.default" if offset == 0 else "shop.lifecycle"
                at = (ms + number * 10 + offset, topic, 0, number * 10 + offset)
                life = job.join(life, job.of(1, 1, 1, "add", "default", key, fact, at))
            assert life is not None
            lives[job_id] = life
        folded = self._folder.merge(lives.items())
        folded.changes.offsets["shop.jobs.default", 0] = read
        self.store.write(folded.changes)
        self._folder.committed(folded)

    def plan(self, **changes: Any) -> None:
        """Write a plan."""
        self.store.write(Changes(plans=[msgspec.structs.replace(PLAN, **changes)]))


def build(table_url: str, bootstrap: str = "127.0.0.1:1") -> App:
    """Return an app whose table is this one. Nothing listens at the default address of the broker."""
    app = App(NAMESPACE, settings=Settings(bootstrap=bootstrap, submit_timeout=0.5, status_url=table_url))

    @app.task(name="add")
    def add(a: int, b: int = 1) -> int:
        return a + b

    return app


def client(api: FastAPI, **headers: str) -> httpx.AsyncClient:
    """Return a client of the API, in the same event loop."""
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False, client=("127.0.0.1", 50_000))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8420", headers=headers, timeout=60.0)
