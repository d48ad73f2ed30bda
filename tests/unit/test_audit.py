"""Each rule of `jobledger audit` gets a log with exactly one fault, and must report this fault with its position."""

from __future__ import annotations

import json
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobledger.audit import order
from jobledger.audit.findings import FAULTS, NOTES, Findings
from jobledger.audit.records import Record, Schemas, fingerprint
from jobledger.audit.rules import Scope
from jobledger.audit.run import Judge, faults_of
from jobledger.audit.spill import Spill, keys_of
from jobledger.audit.table import Final, StatusFile, final, result_text, stored
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.streams.status.store.rows import key_text
from tests.handmade import COORD, DEAD, ERROR, LIFE, NS, SPEC, WORK, Writer, good_log

#: A time after everything that `good_log` writes, ms.
LATER = 10_000_000


class Audited(Writer):
    """A log that is written by hand and judged as the command judges a log: through the scratch file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        made = good_log()
        self.records, self.clock, self.next = made.records, made.clock, made.next
        self.folder = folder

    @contextmanager
    def spilled(self) -> Iterator[Spill]:
        """Write the records to a scratch file."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "records.db").unlink(missing_ok=True)
        spill = Spill(self.folder)
        try:
            for record in self.records:
                spill.add(record, f"{NS}.jobs.")
            yield spill
        finally:
            spill.close()

    def judge(self, table: Path | None = None, **scope: Any) -> Judge:
        """Judge the log. Unless ``scope`` says otherwise, every work record is committed and no worker runs."""
        ends: dict[tuple[str, int], int] = {}
        for record in self.records:
            partition = (record.topic, record.partition)
            ends[partition] = max(record.offset + 1, ends.get(partition, 0))
        given = {"committed": ends, "bound": ends, "lowest": dict.fromkeys(ends, 0), "finished": True, **scope}
        with self.spilled() as spill:
            judge = Judge(Scope(NS, **given), Findings(), None if table is None else StatusFile(table), (), spill.keep)
            judge.all(spill.groups())
            order.in_turn(spill.turns(), judge.found)
        return judge


@pytest.fixture
def log(tmp_path: Path) -> Audited:
    """A log without a fault."""
    return Audited(tmp_path / "scratch")


Plant = Callable[[Audited], Record | list[Record] | None]


def lease(log: Audited, until_ms: int) -> Record:
    """Add a leased job that is released again ``until_ms`` after its lease, and then succeeds. Return the second
    release."""
    log.submit("l")
    log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job="l")
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}, job="l")
    log.start("l")
    due = (log.clock + until_ms) * 1000
    released = log.add(WORK, "JobDue", {"spec": SPEC, "due_at": due}, job="l", release=2, after=until_ms)
    log.add(LIFE, "JobLeased", {"worker": "v", "lease_ms": 5000}, job="l", release=2)
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "v", "lease_ms": 5000, "crashes": 1}, job="l", release=2)
    log.start("l", release=2)
    log.succeed("l", release=2, partition=3)  # the coordinator writes it, on the partition of the job's id
    return released


def in_place(log: Audited, after: int) -> list[Record]:
    """Add a keyed job with a second attempt in place, ``after`` ms after the retry; the retry asks for 100 ms."""
    log.submit("k")
    log.start("k")
    body = {"error": ERROR, "delay_ms": 100, "duration_us": 1, "in_place": True}
    retried = log.add(LIFE, "JobRetried", body, job="k")
    again = log.start("k", attempt=2, after=after)
    log.succeed("k", attempt=2)
    return [again, retried]


def no_end(log: Audited) -> Record:
    log.drop("JobSucceeded", "a")
    log.records[:] = [r for r in log.records if r.topic != WORK or r.head["job_id"] != "a"]
    return log.add(COORD, "JobSubmitted", {"spec": SPEC, "delay_ms": 1, "due_at": None}, release=0)


def no_submission(log: Audited) -> Record:
    log.drop("JobSubmitted", "a")
    return log.records[log.last("JobStarted", "a")]


def contradiction(log: Audited) -> list[Record]:
    one = log.records[log.last("JobSucceeded", "a")]
    other = log.fail("a")
    log.letter("a")
    return [one, other]


