"""What surrounds a task's code, and resources, without a broker."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry import trace

from jobledger import App, BadArguments, ConfigError, Depends, JobContext, ResourceFailed, Settings
from jobledger.definitions.context import enter
from jobledger.definitions.middleware import runner


def app_of() -> App:
    """An app of its own."""
    return App("hooks", settings=Settings(bootstrap="nowhere:1"))


def job(task: str = "t", **more: Any) -> JobContext:
    """An attempt, as a worker makes it."""
    given: dict[str, Any] = {
        "job_id": "j",
        "task": task,
        "queue": "default",
        "run": 1,
        "attempt": 1,
        "release": 1,
        "tags": {},
        "parent": None,
    }
    return JobContext(**(given | {"trace": None, "report": lambda *_: None} | more))


def ran(task: Any, **kwargs: Any) -> Any:
    """What a worker's call of the task gives."""

    def call() -> Any:
        enter(job(task.name))
        made = runner(task, task.registry.hooks)(**kwargs)
        return asyncio.run(made) if task.is_async else made

    return contextvars.copy_context().run(call)


def test_nothing_around_a_task_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hooks, resources and spans the worker calls the task's own function."""
    # Another test of this process may have set a provider of spans, which is for good.
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    app = app_of()

    @app.task
    async def plain() -> None: ...

    assert runner(plain, app.registry.hooks) is plain.fn


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_hooks_nest_in_the_order_they_are_registered(kind: str) -> None:
    """The first is the outermost; `before` in order, `after` from the inside out, with the result."""
    app, said = app_of(), []

    @app.around
    def outer(job: JobContext) -> Iterator[None]:
        said.append(f"outer {job.task}")
        yield
        said.append("outer ends")

    @app.middleware
    class Counts:
        def before(self, job: JobContext) -> None:
            said.append("before")

        def after(self, job: JobContext, result: Any) -> None:
            said.append(f"after {result}")

    if kind == "async":

        @app.around
        async def inner(job: JobContext) -> AsyncIterator[None]:
            said.append("inner")
            yield
            said.append("inner ends")

        @app.task
        async def work(n: int) -> int:
            return n + 1

        assert ran(work, n=1) == 2
        assert said == ["outer work", "before", "inner", "inner ends", "after 2", "outer ends"]
    else:

        @app.task(name="work")
        def work_here(n: int) -> int:
            return n + 1

        assert ran(work_here, n=1) == 2
        assert said == ["outer work", "before", "after 2", "outer ends"]


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_an_error_swallowed_by_around_is_raised_again(kind: str) -> None:
    """A hook sees what the task raised, may raise something else instead, and cannot make a failure a success."""
    app, seen = app_of(), []

    @app.around
    def swallows(job: JobContext) -> Iterator[None]:
        try:
            yield
        except ValueError as exc:
            seen.append(exc)

    task: Any
    if kind == "async":

        @app.task
        async def broken() -> None:
            raise ValueError("b")

        task = broken
    else:

        @app.task(name="broken")
        def broken_here() -> None:
            raise ValueError("b")

        task = broken_here
    with pytest.raises(ValueError, match="b"):
        ran(task)
    assert len(seen) == 1

    @app.around
    def replaces(job: JobContext) -> Iterator[None]:
        try:
            yield
        except ValueError:
            raise KeyError("instead") from None

    with pytest.raises(KeyError):
        ran(task)
    assert len(seen) == 1


def test_before_fails_the_attempt_and_after_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What `before` raises is the attempt's error; what `after` raises is logged."""
    app, calls = app_of(), []

    class Bad:
        def __init__(self) -> None:
            self.refuse = False

        def before(self, job: JobContext) -> None:
            if self.refuse:
                raise PermissionError("no")

        async def after(self, job: JobContext, result: Any) -> None:
            raise RuntimeError("after")

    bad = Bad()
    app.middleware(bad)

    @app.task
    async def work() -> str:
        calls.append(1)
        return "done"

    assert ran(work) == "done"
    assert "Bad.after failed for job j (work)" in caplog.text
    bad.refuse = True
    with pytest.raises(PermissionError):
        ran(work)
    assert len(calls) == 1


def test_an_async_hook_around_a_plain_task_is_refused_unless_kept_from_it() -> None:
    """It could not run there; `tasks=` says which tasks a hook is for."""
    app = app_of()

    async def session(job: JobContext) -> AsyncIterator[None]:
        yield

    app.around(session)

    @app.task
    def plain() -> None: ...

    with pytest.raises(ConfigError, match="is async, and task 'plain' is a plain function"):
        app.check()
    other = app_of()
    other.around(tasks=lambda task: task.is_async)(session)
    other.task(plain.fn)
    other.check()


