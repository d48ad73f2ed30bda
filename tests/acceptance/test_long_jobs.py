"""Job leases of long jobs under faults: restarts and rebalances of other workers, dead coordinators, killed, frozen and
stopped workers. Cancels and expiry that the coordinator handles are tested, too. The tests judge by the raw log.

``FAULT_LONG_S``: the shortest time, in seconds, for which the long job of the first test runs.
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
from tests.acceptance.fleet import Fleet, Member, wait_until_serving
from tests.acceptance.promises import Promise
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]
LONG_S = float(os.environ.get("FAULT_LONG_S", "16"))
#: The lease of every task in `long_app`. It is short enough to end in a test, and long enough for a worker that is
#: paused for seconds.
LEASE_S = 8.0
PARTITIONS = 4
TERMINAL = {"JobSucceeded", "JobFailed", "JobCancelled", "JobExpired"}


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace with its topics and a coordinator, but without a worker."""
    namespace = f"l{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=kafka.bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(tmp_path, kafka.bootstrap, namespace, target="tests/acceptance/long_app.py:app") as made:
        made.start("coordinator")
        yield made


def run_app(fleet: Fleet, *words: str) -> str:
    """Run a command of the app module in a separate process, and return its output."""
    argv = [sys.executable, "-m", "tests.acceptance.long_app", *words]
    done = subprocess.run(
        argv, env=fleet.environ, check=True, cwd=ROOT, timeout=30 * PATIENCE, capture_output=True, text=True
    )
    return done.stdout.strip()


def notes_of(fleet: Fleet, job: str) -> list[tuple[str, int, float]]:
    """Return what a job's code wrote to the side log: what, in which process, and when."""
    return [(words[1], int(words[2]), float(words[3])) for line in fleet.lines() if (words := line.split())[0] == job]


def wait_for_start(fleet: Fleet, job: str, times: int, timeout: float = 60.0) -> tuple[str, int, float]:
    """Wait until a job's code has begun ``times`` times, and return the last begin."""
    found: list[tuple[str, int, float]] = []

    def enough() -> bool:
        found[:] = [note for note in notes_of(fleet, job) if note[0] == "began"]
        return len(found) >= times

    fleet.until(enough, timeout, f"begin number {times} of {job}")
    return found[-1]


def wait_for_outcome(fleet: Fleet, job: str, timeout: float = 60.0) -> tuple[rawlog.Log, rawlog.Record]:
    """Wait for the outcome of a job, and a little longer to see that there is no second one."""
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
    hold(log, fleet.windows, finished=False)  # other jobs of the test may still wait
    return log, ends[0]


def worker_of(fleet: Fleet, pid: int) -> Member:
    """Return the worker to which a process belongs."""
    import psutil

    family = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    return next(m for m in fleet.of("worker") if m.process is not None and m.pid in family)


def let_jobs_end(fleet: Fleet) -> None:
    """Let the running jobs end now."""
    fleet.executions.with_name(f"{fleet.executions.name}.over").touch()


@pytest.mark.extended
@pytest.mark.parametrize("task", ["coroutine", "thread", "process"])
@pytest.mark.timeout(600 + 2 * int(LONG_S))
def test_a_long_job_runs_once_while_other_processes_die_and_restart(
    fleet: Fleet, task: str, say: Callable[[str], None]
) -> None:
    """Other workers join, stop and are killed, the coordinator is killed twice, and partitions move. The long job runs
    once, and blocks no other job."""
    fleet.start("worker")
    job = run_app(fleet, "submit", task, "3600")
    first = wait_for_start(fleet, job, 1)
    over = time.monotonic() + LONG_S
    home = worker_of(fleet, first[1])
    other = fleet.start("worker")
    run_app(fleet, "short", "500")
    for coordinator in fleet.of("coordinator") * 2:
        fleet.kill(coordinator)
        fleet.tend()
        wait_until_serving(fleet, other)
        assert fleet.stop(other) == 0
        fleet.restart(other)
    wait_until_serving(fleet, other)
    fleet.kill(other)
    fleet.tend()

    def committed() -> bool:
        log = rawlog.read(fleet.bootstrap, fleet.namespace)
        return sum(log.committed.values()) == 501

    fleet.until(committed, 120.0, "everything but the long job done, and its record, too")
    fleet.until(lambda: time.monotonic() > over, LONG_S + 10, "the long job's time")
    assert [what for what, *_ in notes_of(fleet, job)] == ["began"], "it still runs"
    let_jobs_end(fleet)
    log, end = wait_for_outcome(fleet, job)
    assert end.fact == "JobSucceeded"
    Promise.AT_LEAST_ONCE.hold([what for what, *_ in notes_of(fleet, job)] == ["began", "ended"], notes_of(fleet, job))
    renewals = sum(r.fact == "LeaseRenewed" and r.head["job_id"] == job for r in log.of("coordination"))
    assert renewals >= LONG_S / LEASE_S * 2
    assert home.lives == 1
    say(f"long {task}: {LONG_S:g} s on a lease of {LEASE_S:g} s, {renewals} renewals, {fleet.did}: ran once")


