"""What the tests of the pages share: an app over a seeded status table, with and without a server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from bench import seed_table
from jobledger import App, Settings
from jobledger.web import Dashboard, Role, User, create_app
from tests.patience import wait_until
from tests.web import client

#: The time of the newest job, in ms since the epoch.
NOW_MS = 1_764_547_200_000


def seeded(folder: Path, jobs: int = 3_000) -> str:
    """Make a status table of the namespace ``shop`` with made-up jobs. Return its URL."""
    url = f"sqlite:///{folder / 'shop.db'}"
    seed_table.fill(url, "shop", seed_table.Options(jobs, now_ms=NOW_MS))
    return url


def shop(url: str, bootstrap: str = "127.0.0.1:1") -> App:
    """Return an app with the tasks of the seeded jobs. At the default address no broker listens."""
    app = App("shop", settings=Settings(bootstrap=bootstrap, status_url=url, submit_timeout=0.5))
    for name, queue in seed_table.TASKS:

        def fn(order: int) -> int:
            return order

        app.task(name=name, queue=queue)(fn)
    return app


def pages(app: App, role: Role = Role.ADMIN, dashboard: Dashboard | None = None, **options: Any) -> FastAPI:
    """Return the application for a user ``alice`` with this role."""
    return create_app(app, user=lambda request: User("alice", role), dashboard=dashboard or Dashboard(), **options)


def ask(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def one() -> httpx.Response:
        async with client(api) as asker:
            return await asker.request(method, path, **options)

    return asyncio.run(one())


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """Serve the application on a free port. Yield its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="error", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            wait_until(lambda: server.started, 20.0, "the start of the server")
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
