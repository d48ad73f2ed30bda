"""The hooks around a task's code, and resources, without a broker."""

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
    """Return a new app."""
    return App("hooks", settings=Settings(bootstrap="nowhere:1"))


def job(task: str = "t", **more: Any) -> JobContext:
    """Return the context of an attempt, as a worker makes it."""
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
    """Call the task as a worker does; return the result."""

    def call() -> Any:
        enter(job(task.name))
        made = runner(task, task.registry.hooks)(**kwargs)
        return asyncio.run(made) if task.is_async else made

    return contextvars.copy_context().run(call)


def test_without_hooks_the_worker_calls_the_tasks_function_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task has no hooks, no resources and no spans."""
    # Another test of this process may have set a provider of spans, which cannot be unset.
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    app = app_of()

    @app.task
    async def plain() -> None: ...

    assert runner(plain, app.registry.hooks) is plain.fn


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_hooks_nest_in_the_order_they_are_registered(kind: str) -> None:
    """The first hook is the outermost. `before` runs in the order of registration, and `after` in the reverse order,
    with the result."""
    app, calls = app_of(), []

    @app.around
    def outer(job: JobContext) -> Iterator[None]:
        calls.append(f"outer {job.task}")
        yield
        calls.append("outer ends")

    @app.middleware
    class Counts:
        def before(self, job: JobContext) -> None:
            calls.append("before")

        def after(self, job: JobContext, result: Any) -> None:
            calls.append(f"after {result}")

    if kind == "async":

        @app.around
        async def inner(job: JobContext) -> AsyncIterator[None]:
            calls.append("inner")
            yield
            calls.append("inner ends")

        @app.task
        async def work(n: int) -> int:
            return n + 1

        assert ran(work, n=1) == 2
        assert calls == ["outer work", "before", "inner", "inner ends", "after 2", "outer ends"]
    else:

        @app.task(name="work")
        def work_here(n: int) -> int:
            return n + 1

        assert ran(work_here, n=1) == 2
        assert calls == ["outer work", "before", "after 2", "outer ends"]


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_an_error_swallowed_by_around_is_raised_again(kind: str) -> None:
    """A hook gets the task's exception and may raise another one, but cannot turn a failure into a success."""
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


def test_an_error_in_before_fails_the_attempt_and_an_error_in_after_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """After an error in `after` the result of the attempt is the same."""
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


def test_an_async_hook_for_a_plain_function_is_refused() -> None:
    """The hook could not run there. With `tasks=` the hook is only for the chosen tasks."""
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


def test_a_middleware_without_hooks_and_an_around_hook_without_yield_are_refused() -> None:
    """The errors are raised at the registration."""
    app = app_of()
    with pytest.raises(ConfigError, match="has none of the methods before"):
        app.middleware(object())
    with pytest.raises(ConfigError, match="is not a generator"):
        app.around(lambda job: None)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_a_resource_is_opened_once_and_closed_in_reverse(kind: str) -> None:
    """A resource is no argument of the job, and may need another resource. Coroutines and plain functions get the same
    open value."""
    app, steps = app_of(), []

    @app.resource
    def engine() -> Iterator[str]:
        steps.append("open engine")
        yield "engine"
        steps.append("close engine")

    @app.resource
    def pool(engine: str = Depends(engine)) -> Iterator[list[str]]:
        steps.append("open pool")
        yield [engine]
        steps.append("close pool")

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
    assert steps == ["open engine", "open pool", "close pool", "close engine"]


def test_async_resources_open_on_the_loop() -> None:
    """The resources are an async generator and a coroutine function. Many jobs need them at the same time, and they are
    opened once."""
    app, steps = app_of(), []

    @app.resource
    async def client() -> AsyncIterator[str]:
        steps.append("open")
        await asyncio.sleep(0.01)
        yield "client"
        steps.append("close")

    @app.resource
    async def token(client: str = Depends(client)) -> str:
        return f"token of {client}"

    @app.task
    async def work(*, token: str = Depends(token)) -> str:
        return token

    async def all_of_it() -> list[str]:
        enter(job())
        results = await asyncio.gather(*[runner(work, app.registry.hooks)() for _ in range(5)])
        await app.registry.resources.close()
        return results

    with pytest.raises(ConfigError, match="is async and not open"):
        app.use(client)
    assert set(asyncio.run(all_of_it())) == {"token of client"}
    assert steps == ["open", "close"]


def test_the_error_of_a_resource_that_cannot_be_opened_names_it() -> None:
    """The error has the reason, too. The next job tries to open the resource again."""
    app = app_of()

    @app.resource
    def database() -> str:
        raise OSError("no route")

    @app.task
    def work(db: str = Depends(database)) -> None: ...

    for _ in range(2):
        with pytest.raises(ResourceFailed, match="resource 'database' could not be opened: OSError: no route"):
            ran(work)


def test_wrong_uses_of_resources_are_refused_at_the_declaration() -> None:
    """The wrong uses are an async resource for a plain function, a resource before other parameters, a parameter
    without a value, and a function that is not a resource."""
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
        ("that is not a resource", lambda: Depends(asks)),  # type: ignore[arg-type]  # wrong on purpose
    ]
    for message, attempt in refused:
        with pytest.raises(ConfigError, match=message):
            attempt()


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, ValueError])
def test_an_error_of_a_resource_at_its_end_does_not_keep_other_resources_open(
    caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """The error is logged with the resource's name, and the other resources are closed."""
    app, closed = app_of(), []

    @app.resource
    def first() -> Iterator[str]:
        yield "first"
        closed.append("first")

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
    assert closed == ["first"]
    for name in ("plain", "coroutine"):
        assert f"resource {name} could not be closed" in caplog.text


def test_a_time_limit_interrupts_the_closing_of_resources() -> None:
    """A cancellation of the wait is passed on, also while the end of a resource blocks."""
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


def test_a_resource_is_closed_while_jobs_occupy_all_threads_of_the_loop() -> None:
    """The end of a resource needs no thread of the loop's executor."""
    app, closed, held = app_of(), [], threading.Event()

    @app.resource
    def pool() -> Iterator[str]:
        yield "pool"
        closed.append("closed")

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
    assert closed == ["closed"]
