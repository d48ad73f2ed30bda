"""The checks that the fault tests add to the audit: each of them gets a log with one fault, and must report it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobledger.audit.findings import FAULTS
from tests.acceptance.audit import ONLY_HERE
from tests.acceptance.independent import (
    Audit,
    Execution,
    Final,
    Log,
    Window,
    audit,
    compare,
    fold,
    read_executions,
)
from tests.acceptance.promises import BROKEN_BY, Promise, PromiseBroken
from tests.handmade import COORD, ERROR, LIFE, NS, SPEC, WORK, Writer, good_log


@pytest.fixture
def good() -> Writer:
    """A log without a fault."""
    return good_log()


def judge(writer: Writer, *args: Any, **kwargs: Any) -> Audit:
    """Return the findings in a log whose work records are all committed."""
    log = Log(NS, writer.records)
    log.ends[WORK, 0] = log.committed[WORK, 0] = writer.next.get(WORK, 0)
    return audit(log, *args, **kwargs)


def test_a_correct_log_breaks_no_promise(good: Writer) -> None:
    """The fold of the log has the outcomes of the jobs."""
    findings = judge(good, accepted=["a", "b", "c"])
    assert findings.good, str(findings)
    assert not findings.product
    assert fold(good.records) == {
        "a": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
        "b": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
        "c": Final("failed", "t", "mail", 1, 2, 2, None, "ValueError"),
    }


def test_every_fault_breaks_a_named_promise() -> None:
    """Each fault that the audit or only the tests can find is assigned to the promise that it breaks."""
    assert BROKEN_BY.keys() == {*FAULTS, *ONLY_HERE}
    assert all(isinstance(promise, Promise) for promise in BROKEN_BY.values())


def test_an_acknowledged_job_that_is_not_in_the_log_is_a_fault(good: Writer) -> None:
    """The log is compared with the submissions that were acknowledged."""
    good.records[:] = [r for r in good.records if r.head.get("job_id") != "a"]
    assert set(judge(good, accepted=["a", "b", "c"]).counts) == {"accepted-lost"}


def test_a_start_after_an_outcome_is_excused_only_if_a_paused_worker_wrote_that_outcome(good: Writer) -> None:
    """A worker's pause excuses only a rerun of a job that this worker began before the pause and ended after it. The
    product's own audit still reports the fault."""
    records = good.records
    began = next(r for r in records if r.fact == "JobStarted")
    closed = next(r for r in records if r.fact == "JobSucceeded")
    records[records.index(began)] = began._replace(head={**began.head, "occurred_at": (closed.at - 9_000) * 1000})
    good.start("a", source="worker@there:8", after=60_000)
    pause = Window("worker", closed.at - 8_000, closed.at - 1, 7)
    findings = judge(good, frozen=[pause])
    assert findings.good
    assert findings.product == {"started-after-end": 1}
    assert not judge(good, frozen=[pause._replace(role="coordinator")]).good
    assert not judge(good, frozen=[pause._replace(pid=8)]).good
    assert not judge(good, frozen=[pause._replace(begin=closed.at - 100)]).good, "shorter than a session"
    assert not judge(good, frozen=[pause._replace(begin=closed.at + 1, end=closed.at + 9_000)]).good, "ended before"
    before = pause._replace(begin=closed.at - 90_000, end=closed.at - 80_000)
    assert not judge(good, frozen=[before]).good, "it was begun long after the pause"
    good.succeed("a", source="worker@there:8")
    good.start("a", source="worker@elsewhere:9", after=60_000)
    assert not judge(good, frozen=[pause]).good, "somebody else had ended it, too"


def test_a_retry_of_the_second_run_is_excused_only_if_a_paused_worker_wrote_the_success(good: Writer) -> None:
    """The job was running when its worker was paused, so it ran twice. The second run was retried after the success of
    the first one."""
    records = good.records
    began = next(r for r in records if r.fact == "JobStarted")
    closed = next(r for r in records if r.fact == "JobSucceeded")
    records[records.index(began)] = began._replace(head={**began.head, "occurred_at": (closed.at - 9_000) * 1000})
    error = {"type": "OSError", "message": "away", "traceback": None}
    body = {"error": error, "delay_ms": 0, "duration_us": 1, "in_place": False}
    good.add(LIFE, "JobRetried", body, source="worker@there:8", after=40_000)
    good.start("a", release=2, attempt=2, source="worker@there:8", after=1_000)
    pause = Window("worker", closed.at - 8_000, closed.at - 1, 7)
    findings = judge(good, frozen=[pause])
    assert findings.product["started-after-end"] == 1
    assert "started-after-end" not in findings.counts
    assert "started-after-end" in judge(good, frozen=[pause._replace(pid=8)]).counts


def test_a_late_start_of_a_paused_worker_is_excused_only_if_it_was_made_before_the_pause(good: Writer) -> None:
    """The worker's Kafka client may send an old start after the pause. A start that the worker makes after the pause is
    a fault."""
    again = good.start("a", source="worker@there:8", after=60_000)
    sent_on_waking = again._replace(head={**again.head, "occurred_at": (again.at - 30_000) * 1000})
    pause = Window("worker", again.at - 20_000, again.at - 5, 8)
    assert set(judge(good, frozen=[pause]).counts) == {"started-after-end"}
    good.records[good.records.index(again)] = sent_on_waking
    assert judge(good, frozen=[pause]).good
    assert not judge(good, frozen=[pause._replace(pid=7)]).good


