"""The second opinion must be able to fail: each check is shown a log in which exactly one thing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobledger.schemas import codec
from jobledger.schemas import events as ev
from tests.acceptance.independent import (
    Audit,
    Execution,
    Final,
    Log,
    Record,
    Schemas,
    Window,
    audit,
    compare,
    fingerprint,
    fold,
    read_executions,
)
from tests.acceptance.promises import BROKEN_BY, Promise, PromiseBroken

NS = "shop"
WORK, LIFE, COORD, DEAD = f"{NS}.jobs.mail", f"{NS}.lifecycle", f"{NS}.coordination", f"{NS}.dead-letter"
SPEC: dict[str, Any] = {"args": b"{}", "tags": {}, "parent": None}
ERROR = {"type": "ValueError", "message": "no", "traceback": None}
OK: dict[str, Any] = {"result": b"7", "duration_us": 1}


class Writer:
    """Writes a log by hand; time goes on 10 ms a record unless told otherwise."""

    def __init__(self) -> None:
        self.log = Log(NS)
        self.clock = 1_000_000
        self._next: dict[str, int] = {}

    def add(
        self,
        topic: str,
        fact: str | None,
        body: dict[str, Any] | None = None,
        *,
        job: str = "a",
        run: int = 1,
        release: int = 1,
        attempt: int = 1,
        partition: int = 0,
        after: int = 10,
        raw: bytes | None = None,
        source: str = "worker@here:7",
    ) -> Record:
        self.clock += after
        offset = self._next.get(topic, 0)
        self._next[topic] = offset + 1
        head = {
            "job_id": job,
            "run": run,
            "release": release,
            "attempt": attempt,
            "task": "t",
            "queue": "mail",
            "source": source,
            "occurred_at": self.clock * 1000,
        }
        record = Record(topic, partition, offset, self.clock, fact, head if fact else {}, body or {}, raw, "framing")
        self.log.records.append(record)
        return record

    def submit(self, job: str = "a", **more: Any) -> Record:
        return self.add(WORK, "JobSubmitted", {"spec": SPEC, "delay_ms": None, "due_at": None}, job=job, **more)

    def start(self, job: str = "a", **more: Any) -> Record:
        return self.add(LIFE, "JobStarted", {"worker": "w"}, job=job, **more)

    def succeed(self, job: str = "a", **more: Any) -> Record:
        return self.add(LIFE, "JobSucceeded", OK, job=job, **more)

    def judge(self, *args: Any, **kwargs: Any) -> Audit:
        self.log.ends[WORK, 0] = self._next.get(WORK, 0)
        self.log.committed.setdefault((WORK, 0), self._next.get(WORK, 0))
        return audit(self.log, *args, **kwargs)


@pytest.fixture
def good() -> Writer:
    """A plain job, one that was delayed and one that was tried twice and failed: all as it must be."""
    out = Writer()
    out.submit()
    out.start()
    out.succeed()
    out.add(COORD, "JobSubmitted", {"spec": SPEC, "delay_ms": 500, "due_at": None}, job="b", release=0)
    due = (out.clock + 500) * 1000
    out.add(COORD, "ReleaseDecided", {"due_at": due}, job="b", after=500)
    out.add(WORK, "JobDue", {"spec": SPEC, "due_at": due}, job="b", after=0)
    out.start("b")
    out.succeed("b")
    out.submit("c")
    out.start("c")
    out.add(LIFE, "JobRetried", {"error": ERROR, "delay_ms": 100, "duration_us": 1}, job="c")
    requested = {"spec": SPEC, "delay_ms": 100, "due_at": None}
    out.add(COORD, "ReleaseRequested", requested, job="c", release=2, attempt=2)
    again = {"spec": SPEC, "due_at": (out.clock + 100) * 1000}
    out.add(WORK, "JobDue", again, job="c", release=2, attempt=2, after=101)
    out.start("c", release=2, attempt=2)
    out.add(LIFE, "JobFailed", {"reason": "exhausted", "error": ERROR, "duration_us": 1}, job="c", release=2, attempt=2)
    out.add(DEAD, "DeadLettered", {"spec": SPEC, "error": ERROR}, job="c", release=2, attempt=2)
    return out


def test_a_log_in_which_all_is_well_breaks_nothing(good: Writer) -> None:
    """A log in which all is well breaks nothing, and its fold is the jobs' ends."""
    assert good.judge(accepted=["a", "b", "c"]).good
    assert fold(good.log.records) == {
        "a": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
        "b": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
        "c": Final("failed", "t", "mail", 1, 2, 2, None, "ValueError"),
    }


