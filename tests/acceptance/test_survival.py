"""Real processes and real faults: whatever is killed, frozen or stopped, the promises hold.

`make test` runs the shortest form, `make test-all` a longer one. `make chaos` runs the longest form: it sets
``CHAOS_JOBS`` and ``CHAOS_SECONDS`` and draws its faults at random. ``CHAOS_SEED`` repeats the choices of a run.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobledger.kafka.embedded import EmbeddedKafka
from tests.acceptance import chaos_app, independent
from tests.acceptance.fleet import ROOT, TARGET, Fleet, Member, paused, wait_until_serving
from tests.acceptance.promises import BROKEN_BY, Promise

pytestmark = pytest.mark.kafka

LONG_JOBS = int(os.environ.get("CHAOS_JOBS", "40000"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "0"))
SEED = os.environ.get("CHAOS_SEED") or uuid.uuid4().hex[:8]
#: Seconds that are longer than every session: the sessions of workers and coordinators are 6 s here, and the
#: materializer's lease is no longer.
BEYOND_SESSION_S = 9.0
OUTAGE_S = 10.0
OPTIONS: dict[str, tuple[str, ...]] = {"worker": ("--concurrency", "50"), "coordinator": (), "materializer": ()}


class Service:
    """A process that submits jobs. ``accepted``: the ids of the acknowledged jobs, and their numbers."""

    def __init__(self, fleet: Fleet, first: int, last: int, rate: float) -> None:
        self._out = fleet.folder / "accepted.txt"
        self._errors = fleet.folder / "service.log"
        argv = [sys.executable, "-m", "tests.acceptance.chaos_app", str(first), str(last), str(rate)]
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=fleet.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=errors
            )

    @property
    def accepted(self) -> dict[str, int]:
        """Return the numbers of the acknowledged jobs, by job id."""
        lines = self._out.read_text().splitlines(keepends=True)
        return {line.split()[1]: int(line.split()[0]) for line in lines if line.endswith("\n")}

    def done(self) -> bool:
        """Return whether the service has submitted everything. Raises an error if the service failed."""
        code = self.process.poll()
        if code:
            raise AssertionError(f"the service ended with {code}:\n{self._errors.read_text()[-3000:]}")
        return code == 0

    def close(self) -> None:
        """End the service."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def counts(fleet: Fleet) -> tuple[int, int]:
    """Return how many jobs have ended according to the status table, and how many it has."""
    try:
        connection = sqlite3.connect(f"file:{fleet.status}?mode=ro", uri=True, timeout=5.0)
        try:
            states = dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        finally:
            connection.close()
    except sqlite3.OperationalError:  # the table does not exist yet
        return 0, 0
    return sum(n for state, n in states.items() if state in independent.ENDED), sum(states.values())


def start_parts(fleet: Fleet, **members: int) -> None:
    """Create the topics, and start this number of members of each role."""
    code, _, errors = fleet.run("topics", "apply", TARGET, "--yes")
    assert code == 0, errors
    for role, number in members.items():
        for _ in range(number):
            fleet.start(role, *OPTIONS[role])


def wait_until_ended(fleet: Fleet, service: Service, timeout: float) -> None:
    """Wait until every accepted job has ended according to the status table."""
    fleet.until(service.done, timeout, "the service submitted everything")
    accepted = len(service.accepted)

    def ended() -> bool:
        done, known = counts(fleet)
        return done == known and known >= accepted

    try:
        fleet.until(ended, timeout, f"{accepted} accepted jobs ended")
    except AssertionError as exc:
        log = independent.read(fleet.bootstrap, fleet.namespace)
        folded = independent.fold(log.records)
        left = [job for job, final in folded.items() if final.state not in independent.ENDED]
        if not left:
            differences = independent.compare(folded, independent.table(fleet.status))
            Promise.STATUS_CONVERGES.hold(
                False, f"all has ended, but {len(differences)} differ: {differences[:5]}\n{exc}"
            )
        lives = "\n\n".join("\n".join(independent.life_of(log, job)) for job in left[:3])
        found = independent.audit(log, service.accepted, fleet.windows)
        Promise.AT_LEAST_ONCE.hold(False, f"{len(left)} jobs did not end; {found}\n{lives}\n{exc}")


