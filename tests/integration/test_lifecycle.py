"""`App.lifecycle` on a real broker: everything once for a group, shared by its members, again after a death."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from jobledger import App, ConfigError, Settings
from jobledger.errors import UnknownFact
from jobledger.kafka.topics import ensure
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobFailed, JobStarted, JobSubmitted, JobSucceeded, Recorded
from jobledger.writer import LogWriter, Outgoing
from tests.integration.test_worker import future_fact
from tests.integration.worker_app import closings, until, working

pytestmark = pytest.mark.kafka


@pytest.fixture
def app(broker: str, namespace: str) -> Iterator[App]:
    """An app that has run forty jobs, every fourth of which failed."""
    made = App(namespace, settings=Settings(bootstrap=broker), partitions=2)

    @made.task(retry=1)
    async def work(number: int) -> int:
        if not number % 4:
            raise ValueError(number)
        return number

    ensure(made, made.settings)
    made.submit_many(work.job(n) for n in range(40))
    with working(made):
        until(lambda: len(closings(made)) == 40)
    yield made
    made.close()


def kinds(records: list[Recorded]) -> Counter[str]:
    return Counter(type(r.event.fact).__name__ for r in records)


def test_a_group_reads_everything_once_and_goes_on_where_it_was(app: App) -> None:
    """Each partition in its order; a second visit gets only what is new; another group gets it all."""
    with app.lifecycle("billing", timeout=3.0) as stream:
        first = list(stream)
    assert kinds(first) == {
        "JobSubmitted": 40, "JobStarted": 40, "JobSucceeded": 30, "JobFailed": 10, "DeadLettered": 10,
    }  # fmt: skip
    places: dict[tuple[str, int], list[int]] = {}
    for record in first:
        places.setdefault((record.position.topic, record.position.partition), []).append(record.position.offset)
    assert all(offsets == sorted(set(offsets)) for offsets in places.values())
    app.tasks["work"].submit(1)
    with app.lifecycle("billing", timeout=3.0) as stream:
        assert kinds(list(stream)) == {"JobSubmitted": 1}
    with app.lifecycle("audit", timeout=3.0, facts=(JobSucceeded, JobFailed)) as stream:
        assert kinds(list(stream)) == {"JobSucceeded": 30, "JobFailed": 10}


def test_what_was_being_dealt_with_when_the_reader_died_comes_again(app: App) -> None:
    """An exception in the middle of a record: that one and what follows, nothing from before."""
    seen: list[str] = []

    def read() -> None:
        with app.lifecycle("billing", facts=(JobSubmitted,), timeout=5.0) as stream:
            for record in stream:
                if len(seen) == 15:
                    raise ConnectionError(record.event.job_id)
                seen.append(record.event.job_id)

    with pytest.raises(ConnectionError) as died:
        read()
    with app.lifecycle("billing", facts=(JobSubmitted,), timeout=3.0) as stream:
        after = [record.event.job_id for record in stream]
    assert str(died.value) in after
    assert len(after) == 25
    assert len({*seen, *after}) == 40


def test_members_of_a_group_share_and_async_readers_do_not_hold_the_loop(app: App) -> None:
    """Two members read everything between them, one of them with ``async for``."""
    shares: list[list[str]] = [[], []]

    def plain() -> None:
        with app.lifecycle("shared", facts=(JobStarted,), timeout=8.0) as stream:
            shares[0].extend(record.event.job_id for record in stream)

    async def alternating() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.01)

        beating = asyncio.create_task(beat())
        with app.lifecycle("shared", facts=(JobStarted,), timeout=8.0) as stream:
            async for record in stream:
                shares[1].append(record.event.job_id)
        beating.cancel()
        return beats

    thread = threading.Thread(target=plain)
    thread.start()
    beats = asyncio.run(alternating())
    thread.join()
    assert len({*shares[0], *shares[1]}) == 40
    assert beats > 100


def test_garbage_is_passed_and_an_unknown_fact_is_not(app: App) -> None:
    """What no reader can read is counted; what a newer reader could read stops this one, and stays."""
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.names.lifecycle, b"garbage", "k", 0)])
    with app.lifecycle("audit", facts=(JobSucceeded,), timeout=3.0) as stream:
        assert len(list(stream)) == 30
        assert stream.skipped == 1
    event = JobEvent("e", "j", 1, 1, 1, 0, "t", "q", None, None, "s", None, JobStarted("w", "t", 0))
    schema = codec.SCHEMA_TEXT.replace("JobExpired", "JobTeleported")
    writer.send([Outgoing(app.names.schemas, schema.encode(), codec.fingerprint(schema).hex())])
    writer.send([Outgoing(app.names.lifecycle, future_fact(schema, event), "k", 0)])
    writer.close()
    for _ in range(2):
        with pytest.raises(UnknownFact, match="upgrade"), app.lifecycle("audit", timeout=3.0) as stream:
            list(stream)


def test_options_that_mean_nothing_are_refused(app: App) -> None:
    with pytest.raises(ConfigError, match="neither"):
        app.lifecycle("g", start="middle")  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigError, match="no facts"):
        app.lifecycle("g", facts=(int,))
    with pytest.raises(ConfigError, match="group"):
        app.lifecycle("a b")