@pytest.mark.parametrize("task", [pytest.param("coroutine", marks=pytest.mark.extended), "process"])
def test_the_job_of_a_dead_worker_starts_again_when_its_lease_is_over(
    fleet: Fleet, task: str, say: Callable[[str], None]
) -> None:
    """After a kill -9, another worker starts the job when its lease is over, and not before. The job has one outcome."""
    for _ in range(2):
        fleet.start("worker")
    job = run_app(fleet, "submit", task, "3600")
    _, pid, _ = wait_for_start(fleet, job, 1)
    time.sleep(1.0)
    victim = worker_of(fleet, pid)
    victim.wanted = False
    fleet.kill(victim)
    died = time.time()
    _, _, again = wait_for_start(fleet, job, 2, 30.0)
    let_jobs_end(fleet)
    log, end = wait_for_outcome(fleet, job)
    assert end.fact == "JobSucceeded"
    assert end.head["release"] == 2
    # All times are those of this machine's clock. The lease counts from the append of its last request. The time from
    # the worker's death to the second start is only printed below, because on a busy machine it includes the machine's
    # delays.
    of_first = [r for r in log.of("coordination") if r.head["job_id"] == job and r.head["release"] == 1]
    leased = [r for r in of_first if r.fact == "Leased"][:1]  # the next owner may send it again
    last = max(r.at for r in [*leased, *(r for r in of_first if r.fact == "LeaseRenewed")])
    assert again * 1000 >= last + LEASE_S * 1000, rawlog.life_of(log, job)
    say(f"long {task}: its worker killed, begun again {again - died:.1f} s later on a lease of {LEASE_S:g} s")


@pytest.mark.extended
def test_a_frozen_worker_loses_its_lease_and_gives_up_the_job(fleet: Fleet) -> None:
    """A worker is frozen for longer than the lease, and another worker runs the job to its only outcome. When the first
    worker continues, it gives up the job."""
    for _ in range(2):
        fleet.start("worker")
    job = run_app(fleet, "submit", "coroutine", "3600")
    _, pid, _ = wait_for_start(fleet, job, 1)
    frozen = worker_of(fleet, pid)
    fleet.freeze(frozen)
    wait_for_start(fleet, job, 2, 30.0)
    fleet.thaw(frozen)
    told = ("CancelledError", pid)
    fleet.until(
        lambda: told in [(what, where) for what, where, _ in notes_of(fleet, job)], 30.0, "the first gives it up"
    )
    let_jobs_end(fleet)
    log, end = wait_for_outcome(fleet, job)
    assert (end.fact, end.head["release"]) == ("JobSucceeded", 2)
    assert "lease of job" in frozen.output()
    facts = [r.fact for r in log.of("coordination") if r.head["job_id"] == job and r.head["release"] == 1]
    assert "JobSucceeded" not in facts


@pytest.mark.extended
def test_a_job_that_a_stop_interrupts_is_released_again_at_once(fleet: Fleet) -> None:
    """A worker gets SIGTERM with a grace time that is too short. Another worker starts the job as soon as the first one
    has given back the lease, and no crash is counted."""
    for worker in [fleet.start("worker", "--grace", "1") for _ in range(2)]:
        wait_until_serving(fleet, worker)
    job = run_app(fleet, "submit", "coroutine", "15")  # long enough to be stopped before its end on any machine
    _, pid, _ = wait_for_start(fleet, job, 1)
    assert fleet.stop(worker_of(fleet, pid)) == 0
    wait_for_start(fleet, job, 2)
    log, end = wait_for_outcome(fleet, job)
    assert (end.fact, end.head["release"]) == ("JobSucceeded", 2)
    # If the lease had run out, a crash would have been counted.
    due = next(r for r in log.work() if r.head["job_id"] == job and r.fact == "JobDue")
    assert due.body["spec"]["tags"] == {}


