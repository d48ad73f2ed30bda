"""Domain events with a real broker: emitted events become one job for each handler; garbage, changed classes and
restarts are tested, too."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fastavro
import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.cimpl import NewPartitions, NewTopic
from sqlalchemy import Column, Integer, MetaData, Table

from jobledger import App, BadEvent, ConfigError, EventHandle, IncompatibleEvent, Settings, TopicMissing
from jobledger.consumers.router import initial_offsets
from jobledger.consumers.router.backfill import Backfill, BackfillPlan, BackfillProgress, events_per_second
from jobledger.consumers.router.router import Router
from jobledger.kafka.clients import admin, consumer_config, partitions_of, producer, producer_config
from jobledger.kafka.clients import consumer as make_consumer
from jobledger.kafka.topics import ensure
from jobledger.log import group_offsets
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas.events import JobSubmitted, JobSucceeded, Position, RecordRejected
from jobledger.streams.projections.runner import ProjectionRunner
from tests.integration.worker_app import limit_records, log_of, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


class UserRegistered(msgspec.Struct, frozen=True):
    user_id: str
    plan: str = "free"


class Changed(msgspec.Struct):
    """`UserRegistered` with another type of one field."""

    user_id: int


class Grown(msgspec.Struct):
    """`UserRegistered` with one more field."""

    user_id: str
    plan: str = "free"
    source: str = "web"


class UserLeft(msgspec.Struct, frozen=True):
    user_id: str


class Parcel(msgspec.Struct, frozen=True):
    number: int


def built(namespace: str, broker: str) -> tuple[App, list[tuple[str, str]]]:
    """Create an app with two events, three handlers and a topic of another system. Return the app, and a list of what
    its handlers have run."""
    app = App(namespace, settings=Settings(bootstrap=broker), partitions=2)
    ran: list[tuple[str, str]] = []
    app.event(key="user_id")(UserRegistered)
    app.event(UserLeft)
    app.event(topic=f"{namespace}-parcels", format="json")(Parcel)

    @app.on(UserRegistered, queue="crm")
    async def sync_crm(event: UserRegistered) -> str:
        ran.append(("sync_crm", event.user_id))
        return event.plan

    @app.on(UserRegistered, queue="mail")
    def welcome(event: UserRegistered, template: str = "welcome") -> str:
        ran.append(("welcome", event.user_id))
        return f"{template} {event.user_id}"

    @app.on(Parcel, queue="mail")
    async def track(event: Parcel) -> int:
        ran.append(("track", str(event.number)))
        return event.number

    return app, ran


@pytest.fixture
def lab(broker: str, namespace: str) -> Iterator[tuple[App, list[tuple[str, str]]]]:
    app, ran = built(namespace, broker)
    client = admin(app.settings)
    client.create_topics([NewTopic(f"{namespace}-parcels", 2, 1)])[f"{namespace}-parcels"].result(timeout=20)
    ensure(app, app.settings)
    yield app, ran
    app.close()


Lab = tuple[App, list[tuple[str, str]]]


@contextlib.contextmanager
def routing(app: App) -> Iterator[Router]:
    """Run a router in a thread. The router is stopped at the end of the block, and its error is raised."""
    router, stop, raised = Router(app.registry, app.settings), threading.Event(), []

    def run() -> None:
        try:
            router.run(stop)
        except BaseException as exc:  # noqa: BLE001  # raised again in the test's thread
            raised.append(exc)

    thread = threading.Thread(target=run, name="router")
    thread.start()
    try:
        yield router
    finally:
        stop.set()
        thread.join(timeout=PATIENCE * 40)
        assert not thread.is_alive(), "the router did not end"
    if raised:
        raise raised[0]


def submitted(app: App) -> Counter[str]:
    """Return how often each job was submitted, by id."""
    records = [r for queue in app.queues for r in log_of(app, app.names.jobs(queue))]
    return Counter(r.event.job_id for r in records if isinstance(r.event.fact, JobSubmitted))


def expected(app: App, event_ids: list[str], name: str) -> set[str]:
    """Return the ids of the jobs that events of a type must have."""
    return {handler.job_id(event_id) for event_id in event_ids for handler in app.registry.handlers[name]}


def test_each_handler_of_an_event_is_a_job_of_its_own(lab: Lab) -> None:
    """Events are emitted in every form, also before a router runs. Each pair of event and handler runs once, with the
    unchanged event, and its job has the event's id as a tag."""
    app, ran = lab
    handles = [app.emit(UserRegistered("a", "paid"))]
    handles += app.emit_many(UserRegistered(f"m{i}") for i in range(50))
    with working(app), routing(app):
        late = app.emit(UserRegistered("late"))
        app.emit(UserLeft("a"))  # without a handler
        until(lambda: len(ran) == 104)
    wanted = {(task, who) for task in ("sync_crm", "welcome") for who in ["a", "late", *(f"m{i}" for i in range(50))]}
    assert Counter(ran) == Counter(wanted)
    assert submitted(app) == Counter(expected(app, [h.event_id for h in [*handles, late]], "UserRegistered"))
    crm = app.registry.handler("sync_crm").job_id(handles[0].event_id)
    facts = [r.event for r in log_of(app, app.names.lifecycle) if r.event.job_id == crm]
    assert [f.fact.result for f in facts if isinstance(f.fact, JobSucceeded)] == [b'"paid"']
    (submission,) = [r.event for r in log_of(app, app.names.jobs("crm")) if r.event.job_id == crm]
    assert submission.fact.spec.tags == {"event": handles[0].event_id}  # type: ignore[union-attr]  # a submission
    assert (submission.task, submission.queue) == ("sync_crm", "crm")


