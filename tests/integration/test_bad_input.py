"""Bad input from users of the library: each case results in a clear error or a dead letter with the whole job, and
never in a hang."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass

import msgspec
import pytest

from jobledger import NO_RETRY, App, Retry, Settings
from jobledger.errors import JobledgerError
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import (
    DeadLettered,
    JobFailedFact,
    JobRetried,
    JobSucceeded,
    Leased,
    ReleaseRequested,
)
from tests.integration import isolated_app
from tests.integration.worker_app import Unprintable, closings, log_of, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

LARGE = "x" * (900 << 10)

RATES = {"EUR": 1.0, "SEK": 0.09}


@dataclass
class Price:
    """A value with a check that raises `KeyError` for an unknown currency."""

    currency: str

    def __post_init__(self) -> None:
        RATES[self.currency]


class WordlessTimeout(TimeoutError):
    """A timeout error of a library, whose ``str()`` fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_argument_of_900_kib_survives_retry_fallback_dead_letter_and_lease(broker: str, namespace: str) -> None:
    """The job runs, is retried, dead-lettered, passed to a fallback and leased. Each record contains the whole
    argument."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=20.0), partitions=2)

    @app.task
    async def runs(text: str) -> int:
        return len(text)

    @app.task(retry=Retry(max_attempts=2, initial=3600))
    async def retries(text: str) -> None:
        raise Unprintable

    @app.task(retry=NO_RETRY, fallback="runs")
    def fails(text: str) -> None:
        raise ValueError(text)

    @app.task(long=True, lease=60)
    async def leased(text: str) -> int:
        return len(text)

    ensure(app, app.settings)
    jobs = {name: app.tasks[name].submit(LARGE).job_id for name in ("runs", "retries", "fails", "leased")}

    def facts(topic: str) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for record in log_of(app, topic):
            found.setdefault(record.event.job_id, []).append(record.event.fact)
        return found

    names = app.names
    with working(app):
        until(lambda: len(closings(app)) == 4, what="two ends, a retry and the fallback's end")
        until(lambda: any(isinstance(f, JobSucceeded) for f in facts(names.coordination).get(jobs["leased"], [])))
    said = closings(app)
    assert said[jobs["runs"]][0].event.fact.result == b"%d" % len(LARGE)  # type: ignore[union-attr]  # the job succeeded
    retried = said[jobs["retries"]][0].event.fact
    assert isinstance(retried, JobRetried)
    assert "str() of this exception raised" in retried.error.message
    (asked,) = facts(names.coordination)[jobs["retries"]]
    assert isinstance(asked, ReleaseRequested)
    (letter,) = facts(names.dead_letter)[jobs["fails"]]
    assert isinstance(letter, DeadLettered)
    assert len(letter.error.message) == 4_096
    lease, *_ = facts(names.coordination)[jobs["leased"]]
    assert isinstance(lease, Leased)
    for spec in (asked.spec, letter.spec, lease.spec):
        assert msgspec.json.decode(spec.args) == {"text": LARGE}
    (console,) = said.keys() - jobs.values()
    assert said[console][0].event.fact.result == b"%d" % len(LARGE)  # type: ignore[union-attr]  # the job succeeded


def test_an_argument_of_900_kib_reaches_a_child_process_and_comes_back(broker: str) -> None:
    """A large argument reaches a child process, and a large result comes back."""
    app = isolated_app.app
    app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(app, app.settings)
    handle = isolated_app.echoes.submit(LARGE)
    with working(app, children=1):
        fact = until(lambda: closings(app).get(handle.job_id))[0].event.fact
    assert isinstance(fact, JobSucceeded)
    assert fact.result == msgspec.json.encode(LARGE)


def test_arguments_that_do_not_fit_a_changed_signature_dead_letter_the_job(broker: str, namespace: str) -> None:
    """The dead letter names the submitted arguments and the present signature of the task."""
    settings = Settings(bootstrap=broker, submit_timeout=20.0)
    old, new = App(namespace, settings=settings, partitions=1), App(namespace, settings=settings, partitions=1)

    @old.task(name="invoice")
    async def before(order: int, currency: str) -> None: ...

    @new.task(name="invoice")
    async def after(order_id: int) -> None: ...

    ensure(old, settings)
    handle = old.tasks["invoice"].submit(7, "EUR")
    with working(new):
        until(lambda: closings(new).get(handle.job_id))
    (letter,) = [r.event.fact for r in log_of(new, new.names.dead_letter)]
    assert isinstance(letter, DeadLettered)
    assert letter.reason == "bad-arguments"
    assert '{"order":7,"currency":"EUR"} do not fit invoice(order_id: int) -> None' in letter.error.message


def test_a_failing_check_of_arguments_fails_only_its_job(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the code of an argument's class raises, the plain and the keyed job are dead-lettered, and other jobs
    run. The worker's log says so without the values."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=20.0), partitions=1)

    @app.task
    async def plain(price: Price) -> str:
        return price.currency

    @app.task(key="account", timeout=10)
    async def keyed(account: str, price: Price) -> str:
        return price.currency

    ensure(app, app.settings)
    jobs = {}
    for currency in ("SEK", "EUR"):
        jobs["plain", currency] = plain.submit(Price(currency)).job_id
        jobs["keyed", currency] = keyed.submit("a", Price(currency)).job_id
    monkeypatch.delitem(RATES, "SEK")
    with caplog.at_level(logging.INFO), working(app) as worker:
        until(lambda: len(closings(app)) == 4)
        assert worker.error is None
    for (task, currency), job_id in jobs.items():
        fact = closings(app)[job_id][0].event.fact
        if currency == "EUR":
            assert isinstance(fact, JobSucceeded), task
        else:
            assert isinstance(fact, JobFailedFact)
            assert fact.reason == "bad-arguments"
            assert "KeyError: 'SEK'" in fact.error.message
            assert '{"currency":"SEK"}' in fact.error.message
    assert any("bad-arguments" in record.getMessage() for record in caplog.records)
    assert not any("SEK" in record.getMessage() for record in caplog.records)


def test_a_timeout_error_without_text_is_still_a_timeout(broker: str, namespace: str) -> None:
    """A coroutine replaces the cancellation at its time limit by an error that cannot be printed."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=20.0), partitions=1)

    @app.task(timeout=0.2, retry=NO_RETRY)
    async def wordless() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise WordlessTimeout from None

    ensure(app, app.settings)
    handle = wordless.submit()
    with working(app) as worker:
        fact = until(lambda: closings(app).get(handle.job_id))[0].event.fact
        assert worker.dispatcher is not None
        until(lambda: not worker.dispatcher.running_jobs.jobs)  # type: ignore[union-attr]  # set, as asserted above
    assert isinstance(fact, JobFailedFact)
    assert fact.reason == "timeout"
    assert "str() of this exception raised" in fact.error.message


