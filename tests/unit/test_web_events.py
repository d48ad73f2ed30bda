"""The events of the HTTP API: what a listener gets, and what is said where events are missing. No broker: the tests
publish the events themselves."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, BrokerUnavailable
from jobledger.job import State
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import Fact, Position, Recorded
from jobledger.web import Role, TokenFile, create_app, events, feed
from jobledger.web.access import API
from jobledger.web.feed import Feed, Listener, _Reading
from jobledger.web.happenings import Filter, Happening, happening_of, id_of, place_of
from tests.web import FAILED, STARTED, SUBMITTED, Table, build, client

BIG = ev.JobProgressed(1, 2**60, None, "a\nb")


def record(fact: Fact, offset: int = 0, job_id: str = "job-1", topic: str = "shop.lifecycle") -> Recorded:
    """Return a fact as it was read."""
    event = standalone(fact, f"e{offset}", 0, "test", job_id=job_id, task="add", queue="default")
    return Recorded(event, Position(topic, 0, offset), 1_000 + offset)


def happening(fact: Fact, offset: int = 0, job_id: str = "job-1") -> Happening:
    """Return a fact as streams show it."""
    found = happening_of(record(fact, offset, job_id))
    assert found is not None
    return found


class _Still(_Reading):
    """A reading thread that reads nothing: the test publishes."""

    def __init__(self, around: Feed, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(around, loop)
        self.ended = False

    def open(self) -> dict[tuple[str, int], int]:
        return {("shop.lifecycle", 0): 0}

    def start(self) -> None:
        pass


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    table = Table(tmp_path)
    with closing(table.store):
        table.write({"job-1": [SUBMITTED], "job-2": [ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "other"}))]})
        made = build(table.url)
        yield made
        made.close()


@pytest.fixture
def made(app: App, monkeypatch: pytest.MonkeyPatch) -> Feed:
    """A feed whose log is silent."""
    monkeypatch.setattr(feed, "_Reading", _Still)
    return Feed(app)


def publish(made: Feed, *some: Happening) -> None:
    """Publish events as the reading thread does."""
    reading = made._reading
    assert reading is not None
    assert reading.room.acquire(blocking=False)
    made.publish(reading, some, {("shop.lifecycle", 0): 1})


def test_each_fact_has_the_state_after_it() -> None:
    """A delayed submission is scheduled, a request for a cancel changes no state, and inner records are not shown."""
    shown: dict[State | None, ev.Fact] = {
        State.QUEUED: SUBMITTED,
        State.SCHEDULED: ev.JobSubmitted(ev.JobSpec(b"{}"), delay_ms=5),
        State.RUNNING: STARTED,
        State.FAILED: FAILED,
        None: ev.CancelRequested("ann", None),
    }
    for state, fact in shown.items():
        assert happening(fact).state is state
    assert happening_of(record(ev.ReleaseOverdue(ev.JobSpec(b"{}"), 1))) is None


def test_an_event_is_one_message_with_an_id_and_exact_json() -> None:
    """No text in the event can end the message early, and large integers are text."""
    one = happening(BIG, 7)
    head, kind, data, *rest = one.data.decode().split("\n")
    assert (head, kind, rest) == ("id: 1007-shop.lifecycle:0:7", "event: job", ["", ""])
    assert json.loads(data.removeprefix("data: "))["progress"] == {"done": str(2**60), "total": None, "message": "a\nb"}


@given(st.text(max_size=60))
def test_any_id_of_a_client_is_a_place_or_none(text: str) -> None:
    """A client may send anything."""
    place = place_of(text)
    assert place is None or place_of(id_of(*place)) == place
    assert place_of(id_of(Position("a.b-c", 3, 2**62), 17)) == (Position("a.b-c", 3, 2**62), 17)


def test_a_filter_needs_all_of_its_parts() -> None:
    """An event whose tags are not known is sent rather than lost."""
    one = happening(SUBMITTED)
    assert Filter().wants(one)
    assert Filter(frozenset({"job-1"}), ["add"], ["default"], [State.QUEUED], {"tenant": "acme"}).wants(one)
    for wrong in (Filter(frozenset({"x"})), Filter(tasks=["x"]), Filter(queues=["x"]), Filter(states=[State.FAILED])):
        assert not wrong.wants(one)
    assert not Filter(tags={"tenant": "other"}).wants(one)
    assert Filter(tags={"tenant": "acme"}).wants(happening(STARTED))


def test_tags_of_earlier_jobs_come_from_the_table(made: Feed) -> None:
    """An event without tags gets those of its job."""
    some = [happening(STARTED, job_id="job-1"), happening(STARTED, job_id="job-2"), happening(STARTED, job_id="job-3")]
    made.add_tags(some, {"job-3": {"tenant": "memory"}})
    assert [each.tags for each in some] == [{"tenant": "acme"}, {"tenant": "other"}, {"tenant": "memory"}]


def reads(feed: Feed) -> bool:
    """Return whether the feed reads the log now."""
    return feed.running


def test_the_log_is_read_while_somebody_listens(made: Feed) -> None:
    """The first listener starts the reading, and the last one ends it."""

    async def run() -> None:
        first, second = await made.join(), await made.join()
        reading = made._reading
        assert reading is not None
        assert reads(made)
        made.leave(first)
        assert reads(made)
        made.leave(second)
        assert not reads(made)
        assert reading.stop.is_set()
        assert reading.room.acquire(blocking=False)
        made.publish(reading, [happening(STARTED)], {})  # what the thread had read before it saw the end
        third = await made.join()
        assert made.take(third, 10) == ([], False)
        made.leave(third)

    asyncio.run(run())


def test_a_log_that_cannot_be_opened_is_not_tried_by_each_listener(made: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners that wait for the first attempt share its failure; some seconds later the log is tried again."""
    tries = []

    def fails(self: _Still) -> dict[tuple[str, int], int]:
        tries.append(1)
        raise BrokerUnavailable("away")

    async def run() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(_Still, "open", fails)
            found = await asyncio.gather(*(made.join() for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in found] == [BrokerUnavailable] * 3
        assert len(tries) == 1
        made._away_until = 0.0
        made.leave(await made.join())

    asyncio.run(run())


def test_a_slow_listener_loses_events_and_is_told(made: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring stays within its bounds, however slow a listener is. It gets what is left, after a gap."""
    monkeypatch.setattr(feed, "EVENTS_MOST", 5)

    async def run() -> None:
        slow, quick = await made.join(), await made.join()
        for offset in range(4):
            publish(made, happening(STARTED, 2 * offset), happening(FAILED, 2 * offset + 1))
            assert len(made.take(quick, 10)[0]) == 2
        assert made._count == 4
        taken, lost = made.take(slow, 3)
        assert ([each.appended_ms for each in taken], lost) == ([1_004, 1_005, 1_006], True)
        assert [len(part) for part, _ in (made.take(slow, 3), made.take(slow, 3))] == [1, 0]
        assert made.take(slow, 3) == ([], False)

    asyncio.run(run())


def test_a_listener_of_one_job_is_not_woken_for_others(made: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it loses nothing by that, however much happens to other jobs."""
    monkeypatch.setattr(feed, "EVENTS_MOST", 3)

    async def run() -> None:
        one = await made.join(frozenset({"job-1"}))
        for offset in range(10):
            publish(made, happening(STARTED, offset, "job-2"))
        assert not one.wake.is_set()
        publish(made, happening(FAILED, 10))
        assert one.wake.is_set()
        taken, lost = made.take(one, 10)
        assert ([each.job_id for each in taken], lost) == (["job-1"], False)

    asyncio.run(run())


async def text_of(chunks: AsyncIterator[bytes], count: int) -> list[str]:
    """Return the kinds of the next ``count`` messages."""
    kinds: list[str] = []
    async for chunk in chunks:
        kinds += [line.removeprefix("event: ") for line in chunk.decode().split("\n") if line.startswith("event: ")]
        if len(kinds) >= count:
            break
    return kinds


def stream(made: Feed, listener: Listener, wanted: Filter, missed: Any = (), gap: bool = False) -> AsyncIterator[bytes]:
    """Return the body of a response."""

    async def allowed() -> bool:
        return True

    return events._Stream(made, listener, wanted, list(missed), gap, allowed)._chunks()


def test_a_stream_begins_with_ready_and_goes_on_with_what_matches(made: Feed) -> None:
    """What was missed comes first, and what the filter does not want is left out."""

    async def run() -> list[str]:
        listener = await made.join()
        body = stream(made, listener, Filter(states=[State.FAILED]), [happening(FAILED), happening(STARTED)])
        assert await text_of(body, 2) == ["ready", "job"]
        assert events._Stream.catching_up == 1
        body = stream(made, listener, Filter(states=[State.FAILED]))
        publish(made, happening(STARTED, 1), happening(FAILED, 2))
        publish(made, happening(FAILED, 3))
        return await text_of(body, 3)

    try:
        assert asyncio.run(run()) == ["ready", "job", "job"]
    finally:
        events._Stream.catching_up = 0


def test_a_stream_says_where_events_are_missing_and_ends_with_the_log(made: Feed) -> None:
    """After an error of the log each stream has a gap and ends, and the next one opens the log anew."""

    async def run() -> list[str]:
        listener = await made.join()
        body = stream(made, listener, Filter(), gap=True)
        assert await text_of(body, 2) == ["ready", "gap"]
        body = stream(made, listener, Filter())
        reading = made._reading
        assert reading is not None
        from jobledger import TopicMissing

        asyncio.get_running_loop().call_soon(made.failed, reading, TopicMissing("gone"))
        kinds = await text_of(body, 99)
        assert not reads(made)
        other = await made.join()
        assert reads(made)
        assert made.take(other, 1) == ([], False)
        return kinds

    assert asyncio.run(run()) == ["ready", "gap"]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_stream_ends_when_its_token_is_revoked(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """At the latest after the time of a heartbeat, also if there are always events to send."""
    monkeypatch.setattr(feed, "_Reading", _Still)
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.2)
    file = TokenFile(tmp_path / "tokens.json")
    file.add("root", Role.ADMIN)
    token, text = file.add("ann", Role.READ)
    api = create_app(app, tokens=file)
    made: Feed = api.state.services.feed
    kinds: list[str] = []

    async def run() -> None:
        async def publishing() -> None:
            for offset in itertools.count():
                if made.listeners and busy:
                    publish(made, happening(FAILED, offset))
                await asyncio.sleep(0.02)

        async def revoking() -> None:
            await asyncio.sleep(0.5)  # some heartbeats
            assert made.listeners == 1
            TokenFile(file.path).revoke(token.id)

        others = [asyncio.create_task(publishing()), asyncio.create_task(revoking())]
        async with client(api, Authorization=f"Bearer {text}") as asker:
            answer = await asyncio.wait_for(asker.get(f"{API}/events"), 60)  # the client reads up to the end
        kinds.extend(line for line in answer.text.split("\n") if line.startswith("event: "))
        assert others[1].done()
        assert made.listeners == 0
        others[0].cancel()

    asyncio.run(run())
    assert kinds[0] == "event: ready"
    assert ("event: job" in kinds) == busy


def test_the_last_event_of_a_client_is_a_place_in_the_ring(made: Feed) -> None:
    """A client that comes back with the id of an event that the ring has gets what came after it."""

    async def run() -> None:
        first = await made.join()
        publish(made, happening(STARTED, 1), happening(FAILED, 2))
        publish(made, happening(STARTED, 3))
        place = made.find("1001-shop.lifecycle:0:1")
        assert place is not None
        first.at = place
        assert [each.appended_ms for each in made.take(first, 10)[0]] == [1_002, 1_003]
        assert made.find("1009-shop.lifecycle:0:9") is None

    asyncio.run(run())