def drop(fact: str, job: str) -> Callable[[Writer], None]:
    def sabotage(writer: Writer) -> None:
        records = writer.log.records
        found = [r for r in records if r.fact == fact and r.head["job_id"] == job]
        records.remove(found[-1])

    return sabotage


def move(fact: str, job: str, by: int) -> Callable[[Writer], None]:
    def sabotage(writer: Writer) -> None:
        records = writer.log.records
        at = next(i for i, r in reversed(list(enumerate(records))) if r.fact == fact and r.head["job_id"] == job)
        records[at] = records[at]._replace(at=records[at].at + by)

    return sabotage


def lost_submission(writer: Writer) -> None:
    writer.log.records[:] = [r for r in writer.log.records if r.head.get("job_id") != "a"]


def garbage(writer: Writer) -> None:
    writer.add(WORK, None, raw=b"?")


def garbage_elsewhere(writer: Writer) -> None:
    writer.add(COORD, None, raw=b"?")


def misplaced(writer: Writer) -> None:
    writer.add(WORK, "JobStarted", {"worker": "w"}, job="a")


def other_bytes(writer: Writer) -> None:
    bad = writer.add(WORK, None, raw=b"?")
    where = {"topic": bad.topic, "partition": 0, "offset": bad.offset, "raw_value": b"!"}
    writer.add(DEAD, "RecordRejected", where, job="")


def rejected_good_one(writer: Writer) -> None:
    where = {"topic": WORK, "partition": 0, "offset": 0, "raw_value": b"!"}
    writer.add(DEAD, "RecordRejected", where, job="")


def started_again(writer: Writer) -> None:
    writer.start("a")


def started_later_release_after_end(writer: Writer) -> None:
    writer.start("a", release=2)


def other_partition(writer: Writer) -> None:
    records = writer.log.records
    at = next(i for i, r in enumerate(records) if r.fact == "JobSucceeded" and r.head["job_id"] == "a")
    records[at] = records[at]._replace(partition=3)


def wrong_due(writer: Writer) -> None:
    record = next(r for r in writer.log.records if r.fact == "JobDue")
    record.body["due_at"] += 1  # type: ignore[index]  # the log is ours to spoil


SABOTAGE: list[tuple[Callable[[Writer], None], set[str]]] = [
    (drop("JobSucceeded", "a"), {"not ended", "passed, but not closed"}),
    (drop("JobSubmitted", "a"), {"accepted, but its submission is not in the log", "facts of a job that nobody submitted"}),
    (lost_submission, {"accepted, but its submission is not in the log"}),
    (drop("JobRetried", "c"), {"passed, but not closed", "asked for before its cause was in the log"}),
    (move("JobRetried", "c", 11), {"asked for before its cause was in the log"}),
    (drop("JobFailed", "c"), {"not ended", "passed, but not closed"}),
    (drop("DeadLettered", "c"), {"failed, but not in the dead letters"}),
    (move("JobDue", "b", -1), {"let go early"}),
    (move("JobDue", "c", -2), {"let go early"}),
    (move("JobStarted", "b", -15), {"started early"}),
    (drop("JobSubmitted", "b"), {
        "accepted, but its submission is not in the log",
        "facts of a job that nobody submitted",
        "let go, but nothing asked for it",
    }),
    (wrong_due, {"a due time that nobody asked for"}),
    (started_again, {"started after its end was in the log"}),
    (started_later_release_after_end, {"started after its end was in the log"}),
    (other_partition, {"closed in another partition than its work record's"}),
    (garbage, {"passed, but neither closed nor rejected", "unreadable, but not rejected"}),
    (misplaced, {"passed, but neither closed nor rejected"}),
    (garbage_elsewhere, {"unreadable, but not rejected"}),
    (other_bytes, {"rejected with other bytes than it has"}),
    (rejected_good_one, {"rejected, but it is a good record"}),
]  # fmt: skip


@pytest.mark.parametrize(("sabotage", "kinds"), SABOTAGE)
def test_each_thing_that_is_wrong_is_found_and_breaks_a_named_promise(
    good: Writer, sabotage: Callable[[Writer], None], kinds: set[str]
) -> None:
    """A record that is dropped, moved in time, added or changed is found, and nothing else is."""
    sabotage(good)
    found = good.judge(accepted=["a", "b", "c"])
    assert set(found.counts) == kinds
    assert all(isinstance(BROKEN_BY[kind], Promise) for kind in kinds)