def start_again(log: Audited) -> list[Record]:
    return [log.start("a"), log.records[log.last("JobSucceeded", "a")]]


def start_later_release(log: Audited) -> list[Record]:
    return [log.start("a", release=2, partition=5), log.records[log.last("JobSucceeded", "a")]]


def start_after_retry(log: Audited) -> list[Record]:
    return [log.start("c", partition=0), log.records[log.last("JobRetried", "c")]]


def release_early(log: Audited) -> Record:
    log.move("JobDue", "b", -1)
    return log.records[log.last("JobDue", "b")]


def retry_early(log: Audited) -> Record:
    log.move("JobDue", "c", -2)
    return log.records[log.last("JobDue", "c")]


def start_early(log: Audited) -> Record:
    log.move("JobStarted", "b", -15)
    return log.records[log.last("JobStarted", "b")]


def out_of_turn(log: Audited) -> list[Record]:
    for job in ("x", "y"):
        log.submit(job, key="k")
    log.start("x")
    early = log.start("y")
    closed = log.succeed("x")
    log.succeed("y")
    return [early, closed]


def unasked(log: Audited) -> Record:
    log.submit("d", release=2)
    log.start("d", release=2)
    log.succeed("d", release=2)
    due = log.add(WORK, "JobDue", {"spec": SPEC, "due_at": log.clock * 1000}, job="d")
    log.start("d", partition=1)
    log.records.insert(-3, log.records.pop())  # on its own partition, so it does not count as a start after the outcome
    log.records[-4] = log.records[-4]._replace(at=1)
    log.add(LIFE, "JobRetried", {"error": ERROR, "delay_ms": 0, "duration_us": 1}, job="d")
    return due


def wrong_due(log: Audited) -> Record:
    record = log.records[log.last("JobDue", "b")]
    record.body["due_at"] += 1  # type: ignore[index]  # this test may spoil its log
    return record


def asked_before(log: Audited) -> Record:
    log.move("JobRetried", "c", 11)
    return log.records[log.last("ReleaseRequested", "c")]


def not_asked(log: Audited) -> Record:
    log.submit("d")
    log.start("d")
    return log.add(LIFE, "JobRetried", {"error": ERROR, "delay_ms": 9, "duration_us": 1}, job="d")


def work_twice(log: Audited) -> list[Record]:
    first = log.records[log.last("JobSubmitted", "a")]
    return [first, log.submit("a", event_id="another")]


def committed_open(log: Audited) -> Record:
    due = log.submit("a", release=0)
    log.records.insert(0, log.records.pop())
    return due


def closed_elsewhere(log: Audited) -> list[Record]:
    at = log.last("JobSucceeded", "a")
    log.records[at] = log.records[at]._replace(partition=3)
    return [log.records[log.last("JobSubmitted", "a")], log.records[at]]


def letter_missing(log: Audited) -> Record:
    log.drop("DeadLettered", "c")
    return log.records[log.last("JobFailed", "c")]


def letter_unasked(log: Audited) -> Record:
    return log.letter("a")


def letter_twice(log: Audited) -> list[Record]:
    first = log.records[log.last("DeadLettered", "c")]
    return [first, log.letter("c", release=2, attempt=2, event_id="another")]


def garbage(log: Audited) -> Record:
    return log.add(WORK, None, raw=b"?")


def garbage_elsewhere(log: Audited) -> Record:
    return log.add(COORD, None, raw=b"?")


def misplaced(log: Audited) -> Record:
    return log.add(WORK, "JobStarted", {"worker": "w"}, job="a")


def rejected(log: Audited, bad: Record, raw: bytes | None, error: str = "no event") -> Record:
    body = {"topic": bad.topic, "partition": 0, "offset": bad.offset, "raw_value": raw, "error": error}
    return log.add(DEAD, "RecordRejected", body, job="")


def other_bytes(log: Audited) -> list[Record]:
    bad = log.add(WORK, None, raw=b"?")
    return [rejected(log, bad, b"!"), bad]


def other_bytes_misplaced(log: Audited) -> list[Record]:
    bad = log.add(WORK, "JobStarted", {"worker": "w"}, job="a", raw=b"the right bytes")
    return [rejected(log, bad, b"!"), bad]