def judge(fleet: Fleet, service: Service, *, seed: str) -> tuple[independent.Log, independent.Audit]:
    """Check everything that can be seen against the promises. `jobledger audit` and `verify` must agree."""
    folded: dict[str, independent.Final] = {}
    differences: list[independent.Difference] = []
    log = independent.Log(fleet.namespace)

    def converged() -> bool:
        nonlocal folded, differences, log
        log = independent.read(fleet.bootstrap, fleet.namespace)
        folded = independent.fold(log.records)
        differences = independent.compare(folded, independent.table(fleet.status))
        return not differences and all(log.committed.get(at, 0) >= end for at, end in log.ends.items())

    def keep() -> None:
        lines = (independent.show(r) for r in sorted(log.records, key=lambda r: (r.at, r.place)))
        (fleet.folder / "log.txt").write_text("\n".join(lines) + f"\n{fleet.windows}\n")

    try:
        fleet.until(
            converged, 30.0, "the independent fold agrees with the table, and every work record is acknowledged"
        )
    except AssertionError as exc:
        keep()
        lives = "\n".join("\n".join(independent.life_of(log, d.job_id)) for d in differences[:3])
        Promise.STATUS_CONVERGES.hold(not differences, f"{len(differences)} differences: {differences[:5]}\n{lives}")
        behind = {at: (log.committed.get(at, 0), end) for at, end in log.ends.items()}
        raise AssertionError(f"{exc}\ncommitted and end: {behind}") from None

    keep()
    executions = independent.read_executions(fleet.executions)
    audit = independent.audit(log, service.accepted, fleet.windows, executions)
    for kind, number in audit.counts.items():
        BROKEN_BY[kind].hold(False, f"{kind}: {number}\n" + "\n".join(audit.violations[kind]))

    as_expected(log, folded, audit, seed)
    code, report, errors = fleet.run("verify", TARGET)
    Promise.STATUS_CONVERGES.hold(
        code == 0 and report["equal"] is True, f"verify: exit code {code}, {report}, {errors[-2000:]}"
    )
    # The command reads and sorts the log in another way, and must find the same faults, excused or not.
    code, report, errors = fleet.run("audit", TARGET, "--finished")
    assert code == (4 if audit.product else 0), (code, report, errors[-2000:])
    assert {fault["kind"]: fault["count"] for fault in report["faults"]} == audit.product, report
    assert (report["jobs"], report["rows"], report["open"]) == (len(folded), len(folded), 0)
    return log, audit


def as_expected(
    log: independent.Log, folded: dict[str, independent.Final], audit: independent.Audit, seed: str
) -> None:
    """Check that every job ended as its number determines, also jobs of other jobs and fallbacks."""
    crashed = {r.head["job_id"] for r in log.of("lifecycle") if r.fact == "JobFailed" and r.body["reason"] == "crashed"}
    audit.noted["failed as crashed"] = len(crashed)
    numbers = {r.head["job_id"]: json.loads(r.body["spec"]["args"])["number"] for r in log.records if submits(r)}
    wrong = []
    for job, final in folded.items():
        wanted = chaos_app.expected(final.task, numbers[job], seed)
        if job in crashed:
            continue
        pairs = (
            (wanted.state, final.state),
            (wanted.attempt, final.attempt),
            (wanted.result, final.result),
            (wanted.error, final.error),
        )
        if any(want is not None and want != got for want, got in pairs):
            wrong.append(f"{final} instead of {wanted}\n" + "\n".join(independent.life_of(log, job)))
    Promise.AT_LEAST_ONCE.hold(not wrong, f"{len(wrong)} jobs ended otherwise than they must:\n" + "\n".join(wrong[:3]))

    offspring: Counter[str] = Counter()
    for first in {r.head["job_id"]: r for r in log.records if submits(r)}.values():
        if first.body["spec"]["parent"] is not None:
            offspring[first.body["spec"]["parent"]] += 1
    for job_id, final in folded.items():
        children = {"parent": 2, "consoled": 1}.get(final.task, 0)
        if job_id not in crashed:
            Promise.AT_LEAST_ONCE.hold(offspring[job_id] == children, f"{offspring[job_id]} children of {final}")


