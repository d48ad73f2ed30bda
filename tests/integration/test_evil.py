"""Exceptions, results, arguments, hooks, resources and log handlers whose own code breaks, on a real worker."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from jobledger import App, ResourceFailed, Settings
from jobledger.consumers.worker.worker import Worker
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobFailed, JobRetried, JobSucceeded, Recorded
from tests.evil import EXCEPTIONS
from tests.integration import evil_app as evil
from tests.integration.worker_app import closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka

RAISED = [(place, "raise", name) for place in evil.PLACES for name in EXCEPTIONS]
RETURNED = [(place, "return", name) for place in evil.PLACES for name in evil.RESULTS]
TAKEN = [(task, "take", how) for task in ("takes", "takes_in_process") for how in evil.ARGUMENTS]

Case = tuple[str, str, str]
Ends = dict[Case, list[Recorded]]


@pytest.fixture(scope="module")
def app(broker: str) -> App:
    """The app of all tests here, with its topics."""
    evil.app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(evil.app, evil.app.settings)
    return evil.app


@pytest.fixture(scope="module")
def ends(app: App) -> Iterator[tuple[Ends, Worker]]:
    """How every job of the table ended; what has not ended is not there."""
    tasks: dict[str, Any] = dict(app.tasks)
    cases = {(p, kind, name): tasks[p].submit(kind, name).job_id for p, kind, name in (*RAISED, *RETURNED)}
    cases |= {(task, kind, how): tasks[task].submit(evil.Argument(how)).job_id for task, kind, how in TAKEN}
    os.environ["EVIL_ARGUMENTS"] = "1"
    try:
        with working(app, children=1, threads=3, concurrency=50, grace=3.0) as worker:
            found: dict[str, list[Recorded]] = {}

            def ended() -> bool:
                nonlocal found
                found = closings(app)
                return found.keys() >= set(cases.values()) or worker.error is not None

            with contextlib.suppress(AssertionError):  # each test says what is missing
                until(ended, 120.0)
            yield {case: found[job] for case, job in cases.items() if job in found}, worker
    finally:
        del os.environ["EVIL_ARGUMENTS"]


@pytest.mark.parametrize(("place", "kind", "name"), [*RAISED, *RETURNED, *TAKEN])
def test_what_breaks_when_it_is_looked_at_fails_its_job(
    ends: tuple[Ends, Worker], place: str, kind: str, name: str
) -> None:
    """The job fails, once, with the reason of its kind and a text that says something."""
    (end,) = ends[0][place, kind, name]
    fact = end.event.fact
    assert isinstance(fact, JobFailed)
    reasons = {"raise": ("exhausted", "never"), "return": ("bad-result",), "take": ("bad-arguments",)}
    assert fact.reason in reasons[kind]
    assert fact.error.type
    fact.error.message.encode()
    assert "evil_app" in (fact.error.traceback or "")


def test_the_worker_its_threads_and_its_children_serve_on(app: App, ends: tuple[Ends, Worker]) -> None:
    """After all of them the same worker runs as many jobs at once as before, and has lost no process."""
    _, worker = ends
    assert worker.error is None
    tasks: dict[str, Any] = dict(app.tasks)
    handles = [tasks[place].submit("well", place) for place in evil.PLACES for _ in range(5)]
    until(lambda: closings(app).keys() >= {h.job_id for h in handles}, 60.0)
    found = closings(app)
    assert all(isinstance(found[h.job_id][-1].event.fact, JobSucceeded) for h in handles)
    assert worker.dispatcher is not None
    until(lambda: not worker.dispatcher.running)  # type: ignore[union-attr]
    assert worker.dispatcher.threads.running == worker.dispatcher.processes.running == 0
    children = worker.health()["children"]
    assert (children["died"], children["killed"]) == (0, 0)


class Raises(logging.Handler):
    """A handler whose `emit` raises, with what it is told to write."""

    def __init__(self, raised: type[BaseException]) -> None:
        super().__init__()
        self.raised, self.calls = raised, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.calls += 1
        raise self.raised("the handler breaks")


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, GeneratorExit])
def test_a_log_handler_that_raises_ends_nothing(app: App, raised: type[BaseException], capsys: Any) -> None:
    """Start, jobs that fail and retry, a failing callback on the event loop, hooks, resources and the end pass, and the
    lines are on standard error."""
    handler = Raises(raised)
    logging.getLogger("jobledger").addHandler(handler)
    try:
        with working(app, children=1, threads=1, grace=3.0) as worker:
            tasks: dict[str, Any] = dict(app.tasks)
            failed = [tasks[place].submit("raise", "__str__") for place in evil.PLACES]
            tried = evil.spoils_its_tags.submit()
            stray = evil.leaves_a_broken_callback.submit()
            until(lambda: closings(app).keys() >= {h.job_id for h in (*failed, stray)}, 60.0)
            until(lambda: any(isinstance(f, JobRetried) for f in facts_of(app, tried.job_id)), 60.0)
        assert worker.error is None
    finally:
        logging.getLogger("jobledger").removeHandler(handler)
    assert handler.calls
    said = capsys.readouterr().err
    assert f"job {failed[0].job_id} (on_loop) failed for good" in said
    assert "the handler breaks" in said


def test_what_a_task_does_to_its_tags_is_not_written(app: App) -> None:
    """The job keeps the tags that it was submitted with, whatever its code puts there."""
    with working(app, children=1, threads=1, grace=3.0) as worker:
        handle = evil.spoils_its_tags.using(tags={"a": "b"}).submit()
        until(lambda: any(isinstance(f, JobRetried) for f in facts_of(app, handle.job_id)), 60.0)
        requests = until(lambda: [r for r in log_of(app, app.names.coordination) if r.event.job_id == handle.job_id])
        assert requests[0].event.fact.spec.tags == {"a": "b"}
        assert worker.error is None


def test_hooks_and_resources_that_break_fail_at_most_their_job(broker: str, namespace: str) -> None:
    """Hooks that raise exceptions which break, or `SystemExit`, and resources whose end does, leave the worker whole."""
    app = evil.broken_around(namespace, Settings(bootstrap=broker, submit_timeout=20.0))
    ensure(app, app.settings)
    tasks: dict[str, Any] = dict(app.tasks)
    with working(app, threads=2, grace=3.0) as worker:
        handles = {(task, how): tasks[task].submit(how) for task in ("plain", "coroutine") for how in ("fails", "ends")}
        until(lambda: closings(app).keys() >= {h.job_id for h in handles.values()}, 60.0)
        until(lambda: len(app.told) >= 2 * 2, 60.0, "hooks called")  # type: ignore[attr-defined]
        found = closings(app)
        for (_, how), handle in handles.items():
            (end,) = found[handle.job_id]
            assert isinstance(end.event.fact, JobFailed if how == "fails" else JobSucceeded)
    assert worker.error is None


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit, "__class__", "__str__"])
def test_a_resource_that_cannot_be_opened_is_named(broker: str, namespace: str, raised: Any) -> None:
    """Whatever its opening raises, the worker ends with an error that names the resource."""
    app = evil.unopened(namespace, Settings(bootstrap=broker, submit_timeout=20.0), raised)
    ensure(app, app.settings)
    with working(app, grace=3.0) as worker:
        until(lambda: worker.error, 60.0)
    assert isinstance(worker.error, ResourceFailed)
    assert "resource 'closed' could not be opened" in str(worker.error)
