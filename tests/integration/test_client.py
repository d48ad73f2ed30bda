"""The client with a real broker: acknowledged submissions are in the log, and refused ones are not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobledger import (
    App,
    BadArguments,
    BrokerUnavailable,
    JobCancelled,
    PayloadTooLarge,
    Position,
    ResultInsideJob,
    Settings,
    State,
    StoreError,
    TopicMissing,
)
from jobledger.definitions.context import enter
from jobledger.definitions.task import Task
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.schemas.events import JobSubmitted, Recorded
from jobledger.streams.status.materializer import Materializer
from tests.integration.worker_app import closings, log_of, until, working
from tests.patience import PATIENCE
from tests.running_job import running_job

pytestmark = pytest.mark.kafka


@pytest.fixture
def app(broker: str, namespace: str) -> Iterator[App]:
    """Yield an app with its topics."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=60.0), partitions=3)
    declare(app)
    ensure(app, app.settings)
    yield app
    app.close()


def declare(app: App) -> Task[[str, str], str]:
    """Declare the only task of these tests."""

    @app.task(queue="mail")
    async def send_mail(to: str, template: str = "welcome") -> str:
        return to

    return send_mail


def read(app: App, position: Position) -> Recorded:
    """Return the record at a position."""
    with LogReader(app.settings) as reader:
        message = reader.at(position)
    assert message is not None
    return recorded(message, decoder(app.settings, app.names).decode)


def everything(app: App, topic: str) -> list[Recorded]:
    """Return all events of a topic."""
    decode = decoder(app.settings, app.names).decode
    with LogReader(app.settings) as reader:
        return [recorded(m, decode) for p in range(3) for m in reader.read(topic, p, 0)]


def test_a_submission_is_in_the_log_when_submit_returns(app: App) -> None:
    """At the handle's position is the whole job, with its id, its arguments and its tags."""
    handle = app.tasks["send_mail"].using(tags={"tenant": "acme"}).submit("a@example.org")
    found = read(app, handle.position)
    assert found.event.job_id == handle.job_id
    assert (found.event.run, found.event.attempt, found.event.release) == (1, 1, 1)
    assert isinstance(found.event.fact, JobSubmitted)
    assert found.event.fact.spec.args == b'{"to":"a@example.org"}'
    assert found.event.fact.spec.tags == {"tenant": "acme"}
    assert handle.position.topic == app.names.jobs("mail")
    assert abs(found.appended_ms - time.time() * 1000) < 60_000


def test_a_delayed_job_goes_to_the_coordinator(app: App) -> None:
    """A delayed submission is on the coordination topic as release 0, with its delay and its home, and on no work
    topic."""
    handle = app.tasks["send_mail"].using(delay=60).submit("a@example.org")
    found = read(app, handle.position)
    assert handle.position.topic == app.names.coordination
    assert (found.event.release, found.event.home) == (0, handle.job_id)
    assert isinstance(found.event.fact, JobSubmitted)
    assert found.event.fact.delay_ms == 60_000
    assert everything(app, app.names.jobs("mail")) == []


def test_submit_async_leaves_the_event_loop_free(app: App) -> None:
    """Many submissions run at the same time in one event loop, and each of them is acknowledged."""
    task = app.tasks["send_mail"]

    async def many() -> set[str]:
        handles = await asyncio.gather(*(task.submit_async(f"{i}@example.org") for i in range(200)))
        return {h.job_id for h in handles}

    ids = asyncio.run(many())
    assert {r.event.job_id for r in everything(app, app.names.jobs("mail"))} == ids
    assert len(ids) == 200


@dataclass(frozen=True)
class Sum:
    """The result of a job."""

    total: int
    on: dt.date


