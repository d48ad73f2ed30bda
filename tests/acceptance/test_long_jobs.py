"""Leases of long jobs against faults: deploys and rebalances of others, dead coordinators, killed, frozen and stopped
workers; and what the coordinator ends by itself, cancels and expiries. Judged by the raw log.

``FAULT_LONG_S`` is how long the long job of the first test runs at least, in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from jobledger.config import Settings
from jobledger.kafka import topics, topology
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topic_names import Names
from tests.acceptance import rawlog
from tests.acceptance.audit import hold
from tests.acceptance.fleet import Fleet, Member, serves
from tests.acceptance.promises import Promise
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]
LONG_S = float(os.environ.get("FAULT_LONG_S", "16"))
#: Of every task in `long_app`: short enough to expire in a test, long enough for a worker that is paused for seconds.
LEASE_S = 8.0
PARTITIONS = 4
TERMINAL = {"JobSucceeded", "JobFailed", "JobCancelled", "JobExpired"}


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """A namespace with its topics, a coordinator, and no worker yet."""
    namespace = f"l{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=kafka.bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(tmp_path, kafka.bootstrap, namespace, target="tests/acceptance/long_app.py:app") as made:
        made.start("coordinator")
        yield made


def tell(fleet: Fleet, *words: str) -> str:
    """Run the app's own little command, in a process of its own."""
    argv = [sys.executable, "-m", "tests.acceptance.long_app", *words]
    done = subprocess.run(
        argv, env=fleet.environ, check=True, cwd=ROOT, timeout=30 * PATIENCE, capture_output=True, text=True
    )
    return done.stdout.strip()


def noted(fleet: Fleet, job: str) -> list[tuple[str, int, float]]:
    """What a job's code noted: what, in which process, when."""
    return [(words[1], int(words[2]), float(words[3])) for line in fleet.lines() if (words := line.split())[0] == job]


def began(fleet: Fleet, job: str, times: int, timeout: float = 60.0) -> tuple[str, int, float]:
    """Wait for the begin of a job's code, for so many times; the last one."""
    found: list[tuple[str, int, float]] = []

    def enough() -> bool:
        found[:] = [note for note in noted(fleet, job) if note[0] == "began"]
        return len(found) >= times

    fleet.until(enough, timeout, f"begin number {times} of {job}")
    return found[-1]


def ended(fleet: Fleet, job: str, timeout: float = 60.0) -> tuple[rawlog.Log, rawlog.Record]:
    """Wait for the one end of a job, and a little longer for another one, which there must not be."""
    found: list[tuple[rawlog.Log, list[rawlog.Record]]] = []

    def over() -> bool:
        log = rawlog.read(fleet.bootstrap, fleet.namespace)
        ends = [r for r in log.of("lifecycle") if r.fact in TERMINAL and r.head["job_id"] == job]
        found[:] = [(log, ends)]
        return bool(ends)

    fleet.until(over, timeout, f"the end of {job}")
    time.sleep(1.0)
    over()
    log, ends = found[0]
    Promise.NO_RERUN_AFTER_SUCCESS.hold(len(ends) == 1, rawlog.life_of(log, job))
    hold(log, fleet.windows, finished=False)  # others of the test may still wait
    return log, ends[0]


def on_worker(fleet: Fleet, pid: int) -> Member:
    """The worker that a process is, or belongs to."""
    import psutil

    family = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    return next(m for m in fleet.of("worker") if m.process is not None and m.pid in family)


def let_end(fleet: Fleet) -> None:
    """Let the jobs that take a time end now."""
    fleet.executions.with_name(f"{fleet.executions.name}.over").touch()


