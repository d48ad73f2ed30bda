"""What the snippets of the pages use and what is not part of Jobledger: small stand-ins for other packages, and for code
that a reader has."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self, TypeVar

import sqlalchemy

Function = TypeVar("Function", bound=Callable[..., Any])


# -- a web framework ----------------------------------------------------------------------------------------------------


class FastAPI:
    """Takes handlers and serves none of them."""

    def exception_handler(self, error: type[Exception]) -> Callable[[Function], Function]:
        """Return a decorator that returns its function."""
        assert issubclass(error, Exception)
        return lambda fn: fn

    def post(self, path: str, *, status_code: int) -> Callable[[Function], Function]:
        """Return a decorator that returns its function."""
        assert path.startswith("/")
        assert status_code == 202
        return lambda fn: fn


class Request:
    """A request without anything in it."""


@dataclass
class JSONResponse:
    """A response."""

    content: dict[str, Any]
    status_code: int


# -- a pool, tenants, an error tracker ------------------------------------------------------------------------------------


class Pool:
    """A pool of connections; ``open`` until its block ends."""

    open = True


@contextlib.asynccontextmanager
async def create_pool(dsn: str) -> AsyncIterator[Pool]:
    """Yield a pool."""
    assert dsn
    pool = Pool()
    yield pool
    pool.open = False


class TenantSchema:
    """Chooses the schema of a tenant while a block runs. ``entered``: the tenants so far."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    @contextlib.contextmanager
    def __call__(self, tenant: str) -> Iterator[None]:
        """Choose a tenant."""
        self.entered.append(tenant)
        yield


class SentrySdk:
    """Collects errors. ``errors``: the errors so far."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def capture_exception(self, error: BaseException) -> None:
        """Keep the error."""
        self.errors.append(error)


# -- a service over HTTP --------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """An answer of a service."""

    body: dict[str, Any]

    def raise_for_status(self) -> None:
        """Do nothing: the service never fails."""

    def json(self) -> dict[str, Any]:
        """Return the body."""
        return self.body


def httpx() -> ModuleType:
    """Return a module with an ``AsyncClient`` that knows a service for labels. The service keeps one label for each
    idempotency key, in the module's ``labels``."""
    made = ModuleType("httpx")
    labels: dict[str, str] = {}

    class AsyncClient:
        def __init__(self, *, base_url: str) -> None:
            assert base_url.startswith("https://")

        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *error: object) -> None:
            pass

        async def post(self, path: str, *, json: dict[str, str], headers: dict[str, str]) -> Answer:
            assert (path, list(json)) == ("/labels", ["order"])
            return Answer({"tracking": labels.setdefault(headers["Idempotency-Key"], f"label {len(labels) + 1}")})

    vars(made).update(AsyncClient=AsyncClient, labels=labels)
    return made


# -- a database -----------------------------------------------------------------------------------------------------------


class Database:
    """A session of SQLAlchemy's with the methods of an asynchronous one, on a database in memory."""

    def __init__(self, *tables: sqlalchemy.Table) -> None:
        self._engine = sqlalchemy.create_engine("sqlite://")
        self._connection = self._engine.connect()
        for table in tables:
            table.create(self._connection)
        self._connection.commit()

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        """Hold a transaction while the block runs."""
        with self._connection.begin():
            yield

    async def scalar(self, statement: Any) -> Any:
        """Return the first column of the first row, or None."""
        return self._connection.scalar(statement)

    async def execute(self, statement: Any) -> Any:
        """Run a statement."""
        return self._connection.execute(statement)

    def at_once(self, statement: Any) -> Any:
        """Run a statement in a transaction of its own; its first column of the first row, or None."""
        with self._connection.begin():
            result = self._connection.execute(statement)
            return result.scalar() if result.returns_rows else None

    def close(self) -> None:
        """Close the database."""
        self._connection.close()
        self._engine.dispose()
