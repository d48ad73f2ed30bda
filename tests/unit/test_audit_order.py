"""The audit's rule of keys: a job that is started before its turn is a fault with both positions, and everything that
KEY_ORDER allows is no fault."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.audit.findings import Findings
from jobledger.audit.order import Turn, in_turn
from jobledger.audit.records import Record
from jobledger.audit.run import faults_of
from tests.acceptance.audit import audit
from tests.acceptance.rawlog import Log
from tests.handmade import COORD, ERROR, LIFE, NS, SPEC, WORK, Writer
from tests.unit.test_audit import Audited


class Keyed(Audited):
    """A log with jobs of the key ``k``; the other jobs of the log are correct."""

    def submit(self, job: str = "a", **more: Any) -> Record:
        """Submit a job of the key."""
        return super().submit(job, **{"key": "k", **more})

    def retry(self, job: str, *, in_place: bool, **more: Any) -> Record:
        """Add the retry of a failed attempt."""
        body = {"error": ERROR, "delay_ms": 0, "duration_us": 1, "in_place": in_place}
        return self.add(LIFE, "JobRetried", body, job=job, **more)

    def release(self, job: str, release: int, attempt: int) -> Record:
        """Add the request for a release and the coordinator's release."""
        requested = {"spec": SPEC, "delay_ms": 0, "due_at": None}
        asked = self.add(COORD, "ReleaseRequested", requested, job=job, release=release, attempt=attempt)
        due = {"spec": SPEC, "due_at": asked.at * 1000}
        return self.add(WORK, "JobDue", due, job=job, release=release, attempt=attempt, key="k")

    def run(self, job: str, **more: Any) -> None:
        """Add a start and a success."""
        self.start(job, **more)
        self.succeed(job, **more)

    def found(self, **scope: Any) -> dict[str, list[list[str]]]:
        """Judge the log; return the positions of the faults of each kind."""
        return {f.kind: [each.positions for each in f.first] for f in faults_of(self.judge(**scope).found)}


@pytest.fixture
def log(tmp_path: Path) -> Keyed:
    """A log in which two jobs of one key are submitted: ``x``, then ``y``."""
    made = Keyed(tmp_path / "scratch")
    made.submit("x")
    made.submit("y")
    return made


def test_a_start_before_the_previous_job_of_the_key_is_closed_is_a_fault(log: Keyed) -> None:
    """The fault has the positions of the start and of the later closing fact, and its text names both jobs."""
    log.start("x")
    early = log.start("y")
    closed = log.succeed("x")
    log.succeed("y")
    judge = log.judge()
    (fault,) = faults_of(judge.found)
    assert (fault.kind, fault.count, fault.first[0].job_id) == ("key-order", 1, "y")
    assert fault.first[0].positions == [early.position, closed.position]
    assert fault.first[0].detail == (
        "started while job x, an earlier job of the same key 'k', was not closed; that job was closed later, by JobSucceeded"
    )


def test_a_start_while_the_previous_job_of_the_key_is_open_is_a_fault(log: Keyed) -> None:
    """The earlier job has no closing fact, so the fault names its work record. The rule also holds while workers
    run."""
    first = log.records[log.last("JobSubmitted", "x")]
    log.start("x")
    early = log.start("y")
    log.succeed("y")
    wanted = {"key-order": [[early.position, first.position]]}
    assert log.found(finished=False, committed={}) == wanted


def test_jobs_of_a_key_in_their_order_are_no_fault(log: Keyed) -> None:
    """The previous job may succeed, fail, or be cancelled or expire without a start."""
    log.submit("z")
    log.submit("w")
    log.run("x")
    log.add(LIFE, "JobCancelled", {"by": "ann", "reason": None}, job="y")
    log.start("z")
    log.fail("z")
    log.letter("z")
    log.add(LIFE, "JobExpired", {"expired_at": 1}, job="w")
    log.submit("v")
    log.run("v")
    assert log.found() == {}


