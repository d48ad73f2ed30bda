"""Workers alone against faults: killed, paused, stopped one by one; judged by the raw log and by what really ran.

Without a coordinator a retried job stays where it is, so every release is looked at by itself: each must be closed, and
none may be started once its success was in the log.
"""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka.admin import AdminClient

from jobledger import App
from jobledger.config import Settings
from jobledger.consumers.recording.worker_producer import UNACKNOWLEDGED_LIMIT
from jobledger.kafka import topics, topology
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topic_names import Names
from tests.acceptance import faults_app, rawlog
from tests.acceptance.fleet import ROOT, Fleet, Member, paused, serves
from tests.acceptance.independent import fold
from tests.acceptance.promises import Promise
from tests.acceptance.rawlog import Log, Record
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

JOBS = 4_000
BEYOND_SESSION_S = 9.0
CLOSING = {"JobSucceeded", "JobFailed", "JobRetried", "JobSnoozed"}
PARTITIONS = 4
#: Jobs whose facts may be on their way at once: two facts each, and no job is begun above `UNACKNOWLEDGED_LIMIT`.
UNACKNOWLEDGED = UNACKNOWLEDGED_LIMIT // 2

Release = tuple[str, int, int]


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """A namespace with its topics and no process yet."""
    namespace = f"w{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=kafka.bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(tmp_path, kafka.bootstrap, namespace, target="tests/acceptance/faults_app.py:app") as made:
        yield made


def submit(fleet: Fleet, first: int, last: int) -> None:
    """Submit jobs by number, in a process of its own, acknowledged when this returns."""
    import subprocess
    import sys

    argv = [sys.executable, "-m", "tests.acceptance.faults_app", str(first), str(last)]
    subprocess.run(argv, env=fleet.environ, check=True, cwd=ROOT, timeout=60 * PATIENCE)


class Seen:
    """The log as it is, release by release."""

    def __init__(self, fleet: Fleet) -> None:
        self.log: Log = rawlog.read(fleet.bootstrap, fleet.namespace)
        self.work: dict[Release, Record] = {}
        for record in self.log.work():
            self.work.setdefault(record.release, record)
        self.closed: dict[Release, Record] = {}
        self.succeeded: dict[Release, Record] = {}
        self.starts: list[Record] = []
        for record in self.log.of("lifecycle"):
            if record.fact in CLOSING:
                self.closed.setdefault(record.release, record)
            if record.fact == "JobSucceeded":
                self.succeeded.setdefault(record.release, record)
            if record.fact == "JobStarted":
                self.starts.append(record)

    def open(self) -> set[Release]:
        """Releases without an end."""
        return set(self.work) - set(self.closed)

    def begun_after_success(self) -> list[Record]:
        """Starts that stand behind the success of their own release."""
        found = []
        for start in self.starts:
            success = self.succeeded.get(start.release)
            if success is not None and success.offset < start.offset:
                assert success.partition == start.partition
                found.append(start)
        return found


def runs(fleet: Fleet) -> Counter[str]:
    """How often each job's code really began, by its own account."""
    return Counter(line.split()[0] for line in fleet.lines() if line.split()[1] == "began")


def drained(fleet: Fleet, expected: int, timeout: float = 120.0) -> Seen:
    """Wait until every release is closed."""
    seen: list[Seen] = []

    def all_closed() -> bool:
        if len(runs(fleet)) < expected:  # reading the whole log is only worth it at the end
            return False
        seen.append(Seen(fleet))
        return len(seen[-1].work) >= expected and not seen[-1].open()

    fleet.until(all_closed, timeout, f"{expected} releases closed")
    return seen[-1]


def progress(fleet: Fleet, least: int) -> None:
    """Wait until at least so many jobs have begun."""
    fleet.until(lambda: sum(runs(fleet).values()) >= least, 90, f"{least} jobs begun")