def test_a_record_above_the_committed_base_may_still_be_open(good: Writer) -> None:
    """What no worker has acknowledged yet is not passed over."""
    good.submit("d")
    good.log.committed[WORK, 0] = good._next[WORK] - 1
    assert set(good.judge().counts) == {"not ended"}


def test_a_start_after_an_end_is_excused_only_if_a_paused_worker_wrote_that_end(good: Writer) -> None:
    """A worker's pause excuses a rerun of what it had begun before and ended afterwards, and nothing else."""
    records = good.log.records
    began = next(r for r in records if r.fact == "JobStarted")
    closed = next(r for r in records if r.fact == "JobSucceeded")
    records[records.index(began)] = began._replace(head={**began.head, "occurred_at": (closed.at - 9_000) * 1000})
    good.start("a", source="worker@there:8", after=60_000)
    pause = Window("worker", closed.at - 8_000, closed.at - 1, 7)
    assert good.judge(frozen=[pause]).good
    assert not good.judge(frozen=[pause._replace(role="coordinator")]).good
    assert not good.judge(frozen=[pause._replace(pid=8)]).good
    assert not good.judge(frozen=[pause._replace(begin=closed.at - 100)]).good, "shorter than a session"
    assert not good.judge(frozen=[pause._replace(begin=closed.at + 1, end=closed.at + 9_000)]).good, "ended before"
    before = pause._replace(begin=closed.at - 90_000, end=closed.at - 80_000)
    assert not good.judge(frozen=[before]).good, "it was begun long after the pause"
    good.succeed("a", source="worker@there:8")
    good.start("a", source="worker@elsewhere:9", after=60_000)
    assert not good.judge(frozen=[pause]).good, "somebody else had ended it, too"


def test_a_start_that_a_paused_worker_sends_on_waking_is_none_that_it_makes_then(good: Writer) -> None:
    """What lay in its Kafka client was begun before; what it begins after the pause is a violation."""
    again = good.start("a", source="worker@there:8", after=60_000)
    sent_on_waking = again._replace(head={**again.head, "occurred_at": (again.at - 30_000) * 1000})
    pause = Window("worker", again.at - 20_000, again.at - 5, 8)
    assert set(good.judge(frozen=[pause]).counts) == {"started after its end was in the log"}
    good.log.records[good.log.records.index(again)] = sent_on_waking
    assert good.judge(frozen=[pause]).good
    assert not good.judge(frozen=[pause._replace(pid=7)]).good


def test_a_start_after_the_end_of_what_was_not_run_is_noted(good: Writer) -> None:
    """A suspect's start is said before its code runs, and its worker may lose it in between; the side log tells."""
    ends = {r.release: r.at for r in good.log.records if r.fact in ("JobSucceeded", "JobFailed", "JobRetried")}
    runs = [Execution(*release, 1, at - 5, at - 1) for release, at in ends.items()]
    said = good.start("a")
    assert set(good.judge().counts) == {"started after its end was in the log"}
    found = good.judge(executions=runs)
    assert found.good
    assert found.noted["said to start after its end, and not run"] == 1
    again = Execution("a", 1, 1, 1, said.at + 1, None)
    assert set(good.judge(executions=[*runs, again]).counts) == {
        "started after its end was in the log",
        "run after its end was in the log",
    }


def test_a_release_that_a_paused_worker_asks_for_after_the_end_is_a_violation(good: Writer) -> None:
    """On waking a worker asks for nothing before it knows that the job is still its own."""
    began = good.start("a", source="worker@there:8")
    good.log.records[good.log.records.index(began)] = began._replace(head={**began.head, "occurred_at": 0})
    retried = good.add(
        LIFE, "JobRetried", {"error": ERROR, "delay_ms": 0, "duration_us": 1}, source="worker@there:8", after=6_000
    )
    good.add(COORD, "ReleaseRequested", {"spec": SPEC, "delay_ms": 0, "due_at": None}, release=2, attempt=2)
    good.add(WORK, "JobDue", {"spec": SPEC, "due_at": good.clock * 1000}, release=2, attempt=2)
    pause = Window("worker", began.at - 1, retried.at, 8)
    assert good.judge(frozen=[pause]).noted["said to start by a paused process, when it woke"] == 1
    good.start("a", release=2, attempt=2, after=60_000)
    good.succeed("a", release=2, attempt=2)
    assert set(good.judge(frozen=[pause]).counts) == {"started after its end was in the log"}