def test_events_of_one_key_are_in_one_partition_in_their_order(lab: Lab) -> None:
    """So each reader of the topic sees the events of one user in the order in which they were emitted."""
    app, _ = lab
    handles = app.emit_many(UserRegistered(f"u{i % 3}", str(i)) for i in range(60))
    by_user: dict[int, list[tuple[int, int]]] = {}
    for i, handle in enumerate(handles):
        by_user.setdefault(i % 3, []).append((handle.position.partition, handle.position.offset))
    for places in by_user.values():
        assert len({partition for partition, _ in places}) == 1
        assert places == sorted(places)


def test_a_second_router_continues_where_the_first_one_stopped(lab: Lab) -> None:
    """A clean stop commits everything. Events that are emitted while no router runs wait in the log."""
    app, _ = lab
    handles = app.emit_many(UserRegistered(f"a{i}") for i in range(200))
    with routing(app) as router:
        until(lambda: router.jobs == 400)
    handles += app.emit_many(UserRegistered(f"b{i}") for i in range(200))
    with routing(app) as router:
        until(lambda: router.jobs == 400)
        time.sleep(0.5)
    assert router.events == 200
    assert submitted(app) == Counter(expected(app, [h.event_id for h in handles], "UserRegistered"))


def test_two_routers_share_the_partitions(lab: Lab) -> None:
    """Every event gets its jobs, also while the second router joins and the first one leaves."""
    app, _ = lab
    handles = app.emit_many(UserRegistered(f"a{i}") for i in range(500))
    with routing(app) as second:
        with routing(app) as first:
            until(lambda: len(first.partitions) > 0 and len(second.partitions) > 0, timeout=60.0)
            handles += app.emit_many(UserRegistered(f"b{i}") for i in range(500))
            until(lambda: set(submitted(app)) == expected(app, [h.event_id for h in handles], "UserRegistered"))
        handles += app.emit_many(UserRegistered(f"c{i}") for i in range(500))
        until(
            lambda: set(submitted(app)) == expected(app, [h.event_id for h in handles], "UserRegistered"), timeout=60.0
        )