def test_coroutines_submit_wait_and_cancel(broker: str, namespace: str, tmp_path: Path) -> None:
    """Submissions, waits for results, queries and cancels do not block the event loop. Results are what the task
    returned."""
    url = f"sqlite:///{tmp_path / 'status.db'}"
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=60.0, status_url=url), partitions=3)

    @app.task
    async def add(a: int, b: int) -> Sum:
        return Sum(a + b, dt.date(2026, 1, 2))

    @app.task
    async def hang() -> None:
        await asyncio.sleep(3_600)

    ensure(app, app.settings)

    async def asks() -> None:
        handles = await asyncio.gather(*(add.submit_async(n, 1) for n in range(200)))
        assert await asyncio.gather(*(h.result_async(PATIENCE * 60) for h in handles)) == [
            Sum(n + 1, dt.date(2026, 1, 2)) for n in range(200)
        ]
        assert (await handles[7].status_async()).state is State.SUCCEEDED
        assert (await app.job_async(handles[7].job_id)).result == {"total": 8, "on": "2026-01-02"}
        assert len([status async for status in app.jobs_async(page=90)]) == 200
        waits = await asyncio.gather(hang.submit_async(), hang.submit_async())
        await waits[0].cancel_async("no need")
        await app.cancel_async(waits[1].job_id, "no need either", by="ann")
        for handle, said in zip(waits, ("no need", "no need either"), strict=True):
            with pytest.raises(JobCancelled, match=said):
                await handle.result_async(PATIENCE * 60)

    stop = threading.Event()
    table = Materializer(app.names, app.settings, list(app.queues), url)
    reading = threading.Thread(target=table.run, args=(stop,))
    reading.start()
    try:
        with working(app):
            asyncio.run(asks())
    finally:
        stop.set()
        reading.join(PATIENCE * 30)
        app.close()
    assert not reading.is_alive()


def test_a_job_id_chosen_by_the_caller_is_one_job_however_often_submitted(broker: str, namespace: str) -> None:
    """In every form of submission, also inside a job, the records carry the chosen id. The job runs once, with the
    arguments of the first submission."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=60.0), partitions=3)
    ran: list[int] = []

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    @app.task
    async def parent(job_id: str) -> None:
        await note.using(job_id=job_id).submit_async(9)

    ensure(app, app.settings)
    mine, delayed = str(uuid.uuid4()), str(uuid.uuid4())
    handles = [note.using(job_id=mine).submit(1), asyncio.run(note.using(job_id=mine.upper()).submit_async(2))]
    handles += app.submit_many([note.using(job_id=uuid.UUID(mine)).job(3), note.job(4)])
    assert [h.job_id == mine for h in handles] == [True, True, True, False]
    assert note.using(job_id=delayed, delay=3_600).submit(5).job_id == delayed
    assert everything(app, app.names.coordination)[0].event.job_id == delayed
    last = parent.submit(mine)
    with working(app):
        until(lambda: len(closings(app)) == 3, 60, "all have ended")
        until(lambda: len([r for r in log_of(app, app.names.jobs("default")) if r.event.job_id == mine]) == 4, 60)
        note.submit(6)
        until(lambda: 6 in ran, 60)
    assert sorted(ran) == [1, 4, 6]
    assert {mine, last.job_id} <= set(closings(app))
    app.close()


def test_submit_many_returns_a_handle_for_each_job_in_order(app: App) -> None:
    """Handles have the order of the jobs, and each handle has the position of its job's record."""
    task = app.tasks["send_mail"]
    handles = app.submit_many(task.job(f"{i}@example.org") for i in range(25_000))
    found = {r.position: r.event for r in everything(app, app.names.jobs("mail"))}
    assert len(handles) == len(found) == 25_000
    for number in (0, 1, 12_345, 24_999):
        event = found[handles[number].position]
        assert event.job_id == handles[number].job_id
        assert isinstance(event.fact, JobSubmitted)
        assert event.fact.spec.args == b'{"to":"%d@example.org"}' % number
    assert app.submit_many([]) == []


def test_a_bad_job_stops_submit_many_with_its_error(app: App) -> None:
    """An argument that does not fit stops `submit_many` with an error that names the task."""
    task = app.tasks["send_mail"]
    with pytest.raises(BadArguments, match="send_mail"):
        app.submit_many(task.job(to) for to in ("a", 5))


def test_a_payload_above_the_limit_names_size_and_limit(app: App) -> None:
    """A record that is too large is refused with an error that names its size and the setting of the limit. Nothing is
    sent."""
    with pytest.raises(PayloadTooLarge, match=r"1,?[0-9]+.*JOBLEDGER_MAX_RECORD_BYTES"):
        app.tasks["send_mail"].submit("x" * 1_000_001)
    assert everything(app, app.names.jobs("mail")) == []