def test_every_outcome_of_a_leased_job_goes_through_the_coordinator(fleet: Fleet) -> None:
    """Retries, failures with a fallback and a dead letter, snoozes and cancels happen once each."""
    fleet.start("worker")
    fails, snoozes, told = (
        run_app(fleet, "submit", *words) for words in (("fails", "0.2"), ("snoozes", "1"), ("thread", "3600"))
    )
    wait_for_start(fleet, told, 1)
    run_app(fleet, "cancel", told)
    log, end = wait_for_outcome(fleet, told, 30.0)
    assert (end.fact, end.body["reason"]) == ("JobCancelled", "by a test")
    assert [what for what, *_ in notes_of(fleet, told)] == ["began", "TaskCancelled"]
    log, end = wait_for_outcome(fleet, snoozes)
    assert (end.fact, end.head["release"], end.head["attempt"]) == ("JobSucceeded", 2, 1)
    log, end = wait_for_outcome(fleet, fails)
    assert (end.fact, end.body["reason"], end.head["attempt"]) == ("JobFailed", "exhausted", 2)
    letters = [r for r in log.of("dead-letter") if r.head["job_id"] == fails]
    assert [(r.fact, r.body["reason"]) for r in letters] == [("DeadLettered", "exhausted")]
    children = [r for r in log.work() if r.fact == "JobSubmitted" and r.body["spec"]["parent"] == fails]
    assert len(children) == 1
    wait_for_outcome(fleet, children[0].head["job_id"])
    assert sum(log.committed.values()) <= len(list(log.work()))


@pytest.mark.extended
def test_a_long_job_that_kills_its_process_fails_as_crashed(fleet: Fleet) -> None:
    """The worker dies once. After that, child processes die twice, and the job fails with an error that names the
    signal."""
    fleet.start("worker")
    job = run_app(fleet, "submit", "kills")
    _, end = wait_for_outcome(fleet, job, 60.0)
    assert (end.fact, end.body["reason"]) == ("JobFailed", "crashed")
    assert "signal 9" in end.body["error"]["message"]
    Promise.POISON_IS_CONTAINED.hold(len(notes_of(fleet, job)) == 3, notes_of(fleet, job))
    Promise.POISON_IS_CONTAINED.hold(len(fleet.deaths) == 1, fleet.deaths)


@pytest.mark.extended
def test_waiting_jobs_are_cancelled_and_expire_without_a_worker(fleet: Fleet) -> None:
    """No worker runs. A cancel ends a delayed job within a moment, and an expiry ends a job when its time is over. This
    also holds if the coordinator did not run at the time of the cancel. If it is killed, no job ends twice."""
    early, late = (run_app(fleet, "delayed", "3600", "coroutine", "1") for _ in range(2))
    expiring = run_app(fleet, "expiring", "4", "3600", "coroutine", "1")
    began_at = time.monotonic()
    run_app(fleet, "cancel", early)
    log, end = wait_for_outcome(fleet, early, 30.0)
    assert (end.fact, end.body["reason"]) == ("JobCancelled", "by a test")
    (coordinator,) = fleet.of("coordinator")
    coordinator.wanted = False
    fleet.kill(coordinator)
    run_app(fleet, "cancel", late)
    fleet.restart(coordinator)
    log, end = wait_for_outcome(fleet, late, 40.0)
    assert end.fact == "JobCancelled"
    fleet.kill(coordinator)
    fleet.restart(coordinator)
    log, end = wait_for_outcome(fleet, expiring, 40.0)
    assert end.fact == "JobExpired"
    assert time.monotonic() - began_at >= 4
    for job in (early, late, expiring):
        wait_for_outcome(fleet, job)
        assert not [r for r in log.work() if r.head["job_id"] == job], "it never came to a worker"