def test_a_record_that_is_no_event_becomes_a_dead_letter_and_stops_nothing(lab: Lab) -> None:
    """The records are garbage, an unknown schema, a record without a value, and an event whose job is too large for its
    topic."""
    app, ran = lab
    topic = app.events["UserRegistered"].topic
    limit_records(app, 5_000, app.names.jobs("crm"))
    writer = LogWriter(app.settings, app.names)
    bad = [b"garbage", b"\xc3\x01" + b"\x07" * 8 + b"x", None]
    writer.send([Outgoing(topic, value, "k") for value in bad])
    writer.close()
    app.emit(UserRegistered("x" * 20_000))
    app.emit(UserRegistered("good"))
    with working(app), routing(app) as router:
        until(lambda: {("sync_crm", "good"), ("welcome", "good"), ("welcome", "x" * 20_000)} <= set(ran))
        until(lambda: router.rejected == 4)
        until(lambda: len(log_of(app, app.names.dead_letter)) == 4)
    facts = [r.event.fact for r in log_of(app, app.names.dead_letter)]
    letters = [fact for fact in facts if isinstance(fact, RecordRejected)]
    assert sorted(fact.raw_value or b"" for fact in letters)[:3] == sorted(value or b"" for value in bad)
    assert any("max.message.bytes" in fact.error for fact in letters)
    assert {fact.topic for fact in letters} == {topic}


def test_jobs_have_the_tags_of_their_handler_and_a_failing_tag_function_affects_no_other_handler(
    broker: str, namespace: str
) -> None:
    """A job has the event's id and the handler's tags, which are fixed or come from a function of the event. If the
    function fails for an event, one dead letter names the handler, and the other handlers and events get their jobs. A
    backfill of that handler stops with the same reason."""
    app = App(namespace, settings=Settings(bootstrap=broker), partitions=2)
    app.event(UserRegistered)

    def by_plan(event: UserRegistered) -> dict[str, str]:
        if event.plan == "none":
            raise LookupError("no such plan")
        return {"plan": event.plan, "user": event.user_id}

    @app.on(UserRegistered, tags=by_plan)
    async def told(event: UserRegistered) -> None: ...

    @app.on(UserRegistered, tags={"team": "crm"})
    async def fixed(event: UserRegistered) -> None: ...

    ensure(app, app.settings)
    good, bad = app.emit(UserRegistered("a", "paid")), app.emit(UserRegistered("b", "none"))
    with routing(app) as router:
        until(lambda: router.events == 2 and router.rejected == 1)
    found = {(r.event.task, r.event.job_id): r.event.fact.spec.tags for r in log_of(app, app.names.jobs("default"))}  # type: ignore[union-attr]  # submissions
    ids = {name: app.registry.handler(name).job_id for name in ("told", "fixed")}
    assert found == {
        ("told", ids["told"](good.event_id)): {"event": good.event_id, "plan": "paid", "user": "a"},
        ("fixed", ids["fixed"](good.event_id)): {"event": good.event_id, "team": "crm"},
        ("fixed", ids["fixed"](bad.event_id)): {"event": bad.event_id, "team": "crm"},
    }
    (letter,) = [r.event.fact for r in log_of(app, app.names.dead_letter)]
    assert isinstance(letter, RecordRejected)
    assert "handler 'told': its tags= failed for this event: LookupError: no such plan" in letter.error
    backfill = Backfill(app.registry, app.settings, BackfillPlan("told"), lambda job_id: False)
    with pytest.raises(ConfigError, match=r"handler 'told'.*LookupError.*run the backfill again"):
        backfill.run(threading.Event())
    app.close()


def write(app: App, *values: Any, partition: int | None = None) -> list[Position]:
    """Write JSON to the topic of parcels, as another program would."""
    writer = LogWriter(app.settings, app.names)
    topic = app.events["Parcel"].topic
    try:
        return writer.send([Outgoing(topic, json.dumps(value).encode(), "k", partition) for value in values])
    finally:
        writer.close()


def parcels(app: App) -> list[int]:
    """Return the numbers of the parcels that have a job."""
    jobs = [r.event for r in log_of(app, app.names.jobs("mail")) if r.event.task == "track"]
    return sorted(json.loads(job.fact.spec.args)["event"]["number"] for job in jobs)  # type: ignore[union-attr]