@pytest.mark.parametrize(("jobs", "kills"), [(1_500, 3), pytest.param(4_000, 6, marks=pytest.mark.extended)])
def test_kill_9_loses_nothing_and_reruns_no_success(fleet: Fleet, jobs: int, kills: int) -> None:
    """Workers killed again and again: every release is closed, none begins again after its success was in the log, and
    what is committed is closed."""
    submit(fleet, 0, jobs)
    workers = [fleet.start("worker", "--concurrency", "50") for _ in range(2)]
    for n in range(kills):
        progress(fleet, jobs * (n + 1) // (kills + 2))
        fleet.kill(workers[n % 2])
        fleet.tend()
    seen = drained(fleet, jobs)
    assert not seen.begun_after_success()
    for place, base in seen.log.committed.items():
        below = [r for r in seen.work.values() if (r.topic, r.partition) == place and r.offset < base]
        assert all(r.release in seen.closed for r in below)
    again = sum(count - 1 for count in runs(fleet).values())
    assert again <= kills * (50 + UNACKNOWLEDGED), "only what ran, or was not acknowledged, at the kill may run again"


@pytest.mark.parametrize("jobs", [1_500, pytest.param(4_000, marks=pytest.mark.extended)])
def test_a_rolling_restart_reruns_nothing(fleet: Fleet, jobs: int) -> None:
    """SIGTERM of one of three workers after the other while they work: every job's code runs exactly once."""
    workers = [fleet.start("worker", "--concurrency", "10") for _ in range(3)]
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap), partitions=PARTITIONS)
    app.task(name="work")(faults_app.work.fn)
    app.task(name="thread")(faults_app.thread.fn)
    with contextlib.closing(app):
        for n, member in enumerate(workers * 2):
            serves(fleet, member)
            # Only now, and from this process: however long starts take, there is work when the member is stopped.
            first, last = jobs * n // 6, jobs * (n + 1) // 6
            app.submit_many(app.tasks["thread" if i % 4 == 3 else "work"].job(i) for i in range(first, last))
            progress(fleet, first + (last - first) // 4)
            assert fleet.stop(member) == 0, member.tail()
            fleet.restart(member)
    seen = drained(fleet, jobs)
    counted = runs(fleet)
    assert len(counted) == jobs
    assert {job: count for job, count in counted.items() if count > 1} == {}
    assert len(seen.starts) == jobs


def by(record: Record, pid: int) -> bool:
    """Whether the worker with this process id wrote it."""
    return str(record.head["source"]).endswith(f":{pid}")


def begun_at(start: Record) -> float:
    """When its worker began the job, ms of that machine's clock."""
    return int(start.head["occurred_at"]) / 1000


def begun_by_others(fleet: Fleet, pid: int) -> set[str]:
    """Jobs whose code began in another process than this one."""
    return {job for job, _, process, _ in map(str.split, fleet.lines()) if int(process) != pid}


def judge_pause(fleet: Fleet, seen: Seen) -> set[str]:
    """What is promised of a worker that was paused beyond its session: nothing that had ended before runs again, and on
    waking it starts nothing that others have. The jobs whose code others began meanwhile."""
    window = fleet.windows[-1]
    again: list[str] = []
    for start in seen.begun_after_success():
        success = seen.succeeded[start.release]
        if by(start, window.pid) and begun_at(start) < window.end:
            continue  # it lay in the Kafka client of the paused worker, which sent it on waking
        if not (success.at >= window.begin and by(success, window.pid)):
            again.append(f"{rawlog.show(start)} after {rawlog.show(success)}")
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not again, again[:5])
    elsewhere: dict[str, int] = {}
    for job, _, pid, at in map(str.split, fleet.lines()):
        if int(pid) != window.pid and int(at) >= window.begin:
            elsewhere.setdefault(job, int(at))
    on_waking = [
        rawlog.show(r)
        for r in seen.starts
        if by(r, window.pid)
        and begun_at(r) >= window.begin
        and elsewhere.get(r.head["job_id"], sys.maxsize) < begun_at(r)
    ]
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not on_waking, on_waking[:5])
    return set(elsewhere)