def good_rejected(log: Audited) -> Record:
    return rejected(log, log.records[0], b"!")


PLANTS: list[tuple[str, Plant]] = [
    ("not-ended", no_end),
    ("submission-missing", no_submission),
    ("ends-contradict", contradiction),
    ("started-after-end", start_again),
    ("started-after-end", start_later_release),
    ("started-after-end", start_after_retry),
    ("released-early", release_early),
    ("released-early", retry_early),
    ("released-early", lambda log: lease(log, 4000)),
    ("started-early", start_early),
    ("retried-early", lambda log: in_place(log, 99)),
    ("key-order", out_of_turn),
    ("due-time-without-request", wrong_due),
    ("request-before-cause", asked_before),
    ("work-twice", work_twice),
    ("closed-elsewhere", closed_elsewhere),
    ("dead-letter-missing", letter_missing),
    ("dead-letter-without-failure", letter_unasked),
    ("dead-letter-twice", letter_twice),
    ("unreadable-lost", garbage),
    ("unreadable-lost", garbage_elsewhere),
    ("committed-misplaced", misplaced),
    ("rejected-altered", other_bytes),
    ("rejected-altered", other_bytes_misplaced),
    ("rejected-good", good_rejected),
]


def test_a_correct_log_has_no_fault_and_no_note(log: Audited) -> None:
    """The log has a plain job, a delayed job and a job that failed at its second attempt."""
    judge = log.judge()
    assert faults_of(judge.found) == []
    assert +judge.found.notes == {}
    assert judge.jobs == 3


@pytest.mark.parametrize(("kind", "plant"), PLANTS)
def test_each_planted_fault_is_found_with_its_position_and_nothing_else(log: Audited, kind: str, plant: Plant) -> None:
    """One record is dropped, added, moved in time or changed. The audit reports one fault, with the positions of the
    records."""
    planted = plant(log)
    assert planted is not None
    places = [r.position for r in (planted if isinstance(planted, list) else [planted])]
    (fault,) = faults_of(log.judge().found)
    assert (fault.kind, fault.count) == (kind, 1)
    assert fault.first[0].positions == places


@pytest.mark.parametrize(
    ("plant", "kinds"),
    [
        (lambda log: log.drop("JobSucceeded", "a"), {"not-ended", "committed-open"}),
        (not_asked, {"not-ended", "request-missing"}),
        (lambda log: log.drop("JobRetried", "c"), {"committed-open", "request-before-cause"}),
        (lambda log: log.drop("JobSubmitted", "b"), {"submission-missing", "release-without-request"}),
    ],
)
def test_one_record_that_is_lost_may_break_two_rules(
    log: Audited, plant: Callable[[Audited], object], kinds: set[str]
) -> None:
    """Without the record, a release is not closed, or a derived record has no cause."""
    plant(log)
    assert {fault.kind for fault in faults_of(log.judge().found)} == kinds


def test_every_kind_of_fault_of_the_log_has_a_test() -> None:
    """Only the three faults of the status table are not planted above. A rule that never failed in a test proves
    nothing."""
    seen = {kind for kind, _ in PLANTS} | {"committed-open", "request-missing", "release-without-request"}
    assert FAULTS.keys() - seen == {"row-missing", "row-differs", "row-unknown"}
    assert not FAULTS.keys() & NOTES.keys()


def test_the_fault_of_a_start_after_an_outcome_names_the_worker(log: Audited) -> None:
    """An operator first asks which worker started the job."""
    log.add(LIFE, "JobStarted", {"worker": "host-9:4711"})
    (fault,) = faults_of(log.judge().found)
    assert "started by host-9:4711" in fault.first[0].detail
    assert "after its JobSucceeded" in fault.first[0].detail


# -- logs without a fault ----------------------------------------------------------------------------------------------


def test_a_second_success_of_a_job_is_a_note(log: Audited) -> None:
    """After a crash the job's code may run twice and succeed twice. The two facts do not contradict each other."""
    log.succeed("a")
    judge = log.judge()
    assert faults_of(judge.found) == []
    assert +judge.found.notes == {"ended-again": 1, "closed-again": 1}