def test_topics_of_other_systems_are_read_from_the_routers_first_start_on(lab: Lab) -> None:
    """Records from before the router's first start are skipped, but not the app's own events. Records that are written
    while no router runs are read, and so are the first records of a new partition."""
    app, _ = lab
    topic = app.events["Parcel"].topic
    for partition in range(2):
        write(app, {"number": 1}, {"number": 2}, partition=partition)
    app.emit(UserRegistered("before"))
    with routing(app) as router:
        until(lambda: len(router.partitions) == 4)

        # The offsets are committed before any record is read, because a router that is killed now must not begin at a
        # later end.
        def begun() -> dict[tuple[str, int], int]:
            found = group_offsets.group_offsets(app.settings, app.names.router_group, topic)
            return {place: each.offset for place, each in found.items()}

        until(lambda: begun() == {(topic, 0): 2, (topic, 1): 2})
        until(lambda: router.jobs == 2)
    for partition in range(2):
        write(app, {"number": 10 + partition}, partition=partition)
    with routing(app) as router:
        until(lambda: len(router.partitions) == 4)
        client = admin(app.settings)  # a reference: without the client, its answers are lost
        client.create_partitions([NewPartitions(topic, 3)])[topic].result(timeout=20)
        until(lambda: partitions_of(app.settings, topic) == 3)
        write(app, {"number": 20}, partition=2)
        until(lambda: parcels(app) == [10, 11, 20], timeout=60.0)
    assert router.events == 3


def test_routers_that_start_together_begin_a_topic_at_the_same_offsets(lab: Lab) -> None:
    """The second router gets partitions without a committed offset. These partitions existed at the first start, so the
    router begins at the end that was noted then."""
    app, _ = lab
    topic = app.events["Parcel"].topic
    for partition in range(2):
        write(app, {"number": 1}, partition=partition)
    settings, group = app.settings, app.names.router_group
    asker = make_consumer(consumer_config(settings, group=group))
    begun, note = initial_offsets.at_the_end(settings, group, topic, [0])
    assert begun == {0: 1}
    asker.commit(offsets=[TopicPartition(topic, 0, 1, note)], asynchronous=False)
    assert initial_offsets.at_the_end(settings, group, topic, [0, 1, 2]) == ({1: 1}, note)
    asker.close()


def test_each_event_class_chooses_where_its_topic_begins(lab: Lab) -> None:
    """``start="latest"`` skips past events of the app itself, and ``"earliest"`` also reads past records of other
    systems."""
    app, _ = lab
    other = App(app.names.namespace, settings=app.settings, partitions=2)
    other.event(key="user_id", start="latest")(UserRegistered)
    other.event(topic=app.events["Parcel"].topic, format="json", start="earliest")(Parcel)
    other.on(UserRegistered, name="sync_crm", queue="crm")(lambda event: None)
    other.on(Parcel, name="track", queue="mail")(lambda event: None)
    app.emit(UserRegistered("before"))
    write(app, {"number": 1})
    with routing(other) as router:
        until(lambda: len(router.partitions) == 4)
        handle = app.emit(UserRegistered("after"))
        until(lambda: router.jobs == 2)
    assert parcels(app) == [1]
    assert set(submitted(other)) > expected(other, [handle.event_id], "UserRegistered")
    other.close()


def test_json_of_other_systems_is_handled(lab: Lab) -> None:
    """The event's id is computed from the record's position. If the record does not fit the event class, its job fails
    with bad arguments."""
    app, ran = lab
    with pytest.raises(BadEvent, match="handled, not emitted"):
        app.emit(Parcel(1))
    with working(app) as worker, routing(app) as router:
        until(lambda: len(router.partitions) == 4)
        places = write(app, {"number": 7}, {"number": "seven"}, {"number": 8})
        until(lambda: sorted(ran) == [("track", "7"), ("track", "8")])
        until(lambda: worker.health()["queues"] and len(submitted(app)) == 3)
        until(lambda: len(log_of(app, app.names.dead_letter)) == 1)
    ids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{p.topic}/{p.partition}/{p.offset}")) for p in places]
    assert set(submitted(app)) == expected(app, ids, "Parcel")


