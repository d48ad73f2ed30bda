"""The table of least rights contains no superfluous right. Without one of its rights, a part names that right, or works
without the functions that the table names.

Each part runs in this process, as its own user with mutual TLS. One of its rights is removed, and restored afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table

from jobledger import App, Settings
from jobledger.consumers.router.backfill import Backfill, BackfillPlan
from jobledger.consumers.router.router import Router
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.errors import JobledgerError, NotAuthorized, TopicMissing
from jobledger.kafka import acls, topics, topology
from jobledger.kafka.acls import TABLE, Right
from jobledger.kafka.clients import admin as admin_client
from jobledger.schemas.events import JobSubmitted
from jobledger.streams.coordinator.coordinator import Coordinator, supervise
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.projections.runner import ProjectionRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_reader
from tests.patience import PATIENCE
from tests.secured import MTLS, Secured

pytestmark = pytest.mark.kafka

#: Seconds in which a part must have reported the missing right.
BOUND_S = PATIENCE * 60
NAMESPACE = "least"

meta = MetaData()
people = Table("people", meta, Column("user_id", String, primary_key=True), Column("seen", Integer))
ends = Table("ends", meta, Column("task", String, primary_key=True), Column("count", Integer))


@dataclass(frozen=True)
class Registered:
    """A user has signed up."""

    user_id: str


def build(namespace: str, settings: Settings) -> App:
    """Create the app of these tests."""
    app = App(namespace, settings=settings, partitions=1)

    app.event(key="user_id")(Registered)

    @app.task
    async def add(a: int) -> int:
        return a + 1

    @app.on(Registered)
    async def welcome(event: Registered) -> str:
        return event.user_id

    @app.projection(Registered, table=people, key=lambda event: event.user_id)
    def count_people(row: Any, event: Any) -> dict[str, int]:
        return {"seen": (row["seen"] if row else 0) + 1}

    @app.projection(facts=(JobSubmitted,), table=ends, key=lambda found: found.event.task)
    def count_jobs(row: Any, found: Any) -> dict[str, int]:
        return {"count": (row["count"] if row else 0) + 1}

    app.add = add  # type: ignore[attr-defined]
    return app


@dataclass
class World:
    """The cluster, one namespace on it, and a folder for the files of the parts."""

    secured: Secured
    folder: Path
    boss: App = field(init=False)

    def __post_init__(self) -> None:
        self.boss = build(NAMESPACE, self.settings(None))
        topics.ensure(self.boss, self.settings(None))

    def settings(self, user: str | None, **more: Any) -> Settings:
        """Return the settings of one user; None: of the cluster's operators."""
        more = {"home": self.folder, "submit_timeout": 30.0, "status_url": f"sqlite:///{self.folder}/s.db", **more}
        if user is None:
            return Settings(bootstrap=self.secured.brokers.bootstrap, **more)
        return Settings(bootstrap=self.secured.address(MTLS), kafka=self.secured.kafka(user, MTLS), **more)

    def app(self, user: str) -> App:
        """Create the app with the settings of one user."""
        return build(NAMESPACE, self.settings(user))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]) -> Iterator[World]:
    """Yield the cluster of this module. Each role is a user with the rights of that role."""
    folder = tmp_path_factory.mktemp("least")
    with Secured(folder, TABLE) as secured:
        made = World(secured, folder)
        for role in TABLE:
            secured.give(f"User:{role}", *acls.rights(role, NAMESPACE))
        yield made
        made.boss.close()
    if missed:
        say(
            f"ACLs over mutual TLS: of the {len(RIGHTS)} least rights of {len(TABLE)} roles {len(missed)} taken away and missed"
        )


# -- what each role does -------------------------------------------------------------------------------------------------


class Degraded(Exception):
    """A part worked without one of its functions. The error says what was refused."""


def client(world: World, refused: list[JobledgerError]) -> None:
    """Submit jobs, also delayed ones; emit an event; send a control command; make a plan."""
    app = world.app("client")
    try:
        app.add.submit(1)  # type: ignore[attr-defined]
        for optional in (
            lambda: app.add.using(delay=3600).submit(1),  # type: ignore[attr-defined]
            lambda: app.emit(Registered("u")),
            lambda: app.resume(queue="default"),
            lambda: app.client.plans.make("redrive", [], {}),
        ):
            try:
                optional()
            except NotAuthorized as exc:
                refused.append(exc)
    finally:
        app.close()


def worker(world: World, refused: list[JobledgerError]) -> None:
    """Take over a partition and run a job."""
    world.boss.add.submit(1)  # type: ignore[attr-defined]
    app = world.app("worker")
    made = Worker(app.registry, app.settings, WorkerOptions(grace=1.0))
    with in_thread(made.run, made.stop) as alive:
        until(lambda: made.health().get("succeeded", 0) >= 1, alive)
    if made.error is not None:
        raise made.error


def coordinator(world: World, refused: list[JobledgerError]) -> None:
    """Release a delayed job."""
    world.boss.add.using(delay=0.01).submit(1)  # type: ignore[attr-defined]
    stop = threading.Event()
    made = Coordinator(
        world.boss.names, world.settings("coordinator"), partitions=1, data_dir=world.folder / uuid.uuid4().hex
    )
    with in_thread(lambda: asyncio.run(supervise(made, stop)), stop.set) as alive:
        until(lambda: made.health()["fired"] >= 1, alive)