def submits(record: independent.Record) -> bool:
    """Return whether the record is a submission."""
    return record.fact == "JobSubmitted"


def summary(fleet: Fleet, log: independent.Log, audit: independent.Audit, seed: str, seconds: float) -> str:
    """Return in one line what was done and what was seen."""
    states = Counter(f.state for f in independent.fold(log.records).values())
    did = ", ".join(f"{what} {n}x" for what, n in sorted(fleet.did.items()))
    noted = ", ".join(f"{what} {n}" for what, n in sorted(audit.noted.items()) if n)
    return (
        f"survival: {sum(states.values())} jobs ({dict(states)}) in {seconds:.0f} s, {len(log.records)} records; {did}; "
        f"ended by themselves {len(fleet.deaths)} {dict(Counter(fleet.deaths))}; within the limits: {noted}; seed {seed}"
    )


@pytest.mark.parametrize(("jobs", "rounds"), [(500, 1), pytest.param(3_000, 3, marks=pytest.mark.extended)])
def test_every_job_ends_once_and_its_status_is_right_under_faults(
    kafka: EmbeddedKafka, tmp_path: Path, namespace: str, say: Callable[[str], None], jobs: int, rounds: int
) -> None:
    """Workers, coordinators and materializers are killed, once or three times each, and frozen once beyond their
    sessions, and the broker is unavailable for ten seconds. Every accepted job ends as expected. No job starts too
    early, or again after its outcome is in the log. The table agrees with an independent fold and with `verify`, and no
    work record is skipped."""
    if SECONDS:
        pytest.skip("the long form runs instead")
    began = time.monotonic()
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, kafka.bootstrap, namespace, seed=SEED))
        start_parts(fleet, worker=2, coordinator=2, materializer=2)
        service = Service(fleet, 0, jobs, rate=43)
        stack.callback(service.close)
        dice = random.Random(SEED)
        fleet.until(lambda: counts(fleet)[0] >= jobs // 50, 60.0, "the first jobs ended")

        def progress() -> None:
            goal = min(counts(fleet)[0] + 50, jobs)
            fleet.until(lambda: counts(fleet)[0] >= goal, 60.0, f"{goal} jobs ended")

        for _ in range(rounds):
            for role in ("worker", "coordinator", "materializer"):
                fleet.kill(dice.choice(fleet.of(role)))
                fleet.tend()
                progress()
        frozen: list[Member] = [dice.choice(fleet.of(role)) for role in ("worker", "coordinator", "materializer")]
        with ExitStack() as still:
            for member in frozen:
                still.enter_context(paused(fleet, member, BEYOND_SESSION_S))
        progress()
        fleet.outage(kafka, OUTAGE_S)
        wait_until_ended(fleet, service, 120.0)
        log, audit = judge(fleet, service, seed=SEED)
        say(summary(fleet, log, audit, SEED, time.monotonic() - began))


@pytest.mark.extended
@pytest.mark.timeout(0)
@pytest.mark.skipif(not SECONDS, reason="the long form: make chaos")
def test_the_promises_hold_under_random_faults(
    kafka: EmbeddedKafka, tmp_path: Path, namespace: str, say: Callable[[str], None]
) -> None:
    """The same as the short form, with random faults, several at a time, for CHAOS_SECONDS with CHAOS_JOBS."""
    began = time.monotonic()
    say(f"chaos: {LONG_JOBS} jobs, {SECONDS:g} s, CHAOS_SEED={SEED}, logs in {tmp_path}")
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, kafka.bootstrap, namespace, seed=SEED))
        start_parts(fleet, worker=3, coordinator=2, materializer=2)
        service = Service(fleet, 0, LONG_JOBS, rate=LONG_JOBS / (SECONDS * 0.8))
        stack.callback(service.close)
        fleet.until(lambda: counts(fleet)[0] > 0, 60.0, "the first jobs ended")
        dice = random.Random(SEED)
        thaws: list[tuple[float, Member]] = []
        until = began + SECONDS
        told = began
        while time.monotonic() < until:
            pause = time.monotonic() + dice.uniform(0.2, 4.0)
            while time.monotonic() < pause:
                fleet.tend()
                for at, member in [t for t in thaws if t[0] <= time.monotonic()]:
                    fleet.thaw(member)
                    thaws.remove((at, member))
                time.sleep(0.05)
            fault = dice.choices(("kill", "freeze", "stop", "outage", "crash"), (70, 12, 12, 4, 2))[0]
            candidates = [m for m in fleet.members if m.frozen_at is None and m.process is not None]
            if fault == "kill" and candidates:
                for member in dice.sample(candidates, min(len(candidates), dice.choice((1, 1, 1, 2, 3)))):
                    fleet.kill(member)
            elif fault == "freeze" and len(thaws) < 3 and candidates:
                member = dice.choice(candidates)
                fleet.freeze(member)
                thaws.append((time.monotonic() + dice.uniform(0.5, 2 * BEYOND_SESSION_S), member))
            elif fault == "stop" and candidates:
                member = dice.choice(candidates)
                fleet.stop(member)
                fleet.restart(member)
            elif fault == "outage":
                fleet.outage(kafka, dice.uniform(1.0, OUTAGE_S))
            elif fault == "crash":
                kafka.kill()
                fleet.outage(kafka, dice.uniform(0.0, 3.0))
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(
                    f"chaos: {told - began:.0f} s, {counts(fleet)} of {len(service.accepted)} ended; {fleet.did}",
                )
        for _, member in thaws:
            fleet.thaw(member)
        wait_until_ended(fleet, service, 600.0)
        log, audit = judge(fleet, service, seed=SEED)
        say(summary(fleet, log, audit, SEED, time.monotonic() - began))