def test_an_event_class_that_cannot_read_the_log_is_refused_before_it_writes(lab: Lab, broker: str) -> None:
    """Emitter, router and backfill refuse such a class. A class with one more field that has a default can read the old
    events."""
    app, _ = lab
    app.emit(UserRegistered("old", "paid"))

    other = App(app.names.namespace, settings=Settings(bootstrap=broker), partitions=2)
    other.event(name="UserRegistered")(Changed)
    with pytest.raises(IncompatibleEvent, match="UserRegistered"):
        other.emit(Changed(1))
    other.on(Changed, name="never", queue="crm")(lambda event: None)
    with pytest.raises(IncompatibleEvent, match="UserRegistered"):
        Router(other.registry, other.settings).run(threading.Event())
    with pytest.raises(IncompatibleEvent, match="UserRegistered"):
        Backfill(other.registry, other.settings, BackfillPlan("never"), lambda job_id: False).run(threading.Event())
    other.close()

    ran: list[Any] = []
    grown = App(app.names.namespace, settings=Settings(bootstrap=broker), partitions=2)
    grown.event(name="UserRegistered")(Grown)

    @grown.on(Grown, queue="crm")
    async def keep(event: Grown) -> None:
        ran.append(event)

    grown.emit(Grown("new", "free", "app"))
    with working(grown, queues=["crm"]), routing(grown):
        until(lambda: len(ran) == 2)
    assert sorted((e.user_id, e.plan, e.source) for e in ran) == [("new", "free", "app"), ("old", "paid", "web")]
    grown.close()


def test_a_rerun_of_a_job_emits_the_same_events(lab: Lab) -> None:
    """A rerun of the job emits events with the same ids, so their jobs have the same ids, too."""
    app, _ = lab
    seen: list[str] = []

    @app.task(queue="crm", retry=2)
    async def registers(user: str) -> None:
        seen.append((await app.emit_async(UserRegistered(user))).event_id)
        if len(seen) == 1:
            raise ConnectionError("once")

    job = registers.submit("u")
    with working(app):
        until(lambda: len(seen) == 1)
    # Write what the coordinator would write after the delay.
    from jobledger.schemas import codec
    from jobledger.schemas.events import JobDue, JobSpec

    record = next(r for r in log_of(app, app.names.jobs("crm")) if r.event.job_id == job.job_id)
    spec: JobSpec = record.event.fact.spec  # type: ignore[union-attr]  # a submission
    again = msgspec.structs.replace(record.event, release=2, attempt=2, fact=JobDue(spec, 0))
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.names.jobs("crm"), codec.encode(again), job.job_id)])
    writer.close()
    with working(app), routing(app):
        until(lambda: len(seen) == 2)
        until(lambda: expected(app, seen[:1], "UserRegistered") <= set(submitted(app)))
    assert seen[0] == seen[1]


def test_a_router_that_cannot_start_names_the_reason(broker: str, namespace: str) -> None:
    """There are no handlers, or a topic does not exist."""
    app, _ = built(namespace, broker)
    with pytest.raises(TopicMissing, match=r"topics apply"):
        Router(app.registry, app.settings).run(threading.Event())
    with pytest.raises(TopicMissing):
        app.emit(UserLeft("a"))
    app.close()
    empty = App(namespace, settings=Settings(bootstrap=broker))
    with pytest.raises(ConfigError, match=r"@app\.on"):
        Router(empty.registry, empty.settings)


# -- backfill ---------------------------------------------------------------------------------------------------------


def run_backfill(
    app: App, known: set[str] | None = None, stop: threading.Event | None = None, **plan: Any
) -> BackfillProgress:
    """Run a backfill of `sync_crm`. ``known``: the ids of the jobs in the status table."""
    run = Backfill(app.registry, app.settings, BackfillPlan("sync_crm", **plan), lambda job_id: job_id in (known or ()))
    return run.run(stop or threading.Event())


def crm_jobs(app: App, handles: list[EventHandle]) -> Counter[str]:
    """Return the jobs that `sync_crm` must have for these events, once each."""
    return Counter(app.registry.handler("sync_crm").job_id(h.event_id) for h in handles)


