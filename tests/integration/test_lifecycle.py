"""`App.lifecycle` with a real broker: a group reads everything once, its members share the partitions, and records are
read again after a failure."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from jobledger import App, ConfigError, Settings
from jobledger.client.lifecycle import LifecycleStream
from jobledger.errors import UnknownFact
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.topics import ensure
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas import codec
from jobledger.schemas.events import (
    CancelRequested,
    JobEvent,
    JobFailedFact,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    QueueLimited,
    QueuePaused,
    QueueResumed,
    Recorded,
    fact_name,
)
from tests.integration.test_worker import future_fact
from tests.integration.worker_app import closings, until, working

pytestmark = pytest.mark.kafka


@pytest.fixture
def app(broker: str, namespace: str) -> Iterator[App]:
    """Yield an app with forty jobs that have run. Every fourth job failed."""
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
    return Counter(fact_name(r.event.fact) for r in records)


def read_at_least(stream: LifecycleStream, least: int) -> list[Recorded]:
    """Return at least ``least`` records, and those that follow until no record has come for three seconds."""
    found: list[Recorded] = []
    for record in stream:
        found.append(record)
        if len(found) >= least:
            stream._timeout = 3.0
    return found


def test_a_group_reads_everything_once_and_continues_where_it_stopped(app: App) -> None:
    """Each partition is read in order. A second stream of the group returns only new records. Another group reads
    everything."""
    with app.lifecycle("billing", timeout=60.0) as stream:
        first = read_at_least(stream, 130)
    assert kinds(first) == {
        "JobSubmitted": 40, "JobStarted": 40, "JobSucceeded": 30, "JobFailed": 10, "DeadLettered": 10,
    }  # fmt: skip
    places: dict[tuple[str, int], list[int]] = {}
    for record in first:
        places.setdefault((record.position.topic, record.position.partition), []).append(record.position.offset)
    assert all(offsets == sorted(set(offsets)) for offsets in places.values())
    app.tasks["work"].submit(1)
    with app.lifecycle("billing", timeout=60.0) as stream:
        assert kinds(read_at_least(stream, 1)) == {"JobSubmitted": 1}
    with app.lifecycle("audit", timeout=60.0, facts=(JobSucceeded, JobFailedFact)) as stream:
        assert kinds(read_at_least(stream, 40)) == {"JobSucceeded": 30, "JobFailed": 10}


def test_a_record_that_was_being_processed_at_a_failure_is_read_again(app: App) -> None:
    """If the reader's loop raises an exception, the next stream of the group returns the same record and those after
    it, and none before it."""
    seen: list[str] = []

    def read() -> None:
        with app.lifecycle("billing", facts=(JobSubmitted,), timeout=60.0) as stream:
            for record in stream:
                if len(seen) == 15:
                    raise ConnectionError(record.event.job_id)
                seen.append(record.event.job_id)

    with pytest.raises(ConnectionError) as died:
        read()
    with app.lifecycle("billing", facts=(JobSubmitted,), timeout=60.0) as stream:
        after = [record.event.job_id for record in read_at_least(stream, 25)]
    assert str(died.value) in after
    assert len(after) == 25
    assert len({*seen, *after}) == 40


def test_members_of_a_group_share_partitions_and_async_readers_do_not_block(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two members, one of them with ``async for``. Each reads the records of its own partitions, and together
    they read everything. The event loop is not blocked meanwhile."""
    shares: list[list[Recorded]] = [[], []]
    streams = [app.lifecycle("shared", facts=(JobStarted,)) for _ in range(2)]
    done, beats, fetch = threading.Event(), 0, streams[1]._fetch
    at_fetches: list[int] = []

    def fetched() -> None:
        fetch()
        at_fetches.append(beats)

    monkeypatch.setattr(streams[1], "_fetch", fetched)

    def plain() -> None:
        with streams[0] as stream:
            for record in stream:
                shares[0].append(record)

    async def alternating() -> None:
        async def beat() -> None:
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0.01)

        beating = asyncio.create_task(beat())
        with streams[1] as stream:
            async for record in stream:
                shares[1].append(record)
        await beating

    def read(share: list[Recorded]) -> set[tuple[str, int]]:
        return {(r.position.topic, r.position.partition) for r in share if r.event.job_id.startswith("late")}

    places = {(topic, p) for topic in streams[0]._topics for p in range(partitions_of(app.settings, topic))}
    threads = [threading.Thread(target=plain), threading.Thread(target=lambda: asyncio.run(alternating()))]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(s._owned for s in streams) and sum(len(s._owned) for s in streams) == len(places))
        writer = LogWriter(app.settings, app.names)
        start = JobEvent(
            "e", "late", 1, 1, 1, 0, "work", "default", None, None, "s", None, JobStarted("w", None, {}, "t", 0)
        )
        for n, (topic, partition) in enumerate(sorted(places) * 3):
            value = codec.encode(msgspec.structs.replace(start, job_id=f"late-{n}"))
            writer.send([Outgoing(topic, value, "k", partition)])
        writer.close()
        until(lambda: len({r.event.job_id for share in shares for r in share}) == 40 + 3 * len(places))
        until(lambda: len(at_fetches) >= 10)
        # A fetch without records waits for a while, and the event loop runs meanwhile.
        assert max(after - before for before, after in itertools.pairwise(at_fetches)) >= 3
        assert [read(share) for share in shares] == [stream._owned for stream in streams]
        assert min(len(stream._owned) for stream in streams) >= len(places) // 2 - 1
    finally:
        done.set()
        for stream in streams:
            stream._closed = True  # ends the loop in the reader's own thread, at its next turn
        for thread in threads:
            thread.join(30)


