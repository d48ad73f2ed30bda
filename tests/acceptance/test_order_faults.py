"""KEY_ORDER and CANCEL_IS_DURABLE against faults: workers killed, stopped one by one and frozen, a broker frozen; judged
by what the jobs' code noted beside the log, by the raw log, and by the rules of `jobledger audit`.

``FAULT_KILLS`` scales the tests up.
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
from tests.acceptance.fleet import Fleet, FleetError, paused, serves
from tests.brokers import Brokers
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("FAULT_KILLS", "4"))
ACCOUNTS, EACH = 40, 60
PLAIN = 1_500
#: How often the broker is paused, and how many seconds: fewer than a worker's lease has, after which it starts no jobs.
FREEZES, LAG_S = max(2, KILLS // 2), 2.5
BEYOND_SESSION_S = 9.0
PARTITIONS = 4
TERMINAL = {"JobSucceeded", "JobFailed", "JobCancelled", "JobExpired"}


@contextlib.contextmanager
def made(folder: Path, bootstrap: str) -> Iterator[Fleet]:
    """A namespace with its topics and no process yet."""
    namespace = f"k{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(folder, bootstrap, namespace, target="tests/acceptance/order_app.py:app") as fleet:
        yield fleet


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """A namespace on the broker that other tests use, too."""
    with made(tmp_path, kafka.bootstrap) as fleet:
        yield fleet


def tell(fleet: Fleet, *words: str, text: str = "") -> str:
    """Run the app's own little command, in a process of its own."""
    argv = [sys.executable, "-m", "tests.acceptance.order_app", *words]
    done = subprocess.run(
        argv, env=fleet.environ, check=True, cwd=ROOT, timeout=60 * PATIENCE, input=text, capture_output=True, text=True
    )
    return done.stdout


def began(fleet: Fleet) -> list[list[str]]:
    """What the jobs' code noted at its begin, in order."""
    return [words for line in fleet.lines() if (words := line.split())[1] == "began"]


class Keys:
    """The log, key by key."""

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
        """Whether every job has ended."""
        return len(self.number) == ACCOUNTS * EACH and self.ended >= self.number.keys()

    def out_of_order(self) -> list[str]:
        """Starts of a job while an earlier one of its key had not ended, in the order of the log."""
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
        """Starts of an attempt before the delay was over that the attempt before asked for, by the log's own times."""
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
        """Attempts of each job that failed and were followed by another, as the log has them."""
        return Counter(r.head["job_id"] for r in self.lifecycle if r.fact == "JobRetried")


def finished(fleet: Fleet) -> Keys:
    """The log once every keyed job has ended."""
    found: list[Keys] = []

    def whole() -> bool:
        fleet.tend()
        if len({words[0] for words in began(fleet)}) < ACCOUNTS * EACH:
            return False
        found.append(Keys(fleet))
        return found[-1].done()

    fleet.until(whole, 150, "every keyed job ended")
    return found[-1]


def passed_over(fleet: Fleet) -> list[str]:
    """Runs that broke the order of a key, by what the jobs' code noted: not of the job whose turn it was, or of an attempt
    before the last one."""
    found: list[str] = []
    last: dict[str, tuple[int, int]] = {}
    for _, _, account, *rest in began(fleet):
        number, attempt = map(int, rest)
        before, tried = last.get(account, (-1, 1))
        if number not in (before, before + 1) or (number == before and attempt < tried):
            found.append(f"{account}: job {number}, attempt {attempt}, began after job {before}, attempt {tried}")
        last[account] = (number, attempt)
    return found


def run_again(fleet: Fleet) -> dict[str, int]:
    """How often an attempt ran again, by account."""
    runs = Counter(tuple(words) for words in began(fleet))
    again: Counter[str] = Counter()
    for words, count in runs.items():
        again[words[2]] += count - 1
    return dict(again)


def judge(fleet: Fleet, keys: Keys) -> None:
    """What holds whatever happened: order, ends, delays, attempts that are counted on. The audit finds no fault either."""
    assert passed_over(fleet) == []
    hold(keys.log, fleet.windows, finished=False)  # dead letters may still be on their way
    assert max(run_again(fleet).values()) <= fleet.did["worker killed"], "more than the one job that ran"
    assert keys.out_of_order() == []
    assert keys.early() == []
    ends = Counter(r.fact for r in keys.lifecycle if r.fact in TERMINAL)
    poor = ACCOUNTS * len([n for n in range(EACH) if n % 50 == 49])
    assert ends["JobFailed"] == poor
    assert ends["JobSucceeded"] == ACCOUNTS * EACH - poor
    assert max(keys.attempts().values()) <= 3, "four attempts make three retries, whoever made them"