def test_a_backfill_submits_jobs_that_the_status_table_does_not_have(lab: Lab) -> None:
    """A dry run counts and submits nothing. A real run skips known jobs and records that are no events."""
    app, _ = lab
    handles = app.emit_many(UserRegistered(f"u{i}") for i in range(300))
    writer = LogWriter(app.settings, app.names)
    writer.send([Outgoing(app.events["UserRegistered"].topic, b"garbage", "k")])
    writer.close()
    wanted = crm_jobs(app, handles)
    known = set(list(wanted)[:100])
    dry = run_backfill(app, known, dry_run=True)
    assert (dry.events, dry.submitted, dry.known, dry.unreadable, dry.done) == (301, 200, 100, 1, True)
    assert not submitted(app)
    real = run_backfill(app, known)
    assert (real.events, real.submitted, real.known, real.unreadable, real.done) == (301, 200, 100, 1, True)
    assert submitted(app) == Counter(set(wanted) - known)


def test_a_backfill_respects_its_time_bounds(lab: Lab) -> None:
    """Events at or after the first time and before the second time are submitted, by the broker's clock."""
    app, _ = lab
    handles: list[EventHandle] = []
    bounds: list[int] = []
    for part in range(3):
        handles += app.emit_many(UserRegistered(f"p{part}-{i}") for i in range(20))
        time.sleep(0.05)
        bounds.append(round(time.time() * 1000))
        time.sleep(0.05)
    found = run_backfill(app, since=bounds[0], until=bounds[1])
    assert (found.submitted, found.done) == (20, True)
    assert submitted(app) == crm_jobs(app, handles[20:40])


def test_an_interrupted_backfill_continues_where_it_stopped(lab: Lab) -> None:
    """The backfill respects its rate and continues within its first range. Other bounds are refused without
    ``--restart``. After the end, a new backfill begins at the start."""
    app, _ = lab
    handles = app.emit_many(UserRegistered(f"u{i}") for i in range(400))
    stop = threading.Event()
    run = Backfill(app.registry, app.settings, BackfillPlan("sync_crm", rate=200.0), lambda job_id: False)
    began = time.monotonic()
    first = run.run(stop, lambda progress: stop.set() if progress.submitted >= 100 else None)
    assert time.monotonic() - began >= 0.3
    assert not first.done
    assert 100 <= first.submitted < 200
    later = app.emit(UserRegistered("later"))
    with pytest.raises(ConfigError, match="--restart"):
        run_backfill(app, since=1)
    second = run_backfill(app)
    assert (second.resumed, second.done) == (True, True)
    assert first.submitted + second.submitted == 400
    assert submitted(app) == crm_jobs(app, handles)
    third = run_backfill(app, known=set(crm_jobs(app, handles)))
    assert (third.resumed, third.submitted, third.known) == (False, 1, 400)
    assert submitted(app) == crm_jobs(app, [*handles, later])


@pytest.mark.parametrize(("text", "rate"), [("50/s", 50.0), ("3000/min", 50.0), ("7200 / h", 2.0), ("0.5/sec", 0.5)])
def test_rates_are_read(text: str, rate: float) -> None:
    assert events_per_second(text) == rate


@pytest.mark.parametrize("text", ["", "50", "0/s", "-1/s", "fast", "5/day"])
def test_an_invalid_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="50/s"):
        events_per_second(text)


class Shipment(msgspec.Struct, frozen=True):
    number: int
    state: Literal["new", "sent"]
    lines: list[Parcel]


SHIPMENT = {
    "type": "record", "name": "ShipmentChanged", "namespace": "warehouse",
    "fields": [
        {"name": "number", "type": "int"},
        {"name": "state", "type": {"type": "enum", "name": "ShipmentState", "symbols": ["new", "sent"]}},
        {"name": "lines", "type": {"type": "array", "items": {
            "type": "record", "name": "ShipmentLine", "fields": [{"name": "number", "type": "int"}]}}},
    ],
}  # fmt: skip