@pytest.mark.parametrize("how", ["stops the loop", "raises SystemExit beside"])
def test_a_job_that_ends_the_event_loop_closes_no_other_job(broker: str, namespace: str, how: str) -> None:
    """The worker ends with an error that says why. The other running jobs get no outcome from this worker, and run in
    the next one."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=20.0), partitions=1)
    once: list[int] = []
    first_ended = threading.Event()

    @app.task(retry=NO_RETRY)
    async def neighbour(n: int) -> int:
        once.append(n)
        await asyncio.sleep(0.0 if first_ended.is_set() else 600.0)
        return n

    @app.task(retry=NO_RETRY)
    async def ends() -> None:
        async def beside() -> None:
            raise SystemExit(3)

        if first_ended.is_set():
            return
        if how == "stops the loop":
            asyncio.get_running_loop().stop()
        else:
            asyncio.get_running_loop().create_task(beside())
        await asyncio.sleep(600.0)

    ensure(app, app.settings)
    handles = [neighbour.submit(n) for n in range(3)]

    def first_worker() -> None:
        with working(app) as worker:
            until(lambda: len(once) == 3)
            ends.submit()
            assert worker.ended.wait(PATIENCE * 30)

    with pytest.raises(JobledgerError, match="event loop stopped unexpectedly"):
        first_worker()
    assert closings(app) == {}
    left = {
        "jobledger-fetch-default",
        "jobledger-ack-tracker",
        "jobledger-takeover",
        "jobledger-control",
        "jobledger-schemas",
    }
    until(lambda: not left & {t.name for t in threading.enumerate()}, 20.0, "the end of the worker's threads")
    first_ended.set()
    with working(app) as second:
        until(lambda: second.ended.is_set() or len(closings(app)) == 4)
    for handle in handles:
        assert [type(r.event.fact) for r in closings(app)[handle.job_id]] == [JobSucceeded]