def materializer(world: World, refused: list[JobledgerError]) -> None:
    """Write the status table, and copy an unreadable record of the lifecycle topic to the dead letters. Then run the
    watchdog, the commit check, trimming and the removal of settled cancels."""
    url, names = f"sqlite:///{world.folder}/{uuid.uuid4().hex}.db", world.boss.names
    settings, stop = world.settings("materializer"), threading.Event()
    handle = world.boss.add.using(delay=0.01).submit(1)  # type: ignore[attr-defined]  # no coordinator releases this job
    garbage(world)
    ended_and_cancelled(world)
    made = Materializer(names, settings, ["default"], url)
    with in_thread(lambda: made.run(stop), stop.set) as alive:
        until(lambda: made.active and made.position() > 0 and made.caught_up(), alive)
        if not alive.is_alive():
            return
        cadence = Cadence(overdue_after=0.0, retention=-60.0, patience=30.0)
        with contextlib.closing(open_reader(url, names.namespace)) as reader:
            maintenance = Maintenance(names, settings, ["default"], reader, cadence=cadence)
            assert reader.job(handle.job_id)
            acts = (maintenance.watch, maintenance.check_commits, maintenance.trim, maintenance.trim_plans)
            for act in (*acts, maintenance.forget_cancels):
                try:
                    act()
                except NotAuthorized as exc:
                    refused.append(exc)
            maintenance.close()


def router(world: World, refused: list[JobledgerError]) -> None:
    """Submit a job for an event."""
    world.boss.emit(Registered("u"))
    app, stop = world.app("router"), threading.Event()
    made = Router(app.registry, app.settings)
    with in_thread(lambda: made.run(stop), stop.set) as alive:
        until(lambda: made.jobs >= 1, alive)


def backfill(world: World, refused: list[JobledgerError]) -> None:
    """Submit jobs for past events."""
    world.boss.emit(Registered("u"))
    app = world.app("backfill")
    progress = Backfill(app.registry, app.settings, BackfillPlan("welcome", restart=True), lambda job_id: False).run(
        threading.Event()
    )
    assert progress.done
    assert progress.submitted >= 1


def projection(world: World, refused: list[JobledgerError]) -> None:
    """Fold events and facts."""
    world.boss.emit(Registered("u"))
    app = world.app("projection")
    for name in ("count_people", "count_jobs"):
        found = app.registry.projections[name]
        url = f"sqlite:///{world.folder}/{uuid.uuid4().hex}.db"
        runner = ProjectionRunner(found, app.settings, app.names, list(app.lanes), url)
        try:
            runner.run(threading.Event(), until_end=True)
            assert runner.folded
        except NotAuthorized as exc:
            refused.append(exc)
        finally:
            runner.close()
    if len(refused) == 2:
        raise refused[0]


def reader(world: World, refused: list[JobledgerError]) -> None:
    """Read the lifecycle stream in a group."""
    world.boss.add.submit(1)  # type: ignore[attr-defined]
    with world.app("reader").lifecycle(f"g{uuid.uuid4().hex[:6]}", timeout=BOUND_S) as stream:
        assert next(iter(stream), None) is not None
        stream.commit()


def web(world: World, refused: list[JobledgerError]) -> None:
    """Read the log for display, audit it, and read what an explanation of a job needs."""
    from jobledger.audit.source import Source
    from jobledger.cli.events import Topics, _Tail

    app = world.app("web")
    with _Tail(app.settings, app.names, [Topics.ALL], list(app.lanes)) as tail:
        tail.begin(since=None, at_end=False, last=None)
        assert list(tail.until_now())
    with Source(app.settings, app.names) as source:
        assert list(source.records())
        refused += source.refused.values()
    explain(app, refused)


def explain(app: App, refused: list[JobledgerError]) -> None:
    """Read what an explanation needs besides the log."""
    from jobledger.client import log_facts
    from jobledger.client.commands import in_force
    from jobledger.client.explaining import check_rights
    from jobledger.log.reading import LogReader
    from jobledger.log.schema_lookup import decoder
    from jobledger.plan import PlanStatus

    names, decode = app.names, decoder(app.settings, app.names).decode
    plan = PlanStatus("p", "redrive", "{}", None, None, "ann", None, 0)
    with LogReader(app.settings) as log:
        looks: list[Callable[[], object]] = [
            lambda: in_force(log, names, decode),
            lambda: log_facts.plans_with(names, log, decode, [plan], ("j", 1), BOUND_S),
            lambda: log_facts.coordinator(app.settings, names, log, 0, BOUND_S),
        ]
        for look in looks:
            try:
                look()
            except (NotAuthorized, TopicMissing) as exc:  # such a topic looks as if it were missing
                refused.append(exc)
    check_rights(app.settings, names)