def test_a_large_argument_below_the_limit_arrives(app: App) -> None:
    """An argument of 900 KiB is accepted, and the whole argument is in the log."""
    handle = app.tasks["send_mail"].submit("x" * 900 * 1024)
    fact = read(app, handle.position).event.fact
    assert isinstance(fact, JobSubmitted)
    assert len(fact.spec.args) > 900 * 1024


def test_the_error_about_missing_topics_names_the_command(broker: str, namespace: str) -> None:
    """Submitting before the topics exist fails within seconds and names the command that creates them."""
    app = App(namespace, settings=Settings(bootstrap=broker, submit_timeout=60.0))
    task = declare(app)
    began = time.monotonic()
    with pytest.raises(TopicMissing, match="jobledger topics apply"):
        task.submit("a@example.org", "b")
    assert time.monotonic() - began < PATIENCE * 10, "it has waited for as long as a submission may take"
    app.close()


def closed_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_an_unreachable_broker_is_named_in_an_error_within_the_time_limit(namespace: str) -> None:
    """Without a broker, a submission fails after its time limit with an error that names the address."""
    address = f"127.0.0.1:{closed_port()}"
    app = App(namespace, settings=Settings(bootstrap=address, submit_timeout=1.0))
    task = declare(app)
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=address):
        task.submit("a@example.org", "b")
    assert time.monotonic() - began < 20
    app.close()


def test_bad_arguments_fail_before_anything_connects(namespace: str) -> None:
    """Arguments are checked first: even without a broker, the error is about the arguments."""
    app = App(namespace, settings=Settings(bootstrap=f"127.0.0.1:{closed_port()}", submit_timeout=1.0))
    task = declare(app)
    with pytest.raises(BadArguments, match="nope"):
        task.submit(nope=1)  # type: ignore[call-arg]  # intended
    assert app._client is None


def test_a_rerun_of_a_job_submits_the_same_children(app: App) -> None:
    """The ids of jobs that a job submits are computed from their parent, so a rerun submits no new jobs. Each of these
    jobs names its parent."""
    task = app.tasks["send_mail"]
    parent = "01890a5d-ac96-774b-bcce-b302099a8057"
    ids = []
    try:
        for _ in range(2):
            enter(running_job(parent))
            ids.append([task.submit("a").job_id, task.submit("a").job_id, task.submit("b").job_id])
    finally:
        enter(None)
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3
    fact = everything(app, app.names.jobs("mail"))[0].event.fact
    assert isinstance(fact, JobSubmitted)
    assert fact.spec.parent == parent


def test_waiting_inside_a_job_is_refused(app: App) -> None:
    """A job that waits for another job of the same workers could wait forever, if all of them are busy with such jobs."""
    handle = app.tasks["send_mail"].submit("a")
    try:
        enter(running_job(handle.job_id))
        with pytest.raises(ResultInsideJob, match="refused"):
            handle.result(timeout=1)
    finally:
        enter(None)


def test_a_query_without_a_status_table_names_the_missing_table(app: App, tmp_path: object) -> None:
    """Without a status table, a query fails with an error that names the missing file, and not with an unknown job."""
    app.settings = app.settings.with_status_url(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(StoreError, match=r"none\.db"):
        app.job("01890a5d-ac96-774b-bcce-b302099a8057")


def test_a_forked_child_submits_with_a_connection_of_its_own(app: App) -> None:
    """After a fork, as in preforking web servers, the child process submits with its own producer."""
    task = app.tasks["send_mail"]
    task.submit("parent")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's coverage is not collected
        try:
            os.write(write_end, task.submit("child").job_id.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        job_id = pipe.read()
    os.waitpid(child, 0)
    assert job_id in {r.event.job_id for r in everything(app, app.names.jobs("mail"))}
    task.submit("parent again")


def test_a_submission_whose_event_loop_was_closed_harms_no_later_one(app: App) -> None:
    """A coroutine gives up before the acknowledgement, and its event loop is closed. Later submissions of the same
    client work."""

    async def gives_up(n: int) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(app.tasks["send_mail"].submit_async(f"{n}@example.org"), 0.0001)

    for n in range(50):
        asyncio.run(gives_up(n))
    assert app.tasks["send_mail"].submit("a@example.org").position.offset >= 0
    assert asyncio.run(app.tasks["send_mail"].submit_async("a@example.org")).position.offset >= 0
