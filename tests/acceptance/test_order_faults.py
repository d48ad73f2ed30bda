"""KEY_ORDER and CANCEL_IS_DURABLE under faults: workers are killed, stopped one by one and frozen, and a broker is
frozen. The tests judge by the side log of the jobs' code, by the raw log, and by the rules of `jobledger audit`.

``FAULT_KILLS`` is the number of kills; the number of jobs follows from it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from jobledger.config import Settings
from jobledger.kafka import topics, topology
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topic_names import Names
from tests.acceptance import rawlog
from tests.acceptance.audit import hold
from tests.acceptance.fleet import Fleet, FleetError, paused, wait_until_serving
from tests.brokers import Brokers
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("FAULT_KILLS", "2"))
ACCOUNTS, EACH = 10 * KILLS, 60
PLAIN = 400 * KILLS
#: How often the broker is paused, and for how many seconds: less than the ownership lease, after which a worker starts
#: no jobs.
FREEZES, LAG_S = max(2, KILLS // 2), 2.5
BEYOND_SESSION_S = 9.0
PARTITIONS = 4
TERMINAL = {"JobSucceeded", "JobFailed", "JobCancelled", "JobExpired"}


@contextlib.contextmanager
def new_namespace(folder: Path, bootstrap: str) -> Iterator[Fleet]:
    """Yield a namespace with its topics and without any process."""
    namespace = f"k{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(folder, bootstrap, namespace, target="tests/acceptance/order_app.py:app") as fleet:
        yield fleet


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace with a broker that other tests use, too."""
    with new_namespace(tmp_path, kafka.bootstrap) as fleet:
        yield fleet


def run_app(fleet: Fleet, *words: str, text: str = "") -> str:
    """Run a command of the app module in a separate process, and return its output."""
    argv = [sys.executable, "-m", "tests.acceptance.order_app", *words]
    done = subprocess.run(
        argv, env=fleet.environ, check=True, cwd=ROOT, timeout=60 * PATIENCE, input=text, capture_output=True, text=True
    )
    return done.stdout


def noted_starts(fleet: Fleet) -> list[list[str]]:
    """Return what the jobs' code wrote to the side log at its begin, in order."""
    return [words for line in fleet.lines() if (words := line.split())[1] == "began"]


class Keys:
    """The log, by key."""

    def __init__(self, fleet: Fleet) -> None:
        self.log = log = rawlog.read(fleet.bootstrap, fleet.namespace)
        self.number: dict[str, int] = {}
        self.jobs: dict[str, list[str]] = defaultdict(list)
        for record in sorted(log.work(), key=lambda r: (r.partition, r.offset)):
            job, key = record.head["job_id"], record.head["key"]
            if job not in self.number:
                self.number[job] = len(self.jobs[key])
                self.jobs[key].append(job)
        self.lifecycle = sorted(log.of("lifecycle"), key=lambda r: (r.partition, r.offset))
        self.ended = {r.head["job_id"] for r in self.lifecycle if r.fact in TERMINAL}

    def done(self) -> bool:
        """Return whether every job has ended."""
        return len(self.number) == ACCOUNTS * EACH and self.ended >= self.number.keys()

    def out_of_order(self) -> list[str]:
        """Return the starts of jobs before the outcome of an earlier job of their key, in the order of the log."""
        found: list[str] = []
        ended: dict[str, int] = defaultdict(int)
        seen: set[str] = set()
        for record in self.lifecycle:
            job, key = record.head["job_id"], record.head["key"]
            number = self.number[job]
            if record.fact == "JobStarted" and number > ended[key]:
                found.append(f"{key}: job {number} began while {ended[key]} had not ended, at {rawlog.show(record)}")
            elif record.fact in TERMINAL and job not in seen:
                seen.add(job)
                ended[key] += 1
        return found

    def early(self) -> list[str]:
        """Return the starts of attempts before the delay of the previous attempt was over, by the times in the log."""
        found: list[str] = []
        due: dict[tuple[str, int], int] = {}
        for record in self.lifecycle:
            job, attempt = record.head["job_id"], record.head["attempt"]
            if record.fact == "JobRetried" and record.body["in_place"]:
                asked = record.at + int(record.body["delay_ms"])
                due[job, attempt + 1] = min(asked, due.get((job, attempt + 1), asked))
            elif record.fact == "JobStarted" and record.at < due.get((job, attempt), 0):
                found.append(f"{due[job, attempt] - record.at} ms early: {rawlog.show(record)}")
        return found

    def attempts(self) -> Counter[str]:
        """Return the number of retried attempts of each job."""
        return Counter(r.head["job_id"] for r in self.lifecycle if r.fact == "JobRetried")


