"""Faults of workers without other parts: they are killed, paused and stopped one by one. The tests judge by the raw log
and by which code really ran.

Without a coordinator, a retried job is not released again. So every release is judged by itself: each must be closed,
and none may start after its success is in the log.
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
from tests.acceptance.fleet import ROOT, Fleet, Member, paused, wait_until_serving
from tests.acceptance.independent import fold
from tests.acceptance.promises import Promise
from tests.acceptance.rawlog import Log, Record
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

JOBS = 4_000
BEYOND_SESSION_S = 9.0
CLOSING = {"JobSucceeded", "JobFailed", "JobRetried", "JobSnoozed"}
PARTITIONS = 4
#: Number of jobs whose facts may be unacknowledged at once: two facts each, and no job starts above
#: `UNACKNOWLEDGED_LIMIT`.
UNACKNOWLEDGED = UNACKNOWLEDGED_LIMIT // 2

Release = tuple[str, int, int]


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace with its topics and without any process."""
    namespace = f"w{uuid.uuid4().hex[:10]}"
    settings, names = Settings(bootstrap=kafka.bootstrap), Names(namespace)
    specs = topology.desired(names, {"default": PARTITIONS}, partitions=PARTITIONS, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs, topology.worker_groups(names, ["default"])))
    with Fleet(tmp_path, kafka.bootstrap, namespace, target="tests/acceptance/faults_app.py:app") as made:
        yield made


def submit(fleet: Fleet, first: int, last: int) -> None:
    """Submit jobs by number from a separate process. All are acknowledged when this returns."""
    import subprocess
    import sys

    argv = [sys.executable, "-m", "tests.acceptance.faults_app", str(first), str(last)]
    subprocess.run(argv, env=fleet.environ, check=True, cwd=ROOT, timeout=60 * PATIENCE)


class Seen:
    """The log at one moment, by release."""

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
        """Return the releases without a closing fact."""
        return set(self.work) - set(self.closed)

    def begun_after_success(self) -> list[Record]:
        """Return the starts that are behind the success of their own release."""
        found = []
        for start in self.starts:
            success = self.succeeded.get(start.release)
            if success is not None and success.offset < start.offset:
                assert success.partition == start.partition
                found.append(start)
        return found


def runs_by_job(fleet: Fleet) -> Counter[str]:
    """Return how often each job's code really began, from the side log."""
    return Counter(line.split()[0] for line in fleet.lines() if line.split()[1] == "began")


def wait_until_closed(fleet: Fleet, expected: int, timeout: float = 120.0) -> Seen:
    """Wait until every release is closed, and return the log."""
    seen: list[Seen] = []

    def all_closed() -> bool:
        if len(runs_by_job(fleet)) < expected:  # the whole log is read only near the end
            return False
        seen.append(Seen(fleet))
        return len(seen[-1].work) >= expected and not seen[-1].open()

    fleet.until(all_closed, timeout, f"{expected} releases closed")
    return seen[-1]


def wait_for_starts(fleet: Fleet, least: int) -> None:
    """Wait until at least ``least`` jobs have begun."""
    fleet.until(lambda: sum(runs_by_job(fleet).values()) >= least, 90, f"{least} jobs begun")