def test_control_commands_are_in_the_stream(app: App) -> None:
    """The stream contains a pause, a resume and a cancel, each once, although the cancel is on two topics. The
    tombstone of a control command is skipped and not counted."""
    app.pause(queue="default", reason="maintenance")
    app.resume(queue="default")
    app.cancel("0192e4a0-0000-7000-8000-000000000001", "not wanted")
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.names.control, None, "cancel:0192e4a0-0000-7000-8000-000000000001:1")])
    writer.close()
    orders = (QueuePaused, QueueResumed, QueueLimited, CancelRequested)
    with app.lifecycle("audit", facts=orders, timeout=60.0) as stream:
        seen = read_at_least(stream, 3)
        assert stream.skipped == 0
    assert kinds(seen) == {"QueuePaused": 1, "QueueResumed": 1, "CancelRequested": 1}
    (pause,) = [r.event for r in seen if isinstance(r.event.fact, QueuePaused)]
    assert (pause.queue, pause.fact.reason) == ("default", "maintenance")  # type: ignore[union-attr]  # it is a QueuePaused
    with app.lifecycle("pauses", facts=(QueuePaused,), timeout=60.0) as stream:
        assert len(read_at_least(stream, 1)) == 1
    with app.lifecycle("all", timeout=60.0) as stream:
        assert kinds(read_at_least(stream, 133))["CancelRequested"] == 1


def test_reports_of_leased_jobs_are_not_in_the_stream(app: App) -> None:
    """A success on the coordination topic may come from a worker whose job lease has ended. So only the success on the
    lifecycle topic is in the stream."""
    names = app.names
    event = JobEvent("e", "j", 1, 1, 1, 0, "t", "q", None, None, "s", None, JobSucceeded(None, 1))
    stale = msgspec.structs.replace(event, job_id="stale")
    writer = LogWriter(app.settings, names)
    for topic, each in ((names.coordination, stale), (names.coordination, event), (names.lifecycle, event)):
        writer.send([Outgoing(topic, codec.encode(each), "k", 0)])
    writer.close()
    with app.lifecycle("audit", facts=(JobSucceeded,), timeout=60.0) as stream:
        seen = read_at_least(stream, 31)
    assert len(seen) == 31
    assert [r.position.topic for r in seen if r.event.job_id in ("j", "stale")] == [names.lifecycle]


def test_garbage_is_skipped_and_an_unknown_fact_is_not(app: App) -> None:
    """A record that no reader can read is counted and skipped. A fact that a newer version could read stops the stream,
    and is not committed."""
    writer = LogWriter(app.settings, app.names)
    last = JobEvent("e", "last", 1, 1, 1, 0, "t", "q", None, None, "s", None, JobSucceeded(None, 1))
    for value in (b"garbage", codec.encode(last)):  # a reader that has read the second one has skipped the garbage
        writer.send([Outgoing(app.names.lifecycle, value, "k", 0)])
    with app.lifecycle("audit", facts=(JobSucceeded,), timeout=60.0) as stream:
        assert len(read_at_least(stream, 31)) == 31
        assert stream.skipped == 1
    event = JobEvent("e", "j", 1, 1, 1, 0, "t", "q", None, None, "s", None, JobStarted("w", None, {}, "t", 0))
    schema = codec.SCHEMA_TEXT.replace("JobExpired", "JobTeleported")
    writer.send([Outgoing(app.names.schemas, schema.encode(), codec.fingerprint(schema).hex())])
    writer.send([Outgoing(app.names.lifecycle, future_fact(schema, event), "k", 0)])
    writer.close()
    for _ in range(2):
        with pytest.raises(UnknownFact, match="upgrade"), app.lifecycle("audit", timeout=60.0) as stream:
            list(stream)
        with app.lifecycle("audit", timeout=60.0) as stream:
            for _ in range(2):  # the same stream does not skip the fact at the next call
                with pytest.raises(UnknownFact, match="upgrade"):
                    list(stream)


def test_invalid_options_are_refused(app: App) -> None:
    with pytest.raises(ConfigError, match="neither"):
        app.lifecycle("g", start="middle")  # type: ignore[arg-type]  # intended
    with pytest.raises(ConfigError, match="not facts"):
        app.lifecycle("g", facts=(int,))
    with pytest.raises(ConfigError, match="group"):
        app.lifecycle("a b")