def wait_until_ended(fleet: Fleet) -> Keys:
    """Wait until every keyed job has ended, and return the log."""
    found: list[Keys] = []

    def whole() -> bool:
        fleet.tend()
        if len({words[0] for words in noted_starts(fleet)}) < ACCOUNTS * EACH:
            return False
        found.append(Keys(fleet))
        return found[-1].done()

    fleet.until(whole, 150, "every keyed job ended")
    return found[-1]


def passed_over(fleet: Fleet) -> list[str]:
    """Return the runs that broke the order of a key, by the side log: runs of a job that was not next, or of an attempt
    before the last one."""
    found: list[str] = []
    last: dict[str, tuple[int, int]] = {}
    for _, _, account, *rest in noted_starts(fleet):
        number, attempt = map(int, rest)
        before, tried = last.get(account, (-1, 1))
        if number not in (before, before + 1) or (number == before and attempt < tried):
            found.append(f"{account}: job {number}, attempt {attempt}, began after job {before}, attempt {tried}")
        last[account] = (number, attempt)
    return found


def run_again(fleet: Fleet) -> dict[str, int]:
    """Return how often an attempt ran again, by account."""
    runs = Counter(tuple(words) for words in noted_starts(fleet))
    again: Counter[str] = Counter()
    for words, count in runs.items():
        again[words[2]] += count - 1
    return dict(again)


def judge(fleet: Fleet, keys: Keys) -> None:
    """Check what must hold after every fault: order, outcomes, delays and the count of attempts. The audit must find no
    fault."""
    assert passed_over(fleet) == []
    hold(keys.log, fleet.windows, finished=False)  # some dead letters may not be written yet
    assert max(run_again(fleet).values()) <= fleet.did["worker killed"], "more than the one job that ran"
    assert keys.out_of_order() == []
    assert keys.early() == []
    ends = Counter(r.fact for r in keys.lifecycle if r.fact in TERMINAL)
    poor = ACCOUNTS * len([n for n in range(EACH) if n % 50 == 49])
    assert ends["JobFailed"] == poor
    assert ends["JobSucceeded"] == ACCOUNTS * EACH - poor
    assert max(keys.attempts().values()) <= 3, "four attempts make three retries, whoever made them"