def test_a_cancelled_job_holds_its_key_until_its_outcome_is_in_the_log(log: Keyed) -> None:
    """The cancelled job is never started. The next job of the key must still wait for its closing fact."""
    early = log.start("y")
    closed = log.add(LIFE, "JobCancelled", {"by": "ann", "reason": None}, job="x")
    log.succeed("y")
    assert log.found() == {"key-order": [[early.position, closed.position]]}


def test_a_job_with_attempts_in_place_holds_its_key(log: Keyed) -> None:
    """A retry in place does not close the release."""
    log.start("x")
    log.retry("x", in_place=True)
    log.start("x", attempt=2)
    log.succeed("x", attempt=2)
    log.run("y")
    assert log.found() == {}
    for job in ("v", "w"):
        log.submit(job)
    log.start("v")
    log.retry("v", in_place=True)
    early = log.start("w")
    log.succeed("w")
    log.start("v", attempt=2)
    closed = log.succeed("v", attempt=2)
    assert log.found() == {"key-order": [[early.position, closed.position]]}


def test_a_retry_by_the_coordinator_gives_the_job_a_new_place_in_the_order(log: Keyed) -> None:
    """Delayed jobs and retries that are not in place run in the order of their releases."""
    log.start("x")
    log.retry("x", in_place=False)
    log.release("x", 2, 2)
    log.start("y")
    ended = log.succeed("y")
    log.run("x", release=2, attempt=2)
    assert log.found() == {}
    at = log.last("JobStarted", "x")
    early = log.records[at] = log.records[at]._replace(offset=ended.offset - 1)
    assert log.found() == {"key-order": [[early.position, ended.position]]}


def test_a_job_that_runs_again_after_a_kill_is_no_fault(log: Keyed) -> None:
    """If the closing fact is in the log twice, the first one counts."""
    log.start("x")
    log.start("x")
    log.succeed("x")
    log.start("y")
    log.succeed("x")
    log.succeed("y")
    assert log.found() == {}


def test_a_late_start_of_a_paused_worker_is_no_fault_of_the_key(log: Keyed) -> None:
    """The start comes after the facts of the next jobs of the key. It is a start after an outcome, and no other
    fault."""
    log.run("x")
    log.run("y")
    log.submit("z")
    log.start("z")
    log.start("x")
    log.succeed("z")
    assert log.found().keys() == {"started-after-end"}


@pytest.mark.parametrize(
    "other", [{"key": "other"}, {"key": None}, {"partition": 1}, {"topic": f"{NS}.jobs.sms"}, {"topic": f"{WORK}.high"}]
)
def test_jobs_of_other_keys_queues_and_partitions_do_not_wait(log: Keyed, other: dict[str, Any]) -> None:
    """The order holds within a key of a queue. After partitions were added, a key may be on another partition."""
    log.start("x")
    where = {"topic": WORK, "key": "k", "partition": 0, **other}
    log.add(where["topic"], "JobSubmitted", {"spec": SPEC, "delay_ms": None, "due_at": None}, job="z",
            key=where["key"], partition=where["partition"])  # fmt: skip
    log.run("z", partition=where["partition"])
    log.succeed("x")
    log.run("y")
    assert log.found() == {}


def test_the_first_work_record_of_a_job_decides_its_place_in_the_order(log: Keyed) -> None:
    """The worker drops the second work record."""
    log.submit("x")
    log.run("x")
    log.run("y")
    assert log.found() == {}


def test_a_job_in_two_partitions_has_no_place_in_the_order(log: Keyed) -> None:
    """A job that is sent again after partitions were added runs in both partitions. The audit cannot know which start
    belongs to which work record."""
    log.run("x")
    log.submit("y", partition=1)
    log.submit("z")
    log.start("z")
    log.run("y")
    log.succeed("z")
    log.start("y", partition=1)
    log.succeed("y", partition=1)
    assert "key-order" not in log.found()