def test_a_start_after_an_outcome_is_only_noted_if_the_code_did_not_run(good: Writer) -> None:
    """The start of a suspect is written before its code runs, and its worker may lose the partition between the two.
    The side log shows whether the code ran."""
    ends = {r.release: r.at for r in good.records if r.fact in ("JobSucceeded", "JobFailed", "JobRetried")}
    runs = [Execution(*release, 1, at - 5, at - 1) for release, at in ends.items()]
    start = good.start("a")
    assert set(judge(good).counts) == {"started-after-end"}
    findings = judge(good, executions=runs)
    assert findings.good
    assert findings.noted["said to start after its end, and not run"] == 1
    again = Execution("a", 1, 1, 1, start.at + 1, None)
    assert set(judge(good, executions=[*runs, again]).counts) == {"started-after-end", "run-after-end"}


def test_a_release_that_a_paused_worker_requests_after_an_outcome_is_a_fault(good: Writer) -> None:
    """After a pause a worker must not request a release before it knows that the job is still its own."""
    began = good.start("a", source="worker@there:8")
    good.records[good.records.index(began)] = began._replace(head={**began.head, "occurred_at": 0})
    body = {"error": ERROR, "delay_ms": 0, "duration_us": 1}
    retried = good.add(LIFE, "JobRetried", body, source="worker@there:8", after=6_000)
    good.add(COORD, "ReleaseRequested", {"spec": SPEC, "delay_ms": 0, "due_at": None}, release=2, attempt=2)
    good.add(WORK, "JobDue", {"spec": SPEC, "due_at": good.clock * 1000}, release=2, attempt=2)
    pause = Window("worker", began.at - 1, retried.at, 8)
    assert judge(good, frozen=[pause]).noted["said to start by a paused process, when it woke"] == 1
    good.start("a", release=2, attempt=2, after=60_000)
    good.succeed("a", release=2, attempt=2)
    assert set(judge(good, frozen=[pause]).counts) == {"started-after-end"}


def test_contradicting_outcomes_are_excused_only_during_a_pause_or_an_outage(good: Writer) -> None:
    """A paused process or an unreachable broker excuses two outcomes that were both written in that time."""
    one = next(r for r in good.records if r.fact == "JobSucceeded")
    other = good.fail("a")
    good.letter("a")
    assert set(judge(good).counts) == {"ends-contradict"}
    assert judge(good, frozen=[Window("broker", one.at - 1, other.at)]).good
    assert not judge(good, frozen=[Window("broker", one.at + 1, other.at)]).good


def test_the_side_log_shows_a_run_that_is_not_in_the_log(good: Writer) -> None:
    """Code that ran after the outcome was in the log is a fault, also if the log has no start of it."""
    ends = {r.release: r.at for r in good.records if r.fact in ("JobSucceeded", "JobFailed", "JobRetried")}
    runs = [Execution(*release, 1, at - 5, at - 1) for release, at in ends.items()]
    assert judge(good, executions=runs).good
    again = Execution("a", 1, 1, 1, ends["a", 1, 1] + 1, None)
    assert set(judge(good, executions=[*runs, again]).counts) == {"run-after-end"}
    cut = Execution("a", 1, 1, 1, ends["a", 1, 1] - 9, None)
    twice = judge(good, executions=[cut, *runs])
    assert twice.good
    assert twice.noted["releases run more than once"] == 1
    assert set(judge(good, executions=runs[1:]).counts) == {"success-without-run"}


def test_the_fold_does_not_depend_on_the_order_of_records(good: Writer) -> None:
    """The fold of the reversed records is the same."""
    good.add(LIFE, "JobStarted", {"worker": "w"}, job="a", run=2)
    assert fold(good.records[::-1]) == fold(good.records)
    assert fold(good.records)["a"] == Final("running", "t", "mail", 2, 1, 1)


def test_a_difference_between_fold_and_table_has_the_job_and_the_field(good: Writer) -> None:
    """A missing row, an extra row and a row with another value are three differences."""
    folded = fold(good.records)
    kept = dict(folded)
    assert compare(folded, kept) == []
    kept["z"] = kept.pop("a")
    kept["c"] = kept["c"]._replace(attempt=1)
    assert [(d.job_id, d.field) for d in compare(folded, kept)] == [("a", "job"), ("c", "attempt"), ("z", "job")]


def test_a_run_without_an_end_in_the_side_log_was_cut_off(tmp_path: Path) -> None:
    """The execution has no end time."""
    path = tmp_path / "x.log"
    path.write_text("B a 1 1 1 100 7\nB b 1 2 1 110 7\nE a 1 1 1 120 7\n")
    assert read_executions(path) == [Execution("a", 1, 1, 1, 100, 120, 7), Execution("b", 1, 2, 1, 110, None, 7)]


def test_the_error_of_a_broken_promise_has_the_promise_and_the_evidence() -> None:
    """A promise that holds raises nothing."""
    Promise.NEVER_EARLY.hold(True)
    with pytest.raises(PromiseBroken, match=r"NEVER_EARLY: No delayed job.*\n.*3 ms"):
        Promise.NEVER_EARLY.hold(False, "3 ms")