def test_a_copy_of_a_derived_record_is_a_note(log: Audited) -> None:
    """A request, a release and a dead letter are sent again after a crash, with the same event ids."""
    log.letter("c", release=2, attempt=2)
    log.records.append(log.records[log.last("ReleaseRequested", "c")]._replace(offset=90))
    log.records.append(log.records[log.last("JobDue", "c")]._replace(offset=90))
    judge = log.judge()
    assert faults_of(judge.found) == []
    assert +judge.found.notes == {"derived-again": 2, "work-again": 1}


def test_a_submission_that_was_sent_again_is_a_note(log: Audited) -> None:
    """The worker drops the second record, because its job has the same id."""
    log.submit("a")
    judge = log.judge()
    assert faults_of(judge.found) == []
    assert +judge.found.notes == {"work-again": 1}


def test_a_lease_that_ended_or_was_given_back_releases_the_job_again(log: Audited) -> None:
    """The lease closes the work record, and the outcome of the job may be on another partition."""
    lease(log, 5000)
    assert faults_of(log.judge().found) == []
    log.submit("g")
    log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job="g")
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}, job="g")
    back = log.add(COORD, "LeaseRenewed", {"worker": "w", "lease_ms": 0}, job="g")
    log.add(WORK, "JobDue", {"spec": SPEC, "due_at": back.at * 1000}, job="g", release=2, after=1)
    log.start("g", release=2)
    log.succeed("g", release=2)
    assert faults_of(log.judge().found) == []


def test_a_lease_that_the_next_owner_sends_again_does_not_last_longer(log: Audited) -> None:
    """The worker died before it committed, so the next owner sends the same `Leased` again, and the coordinator ignores
    it. A `LeaseRenewed`, in contrast, makes the lease last longer."""
    leased = {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}
    for job, again in (("g", "Leased"), ("h", "LeaseRenewed")):
        log.submit(job)
        log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job=job)
        first = log.add(COORD, "Leased", leased, job=job)
        log.add(COORD, again, leased if again == "Leased" else {"worker": "w", "lease_ms": 5000}, job=job, after=4000)
        decided = log.add(COORD, "ReleaseDecided", {"due_at": (first.at + 5000) * 1000}, job=job, after=1500)
        log.add(WORK, "JobDue", {"spec": SPEC, "due_at": decided.at * 1000}, job=job, release=2, after=1)
        log.start(job, release=2)
        log.succeed(job, release=2)
    (fault,) = faults_of(log.judge().found)
    assert (fault.kind, [finding.job_id for finding in fault.first]) == ("released-early", ["h"])


def test_an_attempt_in_place_closes_no_release_and_begins_after_its_delay(log: Audited) -> None:
    """A later fact closes the release. If a retry is in the log twice, the delay counts from the first record."""
    _, retried = in_place(log, 100)
    log.records.insert(log.records.index(retried) + 1, retried._replace(offset=retried.offset, at=retried.at + 50))
    assert faults_of(log.judge().found) == []
    log.submit("s")
    log.start("s")
    for after in (100, 99):
        log.add(LIFE, "JobSnoozed", {"delay_ms": 100, "reason": None, "in_place": True}, job="s")
        log.start("s", after=after)
    log.succeed("s")
    (fault,) = faults_of(log.judge().found)
    assert (fault.kind, fault.count) == ("retried-early", 1)


def test_while_workers_run_a_job_without_an_outcome_is_no_fault(log: Audited) -> None:
    """The job is counted as open. It is a fault if its last record and its due time are before `open_before`."""
    log.submit("d")
    last = log.add(COORD, "JobSubmitted", {"spec": SPEC, "delay_ms": 5000, "due_at": None}, job="e", release=0)
    committed = {(WORK, 0): log.next[WORK] - 1}
    judge = log.judge(finished=False, committed=committed)
    assert faults_of(judge.found) == []
    assert +judge.found.notes == {"open": 2, "not-committed": 1}
    (fault,) = faults_of(log.judge(finished=False, committed=committed, open_before=last.at + 1).found)
    assert [each.job_id for each in fault.first] == ["d"]
    (fault,) = faults_of(log.judge(finished=False, committed=committed, open_before=last.at + 5001).found)
    assert {each.job_id for each in fault.first} == {"d", "e"}