def test_hooks_that_are_none_are_refused() -> None:
    """A class without hooks, a function that is no generator."""
    app = app_of()
    with pytest.raises(ConfigError, match="has none of before"):
        app.middleware(object())
    with pytest.raises(ConfigError, match="is not a generator"):
        app.around(lambda job: None)  # type: ignore[arg-type]  # as tried


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_a_resource_is_opened_once_and_closed_in_reverse(kind: str) -> None:
    """It is no argument of the job; one may need another; both kinds of function have one open value."""
    app, said = app_of(), []

    @app.resource
    def engine() -> Iterator[str]:
        said.append("open engine")
        yield "engine"
        said.append("close engine")

    @app.resource
    def pool(engine: str = Depends(engine)) -> Iterator[list[str]]:
        said.append("open pool")
        yield [engine]
        said.append("close pool")

    if kind == "async":

        @app.task
        async def work(n: int, *, pool: list[str] = Depends(pool)) -> int:
            pool.append("x")
            return len(pool)

        task: Any = work
    else:

        @app.task(name="work")
        def work_here(n: int, pool: list[str] = Depends(pool)) -> int:
            pool.append("x")
            return len(pool)

        task = work_here
    assert task.job(3).args == b'{"n":3}'
    assert task.signature == "(n: int) -> int"
    with pytest.raises(BadArguments):
        task.job(3, pool=[])
    with pytest.raises(BadArguments, match="pass pool="):
        task(3)
    assert (ran(task, n=1), ran(task, n=1)) == (2, 3)
    assert app.use(engine) == "engine"
    asyncio.run(app.registry.resources.close())
    assert said == ["open engine", "open pool", "close pool", "close engine"]


def test_async_resources_open_on_the_loop() -> None:
    """An async generator and a coroutine function; many jobs that need them at once open them once."""
    app, said = app_of(), []

    @app.resource
    async def client() -> AsyncIterator[str]:
        said.append("open")
        await asyncio.sleep(0.01)
        yield "client"
        said.append("close")

    @app.resource
    async def token(client: str = Depends(client)) -> str:
        return f"token of {client}"

    @app.task
    async def work(*, token: str = Depends(token)) -> str:
        return token

    async def all_of_it() -> list[str]:
        enter(job())
        found = await asyncio.gather(*[runner(work, app.registry.hooks)() for _ in range(5)])
        await app.registry.resources.close()
        return found

    with pytest.raises(ConfigError, match="is async and not open"):
        app.use(client)
    assert set(asyncio.run(all_of_it())) == {"token of client"}
    assert said == ["open", "close"]


def test_a_resource_that_cannot_be_opened_is_named() -> None:
    """The error names it and says why; the next job tries again."""
    app = app_of()

    @app.resource
    def database() -> str:
        raise OSError("no route")

    @app.task
    def work(db: str = Depends(database)) -> None: ...

    for _ in range(2):
        with pytest.raises(ResourceFailed, match="resource 'database' could not be opened: OSError: no route"):
            ran(work)


def test_resources_that_cannot_be_had_are_refused_at_once() -> None:
    """An async one for a plain task; a parameter that others follow; a parameter nobody fills; something else."""
    app = app_of()

    @app.resource
    async def client() -> str:
        return ""

    @app.resource
    def plain() -> str:
        return ""

    def wants(c: str = Depends(client)) -> None: ...

    async def misplaced(p: str = Depends(plain), n: int = 0) -> None: ...

    def asks(n: int) -> str:
        return ""

    refused: list[tuple[str, Callable[[], Any]]] = [
        ("which it needs, is async", lambda: app.task(wants)),
        ("put resources last", lambda: app.task(misplaced)),
        ("has no default", lambda: app.resource(asks)),
        ("which it needs, is async", lambda: app.resource(wants)),
        ("that is not a resource", lambda: Depends(asks)),  # type: ignore[arg-type]  # as tried
    ]
    for message, attempt in refused:
        with pytest.raises(ConfigError, match=message):
            attempt()


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, ValueError])
def test_whatever_a_resource_raises_at_its_end_the_others_are_closed(
    caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """It is logged with the resource's name, and whoever closes them goes on."""
    app, said = app_of(), []

    @app.resource
    def first() -> Iterator[str]:
        yield "first"
        said.append("first")

    @app.resource
    def plain() -> Iterator[str]:
        yield "plain"
        raise kind

    @app.resource
    async def coroutine() -> AsyncIterator[str]:
        yield "coroutine"
        raise kind

    async def all_of_it() -> None:
        resources = app.registry.resources
        await resources.open([first, plain, coroutine])
        await resources.close()

    asyncio.run(all_of_it())
    assert said == ["first"]
    for name in ("plain", "coroutine"):
        assert f"resource {name} could not be closed" in caplog.text


def test_the_end_of_resources_is_bounded_by_who_waits_for_it() -> None:
    """A cancellation of the waiting itself is passed on, also while a resource takes its time."""
    app, stuck = app_of(), threading.Event()

    @app.resource
    def slow() -> Iterator[str]:
        yield "slow"
        stuck.wait(300)

    async def all_of_it() -> None:
        await app.registry.resources.open([slow])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await app.registry.resources.close()
        stuck.set()

    asyncio.run(all_of_it())


def test_a_resource_is_closed_where_jobs_hold_all_threads() -> None:
    """Its end needs none of the loop's."""
    app, said, held = app_of(), [], threading.Event()

    @app.resource
    def pool() -> Iterator[str]:
        yield "pool"
        said.append("closed")

    async def all_of_it() -> None:
        loop = asyncio.get_running_loop()
        await app.registry.resources.open([pool])
        threads = ThreadPoolExecutor(1)
        loop.set_default_executor(threads)
        job = loop.run_in_executor(None, held.wait)
        try:
            async with asyncio.timeout(60):
                await app.registry.resources.close()
        finally:
            held.set()
            await job
            threads.shutdown()

    asyncio.run(all_of_it())
    assert said == ["closed"]
