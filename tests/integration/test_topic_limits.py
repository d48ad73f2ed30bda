"""Topics with a smaller limit than the client's: of many records, only those that are too large fail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from jobledger import App, PayloadTooLarge, Settings
from jobledger.kafka.clients import batch_room, partitions_of
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader
from jobledger.schemas.events import JobSubmitted, JobSucceeded
from tests.integration.worker_app import closings, limit_records, log_of, until, working

pytestmark = pytest.mark.kafka

LIMIT = 20_000
LARGE = "x" * 30_000


class Happened(msgspec.Struct, frozen=True):
    what: str


def limit(app: App, *topics: str) -> None:
    """Limit the size of records on these topics to ``LIMIT`` bytes."""
    limit_records(app, LIMIT, *topics)


@pytest.fixture
def app(broker: str, namespace: str) -> Iterator[App]:
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=120.0), partitions=2)

    @app.task
    async def keep(text: str) -> str:
        return text

    @app.task(key="customer", timeout=10.0)
    async def keyed(customer: str, n: int, text: str = "") -> None: ...

    app.event(Happened)
    ensure(app, app.settings)
    yield app
    app.close()


def known_limit(app: App) -> None:
    """Set the limit before the client connects, so that the client knows the limit."""
    limit(app, app.names.jobs("default"), app.events["Happened"].topic, app.names.lifecycle)


def unknown_limit(app: App) -> None:
    """Set the limit while the client is connected, so that the client does not know the limit."""
    app.tasks["keep"].submit("first")
    app.submit_many([app.tasks["keep"].job("second")])
    known_limit(app)


with_both_limits = pytest.mark.parametrize("lower", [known_limit, unknown_limit])


def texts(app: App) -> list[str]:
    found = log_of(app, app.names.jobs("default"))
    args = [msgspec.json.decode(r.event.fact.spec.args) for r in found if isinstance(r.event.fact, JobSubmitted)]
    return sorted(each["text"] for each in args)


@with_both_limits
def test_of_many_jobs_only_the_large_one_fails(app: App, lower: Callable[[App], None]) -> None:
    """1,800 small jobs are accepted and the large one is refused. The error names the index of the large job."""
    lower(app)
    already = texts(app)
    keep = app.tasks["keep"]
    small = [f"small {n} " + "y" * 400 for n in range(1_800)]
    with pytest.raises(
        PayloadTooLarge, match=r"1800 of 1801 jobs were accepted.*: 900 \(.*max\.message\.bytes"
    ) as told:
        app.submit_many(keep.job(text) for text in [*small[:900], LARGE, *small[900:]])
    assert told.value.failed == (900,)
    assert app.names.jobs("default") in str(told.value)
    assert texts(app) == sorted([*already, *small])


def test_keyed_jobs_around_a_large_one_stay_in_order(app: App) -> None:
    """If the client knows the limit, the accepted jobs of a key are in the order of their submission."""
    known_limit(app)
    keyed = app.tasks["keyed"]
    jobs = [keyed.job(f"c{n % 5}", n, LARGE if n % 100 == 50 else "y" * 300) for n in range(1_000)]
    with pytest.raises(PayloadTooLarge) as told:
        app.submit_many(jobs)
    assert told.value.failed == tuple(range(50, 1_000, 100))
    seen: dict[str, list[int]] = {}
    for each in log_of(app, app.names.jobs("default")):
        args = msgspec.json.decode(each.event.fact.spec.args)  # type: ignore[union-attr]
        seen.setdefault(args["customer"], []).append(args["n"])
    assert sum(map(len, seen.values())) == 990
    assert all(numbers == sorted(numbers) for numbers in seen.values())


@with_both_limits
def test_of_jobs_submitted_at_once_only_the_large_one_fails(app: App, lower: Callable[[App], None]) -> None:
    """Single submissions that share a batch with the large one are accepted."""
    lower(app)
    keep = app.tasks["keep"]

    async def submitted() -> list[Any]:
        texts = [LARGE if n == 50 else "y" * 500 for n in range(100)]
        found: list[Any] = await asyncio.gather(*(keep.submit_async(text) for text in texts), return_exceptions=True)
        return found

    failed = {n: error for n, error in enumerate(asyncio.run(submitted())) if isinstance(error, Exception)}
    assert [(n, type(error)) for n, error in failed.items()] == [(50, PayloadTooLarge)]
    with pytest.raises(PayloadTooLarge, match=re.escape(app.names.jobs("default"))):
        keep.submit(LARGE)
    keep.submit("still works")


@with_both_limits
def test_of_many_events_only_the_large_one_fails(app: App, lower: Callable[[App], None]) -> None:
    """The other events are accepted, each with its id in a header."""
    lower(app)
    events = [Happened(LARGE if n == 70 else "y" * 500) for n in range(200)]
    with pytest.raises(PayloadTooLarge, match="199 of 200 events") as told:
        app.emit_many(events)
    assert told.value.failed == (70,)
    topic = app.events["Happened"].topic
    with LogReader(app.settings) as reader:
        found = [m for p in range(partitions_of(app.settings, topic)) for m in reader.read(topic, p, 0)]
    assert len(found) == len({dict(m.headers() or ())["jl-event"] for m in found}) == 199


def test_a_job_above_the_clients_own_limit_fails_alone(app: App) -> None:
    """A job that is refused before it is sent does not keep the other jobs from being accepted."""
    keep = app.tasks["keep"]
    with pytest.raises(PayloadTooLarge, match=r"99 of 100 jobs were accepted.*JOBLEDGER_MAX_RECORD_BYTES") as told:
        app.submit_many(keep.job("x" * 1_100_000 if n == 20 else f"{n}") for n in range(100))
    assert told.value.failed == (20,)
    assert len(texts(app)) == 99


@with_both_limits
def test_of_many_results_only_the_large_one_fails_its_job(app: App, lower: Callable[[App], None]) -> None:
    """Results that share a batch with the large one are accepted, and their jobs succeed."""
    keep = app.tasks["keep"]
    if lower is known_limit:
        limit(app, app.names.lifecycle)
    handles = app.submit_many(keep.job("z" * 30_000 if n == 50 else "y" * 500) for n in range(100))
    with working(app):
        if lower is unknown_limit:
            until(lambda: closings(app))
            limit(app, app.names.lifecycle)
            handles += app.submit_many(keep.job("z" * 30_000 if n == 50 else "y" * 500) for n in range(100))
        until(lambda: {h.job_id for h in handles} <= set(closings(app)))
    ended = closings(app)
    failed = {n for n, h in enumerate(handles) if not isinstance(ended[h.job_id][-1].event.fact, JobSucceeded)}
    assert failed <= {50, 150}
    assert {50 if lower is known_limit else 150} <= failed


def test_batches_are_limited_by_the_topic_with_the_smallest_limit(app: App) -> None:
    """The smallest limit of all topics of the namespace counts. If every topic accepts what the client sends, batches
    are not limited."""
    assert batch_room(app.settings, app.names) is None
    limit(app, app.names.dead_letter)
    room = batch_room(app.settings, app.names)
    assert room is not None
    assert LIMIT - 1_000 < room < LIMIT


def test_a_submission_during_the_first_one_uses_the_second_connection(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client connects a second time if a topic accepts less than the client would send. Coroutines that submit at
    that moment wait for the second connection, because acknowledgements of the first one are no longer read."""
    limit(app, app.names.jobs("default"))
    keep = app.tasks["keep"]

    sent: list[int] = []

    async def submitted() -> list[str]:
        loop = asyncio.get_running_loop()
        during: list[asyncio.Task[Any]] = []

        async def begin() -> None:
            during.extend(asyncio.create_task(keep.submit_async("z" * 10_000)) for _ in range(500))
            await asyncio.sleep(0)  # lets the tasks begin

        def asked(*of: Any) -> int | None:
            room = batch_room(*of)
            asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
            assert app.client._single is not None
            sent.append(len(app.client._single.producer))
            return room

        monkeypatch.setattr("jobledger.log.writer.batch_room", asked)
        async with asyncio.timeout(60):
            handles = [await keep.submit_async("first"), *await asyncio.gather(*during)]
        return [handle.job_id for handle in handles]

    assert len(set(asyncio.run(submitted()))) == 501
    assert sent == [0]