def test_records_written_while_the_log_is_read_are_evidence_but_are_not_judged(log: Audited) -> None:
    """A record above the ends that the audit noted first may lack its cause, and may be the cause of a record below
    them."""
    end = log.next[LIFE]
    log.start("unknown")
    log.add(WORK, "JobDue", {"spec": SPEC, "due_at": 1}, job="b", release=9)
    bound = {(LIFE, 0): end, (WORK, 0): log.next[WORK] - 1, (COORD, 0): 99, (DEAD, 0): 99}
    assert faults_of(log.judge(finished=False, bound=bound, committed={}).found) == []
    assert faults_of(log.judge(finished=False, committed={}).found) != []


def test_missing_records_of_a_trimmed_log_are_no_fault(log: Audited) -> None:
    """A job that began before the oldest record is counted. Records that contradict each other are still a fault."""
    horizon = log.records[1].at
    del log.records[0]
    judge = log.judge(horizon=horizon)
    assert faults_of(judge.found) == []
    assert judge.found.notes["submission-trimmed"] == 1
    log.start("a")
    (fault,) = faults_of(log.judge(horizon=horizon).found)
    assert fault.kind == "started-after-end"


def test_the_report_of_a_leased_job_may_overtake_the_start(log: Audited) -> None:
    """The worker writes the start and the report to different topics. If the worker's own times show that the job was
    started after its report, that is a fault."""
    log.submit("l")
    log.add(LIFE, "JobLeased", {"worker": "w", "lease_ms": 5000}, job="l")
    log.add(COORD, "Leased", {"spec": SPEC, "worker": "w", "lease_ms": 5000, "crashes": 0}, job="l")
    end = log.succeed("l", partition=3)
    log.start("l")
    (fault,) = faults_of(log.judge().found)
    assert fault.kind == "started-after-end"
    at = log.last("JobStarted", "l")
    head = {**log.records[at].head, "occurred_at": end.head["occurred_at"] - 1}
    log.records[at] = log.records[at]._replace(head=head)
    assert faults_of(log.judge().found) == []


def test_a_fact_of_a_later_version_is_not_judged(log: Audited) -> None:
    """The audit does not know the meaning of the fact. On a work topic the fact may hand over a job."""
    log.add(LIFE, "JobFromTheFuture", {}, job="f")
    assert faults_of(log.judge().found) == []


def test_records_with_their_writers_time_are_not_judged_by_time(log: Audited) -> None:
    """With message.timestamp.type=CreateTime the time of the append is not known."""
    release_early(log)
    at = log.last("JobDue", "b")
    log.records[at] = log.records[at]._replace(timed=False)
    judge = log.judge()
    assert faults_of(judge.found) == []
    assert judge.found.notes["writer-time"] == 1


def test_a_dead_letter_may_hold_only_the_beginning_of_a_large_record(log: Audited) -> None:
    """A shorter value is allowed only if the dead letter says so."""
    bad = log.add(WORK, None, raw=b"x" * 100)
    rejected(log, bad, b"x" * 10, "no event; the first 10 of its value's 100 bytes are kept here")
    assert faults_of(log.judge().found) == []
    for error in ("no event", "no event; the first 4096 of its key's 5000 bytes are kept here"):
        other = log.add(WORK, None, raw=b"x" * 100)
        rejected(log, other, b"x" * 10, error)
        (fault,) = faults_of(log.judge().found)
        assert fault.kind == "rejected-altered"
        del log.records[-2:]


def test_a_rejection_of_a_record_that_the_audit_did_not_read_is_not_judged(log: Audited) -> None:
    """The rejected record may have been trimmed, or may be on a foreign topic."""
    rejected(log, Record("elsewhere", 0, 3, 1), b"?")
    assert faults_of(log.judge().found) == []


def test_a_bounded_number_of_faults_is_kept_and_all_are_counted(log: Audited) -> None:
    """The memory is bounded for a log with any number of faults."""
    findings = Findings(most=2)
    for _ in range(5):
        findings.fault("not-ended", "a", "x", log.records[0])
    (fault,) = faults_of(findings)
    assert (fault.count, len(fault.first)) == (5, 2)