@pytest.mark.parametrize(
    "task", ["coroutine", *(pytest.param(task, marks=pytest.mark.extended) for task in ("thread", "process"))]
)
@pytest.mark.timeout(600 + 2 * int(LONG_S))
def test_a_long_job_outlives_what_happens_to_others(fleet: Fleet, task: str, say: Callable[[str], None]) -> None:
    """Workers come, go and die, the coordinator is killed twice, partitions move: it
    runs once, and holds nothing up."""
    fleet.start("worker")
    job = tell(fleet, "submit", task, "3600")
    first = began(fleet, job, 1)
    over = time.monotonic() + LONG_S
    home = on_worker(fleet, first[1])
    other = fleet.start("worker")
    tell(fleet, "short", "500")
    for coordinator in fleet.of("coordinator") * 2:
        fleet.kill(coordinator)
        fleet.tend()
        serves(fleet, other)
        assert fleet.stop(other) == 0
        fleet.restart(other)
    serves(fleet, other)
    fleet.kill(other)
    fleet.tend()

    def committed() -> bool:
        log = rawlog.read(fleet.bootstrap, fleet.namespace)
        return sum(log.committed.values()) == 501

    fleet.until(committed, 120.0, "everything but the long job done, and its record, too")
    fleet.until(lambda: time.monotonic() > over, LONG_S + 10, "the long job's time")
    assert [what for what, *_ in noted(fleet, job)] == ["began"], "it still runs"
    let_end(fleet)
    log, end = ended(fleet, job)
    assert end.fact == "JobSucceeded"
    Promise.AT_LEAST_ONCE.hold([what for what, *_ in noted(fleet, job)] == ["began", "ended"], noted(fleet, job))
    renewals = sum(r.fact == "LeaseRenewed" and r.head["job_id"] == job for r in log.of("coordination"))
    assert renewals >= LONG_S / LEASE_S * 2
    assert home.lives == 1
    say(f"long {task}: {LONG_S:g} s on a lease of {LEASE_S:g} s, {renewals} renewals, {fleet.did}: ran once")


@pytest.mark.parametrize("task", [pytest.param("coroutine", marks=pytest.mark.extended), "process"])
def test_a_dead_worker_is_seen_within_its_lease(fleet: Fleet, task: str, say: Callable[[str], None]) -> None:
    """kill -9 in the middle: another one begins once the lease is over, and not before; one end."""
    for _ in range(2):
        fleet.start("worker")
    job = tell(fleet, "submit", task, "3600")
    _, pid, _ = began(fleet, job, 1)
    time.sleep(1.0)
    victim = on_worker(fleet, pid)
    victim.wanted = False
    fleet.kill(victim)
    died = time.time()
    _, _, again = began(fleet, job, 2, 30.0)
    let_end(fleet)
    log, end = ended(fleet, job)
    assert end.fact == "JobSucceeded"
    assert end.head["release"] == 2
    # All times are of this machine's clock. The lease counts from the append of its last request. The time from
    # the worker's death to the second start is only printed below: on a busy machine it includes the machine's delays.
    of_first = [r for r in log.of("coordination") if r.head["job_id"] == job and r.head["release"] == 1]
    leased = [r for r in of_first if r.fact == "Leased"][:1]  # the next owner may send it again, which changes nothing
    last = max(r.at for r in [*leased, *(r for r in of_first if r.fact == "LeaseRenewed")])
    assert again * 1000 >= last + LEASE_S * 1000, rawlog.life_of(log, job)
    say(f"long {task}: its worker killed, begun again {again - died:.1f} s later on a lease of {LEASE_S:g} s")


@pytest.mark.extended
def test_a_frozen_worker_loses_its_lease_and_knows_it(fleet: Fleet) -> None:
    """SIGSTOP for longer than the lease: another runs it to its one end; the first, awake again, drops what it has."""
    for _ in range(2):
        fleet.start("worker")
    job = tell(fleet, "submit", "coroutine", "3600")
    _, pid, _ = began(fleet, job, 1)
    frozen = on_worker(fleet, pid)
    fleet.freeze(frozen)
    began(fleet, job, 2, 30.0)
    fleet.thaw(frozen)
    told = ("CancelledError", pid)
    fleet.until(lambda: told in [(what, where) for what, where, _ in noted(fleet, job)], 30.0, "the first gives it up")
    let_end(fleet)
    log, end = ended(fleet, job)
    assert (end.fact, end.head["release"]) == ("JobSucceeded", 2)
    assert "lease of job" in frozen.output()
    facts = [r.fact for r in log.of("coordination") if r.head["job_id"] == job and r.head["release"] == 1]
    assert "JobSucceeded" not in facts