@pytest.mark.extended
def test_a_rolling_restart_under_load_runs_nothing_twice(
    kafka: EmbeddedKafka, tmp_path: Path, namespace: str, say: Callable[[str], None]
) -> None:
    """Two workers are stopped with SIGTERM and restarted, one after the other and twice, while jobs are submitted.
    Every release is started once, and its code runs once."""
    began = time.monotonic()
    jobs = 1500
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, kafka.bootstrap, namespace, seed=SEED))
        start_parts(fleet, worker=2, coordinator=1, materializer=1)
        service = Service(fleet, 0, jobs, rate=jobs / 30)
        stack.callback(service.close)
        fleet.until(lambda: counts(fleet)[0] >= jobs // 30, 60.0, "the first jobs ended")
        for _ in range(2):
            for member in fleet.of("worker"):
                wait_until_serving(fleet, member)
                code = fleet.stop(member)
                Promise.GRACEFUL_STOP.hold(code == 0, f"{member.name} ended with {code}:\n{member.tail()}")
                fleet.restart(member)
                goal = min(counts(fleet)[0] + jobs // 15, jobs)
                fleet.until(lambda goal=goal: counts(fleet)[0] >= goal, 60.0, f"{goal} jobs ended")  # type: ignore[misc]
        wait_until_ended(fleet, service, 90.0)
        log, audit = judge(fleet, service, seed=SEED)
        for kind in ("releases run more than once", "started-again", "closed-again"):
            Promise.GRACEFUL_STOP.hold(audit.noted[kind] == 0, f"{kind}: {audit.noted[kind]}")
        say(summary(fleet, log, audit, SEED, time.monotonic() - began))
