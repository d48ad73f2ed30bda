"""The coordinator in real processes: kill -9 between any two steps, SIGSTOP, a broker that stops, and takeovers.

The tests read the raw topics: each requested release has at least one JobDue, all its copies have the same id, none is
appended before it is due, and there is no JobDue without a request.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uuid_utils
from confluent_kafka import Producer

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, SchemaError
from jobledger.kafka import clients, embedded, topics, topology
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.defaults import START_TIMEOUT_S
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas import codec
from jobledger.schemas.events import JobDue, JobEvent, JobSpec, JobSubmitted, RecordRejected, ReleaseRequested
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

PARTITIONS = 3
CHILD = Path(__file__).with_name("coordinator_process.py")

#: Every point between two steps of a timer, a cycle, a commit or a removal of old rows.
STEPS = [
    "due",
    "decisions-sent",
    "decisions-acknowledged",
    "decided",
    "releases-sent",
    "released",
    "rows-sent",
    "rows-acknowledged",
    "rows-durable",
    "acknowledged",
    "commit-begins",
    "committed",
    "sweep-begins",
    "floor-durable",
    "swept",
]


@dataclass
class Fleet:
    """The coordinator processes of one namespace, and the releases that were requested from them."""

    bootstrap: str
    namespace: str
    folder: Path
    options: dict[str, float] = field(default_factory=dict)
    asked: dict[tuple[str, int, int], int | None] = field(default_factory=dict)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = Settings(bootstrap=self.bootstrap)
        self.names = Names(self.namespace)
        admin = clients.admin(self.settings)
        specs = topology.desired(self.names, {"mail": PARTITIONS}, partitions=PARTITIONS, replication=1)
        topics.apply(admin, topics.plan(admin, specs))
        self.writer = LogWriter(self.settings, self.names)
        self.reader = LogReader(self.settings)
        self._read: dict[str, list[tuple[JobEvent, int]]] = defaultdict(list)
        self._next: dict[tuple[str, int], int] = defaultdict(int)
        wait_for(self._has_leaders, 30, lambda: "")
        self.options = {"session_timeout": 2.0, "commit_interval": 0.2, "keep_markers": 1.0, **self.options}

    def _has_leaders(self) -> bool:
        try:
            self.released()
        except BrokerUnavailable:
            return False
        return True

    def start(
        self, name: str = "a", kill: tuple[str, int] | None = None, freeze: tuple[int | None, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process. ``name``: its folder; ``freeze``: the broker's pid, and the file that makes the process
        freeze the broker."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        given = {
            "bootstrap": self.bootstrap,
            "namespace": self.namespace,
            "partitions": PARTITIONS,
            "folder": str(folder / "rows"),
            "health": str(folder / "health.json"),
            "options": self.options,
            "kill": kill,
            "freeze": freeze,
        }
        (folder / "health.json").unlink(missing_ok=True)
        with (folder / "log").open("ab") as out:
            child = subprocess.Popen([sys.executable, str(CHILD), json.dumps(given)], stdout=out, stderr=out)
        self.children.append(child)
        return child

    def log_of(self, name: str = "a") -> str:
        """Return the end of a process's output."""
        return (self.folder / name / "log").read_text("utf-8", "replace")[-5000:]

    def health(self, name: str = "a") -> dict[str, Any]:
        """Return the health that a process last reported."""
        try:
            found: dict[str, Any] = json.loads((self.folder / name / "health.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def submit(self, count: int, longest_ms: int) -> list[str]:
        """Submit ``count`` delayed jobs that are due within ``longest_ms``."""
        jobs = [str(uuid_utils.uuid7()) for _ in range(count)]
        self.ask([(job, 0, JobSubmitted(JobSpec(b"{}"), random.randrange(longest_ms + 1))) for job in jobs])
        return jobs

    def retry(self, jobs: list[str], release: int, longest_ms: int) -> None:
        """Request the next release of jobs, as a worker does."""
        self.ask([(job, release, ReleaseRequested(JobSpec(b"{}"), random.randrange(longest_ms + 1))) for job in jobs])

    def ask(self, requests: list[tuple[str, int, JobSubmitted | ReleaseRequested]]) -> None:
        records = []
        for job, release, fact in requests:
            event = JobEvent(job, job, 1, max(release, 1), release, 0, "t", "mail", None, job, "test", None, fact)
            records.append(Outgoing(self.names.coordination, codec.encode(event), job))
            self.asked[job, 1, max(release, 1)] = None
        self.writer.send(records)

    def raw(self, topic: str) -> list[tuple[JobEvent, int]]:
        """Return every event of a topic until now, with its append time in ms."""
        read = self._read[topic]
        for partition in range(PARTITIONS):
            for message in self.reader.read(topic, partition, self._next[topic, partition]):
                self._next[topic, partition] = (message.offset() or 0) + 1
                try:
                    read.append((codec.decode(message.value()), message.timestamp()[1]))
                except SchemaError:
                    continue
        return read

    def due_times(self) -> dict[tuple[str, int, int], int]:
        """Return when each release was due, in µs, computed from the requests."""
        found: dict[tuple[str, int, int], int] = {}
        for event, appended in self.raw(self.names.coordination):
            if isinstance(event.fact, JobSubmitted | ReleaseRequested):
                named = (event.job_id, event.run, max(event.release, 1))
                found.setdefault(named, (appended + (event.fact.delay_ms or 0)) * 1000)
        return found

    def released(self) -> dict[tuple[str, int, int], list[tuple[JobEvent, int]]]:
        """Return every JobDue, by release."""
        found: dict[tuple[str, int, int], list[tuple[JobEvent, int]]] = defaultdict(list)
        for event, appended in self.raw(self.names.jobs("mail")):
            assert isinstance(event.fact, JobDue)
            found[event.job_id, event.run, event.release].append((event, appended))
        return found

    def await_all(
        self, timeout: float = 60.0, said: Callable[[], str] | None = None
    ) -> dict[tuple[str, int, int], list[tuple[JobEvent, int]]]:
        """Wait until every requested release was made, and check the releases."""
        wait_for(lambda: self.asked.keys() <= self.released().keys(), timeout, said or self.log_of)
        found, due = self.released(), self.due_times()
        assert found.keys() == self.asked.keys(), "something was let go that nobody asked for"
        for named, copies in found.items():
            assert len({event.event_id for event, _ in copies}) == 1, f"{named} was let go under two ids"
            assert all(appended * 1000 >= due[named] for _, appended in copies), f"{named} was early"
        return found

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.wait(10 * PATIENCE)
        self.reader.close()
        self.writer.close()


def wait_for(fact: Callable[[], bool], timeout: float, said: Callable[[], str]) -> None:
    """Poll ``fact`` until it is true. After ``timeout`` seconds times `PATIENCE`, fail with the output of the process."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not fact():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come to be within {PATIENCE * timeout:g} s; the coordinator said:\n{said()}")
        time.sleep(0.1)


@pytest.fixture
def fleet(broker: str, namespace: str, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a fleet of processes with the shared broker. All processes are ended afterwards."""
    made = Fleet(broker, namespace, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("steps", [STEPS[1::4], pytest.param(STEPS, marks=pytest.mark.extended)], ids=["some", "all"])
def test_kill_9_between_any_two_steps_loses_and_contradicts_nothing(fleet: Fleet, steps: list[str]) -> None:
    """The process is killed at every step in turn, with and without its local copy, while jobs are submitted. Every
    requested release is made, none too early, and copies have one id. In the end, another process makes the remaining
    releases."""
    jobs: list[str] = []
    for number, step in enumerate(steps):
        # Every third start has no local copy and restores the table from the changelog.
        name = f"a{number // 3}"
        child = fleet.start(name, kill=(step, random.randrange(1, 4)))
        let_go = fleet.released()
        fleet.retry([job for job in jobs if (job, 1, 1) in let_go], 2, 300)
        jobs = fleet.submit(40, 800)
        deadline = time.monotonic() + 60 * PATIENCE
        while child.poll() is None:
            assert time.monotonic() < deadline, f"never came to step {step!r}:\n{fleet.log_of(name)}"
            fleet.submit(2, 100)  # each step needs some jobs
            time.sleep(0.1)
        assert child.returncode == -signal.SIGKILL, fleet.log_of(name)
    fleet.start("b")
    found = fleet.await_all(said=lambda: fleet.log_of("b"))
    assert len(found) > 40 * len(steps)


@pytest.mark.extended
def test_a_paused_instance_repeats_decisions_and_contradicts_none(fleet: Fleet) -> None:
    """One of two instances is paused for longer than its session while releases are due, and then continues."""
    one, two = fleet.start("one"), fleet.start("two")
    wait_for(
        lambda: (
            len(fleet.health("one").get("partitions", [])) + len(fleet.health("two").get("partitions", [])) == 3
            and bool(fleet.health("one")["partitions"] and fleet.health("two")["partitions"])
            and fleet.health("one")["ready"]
            and fleet.health("two")["ready"]
        ),
        60,
        lambda: fleet.log_of("one") + fleet.log_of("two"),
    )
    fleet.submit(600, 12_000)
    wait_for(lambda: len(fleet.released()) > 50, 30, lambda: fleet.log_of("two"))
    one.send_signal(signal.SIGSTOP)
    # The other instance now owns all partitions and makes the releases of the paused one.
    wait_for(lambda: len(fleet.health("two").get("partitions", [])) == 3, 30, lambda: fleet.log_of("two"))
    wait_for(lambda: len(fleet.released()) > 400, 60, lambda: fleet.log_of("two"))
    one.send_signal(signal.SIGCONT)
    fleet.submit(100, 3_000)
    found = fleet.await_all(said=lambda: fleet.log_of("one") + fleet.log_of("two"))
    assert len(found) == 700
    assert two.poll() is None, fleet.log_of("two")


def test_an_instance_that_dies_is_replaced_by_the_other(fleet: Fleet) -> None:
    """One of two instances is killed with kill -9 while releases are due. The other one makes its releases."""
    fleet.options["session_timeout"] = 6.0  # the dead instance's session ends before the last release
    one, two = fleet.start("one"), fleet.start("two")
    wait_for(
        lambda: bool(fleet.health("one").get("partitions") and fleet.health("two").get("partitions")),
        60,
        lambda: fleet.log_of("one") + fleet.log_of("two"),
    )
    fleet.submit(400, 8_000)
    wait_for(lambda: len(fleet.released()) > 50, 30, lambda: fleet.log_of("two"))
    one.kill()
    fleet.await_all(said=lambda: fleet.log_of("two"))
    assert two.poll() is None


def test_sigterm_ends_a_coordinator_cleanly_and_the_next_one_continues(fleet: Fleet) -> None:
    """The exit code is 0, and no job is released twice, because processed events are committed."""
    fleet.options["session_timeout"] = 10.0  # if the session ended early, events would be read twice
    first = fleet.start("a")
    fleet.submit(200, 4_000)
    wait_for(lambda: len(fleet.released()) > 60, 60, fleet.log_of)
    first.terminate()
    assert first.wait(10 * PATIENCE) == 0, fleet.log_of()
    fleet.start("a")
    found = fleet.await_all()
    assert all(len(copies) == 1 for copies in found.values())


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """Yield a broker that the test may stop."""
    with EmbeddedKafka(tmp_path / "kafka", timeout=PATIENCE * START_TIMEOUT_S) as kafka:
        yield kafka


@pytest.mark.extended
def test_a_coordinator_survives_a_broker_outage_of_ten_seconds(
    own_broker: EmbeddedKafka, namespace: str, tmp_path: Path
) -> None:
    """The same process continues. No release is lost, too early or contradicted."""
    # The stop and the start of the broker take more time than the ten seconds.
    fleet = Fleet(own_broker.bootstrap, namespace, tmp_path, options={"patience": 120.0})
    try:
        child = fleet.start()
        fleet.submit(300, 15_000)
        wait_for(lambda: len(fleet.released()) > 20, 60, fleet.log_of)
        own_broker.stop()
        time.sleep(10)  # the duration of the fault, not a wait for a fact
        own_broker.start()
        fleet.await_all(120)
        assert child.poll() is None, fleet.log_of()
    finally:
        fleet.close()


@pytest.mark.extended
def test_a_broker_that_freezes_during_a_rebalance_leaves_no_coordinator_idle(
    own_broker: EmbeddedKafka, namespace: str, tmp_path: Path
) -> None:
    """One of two coordinators is frozen. While the other one takes over its partitions, the broker is frozen for longer
    than a request may take. The coordinator repeats the request, and every release is made."""
    fleet = Fleet(own_broker.bootstrap, namespace, tmp_path)
    freeze = tmp_path / "freeze"

    def written() -> str:
        return (fleet.folder / "a" / "log").read_text("utf-8", "replace")

    try:
        broker_pid = embedded.status(own_broker.home).pid
        running = {"a": fleet.start("a", freeze=(broker_pid, str(freeze))), "b": fleet.start("b")}
        wait_for(lambda: all(fleet.health(name).get("partitions") for name in "ab"), 60, fleet.log_of)
        fleet.submit(100, 15_000)
        freeze.touch()
        running["b"].send_signal(signal.SIGSTOP)
        wait_for(lambda: not freeze.exists(), 60, fleet.log_of)
        until = time.monotonic() + 15
        wait_for(lambda: "restoring begins again" in written(), 60, fleet.log_of)  # the request has failed
        time.sleep(max(0.0, until - time.monotonic()))  # the duration of the fault, not a wait for a fact
        own_broker.resume()
        running["b"].send_signal(signal.SIGCONT)

        def released() -> bool:
            for name, child in running.items():
                if child.poll() is not None:  # restarts a child, as a supervisor does
                    running[name] = fleet.start(name)
            return fleet.asked.keys() <= fleet.released().keys()

        wait_for(released, 120, fleet.log_of)
        fleet.await_all()
        assert "restoring begins again" in written()
    finally:
        own_broker.resume()
        fleet.close()


@pytest.mark.extended
def test_a_broker_that_stays_unreachable_ends_the_coordinator_with_an_error(
    own_broker: EmbeddedKafka, namespace: str, tmp_path: Path
) -> None:
    """After its patience, the coordinator exits with 70 and names the address."""
    fleet = Fleet(own_broker.bootstrap, namespace, tmp_path, options={"patience": 6.0})
    try:
        child = fleet.start()
        wait_for(lambda: bool(fleet.health().get("ready")), 60, fleet.log_of)
        fleet.submit(20, 30_000)
        own_broker.kill()
        assert child.wait(60 * PATIENCE) == 70, fleet.log_of()
        assert own_broker.bootstrap in fleet.log_of()
    finally:
        fleet.close()


def test_garbage_between_good_records_is_dead_lettered_and_stops_nothing(fleet: Fleet) -> None:
    """Another producer writes random bytes, half an event and empty records among 200 jobs."""
    foreign = Producer({"bootstrap.servers": fleet.bootstrap})
    fleet.options["session_timeout"] = 10.0  # if the session ended early, events would be read twice
    fleet.start()
    good = codec.encode(JobEvent("x", "x", 1, 1, 0, 0, "t", "mail", None, "x", "t", None, JobSubmitted(JobSpec(b"{}"))))
    garbage = [os.urandom(40), good[:25], None, b""]
    for number in range(20):
        fleet.submit(10, 300)
        foreign.produce(fleet.names.coordination, garbage[number % 4], b"k")
        assert foreign.flush(10 * PATIENCE) == 0
    fleet.await_all()
    wait_for(lambda: len(fleet.raw(fleet.names.dead_letter)) >= 20, 30, fleet.log_of)
    rejected = [event.fact for event, _ in fleet.raw(fleet.names.dead_letter)]
    values = [fact.raw_value for fact in rejected if isinstance(fact, RecordRejected)]
    assert len(rejected) == 20
    assert sorted(value or b"" for value in values) == sorted((value or b"") for value in garbage * 5)