def test_a_leased_job_does_not_hold_its_key(log: Keyed) -> None:
    """The coordinator writes the outcome of a leased job. A long task cannot have a key, but a submission from another
    language may have one."""
    log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job="x")
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}, job="x")
    log.start("x")
    log.run("y")
    log.succeed("x")
    assert log.found() == {}


def test_a_release_that_is_closed_in_another_partition_is_one_fault(log: Keyed) -> None:
    """The fault is `closed-elsewhere`. The next jobs of the key are not reported."""
    log.start("x")
    log.succeed("x", partition=1)
    log.run("y")
    assert log.found().keys() == {"closed-elsewhere"}


def test_of_a_trimmed_log_only_the_complete_part_is_judged(log: Keyed) -> None:
    """The closing fact of an older job may be trimmed. The first of two work records may be trimmed, too; then the
    start of the job comes before the second one."""
    last = log.records[log.last("JobSubmitted", "y")]
    log.run("y")
    assert "key-order" not in log.found(horizon=last.at)
    assert "key-order" in log.found()
    log.start("z")
    log.submit("v")
    log.submit("z")
    log.succeed("z")
    log.run("v")
    faults = log.found(horizon=last.at)
    assert "key-order" not in faults


# -- against a simple implementation ------------------------------------------------------------------------------------


def fact(offset: int | None) -> Record | None:
    return None if offset is None else Record(LIFE, 0, offset, offset, "JobSucceeded")


OFFSET = st.none() | st.integers(0, 12)
TURN = st.tuples(st.sampled_from("kl"), OFFSET, OFFSET, st.booleans())


@given(st.lists(TURN, max_size=12))
def test_one_pass_finds_the_same_faults_as_a_comparison_of_all_pairs(
    given_turns: list[tuple[str, int | None, int | None, bool]],
) -> None:
    """A job starts too early if an earlier job that holds the key is closed after that start, or never."""
    lines: dict[str, list[Turn]] = defaultdict(list)
    for number, (key, started, closed, holds) in enumerate(given_turns):
        work = Record(WORK, 0, number, number, head={"job_id": f"{number}"})
        lines[key].append(Turn(key, work, fact(started), fact(closed), holds))
    wanted = {
        turn.work.head["job_id"]
        for line in lines.values()
        for number, turn in enumerate(line)
        if turn.started is not None
        and any(
            each.holds and (each.closed is None or each.closed.offset > turn.started.offset) for each in line[:number]
        )
    }
    findings = Findings()
    in_turn((turn for key in sorted(lines) for turn in lines[key]), findings)
    assert {each.job_id for each in findings.faults["key-order"]} == wanted
    assert findings.counts["key-order"] == len(wanted)


@given(st.data())
def test_the_log_of_a_correct_worker_has_no_fault(data: st.DataObject) -> None:
    """The log has some keys with jobs in their order, attempts in place, and kills: a job that was started and not
    closed is started again, and a closing fact without an acknowledgement may be written again."""
    log = Writer()
    keys = {key: [f"{key}{n}" for n in range(data.draw(st.integers(0, 4)))] for key in "kl"}
    for key, jobs in keys.items():
        for job in jobs:
            log.submit(job, key=key)
    while left := sorted(key for key, jobs in keys.items() if jobs):
        key = data.draw(st.sampled_from(left))
        job, attempt = keys[key].pop(0), 1
        for step in data.draw(st.lists(st.sampled_from(["killed", "in place"]), max_size=3)):
            log.start(job, attempt=attempt, key=key)
            if step == "in place":
                body = {"error": ERROR, "delay_ms": 0, "duration_us": 1, "in_place": True}
                log.add(LIFE, "JobRetried", body, job=job, attempt=attempt, key=key)
                attempt += 1
        log.start(job, attempt=attempt, key=key)
        for _ in range(data.draw(st.integers(1, 2))):
            log.succeed(job, attempt=attempt, key=key)
    assert not audit(Log(NS, log.records)).counts