@contextlib.contextmanager
def registry_of(*schemas: dict[str, Any]) -> Iterator[str]:
    """Run a server that returns schemas by id, from 1 on, and accepts new schemas, as a Schema Registry does. Yield its
    URL."""
    texts = list(map(json.dumps, schemas))

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"schema": texts[int(self.path.rpartition("/")[2]) - 1]})

        def do_POST(self) -> None:
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
            if text not in texts:
                texts.append(text)
            self.answer({"id": texts.index(text) + 1})

        def answer(self, found: dict[str, Any]) -> None:
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def avro(schema_id: int, schema: dict[str, Any], values: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(json.dumps(schema))), values)
    return b"\0" + schema_id.to_bytes(4, "big") + out.getvalue()


def test_records_of_other_systems_are_read_with_their_schema_or_stop_the_router(
    broker: str, namespace: str, tmp_path: Path
) -> None:
    """The records have enums, arrays of records, tombstones, and JSON after a byte-order mark. Handler and projection
    get the events, and nothing goes to the dead letters. A schema that the class cannot read stops both at that record,
    with an error that names the field."""
    changed = json.loads(json.dumps(SHIPMENT).replace('"number", "type": "int"', '"number", "type": "string"', 1))
    with registry_of(SHIPMENT, changed) as url, contextlib.ExitStack() as stack:
        settings = Settings(bootstrap=broker, schema_registry=url, status_url=f"sqlite:///{tmp_path / 'status.db'}")
        app = App(namespace, settings=settings, partitions=1)
        stack.callback(app.close)
        shipments, parcels = f"{namespace}-shipments", f"{namespace}-parcels"
        app.event(topic=shipments, format="avro", start="earliest")(Shipment)
        app.event(topic=parcels, format="json", start="earliest")(Parcel)
        ran: list[Any] = []

        @app.on(Shipment)
        async def shipped(event: Shipment) -> None:
            ran.append(event)

        @app.on(Parcel)
        async def track(event: Parcel) -> None:
            ran.append(event)

        table = Table("seen", MetaData(), Column("number", Integer, primary_key=True), Column("events", Integer))

        @app.projection(Shipment, table=table, key=lambda event: event.number)
        def count(row: Any, event: Shipment) -> dict[str, int]:
            return {"events": (row["events"] if row else 0) + len(event.lines)}

        client = admin(settings)
        for future in client.create_topics([NewTopic(topic, 1, 1) for topic in (shipments, parcels)]).values():
            future.result(timeout=20)
        ensure(app, settings)
        writer = producer(producer_config(settings))
        first = avro(1, SHIPMENT, {"number": 1, "state": "sent", "lines": [{"number": 7}, {"number": 8}]})
        for topic, value in (
            (shipments, first),
            (shipments, None),
            (parcels, None),
            (parcels, b'\xef\xbb\xbf{"number": 5}'),
        ):
            writer.produce(topic, value, b"k")
        assert writer.flush(20) == 0
        with working(app), routing(app) as router:
            until(lambda: len(ran) == 2)
            until(lambda: (router.events, router.jobs) == (4, 2))
            assert router.rejected == 0
        assert sorted(ran, key=repr) == [Parcel(5), Shipment(1, "sent", [Parcel(7), Parcel(8)])]
        url_of = settings.resolve_status_url(namespace)
        with contextlib.closing(
            ProjectionRunner(app.registry.projections["count"], settings, app.names, list(app.lanes), url_of)
        ) as runner:
            runner.run(threading.Event(), until_end=True)
            assert (runner.folded, runner.unreadable) == (1, 0)
        writer.produce(shipments, avro(2, changed, {"number": "x", "state": "new", "lines": []}), b"k")
        assert writer.flush(20) == 0
        for _ in range(2):
            with pytest.raises(IncompatibleEvent, match=r"Shipment\.number: .* have string"):
                Router(app.registry, settings).run(threading.Event())
        with (
            contextlib.closing(
                ProjectionRunner(app.registry.projections["count"], settings, app.names, list(app.lanes), url_of)
            ) as runner,
            pytest.raises(IncompatibleEvent, match=r"Shipment\.number"),
        ):
            runner.run(threading.Event(), until_end=True)
        assert log_of(app, app.names.dead_letter) == []