def test_a_run_that_the_log_does_not_know_of_is_found_by_the_side_log(good: Writer) -> None:
    """Code that ran after its end was in the log is found even if nothing says that it was started."""
    ends = {r.release: r.at for r in good.log.records if r.fact in ("JobSucceeded", "JobFailed", "JobRetried")}
    runs = [Execution(*release, 1, at - 5, at - 1) for release, at in ends.items()]
    assert good.judge(executions=runs).good
    again = Execution("a", 1, 1, 1, ends["a", 1, 1] + 1, None)
    assert set(good.judge(executions=[*runs, again]).counts) == {"run after its end was in the log"}
    cut = Execution("a", 1, 1, 1, ends["a", 1, 1] - 9, None)
    twice = good.judge(executions=[cut, *runs])
    assert twice.good
    assert twice.noted["releases run more than once"] == 1
    assert set(good.judge(executions=runs[1:]).counts) == {"succeeded without having been run"}


def test_closes_that_came_twice_are_counted(good: Writer) -> None:
    """A second end of one release is counted, and it is told whether both say the same."""
    good.succeed("a")
    good.add(LIFE, "JobFailed", {"reason": "never", "error": ERROR, "duration_us": 1}, job="b")
    good.add(DEAD, "DeadLettered", {"spec": SPEC, "error": ERROR}, job="b")
    found = good.judge()
    assert found.good
    assert found.noted["closed more than once"] == 2
    assert found.noted["closed in different ways"] == 1
    assert fold(good.log.records)["b"].state == "succeeded"


def test_the_fold_does_not_care_about_order(good: Writer) -> None:
    """The records backwards fold to the same."""
    good.add(LIFE, "JobStarted", {"worker": "w"}, job="a", run=2)
    assert fold(good.log.records[::-1]) == fold(good.log.records)
    assert fold(good.log.records)["a"] == Final("running", "t", "mail", 2, 1, 1)


def test_a_difference_between_fold_and_table_is_named_by_job_and_field(good: Writer) -> None:
    """A row that is missing, one too many and one with another value are three differences."""
    folded = fold(good.log.records)
    kept = dict(folded)
    assert compare(folded, kept) == []
    kept["z"] = kept.pop("a")
    kept["c"] = kept["c"]._replace(attempt=1)
    assert [(d.job_id, d.field) for d in compare(folded, kept)] == [("a", "job"), ("c", "attempt"), ("z", "job")]


def test_the_bytes_that_the_codec_writes_are_read_by_hand() -> None:
    """An event that the codec wrote is read by hand, fact by fact, and the fingerprint is the same."""
    assert fingerprint(codec.SCHEMA_TEXT) == codec.FINGERPRINT
    spec = ev.JobSpec(b"{}", {"x": "y"}, "p")
    facts: list[ev.Fact] = [
        ev.JobSubmitted(spec, 5, None),
        ev.JobDue(spec, 1_700_000_000_000_000),
        ev.JobRetried(ev.ErrorInfo("E", "m", None), 7),
        ev.JobSucceeded(b"1", 3),
        ev.RecordRejected("t", 1, 2, None, b"\0", "why"),
    ]
    for fact in facts:
        event = ev.JobEvent("e", "j", 2, 3, 4, 1_700_000_000_000_001, "t", "q", None, "h", "s", None, fact)
        head, name, body = Schemas().decode(codec.encode(event))
        assert name == type(fact).__name__
        assert {**head, "fact": None} == {**msgspec.structs.asdict(event), "fact": None}
        assert body == msgspec.to_builtins(fact, builtin_types=(bytes,))


@pytest.mark.parametrize("value", [None, b"", b"\xc3\x01short", b"garbage of some length", b"\xc3\x01" + b"\0" * 30])
def test_what_is_no_event_is_said_to_be_none(value: bytes | None) -> None:
    """Bytes without our frame, or of an unknown schema, are no event."""
    with pytest.raises(ValueError, match=r"null|framing|unknown schema|damaged"):
        Schemas().decode(value)


def test_the_side_log_tells_cut_off_runs(tmp_path: Path) -> None:
    """A run whose end is missing was cut off."""
    path = tmp_path / "x.log"
    path.write_text("B a 1 1 1 100 7\nB b 1 2 1 110 7\nE a 1 1 1 120 7\n")
    assert read_executions(path) == [Execution("a", 1, 1, 1, 100, 120, 7), Execution("b", 1, 2, 1, 110, None, 7)]


def test_a_promise_that_is_broken_names_itself() -> None:
    """The message of a broken promise is the promise and the evidence."""
    Promise.NEVER_EARLY.hold(True)
    with pytest.raises(PromiseBroken, match=r"NEVER_EARLY: No job is let go.*\n.*3 ms"):
        Promise.NEVER_EARLY.hold(False, "3 ms")