@pytest.mark.extended
def test_what_a_stop_cuts_off_is_given_back_at_once(fleet: Fleet) -> None:
    """SIGTERM with a grace time that is too short: begun elsewhere as soon as the first has
    let go, without a crash counted."""
    for worker in [fleet.start("worker", "--grace", "1") for _ in range(2)]:
        serves(fleet, worker)
    job = tell(fleet, "submit", "coroutine", "15")  # long enough to be stopped in the middle on any machine
    _, pid, _ = began(fleet, job, 1)
    assert fleet.stop(on_worker(fleet, pid)) == 0
    began(fleet, job, 2)
    log, end = ended(fleet, job)
    assert (end.fact, end.head["release"]) == ("JobSucceeded", 2)
    # A lease that ran out would have counted a crash.
    due = next(r for r in log.work() if r.head["job_id"] == job and r.fact == "JobDue")
    assert due.body["spec"]["tags"] == {}


def test_every_end_of_a_leased_job_goes_by_the_coordinator(fleet: Fleet) -> None:
    """Retries, failures with fallback and dead letter, snoozes, cancels: each once, and nothing left behind."""
    fleet.start("worker")
    fails, snoozes, told = (
        tell(fleet, "submit", *words) for words in (("fails", "0.2"), ("snoozes", "1"), ("thread", "3600"))
    )
    began(fleet, told, 1)
    tell(fleet, "cancel", told)
    log, end = ended(fleet, told, 30.0)
    assert (end.fact, end.body["reason"]) == ("JobCancelled", "by a test")
    assert [what for what, *_ in noted(fleet, told)] == ["began", "TaskCancelled"]
    log, end = ended(fleet, snoozes)
    assert (end.fact, end.head["release"], end.head["attempt"]) == ("JobSucceeded", 2, 1)
    log, end = ended(fleet, fails)
    assert (end.fact, end.body["reason"], end.head["attempt"]) == ("JobFailed", "exhausted", 2)
    letters = [r for r in log.of("dead-letter") if r.head["job_id"] == fails]
    assert [(r.fact, r.body["reason"]) for r in letters] == [("DeadLettered", "exhausted")]
    children = [r for r in log.work() if r.fact == "JobSubmitted" and r.body["spec"]["parent"] == fails]
    assert len(children) == 1
    ended(fleet, children[0].head["job_id"])
    assert sum(log.committed.values()) <= len(list(log.work()))


@pytest.mark.extended
def test_a_long_job_that_kills_is_quarantined(fleet: Fleet) -> None:
    """The worker dies once; after that it is a child that dies, twice, and the job is failed with its words."""
    fleet.start("worker")
    job = tell(fleet, "submit", "kills")
    _, end = ended(fleet, job, 60.0)
    assert (end.fact, end.body["reason"]) == ("JobFailed", "crashed")
    assert "signal 9" in end.body["error"]["message"]
    Promise.POISON_IS_CONTAINED.hold(len(noted(fleet, job)) == 3, noted(fleet, job))
    Promise.POISON_IS_CONTAINED.hold(len(fleet.deaths) == 1, fleet.deaths)


@pytest.mark.extended
def test_what_waits_is_cancelled_and_expires_at_once(fleet: Fleet) -> None:
    """Delayed jobs, with no worker about: a cancel ends one within a moment, an expiry at its time; also when the
    coordinator was down at the time of the order, and never twice when it is killed."""
    early, late = (tell(fleet, "delayed", "3600", "coroutine", "1") for _ in range(2))
    expiring = tell(fleet, "expiring", "4", "3600", "coroutine", "1")
    began_at = time.monotonic()
    tell(fleet, "cancel", early)
    log, end = ended(fleet, early, 30.0)
    assert (end.fact, end.body["reason"]) == ("JobCancelled", "by a test")
    (coordinator,) = fleet.of("coordinator")
    coordinator.wanted = False
    fleet.kill(coordinator)
    tell(fleet, "cancel", late)
    fleet.restart(coordinator)
    log, end = ended(fleet, late, 40.0)
    assert end.fact == "JobCancelled"
    fleet.kill(coordinator)
    fleet.restart(coordinator)
    log, end = ended(fleet, expiring, 40.0)
    assert end.fact == "JobExpired"
    assert time.monotonic() - began_at >= 4
    for job in (early, late, expiring):
        ended(fleet, job)
        assert not [r for r in log.work() if r.head["job_id"] == job], "it never came to a worker"