def test_keys_keep_their_order_under_kill_9(fleet: Fleet) -> None:
    """KEY_ORDER: two workers are killed in turn while every seventh job is retried. No job starts before the outcome of
    the job before it, the next owner continues the count of attempts, and every job ends."""
    run_app(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    for n in range(KILLS):
        least = ACCOUNTS * EACH * (n + 1) // (KILLS + 2)
        fleet.until(lambda least=least: len(noted_starts(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound in this iteration
        fleet.kill(workers[n % 2])
        fleet.tend()
    judge(fleet, wait_until_ended(fleet))


def test_keys_keep_their_order_when_acknowledgements_lag(tmp_path: Path) -> None:
    """KEY_ORDER with a paused broker: the worker continues, and is killed before its records are acknowledged. For each
    key, at most the one job that was running runs again, and none runs after a later job."""
    with Brokers() as brokers, new_namespace(tmp_path, brokers.bootstrap) as fleet:
        run_app(fleet, "submit", str(ACCOUNTS), str(EACH))
        worker = fleet.start("worker", "--concurrency", "20")
        for n in range(FREEZES):
            least = ACCOUNTS * EACH * (n + 1) // (FREEZES + 2)
            fleet.until(lambda least=least: len(noted_starts(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound in this iteration
            brokers.pause(1)
            until = time.monotonic() + LAG_S
            while time.monotonic() < until:  # the duration of the fault, not a wait for a fact
                fleet.tend()
                time.sleep(0.1)
            fleet.kill(worker)
            brokers.resume(1)
            fleet.tend()
        judge(fleet, wait_until_ended(fleet))


@pytest.mark.extended
def test_a_rolling_restart_keeps_the_order_and_runs_no_attempt_twice(fleet: Fleet) -> None:
    """GRACEFUL_STOP with keys: workers are stopped one by one while jobs that wait for a retry hold their keys."""
    run_app(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    for n, member in enumerate(workers * 2):
        wait_until_serving(fleet, member)
        least = ACCOUNTS * EACH * (n + 1) // 6
        fleet.until(lambda least=least: len(noted_starts(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound in this iteration
        assert fleet.stop(member) == 0, member.tail()
        fleet.restart(member)
    judge(fleet, wait_until_ended(fleet))
    twice = {what: count for what, count in Counter(tuple(words) for words in noted_starts(fleet)).items() if count > 1}
    assert twice == {}


@pytest.mark.extended
def test_a_frozen_worker_does_not_continue_with_a_key_that_was_taken_over(fleet: Fleet) -> None:
    """A worker that was frozen beyond its session starts no job of a key that has another owner by then."""
    run_app(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    fleet.until(lambda: len(noted_starts(fleet)) >= ACCOUNTS * EACH // 4, 90, "a quarter begun")
    with paused(fleet, workers[0], BEYOND_SESSION_S):
        fleet.until(lambda: len(noted_starts(fleet)) >= ACCOUNTS * EACH // 2, 90, "half begun")
    keys = wait_until_ended(fleet)
    window = fleet.windows[-1]
    assert keys.done()
    # Records that the worker had queued when it was frozen are sent when it continues. Then they are behind the records
    # that came meanwhile.
    waking = {rawlog.show(r) for r in keys.lifecycle if window.end - 500 <= r.at <= window.end + 3_000}
    late = [line for line in keys.out_of_order() if line.partition(", at ")[2] not in waking]
    assert len(late) == 0, late[:5]
    hold(keys.log, fleet.windows, finished=False)


def test_a_cancelled_job_never_runs(fleet: Fleet) -> None:
    """CANCEL_IS_DURABLE: jobs are cancelled while no worker runs. Then workers are killed in turn, and none of them
    runs a cancelled job."""
    ids = run_app(fleet, "plain", str(PLAIN)).split()
    cancelled = ids[::3]
    run_app(fleet, "cancel", "wrong list", text="\n".join(cancelled))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    wanted = len(ids) - len(cancelled)
    for n in range(KILLS):
        least = wanted * (n + 1) // (KILLS + 2)
        fleet.until(lambda least=least: len(noted_starts(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound in this iteration
        fleet.kill(workers[n % 2])
        fleet.tend()
    seen: list[dict[str, list[rawlog.Record]]] = []

    def whole() -> bool:
        fleet.tend()
        if len({words[0] for words in noted_starts(fleet)}) < wanted:
            return False
        ends: dict[str, list[rawlog.Record]] = defaultdict(list)
        for record in rawlog.read(fleet.bootstrap, fleet.namespace).of("lifecycle"):
            if record.fact in TERMINAL:
                ends[record.head["job_id"]].append(record)
        seen.append(ends)
        return len(ends) == len(ids)

    try:
        fleet.until(whole, 120, "every job ended")
    except FleetError as error:
        log, ended = rawlog.read(fleet.bootstrap, fleet.namespace), seen[-1] if seen else {}
        missing = [job for job in ids if job not in ended]
        said = [
            f"{len(missing)} jobs have no outcome, {len(set(missing) & set(cancelled))} of them cancelled",
            f"committed {log.committed} of {log.ends}; {len(list(log.work()))} work records",
            *(line for job in missing[:5] for line in rawlog.life_of(log, job)),
            *(f"== {worker.name}\n{worker.output()}" for worker in workers),
        ]
        raise FleetError("\n".join([*said, str(error)])) from None
    assert not {words[0] for words in noted_starts(fleet)} & set(cancelled)
    for job in cancelled:
        assert {r.fact for r in seen[-1][job]} == {"JobCancelled"}
        assert msgspec.convert(seen[-1][job][0].body["reason"], str) == "wrong list"
    assert all({r.fact for r in seen[-1][job]} == {"JobSucceeded"} for job in set(ids) - set(cancelled))