# -- the scratch file ---------------------------------------------------------------------------------------------------


def test_the_scratch_file_groups_records_by_job_in_the_order_of_ids(log: Audited) -> None:
    """The order of the groups does not depend on the order in which records were added. Only the first progress report
    of each attempt is kept."""
    for _ in range(50):
        log.add(LIFE, "JobProgressed", {"sequence": 1, "done": 1, "total": None, "message": None}, job="b")
    log.records.reverse()
    with log.spilled() as spill:
        groups = list(spill.groups())
    assert [key for key, _ in groups] == ["a", "b", "c"]
    wanted = {key: [] for key in "abc"}  # type: dict[str, list[str]]
    for record in log.records:
        wanted[record.head["job_id"]].append(record.position)
    kept = {key: [r.position for r in records if r.fact != "JobProgressed"] for key, records in groups}
    progress = {r.position for r in log.records if r.fact == "JobProgressed"}
    assert kept == {key: [p for p in several if p not in progress] for key, several in wanted.items()}
    assert sum(r.fact == "JobProgressed" for _, records in groups for r in records) == 1


@pytest.mark.parametrize("key", [None, "k"])
def test_memory_does_not_grow_with_the_number_of_jobs(tmp_path: Path, key: str | None) -> None:
    """Four times as many jobs are sorted and judged in the same memory, also when all of them share a key."""
    peaks = []
    for jobs in (2_000, 8_000):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        log, scope, findings = Writer(), Scope(NS, finished=True), Findings()
        spill = Spill(folder)
        tracemalloc.start()
        try:
            for number in range(jobs):
                log.submit(f"{number}", key=key)
                log.start(f"{number}", key=key)
                log.succeed(f"{number}", key=key)
                for record in log.records:
                    spill.add(record, f"{NS}.jobs.")
                log.records.clear()
            judge = Judge(scope, findings, keep=spill.keep)
            judge.all(spill.groups())
            turns = sum(1 for _ in spill.turns())
            order.in_turn(spill.turns(), findings)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            spill.close()
        assert judge.jobs == jobs
        assert turns == (0 if key is None else jobs)
        assert not findings.counts
    assert peaks[1] < 1.3 * peaks[0]


def test_a_record_is_grouped_by_its_job_its_position_or_both() -> None:
    """A record that is not an event belongs to no job. An event on a work topic that submits no job belongs to the
    group of its job and to the group of its position."""
    log = Writer()
    prefix = f"{NS}.jobs."
    assert keys_of(log.submit("a"), prefix) == ["a"]
    assert keys_of(log.add(WORK, None, raw=b"?"), prefix) == [f"\0{WORK}/0/1"]
    assert keys_of(log.add(WORK, "JobStarted", {"worker": "w"}), prefix) == [f"\0{WORK}/0/2", "a"]
    assert keys_of(log.add(WORK, "JobFromTheFuture", {}), prefix) == ["a"]


# -- the status table ---------------------------------------------------------------------------------------------------


def write_table(
    path: Path,
    rows: dict[str, Final],
    offsets: dict[tuple[str, int], int],
    at: int = LATER,
    removed: dict[str, int] | None = None,
) -> Path:
    """Write a status table with these rows. ``removed``: limits up to which rows were removed, by state."""
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as made:
        made.execute(
            "CREATE TABLE jobs (job_id TEXT PRIMARY KEY, state, task, queue, run, attempt, release, submitted_ms, result, "
            "error_type, carried)"
        )
        made.execute("CREATE TABLE offsets (topic, partition, next_offset)")
        made.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
        limits = [(f"removed:{state}", str(ms)) for state, ms in (removed or {}).items()]
        made.executemany("INSERT INTO meta VALUES (?,?)", [("namespace", NS), *limits])
        for job, row in rows.items():
            result = None if row.result is None else row.result.encode()
            values = (job, row.state, row.task, row.queue, row.run, row.attempt, row.release, at, result, row.error, 0)
            made.execute("INSERT INTO jobs VALUES (?,?,?,?,?,?,?,?,?,?,?)", values)
        made.executemany("INSERT INTO offsets VALUES (?,?,?)", [(*where, end) for where, end in offsets.items()])
    made.close()
    return path