@pytest.mark.parametrize(("jobs", "kills"), [(800, 2), pytest.param(4_000, 6, marks=pytest.mark.extended)])
def test_kill_9_loses_nothing_and_reruns_no_success(fleet: Fleet, jobs: int, kills: int) -> None:
    """Workers are killed several times. Every release is closed, none starts again after its success is in the log, and
    every committed record is closed."""
    submit(fleet, 0, jobs)
    workers = [fleet.start("worker", "--concurrency", "50") for _ in range(2)]
    for n in range(kills):
        wait_for_starts(fleet, jobs * (n + 1) // (kills + 2))
        fleet.kill(workers[n % 2])
        fleet.tend()
    seen = wait_until_closed(fleet, jobs)
    assert not seen.begun_after_success()
    for place, base in seen.log.committed.items():
        below = [r for r in seen.work.values() if (r.topic, r.partition) == place and r.offset < base]
        assert all(r.release in seen.closed for r in below)
    again = sum(count - 1 for count in runs_by_job(fleet).values())
    assert again <= kills * (50 + UNACKNOWLEDGED), "only what ran, or was not acknowledged, at the kill may run again"


@pytest.mark.parametrize("jobs", [900, pytest.param(4_000, marks=pytest.mark.extended)])
def test_a_rolling_restart_reruns_nothing(fleet: Fleet, jobs: int) -> None:
    """Three workers get SIGTERM one after the other while they work. The code of every job runs exactly once."""
    workers = [fleet.start("worker", "--concurrency", "10") for _ in range(3)]
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap), partitions=PARTITIONS)
    app.task(name="work")(faults_app.work.fn)
    app.task(name="thread")(faults_app.thread.fn)
    with contextlib.closing(app):
        for n, member in enumerate(workers * 2):
            wait_until_serving(fleet, member)
            # The jobs are submitted only now and from this process, so that there is work when the member is stopped,
            # however long starts take.
            first, last = jobs * n // 6, jobs * (n + 1) // 6
            app.submit_many(app.tasks["thread" if i % 4 == 3 else "work"].job(i) for i in range(first, last))
            wait_for_starts(fleet, first + (last - first) // 4)
            assert fleet.stop(member) == 0, member.tail()
            fleet.restart(member)
    seen = wait_until_closed(fleet, jobs)
    counted = runs_by_job(fleet)
    assert len(counted) == jobs
    assert {job: count for job, count in counted.items() if count > 1} == {}
    assert len(seen.starts) == jobs


def written_by(record: Record, pid: int) -> bool:
    """Return whether the worker with this process id wrote the record."""
    return str(record.head["source"]).endswith(f":{pid}")


def begun_at(start: Record) -> float:
    """Return when the worker started the job, in ms of its machine's clock."""
    return int(start.head["occurred_at"]) / 1000


def begun_by_others(fleet: Fleet, pid: int) -> set[str]:
    """Return the jobs whose code began in another process than this one."""
    return {job for job, _, process, _ in map(str.split, fleet.lines()) if int(process) != pid}


#: Milliseconds after the end of a pause in which the job begins that the event loop was starting when it was paused.
INSTANT_MS = 1_000


def judge_pause(fleet: Fleet, seen: Seen) -> set[str]:
    """Check what is promised about a worker that was paused beyond its session: no job that had ended before runs
    again, and when the worker continues, it starts no job that other workers have. Return the jobs whose code other
    workers began meanwhile."""
    window = fleet.windows[-1]
    again: list[str] = []
    woken = [r for r in seen.starts if written_by(r, window.pid) and 0 <= begun_at(r) - window.end < INSTANT_MS]
    # The limit of the promise: the one job that the event loop was starting when the process was paused.
    was_starting = {r.release for r in sorted(woken, key=begun_at)[:1]}
    for start in seen.begun_after_success():
        if start.release in was_starting and written_by(start, window.pid):
            continue
        success = seen.succeeded[start.release]
        if written_by(start, window.pid) and begun_at(start) < window.end:
            continue  # the Kafka client of the paused worker had queued this record, and sent it after the pause
        if not (success.at >= window.begin and written_by(success, window.pid)):
            when = (
                f"{begun_at(start) - window.begin:.0f} ms after the pause of {window.end - window.begin:.0f} ms began"
            )
            writers = f"by {start.head['source']} {when}, after one by {success.head['source']}; paused: {window.pid}"
            again.append(f"{rawlog.show(start)} after {rawlog.show(success)}: {writers}")
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not again, again[:5])
    elsewhere: dict[str, int] = {}
    for job, _, pid, at in map(str.split, fleet.lines()):
        if int(pid) != window.pid and int(at) >= window.begin:
            elsewhere.setdefault(job, int(at))
    on_waking = [
        f"{rawlog.show(r)}, {begun_at(r) - window.end:.0f} ms after the pause"
        for r in seen.starts
        if written_by(r, window.pid)
        and r.release not in was_starting
        and begun_at(r) >= window.begin
        and elsewhere.get(r.head["job_id"], sys.maxsize) < begun_at(r)
    ]
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not on_waking, on_waking[:5])
    return set(elsewhere)