def admin(world: World, refused: list[JobledgerError]) -> None:
    """Create topics, add partitions and change settings."""
    namespace = f"adm{uuid.uuid4().hex[:8]}"
    for right in TABLE["admin"]:
        if right.of(NAMESPACE) != taken.get("admin"):
            world.secured.give("User:admin", right.of(namespace))
    settings, app = world.settings("admin"), build(namespace, world.settings(None))
    boss = admin_client(world.settings(None))
    specs, groups = topology.wanted(app, 1)
    few = [s for s in specs if s.name in (app.names.dead_letter, app.names.control)]
    topics.apply(boss, topics.plan(boss, few))
    grown = [topology.TopicSpec(s.name, s.partitions + (s.name == app.names.dead_letter), 1, {"retention.ms": "5000"})
             if s in few else s for s in specs]  # fmt: skip
    made = topics.plan(admin_client(settings), grown, groups)
    assert {c.step.value for c in made.pending} == {"create", "add-partitions", "alter-config"}
    notes = topics.apply(admin_client(settings), made)
    refused += [Noted(note) for note in notes]


class Noted(JobledgerError):
    """A note of `topics apply`."""


ROLES: dict[str, Callable[[World, list[JobledgerError]], None]] = {
    "client": client,
    "worker": worker,
    "coordinator": coordinator,
    "materializer": materializer,
    "router": router,
    "backfill": backfill,
    "projection": projection,
    "reader": reader,
    "web": web,
    "admin": admin,
}
#: The right that is removed at the moment, by role.
taken: dict[str, Right] = {}
#: Rights that were removed, and reported as the table says.
missed: list[Right] = []
RIGHTS = [(role, right.of(NAMESPACE)) for role, rights in TABLE.items() for right in rights]


@contextlib.contextmanager
def in_thread(run: Callable[[], Any], stop: Callable[[], None]) -> Iterator[threading.Thread]:
    """Run ``run`` in a thread, stop it at the end of the block, and raise its error."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as exc:  # noqa: BLE001  # raised again below
            raised.append(exc)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield thread
    finally:
        stop()
        thread.join(BOUND_S)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def until(done: Callable[[], bool], alive: threading.Thread) -> None:
    """Wait until ``done`` is true, or until the thread has ended."""
    deadline = time.monotonic() + BOUND_S
    while alive.is_alive() and not done():
        assert time.monotonic() < deadline, "neither done nor refused in time"
        time.sleep(0.02)


def garbage(world: World) -> None:
    """Write a record that is not an event to the lifecycle topic."""
    from jobledger.log.writer import LogWriter, Outgoing

    writer = LogWriter(world.settings(None), None)
    writer.send([Outgoing(world.boss.names.lifecycle, b"garbage", "x")])
    writer.close()


def ended_and_cancelled(world: World) -> None:
    """Write a job that has ended, and cancel it afterwards."""
    from jobledger.log.writer import LogWriter, Outgoing
    from jobledger.process.identity import now_us
    from jobledger.schemas import codec
    from jobledger.schemas.events import JobEvent, JobSucceeded

    names, job_id = world.boss.names, str(uuid.uuid4())
    end = JobEvent(
        str(uuid.uuid4()), job_id, 1, 1, 1, now_us(), "add", "default", None, None, "test", None, JobSucceeded()
    )
    writer = LogWriter(world.settings(None), names)
    writer.send([Outgoing(names.lifecycle, codec.encode(end), job_id)])
    writer.close()
    world.boss.cancel(job_id, "too late")


# -- the tests -----------------------------------------------------------------------------------------------------------


def test_every_role_has_an_action() -> None:
    """A new role in the table needs an action in this file."""
    assert list(ROLES) == list(TABLE)


@pytest.mark.parametrize("role", ROLES)
def test_a_part_runs_with_the_least_rights(world: World, role: str) -> None:
    """With the rights of the table and no others, nothing is refused."""
    refused: list[JobledgerError] = []
    ROLES[role](world, refused)
    assert refused == []


@pytest.mark.extended
@pytest.mark.parametrize(
    ("role", "right"), RIGHTS, ids=[f"{role}-{r.operation}-{r.kind}-{r.name.rstrip('.')}" for role, r in RIGHTS]
)
def test_a_missing_right_is_reported(world: World, role: str, right: Right, caplog: pytest.LogCaptureFixture) -> None:
    """The error names the missing right and says how to get it. If the table says that the part works without this
    right, only the report of the missing right is checked."""
    refused: list[JobledgerError] = []
    world.secured.take(f"User:{role}", right)
    taken[role] = right
    began = time.monotonic()
    try:
        if right.lost:
            ROLES[role](world, refused)
            said = "\n".join([*map(str, refused), *(record.getMessage() for record in caplog.records)])
        else:
            with pytest.raises(NotAuthorized) as caught:
                ROLES[role](world, refused)
            found = caught.value
            assert found.role == role
            assert (found.operation, found.resource_type) == (right.operation, right.kind)
            said = str(found)
            assert "jobledger topics acls" in said
        if role != "admin":
            assert f"{right.operation} on {right.kind} {right.name}" in said
        assert time.monotonic() - began < BOUND_S
        missed.append(right)
    finally:
        del taken[role]
        world.secured.give(f"User:{role}", right)
