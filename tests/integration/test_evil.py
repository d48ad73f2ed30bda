"""Exceptions, results, arguments, hooks, resources and log handlers whose own code raises errors, with a real worker."""

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
from jobledger.schemas.events import JobFailedFact, JobRetried, JobSucceeded, Recorded
from tests.evil import EXCEPTIONS
from tests.integration import evil_app as evil
from tests.integration.worker_app import closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka

RAISED = [(place, "raise", name) for place in evil.PLACES for name in EXCEPTIONS]
RETURNED = [(place, "return", name) for place in evil.PLACES for name in evil.RESULTS]
TAKEN = [(task, "take", how) for task in ("takes", "takes_in_process") for how in evil.ARGUMENTS]

Case = tuple[str, str, str]
Outcomes = dict[Case, list[Recorded]]


@pytest.fixture(scope="module")
def app(broker: str) -> App:
    """Return the app of all tests in this file, with its topics."""
    evil.app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(evil.app, evil.app.settings)
    return evil.app


@pytest.fixture(scope="module")
def outcomes(app: App) -> Iterator[tuple[Outcomes, Worker]]:
    """Yield the closing facts of every case, and the worker. A case without an outcome is missing."""
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

            with contextlib.suppress(AssertionError):  # each test reports what is missing
                until(ended, 120.0)
            yield {case: found[job] for case, job in cases.items() if job in found}, worker
    finally:
        del os.environ["EVIL_ARGUMENTS"]


@pytest.mark.parametrize(("place", "kind", "name"), [*RAISED, *RETURNED, *TAKEN])
def test_a_job_whose_error_result_or_argument_raises_when_read_fails(
    outcomes: tuple[Outcomes, Worker], place: str, kind: str, name: str
) -> None:
    """The job fails once, with the reason for its kind of error and an error message that can be encoded."""
    (end,) = outcomes[0][place, kind, name]
    fact = end.event.fact
    assert isinstance(fact, JobFailedFact)
    reasons = {"raise": ("exhausted", "never"), "return": ("bad-result",), "take": ("bad-arguments",)}
    assert fact.reason in reasons[kind]
    assert fact.error.type
    fact.error.message.encode()
    assert "evil_app" in (fact.error.traceback or "")


def test_the_worker_still_runs_jobs_in_all_places_afterwards(app: App, outcomes: tuple[Outcomes, Worker]) -> None:
    """After all these jobs, the same worker runs jobs in all places as before, and none of its child processes has
    died."""
    _, worker = outcomes
    assert worker.error is None
    tasks: dict[str, Any] = dict(app.tasks)
    handles = [tasks[place].submit("well", place) for place in evil.PLACES for _ in range(5)]
    until(lambda: closings(app).keys() >= {h.job_id for h in handles}, 60.0)
    found = closings(app)
    assert all(isinstance(found[h.job_id][-1].event.fact, JobSucceeded) for h in handles)
    assert worker.dispatcher is not None
    until(lambda: not worker.dispatcher.running_jobs.jobs)  # type: ignore[union-attr]
    assert worker.dispatcher.pipe.tasks.threads.running == worker.dispatcher.pipe.tasks.children.running == 0
    children = worker.health()["children"]
    assert (children["died"], children["killed"]) == (0, 0)


class Raises(logging.Handler):
    """A log handler whose `emit` raises an error."""

    def __init__(self, raised: type[BaseException]) -> None:
        super().__init__()
        self.raised, self.calls = raised, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.calls += 1
        raise self.raised("the handler breaks")


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, GeneratorExit])
def test_a_log_handler_that_raises_stops_nothing(app: App, raised: type[BaseException], capsys: Any) -> None:
    """The worker starts, jobs fail and are retried, a callback fails on the event loop, and the worker stops. The lines
    are on standard error."""
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
    assert f"job {failed[0].job_id} (on_loop) failed (" in said
    assert "the handler breaks" in said


def test_changes_to_a_jobs_tags_are_not_recorded(app: App) -> None:
    """The job keeps the tags with which it was submitted, whatever its code adds to them."""
    with working(app, children=1, threads=1, grace=3.0) as worker:
        handle = evil.spoils_its_tags.using(tags={"a": "b"}).submit()
        until(lambda: any(isinstance(f, JobRetried) for f in facts_of(app, handle.job_id)), 60.0)
        requests = until(lambda: [r for r in log_of(app, app.names.coordination) if r.event.job_id == handle.job_id])
        assert requests[0].event.fact.spec.tags == {"a": "b"}
        assert worker.error is None


def test_a_failing_hook_or_resource_fails_at_most_its_job(broker: str, namespace: str) -> None:
    """The worker survives hooks that raise `SystemExit`, resources that raise errors when they are closed, and
    exceptions whose own code raises errors."""
    app = evil.app_with_broken_hooks(namespace, Settings(bootstrap=broker, submit_timeout=20.0))
    ensure(app, app.settings)
    tasks: dict[str, Any] = dict(app.tasks)
    with working(app, threads=2, grace=3.0) as worker:
        handles = {(task, how): tasks[task].submit(how) for task in ("plain", "coroutine") for how in ("fails", "ends")}
        until(lambda: closings(app).keys() >= {h.job_id for h in handles.values()}, 60.0)
        until(lambda: len(app.told) >= 2 * 2, 60.0, "hooks called")  # type: ignore[attr-defined]
        found = closings(app)
        for (_, how), handle in handles.items():
            (end,) = found[handle.job_id]
            assert isinstance(end.event.fact, JobFailedFact if how == "fails" else JobSucceeded)
    assert worker.error is None


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit, "__class__", "__str__"])
def test_a_resource_that_cannot_be_opened_ends_the_worker(broker: str, namespace: str, raised: Any) -> None:
    """Whatever error the opening raises, the worker ends with an error that names the resource."""
    app = evil.app_with_broken_resource(namespace, Settings(bootstrap=broker, submit_timeout=20.0), raised)
    ensure(app, app.settings)
    with working(app, grace=3.0) as worker:
        until(lambda: worker.error, 60.0)
    assert isinstance(worker.error, ResourceFailed)
    assert "resource 'closed' could not be opened" in str(worker.error)