def test_keys_keep_their_order_under_kill_9(fleet: Fleet) -> None:
    """KEY_ORDER: two workers killed in turn while every seventh job is tried again: no job begins before the one before
    it has ended, attempts are counted on by the next owner, and everything ends."""
    tell(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    for n in range(KILLS):
        least = ACCOUNTS * EACH * (n + 1) // (KILLS + 2)
        fleet.until(lambda least=least: len(began(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound now
        fleet.kill(workers[n % 2])
        fleet.tend()
    judge(fleet, finished(fleet))


def test_keys_keep_their_order_when_acknowledgements_lag(tmp_path: Path) -> None:
    """KEY_ORDER with a paused broker: the worker continues, and is killed before anything that it sent is acknowledged. Of
    each key at most the one job that ran runs again, and none after a later one."""
    with Brokers() as brokers, made(tmp_path, brokers.bootstrap) as fleet:
        tell(fleet, "submit", str(ACCOUNTS), str(EACH))
        worker = fleet.start("worker", "--concurrency", "20")
        for n in range(FREEZES):
            least = ACCOUNTS * EACH * (n + 1) // (FREEZES + 2)
            fleet.until(lambda least=least: len(began(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound now
            brokers.pause(1)
            until = time.monotonic() + LAG_S
            while time.monotonic() < until:  # how long nothing is acknowledged is the fault itself
                fleet.tend()
                time.sleep(0.1)
            fleet.kill(worker)
            brokers.resume(1)
            fleet.tend()
        judge(fleet, finished(fleet))


def test_a_rolling_restart_keeps_the_order_and_runs_no_attempt_twice(fleet: Fleet) -> None:
    """GRACEFUL_STOP with keys: stopped one by one while keys are held by jobs that wait for their retry."""
    tell(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    for n, member in enumerate(workers * 2):
        serves(fleet, member)
        least = ACCOUNTS * EACH * (n + 1) // 6
        fleet.until(lambda least=least: len(began(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound now
        assert fleet.stop(member) == 0, member.tail()
        fleet.restart(member)
    judge(fleet, finished(fleet))
    twice = {what: count for what, count in Counter(tuple(words) for words in began(fleet)).items() if count > 1}
    assert twice == {}


@pytest.mark.extended
def test_a_frozen_worker_does_not_go_on_with_a_key_that_was_taken_over(fleet: Fleet) -> None:
    """A worker that stood still past its session begins nothing of a key that has another owner by then."""
    tell(fleet, "submit", str(ACCOUNTS), str(EACH))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    fleet.until(lambda: len(began(fleet)) >= ACCOUNTS * EACH // 4, 90, "a quarter begun")
    with paused(fleet, workers[0], BEYOND_SESSION_S):
        fleet.until(lambda: len(began(fleet)) >= ACCOUNTS * EACH // 2, 90, "half begun")
    keys = finished(fleet)
    window = fleet.windows[-1]
    assert keys.done()
    # What it had on its way when it was frozen is sent when it wakes, and then stands behind what came meanwhile.
    waking = {rawlog.show(r) for r in keys.lifecycle if window.end - 500 <= r.at <= window.end + 3_000}
    late = [line for line in keys.out_of_order() if line.partition(", at ")[2] not in waking]
    assert len(late) == 0, late[:5]
    hold(keys.log, fleet.windows, finished=False)


def test_what_was_cancelled_never_runs(fleet: Fleet) -> None:
    """CANCEL_IS_DURABLE: cancelled while no worker ran; workers are then killed in turn, and none of them runs one."""
    ids = tell(fleet, "plain", str(PLAIN)).split()
    cancelled = ids[::3]
    tell(fleet, "cancel", "wrong list", text="\n".join(cancelled))
    workers = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    wanted = len(ids) - len(cancelled)
    for n in range(KILLS):
        least = wanted * (n + 1) // (KILLS + 2)
        fleet.until(lambda least=least: len(began(fleet)) >= least, 90, f"{least} begun")  # type: ignore[misc]  # bound now
        fleet.kill(workers[n % 2])
        fleet.tend()
    seen: list[dict[str, list[rawlog.Record]]] = []

    def whole() -> bool:
        fleet.tend()
        if len({words[0] for words in began(fleet)}) < wanted:
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
    assert not {words[0] for words in began(fleet)} & set(cancelled)
    for job in cancelled:
        assert {r.fact for r in seen[-1][job]} == {"JobCancelled"}
        assert msgspec.convert(seen[-1][job][0].body["reason"], str) == "wrong list"
    assert all({r.fact for r in seen[-1][job]} == {"JobSucceeded"} for job in set(ids) - set(cancelled))