def test_a_worker_that_was_paused_beyond_its_session_starts_no_job_of_others(fleet: Fleet) -> None:
    """Only short jobs that the worker had started may run twice. The worker starts no others before it has partitions
    again, and then it works again."""
    submit(fleet, 0, JOBS)
    members: list[Member] = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    wait_for_starts(fleet, JOBS // 4)
    with paused(fleet, members[0], BEYOND_SESSION_S):
        wait_for_starts(fleet, JOBS // 2)
    submit(fleet, JOBS, JOBS + 500)
    judge_pause(fleet, wait_until_closed(fleet, JOBS + 500))
    again = sum(count - 1 for count in runs_by_job(fleet).values())
    assert again <= 20 + UNACKNOWLEDGED, "only what ran when it was paused may run again"
    assert all(m.process is not None and m.process.poll() is None for m in members)


@pytest.mark.extended
def test_jobs_that_end_when_their_paused_worker_continues_have_one_state(fleet: Fleet) -> None:
    """Jobs of two seconds are taken over by other workers during the pause. Both outcomes may be in the log, and every
    reader sees one success. Half of the jobs have a time limit that is over when the worker continues. The worker
    requests no retry of a job that now has another owner."""
    submit(fleet, -241, -1)  # two seconds each, and enough jobs that some are open after the log was read a few times
    members: list[Member] = [fleet.start("worker", "--concurrency", "20") for _ in range(2)]
    process = members[0].process
    assert process is not None

    def runs_many() -> bool:
        seen = Seen(fleet)
        left = seen.open()
        return len([r for r in seen.starts if r.release in left and written_by(r, process.pid)]) >= 10

    fleet.until(runs_many, 60, "the worker that is to be paused runs many jobs")
    with paused(fleet, members[0], BEYOND_SESSION_S):
        seen = Seen(fleet)
        open_here = {r.head["job_id"] for r in seen.starts if written_by(r, process.pid) and r.release in seen.open()}
        fleet.until(
            lambda: bool(open_here & begun_by_others(fleet, process.pid)), 60, "others have begun one of its jobs"
        )
    seen = wait_until_closed(fleet, 240)
    taken = judge_pause(fleet, seen) & {r.head["job_id"] for r in seen.starts if written_by(r, process.pid)}
    assert taken, "nothing was taken over: the worker was not paused while it ran jobs"

    def all_told() -> bool:
        ends = (r for r in Seen(fleet).log.of("lifecycle") if r.fact in CLOSING)
        return taken <= {r.head["job_id"] for r in ends if written_by(r, process.pid)}

    fleet.until(all_told, 60, "the worker that was paused has written what its jobs resulted in")
    fleet.until(lambda: "lost partitions" in members[0].output(), 60, "the worker knows what it has lost")
    retried = {
        r.release for r in Seen(fleet).log.of("lifecycle") if r.fact == "JobRetried" and written_by(r, process.pid)
    }
    assert retried, "no job with a time limit ran there when it was paused"
    submit(fleet, 0, 200)
    log = wait_until_closed(fleet, 440).log
    asked = {r.release for r in log.of("coordination") if r.fact == "ReleaseRequested" and written_by(r, process.pid)}
    again = {(job, run, release + 1) for job, run, release in retried if job in taken}
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not asked & again, asked & again)
    states, elsewhere = fold(log.records), begun_by_others(fleet, process.pid)
    assert {states[job].state for job, _, _ in seen.work if job in elsewhere} == {"succeeded"}
    # A retry counts if it was in the log before another worker took over the partition.
    assert {states[job].state for job, _, _ in seen.work} <= {"succeeded", "retrying"}
    assert process.poll() is None


@pytest.mark.extended
def test_a_job_whose_child_process_died_in_a_pause_is_not_started_again(fleet: Fleet, kafka: EmbeddedKafka) -> None:
    """Child processes of a paused worker are killed while they run jobs, and other workers run these jobs. When the
    paused worker continues, it writes no start of them, even if no broker answers when it notices the dead child
    processes."""
    jobs = 12
    submit(fleet, -1000 - jobs, -1000)
    members: list[Member] = [fleet.start("worker", "--concurrency", "20", "--children", "2") for _ in range(2)]
    paused_pid = members[0].pid

    def begun() -> list[tuple[str, int]]:
        """Return the jobs whose code began, and the process of each."""
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
    seen = wait_until_closed(fleet, jobs)
    judge_pause(fleet, seen)
    begin = fleet.windows[-1].begin
    again = [
        rawlog.show(r)
        for r in seen.starts
        if written_by(r, paused_pid) and r.head["job_id"] in running and begun_at(r) >= begin
    ]
    assert running, "no child ran a job when its worker was paused"
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not again, again)


def test_a_second_stop_signal_ends_the_grace_time(fleet: Fleet) -> None:
    """The second SIGTERM ends the grace time."""
    submit(fleet, -1, 0)  # a job that takes an hour
    worker = fleet.start("worker", "--grace", "600")
    wait_for_starts(fleet, 1)
    began = time.monotonic()
    fleet._signal(worker, 15)
    fleet.until(lambda: " stops; running jobs: 1," in worker.output(), 30, "the first signal taken")
    assert fleet.stop(worker) == 0
    assert time.monotonic() - began < 300, "as long as that only if it waited"
    assert len(Seen(fleet).open()) == 1