ROWS = {
    "a": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
    "b": Final("succeeded", "t", "mail", 1, 1, 1, "7"),
    "c": Final("failed", "t", "mail", 1, 2, 2, None, "ValueError"),
}
ALL_READ = {(topic, 0): 99 for topic in (WORK, LIFE, COORD, DEAD)}


def test_a_table_that_agrees_with_the_log_has_no_fault(log: Audited, tmp_path: Path) -> None:
    """The audit compares every row."""
    judge = log.judge(write_table(tmp_path / "t.db", ROWS, ALL_READ))
    assert faults_of(judge.found) == []
    assert judge.rows == 3


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("row-missing", {job: row for job, row in ROWS.items() if job != "c"}),
        ("row-differs", {**ROWS, "b": ROWS["b"]._replace(result="8")}),
        ("row-differs", {**ROWS, "c": ROWS["c"]._replace(state="succeeded", error=None)}),
        ("row-unknown", {**ROWS, "bb": ROWS["b"]}),
        ("row-unknown", {**ROWS, "z": ROWS["b"]}),
    ],
)
def test_a_missing_wrong_or_extra_row_is_a_fault(
    log: Audited, tmp_path: Path, kind: str, rows: dict[str, Final]
) -> None:
    """No other row is reported."""
    judge = log.judge(write_table(tmp_path / "t.db", rows, ALL_READ))
    (fault,) = faults_of(judge.found)
    assert (fault.kind, fault.count) == (kind, 1)


def test_a_row_that_was_removed_after_its_end_is_no_fault(log: Audited, tmp_path: Path) -> None:
    """A missing row of a job that ended before the limit of its state is counted as a note, and so is a row that a late
    fact began again. A row that ended later, or in another state, must be there."""
    end = log.records[log.last("JobFailed", "c")].at
    others = {job: row for job, row in ROWS.items() if job != "c"}
    partial = {**ROWS, "c": ROWS["c"]._replace(state="running", error=None)}
    for rows in (others, partial):
        judge = log.judge(write_table(tmp_path / "t.db", rows, ALL_READ, removed={"failed": end + 1}))
        assert faults_of(judge.found) == []
        assert (judge.rows, judge.found.notes["rows-removed"]) == (2, 1)
        for limits in ({"failed": end}, {"succeeded": end + 10**9}, {}):
            judge = log.judge(write_table(tmp_path / "t.db", rows, ALL_READ, removed=limits))
            assert [fault.kind for fault in faults_of(judge.found)] == [
                "row-missing" if rows is others else "row-differs"
            ]
    judge = log.judge(write_table(tmp_path / "t.db", ROWS, ALL_READ, removed={"failed": end + 1}))
    assert judge.rows == 3, "a row that is still there is compared"


def test_a_row_that_lacks_the_last_facts_of_its_job_is_not_compared(log: Audited, tmp_path: Path) -> None:
    """A table that is behind is not wrong: its offset is at or below the job's last record. The row is counted."""
    read = {**ALL_READ, (LIFE, 0): log.records[log.last("JobFailed", "c")].offset}
    judge = log.judge(write_table(tmp_path / "t.db", {"a": ROWS["a"], "b": ROWS["b"]}, read))
    assert faults_of(judge.found) == []
    assert judge.found.notes["rows-behind"] == 1


def test_a_row_older_than_the_log_is_not_judged(log: Audited, tmp_path: Path) -> None:
    """The table keeps the rows of jobs whose records were trimmed."""
    rows = {**ROWS, "z": ROWS["b"]}
    judge = log.judge(write_table(tmp_path / "t.db", rows, ALL_READ, at=log.clock), horizon=log.clock + 1)
    assert faults_of(judge.found) == []


def test_long_ids_and_results_are_compared_in_the_form_of_the_table() -> None:
    """The table stores a long id as its beginning and a digest. A long result is compared by its digest."""
    for text in ("a", "x" * 200, "x" * 201, "ü\0" * 150):
        assert stored(text) == key_text(text)
    long = b'"' + b"x" * 500 + b'"'
    digest = result_text(long)
    assert digest is not None
    assert digest.startswith("sha256:")
    assert result_text(digest.encode()) == digest
    assert result_text(b"\xff") == "\\xff"