def test_a_worker_that_was_paused_beyond_its_session_starts_nothing_when_it_wakes(fleet: Fleet) -> None:
    """Short jobs: what it had begun may run twice, as much as was on its way; nothing else does, and it works again."""
    submit(fleet, 0, JOBS)
    members: list[Member] = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    progress(fleet, JOBS // 4)
    with paused(fleet, members[0], BEYOND_SESSION_S):
        progress(fleet, JOBS // 2)
    submit(fleet, JOBS, JOBS + 500)
    judge_pause(fleet, drained(fleet, JOBS + 500))
    again = sum(count - 1 for count in runs(fleet).values())
    assert again <= 20 + UNACKNOWLEDGED, "only what ran when it was paused may run again"
    assert all(m.process is not None and m.process.poll() is None for m in members)


@pytest.mark.extended
def test_jobs_that_end_as_their_paused_worker_wakes_have_one_state(fleet: Fleet) -> None:
    """Jobs of two seconds, which others take over meanwhile: both ends may stand in the log, and all who read it see one
    success. Half of them have a time limit, which is over when the worker wakes: it asks for no retry of what is another's."""
    submit(fleet, -241, -1)  # two seconds each, and so many that some are open after the log was read a few times
    members: list[Member] = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    process = members[0].process
    assert process is not None

    def runs_many() -> bool:
        seen = Seen(fleet)
        left = seen.open()
        return len([r for r in seen.starts if r.release in left and by(r, process.pid)]) >= 10

    fleet.until(runs_many, 60, "the worker that is to be paused runs many jobs")
    with paused(fleet, members[0], BEYOND_SESSION_S):
        seen = Seen(fleet)
        open_here = {r.head["job_id"] for r in seen.starts if by(r, process.pid) and r.release in seen.open()}
        fleet.until(
            lambda: bool(open_here & begun_by_others(fleet, process.pid)), 60, "others have begun one of its jobs"
        )
    seen = drained(fleet, 240)
    taken = judge_pause(fleet, seen) & {r.head["job_id"] for r in seen.starts if by(r, process.pid)}
    assert taken, "nothing was taken over: the worker was not paused while it ran jobs"

    def all_told() -> bool:
        ends = (r for r in Seen(fleet).log.of("lifecycle") if r.fact in CLOSING)
        return taken <= {r.head["job_id"] for r in ends if by(r, process.pid)}

    fleet.until(all_told, 60, "the worker that was paused has written what its jobs resulted in")
    fleet.until(lambda: "lost partitions" in members[0].output(), 60, "the worker knows what it has lost")
    retried = {r.release for r in Seen(fleet).log.of("lifecycle") if r.fact == "JobRetried" and by(r, process.pid)}
    assert retried, "no job with a time limit ran there when it was paused"
    submit(fleet, 0, 200)
    log = drained(fleet, 440).log
    asked = {r.release for r in log.of("coordination") if r.fact == "ReleaseRequested" and by(r, process.pid)}
    again = {(job, run, release + 1) for job, run, release in retried if job in taken}
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not asked & again, asked & again)
    states, elsewhere = fold(log.records), begun_by_others(fleet, process.pid)
    assert {states[job].state for job, _, _ in seen.work if job in elsewhere} == {"succeeded"}
    # A retry that was in the log before others took its partition over counts.
    assert {states[job].state for job, _, _ in seen.work} <= {"succeeded", "retrying"}
    assert process.poll() is None


@pytest.mark.extended
def test_a_job_whose_child_died_in_a_pause_is_not_started_again_on_waking(fleet: Fleet, kafka: EmbeddedKafka) -> None:
    """Children of a paused worker are killed while they run jobs, and other workers run these jobs. When the paused worker
    continues, it writes no start of them, also if no broker answers when it notices that the children died."""
    jobs = 12
    submit(fleet, -1000 - jobs, -1000)
    members: list[Member] = [fleet.start("worker", "--concurrency", "20", "--children", "2") for _ in range(2)]
    paused_pid = members[0].pid

    def begun() -> list[tuple[str, int]]:
        """Jobs whose code began, and the process that ran each."""
        return [(job, int(pid)) for job, _, pid, _ in map(str.split, fleet.lines())]

    def family() -> dict[int, psutil.Process]:
        return {each.pid: each for each in psutil.Process(paused_pid).children(recursive=True)}

    fleet.until(lambda: any(pid in family() for _, pid in begun()), 60, "the worker that is to be paused runs a job")
    try:
        with paused(fleet, members[0], BEYOND_SESSION_S):
            own, closed = family(), {job for job, _, _ in Seen(fleet).closed}
            running = {job: own[pid] for job, pid in begun() if pid in own and job not in closed}
            for child in running.values():
                child.kill()
            fleet.until(
                lambda: set(running) <= {job for job, pid in begun() if pid not in own},
                60,
                "others have begun its jobs",
            )
            kafka.pause()
        fleet.until(
            lambda: len(set(family()) - set(own)) >= len(set(running.values())), 60, "it has replaced the children"
        )
    finally:
        kafka.resume()
    fleet.until(lambda: "lost partitions" in members[0].output(), 60, "the worker knows what it has lost")
    seen = drained(fleet, jobs)
    judge_pause(fleet, seen)
    begin = fleet.windows[-1].begin
    again = [
        rawlog.show(r)
        for r in seen.starts
        if by(r, paused_pid) and r.head["job_id"] in running and begun_at(r) >= begin
    ]
    assert running, "no child ran a job when its worker was paused"
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not again, again)


def test_a_stop_signal_twice_does_not_wait(fleet: Fleet) -> None:
    """The second SIGTERM ends the grace time."""
    submit(fleet, -1, 0)  # a job that takes an hour
    worker = fleet.start("worker", "--grace", "600")
    progress(fleet, 1)
    began = time.monotonic()
    fleet._signal(worker, 15)
    fleet.until(lambda: " stops; 1 jobs run" in worker.output(), 30, "the first signal taken")
    assert fleet.stop(worker) == 0
    assert time.monotonic() - began < 300, "as long as that only if it waited"
    assert len(Seen(fleet).open()) == 1
