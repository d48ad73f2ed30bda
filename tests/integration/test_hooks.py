"""Hooks, resources and spans in a real worker with a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobledger import NO_RETRY, App, Depends, JobContext, ResourceFailed, Retry, Settings, current_job
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobFailedFact, fact_name
from tests.integration.worker_app import Unprintable, closings, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


def app_of(namespace: str, broker: str) -> App:
    """Create an app without tasks."""
    return App(namespace, settings=Settings(bootstrap=broker), partitions=2)


def test_hooks_are_called_for_every_attempt(broker: str, namespace: str) -> None:
    """`around` surrounds each attempt and sees its tags. The hooks for retries and failures get the error, for both
    kinds of tasks. An error in a hook changes nothing. A coroutine that a plain hook returns is awaited."""
    app = app_of(namespace, broker)
    said: list[tuple[Any, ...]] = []

    @app.around
    def tenant(job: JobContext) -> Iterator[None]:
        said.append(("around", job.task, job.tags["tenant"], job.attempt))
        yield

    @app.middleware
    class Told:
        def retry(self, job: JobContext, error: BaseException, delay: float) -> None:
            said.append(("retry", job.task, job.attempt, str(error), delay, current_job() is job))
            raise RuntimeError("of the hook")

        async def failure(self, job: JobContext, error: BaseException) -> None:
            await asyncio.sleep(0)
            said.append(("failure", job.task, job.attempt, type(error), current_job() is job))

    @app.middleware
    class Wrapped:
        def failure(self, job: JobContext, error: BaseException) -> Any:
            return self._failure(job)

        async def _failure(self, job: JobContext) -> None:
            await asyncio.sleep(0)
            said.append(("awaited", job.task, current_job() is job))

    again = Retry(max_attempts=2, initial=0.05, jitter=False)

    @app.task(retry=again, key="n", timeout=60)  # in place, so that no coordinator is needed
    async def broken(n: int) -> None:
        raise ValueError(f"attempt {current_job().attempt}")

    @app.task(retry=NO_RETRY)
    def broken_in_thread(n: int) -> None:
        raise KeyError(n)

    @app.task(retry=NO_RETRY, timeout=0.1)
    async def slow(n: int) -> None:
        await asyncio.sleep(60)

    ensure(app, app.settings)
    for task in (broken, broken_in_thread, slow):
        task.using(tags={"tenant": "acme"}).submit(1)
    with working(app):
        until(lambda: len([s for s in said if s[0] == "failure"]) == 3)
        until(lambda: len([s for s in said if s[0] == "awaited"]) == 3, what="what the plain hook returned")
    assert {s for s in said if s[0] == "awaited"} == {
        ("awaited", task, True) for task in ("broken", "broken_in_thread", "slow")
    }
    assert ("around", "broken", "acme", 2) in said
    assert ("retry", "broken", 1, "attempt 1", 0.05, True) in said
    failures = sorted((s for s in said if s[0] == "failure"), key=lambda s: str(s[1]))
    assert failures == [
        ("failure", "broken", 2, ValueError, True),
        ("failure", "broken_in_thread", 1, KeyError, True),
        ("failure", "slow", 1, TimeoutError, True),
    ]
    app.close()


def test_resources_are_open_before_jobs_and_closed_after_them(broker: str, namespace: str) -> None:
    """Each resource that a task uses is opened once, at the worker's start. Both kinds of tasks get its value. It is
    closed when the last job has ended."""
    app, said = app_of(namespace, broker), []

    @app.resource
    async def client() -> AsyncIterator[list[int]]:
        said.append("open client")
        yield []
        said.append("close client")

    @app.resource
    def pool() -> Iterator[dict[str, int]]:
        said.append("open pool")
        yield {}
        said.append("close pool")

    @app.resource
    def unused() -> None:
        said.append("nobody asks for it")

    @app.task
    async def work(n: int, *, client: list[int] = Depends(client), pool: dict[str, int] = Depends(pool)) -> int:
        await asyncio.sleep(0.2)
        said.append("job")
        return n

    @app.task
    def work_in_thread(n: int, *, pool: dict[str, int] = Depends(pool)) -> int:
        said.append("job")
        assert pool is app.use(pool_)
        return n

    pool_ = pool
    ensure(app, app.settings)
    with working(app) as worker:
        until(lambda: worker.control_reader is not None)
        assert said == ["open client", "open pool"]
        ids = [work.submit(1).job_id, work_in_thread.submit(2).job_id]
        until(lambda: worker.dispatcher is not None and worker.dispatcher.running_jobs.begun == 2)
    assert said == ["open client", "open pool", "job", "job", "close pool", "close client"]
    assert {fact_name(found[0].event.fact) for found in closings(app).values()} == {"JobSucceeded"}
    assert set(closings(app)) == set(ids)
    app.close()


def test_a_worker_whose_resource_cannot_be_opened_ends_with_an_error(broker: str, namespace: str) -> None:
    """The worker ends with an error that names the resource, and closes the other resources. No job is started, and
    none is lost."""
    app, said = app_of(namespace, broker), []

    @app.resource
    def good() -> Iterator[int]:
        yield 1
        said.append("closed")

    @app.resource
    def database() -> str:
        raise OSError("no route to host")

    @app.task
    def work(good: int = Depends(good), db: str = Depends(database)) -> None: ...

    ensure(app, app.settings)
    work.submit()
    with working(app) as worker:
        assert worker.ended.wait(PATIENCE * 30)
    assert isinstance(worker.error, ResourceFailed)
    assert "resource 'database' could not be opened: OSError: no route to host" in str(worker.error)
    assert said == ["closed"]
    assert closings(app) == {}
    app.close()


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    """Return an exporter with all spans. A process has only one provider."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def test_a_trace_connects_a_submission_with_its_child_jobs(
    broker: str, namespace: str, spans: InMemorySpanExporter
) -> None:
    """The chain of spans is: the caller's span, the submission, each attempt, the submission by the job, and the run of
    that job. Coroutines and threads are tested."""
    app = app_of(namespace, broker)
    tracer = trace.get_tracer("test")

    @app.task(key="n", timeout=60, retry=Retry(max_attempts=2, initial=0.05, jitter=False))
    async def first(n: int) -> None:
        if current_job().attempt == 1:
            raise ValueError("not yet")
        with tracer.start_as_current_span("inside"):
            await second.submit_async(n)

    @app.task
    def second(n: int) -> None:
        with tracer.start_as_current_span("in the thread"):
            third.submit(n)

    @app.task
    async def third(n: int) -> None: ...

    ensure(app, app.settings)
    spans.clear()
    with tracer.start_as_current_span("request"):
        first.submit(1)
    with working(app):
        until(lambda: any(s.name == "run third" for s in spans.get_finished_spans()))
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    runs = sorted(found["run first"], key=lambda s: int(str((s.attributes or {})["jobledger.attempt"])))
    assert [s.status.status_code for s in runs] == [trace.StatusCode.ERROR, trace.StatusCode.UNSET]
    assert [e.name for e in runs[0].events] == ["exception"]
    assert runs[0].kind is trace.SpanKind.CONSUMER
    assert runs[0].attributes is not None
    assert runs[0].attributes["messaging.destination.name"] == f"{namespace}.jobs.default"

    def parent(span: ReadableSpan) -> int | None:
        return None if span.parent is None else span.parent.span_id

    def number(name: str) -> int:
        (one,) = found[name]
        return int(one.context.span_id)

    assert [parent(s) for s in runs] == [number("submit first")] * 2
    assert [s.links[0].context.span_id for s in runs] == [number("submit first")] * 2
    chain = {name: parent(found[name][0]) for name in found if name != "run first"}
    assert chain == {
        "request": None,
        "submit first": number("request"),
        "inside": runs[1].context.span_id,
        "submit second": number("inside"),
        "run second": number("submit second"),
        "in the thread": number("run second"),
        "submit third": number("in the thread"),
        "run third": number("submit third"),
    }
    assert len({s.context.trace_id for s in spans.get_finished_spans()}) == 1
    app.close()


def test_tracing_an_exception_without_a_text_does_not_change_the_outcome(
    broker: str, namespace: str, spans: InMemorySpanExporter
) -> None:
    """The tracing library calls ``str()`` of the exception, which fails. The job still fails with its own exception."""
    app = app_of(namespace, broker)

    @app.task(retry=NO_RETRY)
    async def wordless() -> None:
        raise Unprintable

    ensure(app, app.settings)
    spans.clear()
    handle = wordless.submit()
    with working(app):
        until(lambda: handle.job_id in closings(app))
    (closing,) = closings(app)[handle.job_id]
    assert isinstance(closing.event.fact, JobFailedFact)
    assert closing.event.fact.error.type.endswith("Unprintable")
    (span,) = [s for s in spans.get_finished_spans() if s.name == "run wordless"]
    assert [dict(e.attributes or {}).get("exception.type") for e in span.events] == ["Unprintable"]