def test_the_outcome_of_a_leased_job_counts_after_the_coordinator_wrote_it() -> None:
    """A worker's report on the topic `coordination` may belong to a lease that has ended."""
    log = Writer()
    log.submit("l")
    log.start("l")
    log.add(COORD, "JobSucceeded", {"result": b"7"}, job="l")
    expected = final(log.records)
    assert expected is not None
    assert expected.state == "running"


# -- bytes --------------------------------------------------------------------------------------------------------------


def facts() -> list[ev.Fact]:
    """Facts of several shapes."""
    spec = ev.JobSpec(b"{}", {"x": "y"}, "p")
    return [
        ev.JobSubmitted(spec, 5, None),
        ev.JobDue(spec, 1_700_000_000_000_000),
        ev.JobRetried(ev.ErrorInfo("E", "m", None), 7),
        ev.JobSucceeded(b"1", 3),
        ev.RecordRejected("t", 1, 2, None, b"\0", "why"),
    ]


def test_the_audits_decoder_reads_what_the_codec_writes() -> None:
    """The audit has its own decoder. It reads each event that the codec wrote, and computes the same fingerprint."""
    assert fingerprint(codec.SCHEMA_TEXT) == codec.FINGERPRINT
    for fact in facts():
        event = ev.JobEvent("e", "j", 2, 3, 4, 1_700_000_000_000_001, "t", "q", None, "h", "s", None, fact)
        head, name, body = Schemas().decode(codec.encode(event))
        assert name == ev.fact_name(fact)
        assert {**head, "fact": None} == {**msgspec.structs.asdict(event), "fact": None}
        assert body == msgspec.to_builtins(fact, builtin_types=(bytes,))


def test_the_audits_decoder_reads_the_frame_of_a_schema_registry() -> None:
    """The decoder uses the schema that is published under the id of the frame, or asks the registry for the schema."""
    event = ev.JobEvent("e", "j", 1, 1, 1, 1, "t", "q", None, None, "s", None, ev.JobSucceeded(b"1", 3))
    framed = b"\0" + (7).to_bytes(4, "big") + codec.encode(event)[10:]
    published = Schemas()
    with pytest.raises(ValueError, match="unknown schema"):
        published.decode(framed)
    published.add(codec.SCHEMA_TEXT, b"id-7")
    asked = Schemas({7: codec.SCHEMA_TEXT}.get)
    assert published.decode(framed)[1] == asked.decode(framed)[1] == "JobSucceeded"


def test_a_fact_without_fields_of_a_later_schema_is_judged(log: Audited) -> None:
    """A fact of an earlier schema has no `in_place`."""
    schema = json.loads(codec.SCHEMA_TEXT)
    union = next(f for f in schema["fields"] if f["name"] == "fact")["type"]
    retried = next(r for r in union if r["name"] == "JobRetried")
    retried["fields"] = [f for f in retried["fields"] if f["name"] != "in_place"]
    record = log.records[log.last("JobRetried", "c")]
    del record.body["in_place"]  # type: ignore[attr-defined]  # this test may spoil its log
    assert faults_of(log.judge().found) == []


@pytest.mark.parametrize("value", [None, b"", b"\xc3\x01short", b"garbage of some length", b"\xc3\x01" + b"\0" * 30])
def test_a_value_that_is_no_event_is_refused(value: bytes | None) -> None:
    """A value without the frame of an event, or of an unknown schema, is not an event."""
    with pytest.raises(ValueError, match=r"no value|not the head of an event|unknown schema|damaged"):
        Schemas().decode(value)


def test_the_docs_list_every_fault_and_note() -> None:
    """docs/reference.md has a row for each kind. If this test fails, the printed rows belong on that page."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "reference.md").read_text("utf-8")
    for kinds in (FAULTS, NOTES):
        wanted = "\n".join(f"| `{kind}` | {says} |" for kind, says in kinds.items())
        assert wanted in text, wanted
