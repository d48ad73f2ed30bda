"""What goes wrong with what people hand in: each a clear error or a dead letter, with
the job whole, and never a hang."""

from __future__ import annotations

import msgspec
import pytest

from jobledger import NO_RETRY, App, Retry, Settings
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import DeadLettered, JobRetried, JobSucceeded, Leased, ReleaseRequested
from tests.integration import isolated_app
from tests.integration.worker_app import Unprintable, closings, log_of, until, working

pytestmark = pytest.mark.kafka

LARGE = "x" * (900 << 10)


def test_an_argument_of_900_kib_goes_every_way(broker: str, namespace: str) -> None:
    """Run, tried again, dead-lettered, handed to a fallback, leased: the job is carried whole each time."""
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

    @app.task(long=True, lease=5)
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
    assert said[jobs["runs"]][0].event.fact.result == b"%d" % len(LARGE)  # type: ignore[union-attr]  # it succeeded
    retried = said[jobs["retries"]][0].event.fact
    assert isinstance(retried, JobRetried)
    assert "its str() raised" in retried.error.message
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
    assert said[console][0].event.fact.result == b"%d" % len(LARGE)  # type: ignore[union-attr]  # it succeeded


def test_so_it_does_through_a_child_process(broker: str) -> None:
    """There and back."""
    app = isolated_app.app
    app.settings = Settings(bootstrap=broker, submit_timeout=20.0)
    ensure(app, app.settings)
    handle = isolated_app.echoes.submit(LARGE)
    with working(app, children=1):
        fact = until(lambda: closings(app).get(handle.job_id))[0].event.fact
    assert isinstance(fact, JobSucceeded)
    assert fact.result == msgspec.json.encode(LARGE)


def test_a_changed_signature_dead_letters_with_both(broker: str, namespace: str) -> None:
    """What was submitted, and what the task takes now."""
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
