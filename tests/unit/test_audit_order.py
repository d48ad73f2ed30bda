"""The audit's rule of keys: a log in which a job is started out of its turn is a fault with both places, and what KEY_ORDER allows is none."""

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
    """Jobs of the key ``k``, in a log in which the other jobs are as they must be."""

    def submit(self, job: str = "a", **more: Any) -> Record:
        """A job of the key."""
        return super().submit(job, **{"key": "k", **more})

    def retry(self, job: str, *, in_place: bool, **more: Any) -> Record:
        """Its attempt failed, and another one follows."""
        body = {"error": ERROR, "delay_ms": 0, "duration_us": 1, "in_place": in_place}
        return self.add(LIFE, "JobRetried", body, job=job, **more)

    def release(self, job: str, release: int, attempt: int) -> Record:
        """The coordinator releases it again, as it was asked to."""
        requested = {"spec": SPEC, "delay_ms": 0, "due_at": None}
        asked = self.add(COORD, "ReleaseRequested", requested, job=job, release=release, attempt=attempt)
        due = {"spec": SPEC, "due_at": asked.at * 1000}
        return self.add(WORK, "JobDue", due, job=job, release=release, attempt=attempt, key="k")

    def run(self, job: str, **more: Any) -> None:
        """It is started and succeeds."""
        self.start(job, **more)
        self.succeed(job, **more)

    def found(self, **scope: Any) -> dict[str, list[list[str]]]:
        """Positions of every fault, by its kind."""
        return {f.kind: [each.positions for each in f.first] for f in faults_of(self.judge(**scope).found)}


@pytest.fixture
def log(tmp_path: Path) -> Keyed:
    """Two jobs of one key are submitted: ``x``, then ``y``."""
    made = Keyed(tmp_path / "scratch")
    made.submit("x")
    made.submit("y")
    return made


def test_a_job_that_is_started_before_the_one_before_is_closed_is_a_fault(log: Keyed) -> None:
    """The fault names the start and the closing fact behind it, and in words both jobs."""
    log.start("x")
    early = log.start("y")
    closed = log.succeed("x")
    log.succeed("y")
    judge = log.judge()
    (fault,) = faults_of(judge.found)
    assert (fault.kind, fault.count, fault.first[0].job_id) == ("key-order", 1, "y")
    assert fault.first[0].positions == [early.position, closed.position]
    assert fault.first[0].detail == (
        "of key 'k', started before job x, which was submitted earlier, was closed by its JobSucceeded"
    )


def test_a_job_that_is_started_while_the_one_before_is_open_is_a_fault(log: Keyed) -> None:
    """Nothing closes the earlier one: its work record is named. Also while workers run."""
    first = log.records[log.last("JobSubmitted", "x")]
    log.start("x")
    early = log.start("y")
    log.succeed("y")
    wanted = {"key-order": [[early.position, first.position]]}
    assert log.found(finished=False, committed={}) == wanted


def test_each_job_of_a_key_in_its_turn_is_no_fault(log: Keyed) -> None:
    """Whether the one before succeeds, fails, or is cancelled or expires without a start."""
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


def test_a_job_that_is_cancelled_keeps_its_turn_until_that_is_in_the_log(log: Keyed) -> None:
    """It is never started, and the next one waits for its closing fact all the same."""
    early = log.start("y")
    closed = log.add(LIFE, "JobCancelled", {"by": "ann", "reason": None}, job="x")
    log.succeed("y")
    assert log.found() == {"key-order": [[early.position, closed.position]]}


def test_a_job_that_is_tried_again_in_place_keeps_its_turn(log: Keyed) -> None:
    """A retry in place closes nothing."""
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


def test_a_retry_by_the_coordinator_gives_up_its_turn_and_takes_another_one(log: Keyed) -> None:
    """Delayed jobs and retries that are no longer in place are in the order of their releases."""
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
    """Its closing fact may stand twice: the first one counts."""
    log.start("x")
    log.start("x")
    log.succeed("x")
    log.start("y")
    log.succeed("x")
    log.succeed("y")
    assert log.found() == {}


def test_what_a_paused_worker_sends_late_is_no_fault_of_the_key(log: Keyed) -> None:
    """Its start stands behind the next jobs of the key: that is a start after an outcome, and nothing else."""
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
    """Order is kept for each key of each queue; adding partitions moves keys."""
    log.start("x")
    where = {"topic": WORK, "key": "k", "partition": 0, **other}
    log.add(where["topic"], "JobSubmitted", {"spec": SPEC, "delay_ms": None, "due_at": None}, job="z",
            key=where["key"], partition=where["partition"])  # fmt: skip
    log.run("z", partition=where["partition"])
    log.succeed("x")
    log.run("y")
    assert log.found() == {}


def test_a_work_record_that_stands_twice_has_its_turn_where_it_stands_first(log: Keyed) -> None:
    """The second one is dropped."""
    log.submit("x")
    log.run("x")
    log.run("y")
    assert log.found() == {}


def test_a_job_in_two_partitions_has_no_turn(log: Keyed) -> None:
    """Sent again after partitions were added, it is run in both, and which start is whose is not known."""
    log.run("x")
    log.submit("y", partition=1)
    log.submit("z")
    log.start("z")
    log.run("y")
    log.succeed("z")
    log.start("y", partition=1)
    log.succeed("y", partition=1)
    assert "key-order" not in log.found()


def test_a_leased_job_holds_nobody_up(log: Keyed) -> None:
    """Its outcome goes by the coordinator. A long task cannot have a key; a submission from another language may have one."""
    log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job="x")
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}, job="x")
    log.start("x")
    log.run("y")
    log.succeed("x")
    assert log.found() == {}


def test_a_release_that_is_closed_in_another_partition_is_one_fault(log: Keyed) -> None:
    """`closed-elsewhere`, and not that those behind it were started."""
    log.start("x")
    log.succeed("x", partition=1)
    log.run("y")
    assert log.found().keys() == {"closed-elsewhere"}


def test_of_a_trimmed_log_only_the_complete_part_is_judged(log: Keyed) -> None:
    """The closing fact of an older job may be gone; so may the first of two work records, whose start stands before the second."""
    last = log.records[log.last("JobSubmitted", "y")]
    log.run("y")
    assert "key-order" not in log.found(horizon=last.at)
    assert "key-order" in log.found()
    log.start("z")
    log.submit("v")
    log.submit("z")
    log.succeed("z")
    log.run("v")
    found = log.found(horizon=last.at)
    assert "key-order" not in found


# -- against what anybody would write ---------------------------------------------------------------------------------------


def fact(offset: int | None) -> Record | None:
    return None if offset is None else Record(LIFE, 0, offset, offset, "JobSucceeded")


OFFSET = st.none() | st.integers(0, 12)
TURN = st.tuples(st.sampled_from("kl"), OFFSET, OFFSET, st.booleans())


@given(st.lists(TURN, max_size=12))
def test_one_pass_finds_what_a_look_at_all_pairs_finds(
    given_turns: list[tuple[str, int | None, int | None, bool]],
) -> None:
    """A job is out of its turn if any earlier one of its key that holds it up is closed later than it is started, or never."""
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
    found = Findings()
    in_turn((turn for key in sorted(lines) for turn in lines[key]), found)
    assert {each.job_id for each in found.faults["key-order"]} == wanted
    assert found.counts["key-order"] == len(wanted)


@given(st.data())
def test_what_an_honest_worker_writes_has_no_fault(data: st.DataObject) -> None:
    """Some keys, each job in its turn, attempts in place, and kills: what was started and not closed is started again, and what
    was closed without an acknowledgement may be closed again."""
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
