"""Checks the rules that the records of each job must follow, whichever processes were killed. Pure.

A rule gets all records of one job, checks them for one thing, and reports the positions of the wrong records. A *fault*
breaks a promise of docs/promises.md. A *note* is within the limits of the promises: for example, a job whose code ran
twice has two successes, and derived records may be in the log twice with the same ``event_id``.

Two kinds of rules depend on how much of the log was read. A record that must *follow* another record is reported as
missing only if the other record is old enough, that is, below the workers' committed offset. A record that must be the
*cause* of another record is reported as missing only if the log still begins before the other record (`Scope.horizon`).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from jobledger.audit.findings import Findings
from jobledger.audit.records import Record

Release = tuple[str, int, int]

#: How a dead letter says that it has only the beginning of a record's value.
_KEPT = re.compile(r"the first (\d+) of its value's (\d+) bytes are kept here")

TERMINAL = ("JobSucceeded", "JobFailed", "JobCancelled", "JobExpired")
#: Facts after which another attempt follows: in the next release or, with ``in_place``, in the same release.
PASSING_ON = ("JobRetried", "JobSnoozed")
#: Facts that only a submitted job can have. This list does not contain facts of later versions of Jobledger.
OF_A_JOB = {
    *TERMINAL,
    *PASSING_ON,
    *("JobSubmitted", "JobDue", "JobStarted", "JobProgressed", "JobLeased", "Leased", "LeaseRenewed"),
    *("ReleaseRequested", "ReleaseOverdue"),
}
#: Facts that do not hand over a job to workers, and do not belong on a work topic.
NO_WORK = {
    *TERMINAL,
    *PASSING_ON,
    *("JobStarted", "JobProgressed", "JobLeased", "Leased", "LeaseRenewed"),
    *("ReleaseRequested", "ReleaseDecided", "ReleaseOverdue", "CancelRequested"),
    *("QueuePaused", "QueueResumed", "QueueLimited", "DeadLettered", "RecordRejected"),
}


@dataclass
class Scope:
    """The part of the log that was read, which limits what the rules can report.

    ``committed``, ``bound``, ``lowest``: offsets, by (topic, partition). ``committed``: the committed offsets of the
    worker groups. ``bound``: the ends when reading began; a record at or above ``bound`` is not checked, but is used to
    check earlier records. ``lowest``: the first offsets that were read. ``horizon``: the append time (ms) from which on
    no record of any partition is missing. ``finished``: nothing runs any more, so every job without an outcome is a
    fault. ``open_before``: a job without an outcome is a fault if its last record and its due times are before this
    time (ms).
    """

    namespace: str
    committed: Mapping[tuple[str, int], int] = field(default_factory=dict)
    bound: Mapping[tuple[str, int], int] = field(default_factory=dict)
    lowest: Mapping[tuple[str, int], int] = field(default_factory=dict)
    horizon: int = 0
    finished: bool = False
    open_before: int | None = None

    def __post_init__(self) -> None:
        self.work_prefix = f"{self.namespace}.jobs."
        self.lifecycle = f"{self.namespace}.lifecycle"
        self.coordination = f"{self.namespace}.coordination"
        self.dead_letter = f"{self.namespace}.dead-letter"

    def is_work(self, record: Record) -> bool:
        """Return whether the record is on a work topic."""
        return record.topic.startswith(self.work_prefix)

    def is_subject(self, record: Record) -> bool:
        """Return whether the record was in the log when reading began.

        The cause and the consequence of such a record can be expected to be among the records that were read.
        """
        return record.offset < self.bound.get((record.topic, record.partition), sys.maxsize)

    def passed(self, record: Record) -> bool:
        """Return whether a work record is below the committed offset of its worker group."""
        return record.offset < self.committed.get((record.topic, record.partition), 0)


def in_place(record: Record) -> bool:
    """Return whether a retry or snooze is in place: it does not close the release, which continues."""
    return bool(record.body.get("in_place"))


def due_of(record: Record) -> int:
    """Return when the release or attempt that a record requests is due, in microseconds of the broker's clock."""
    due_at: int | None = record.body.get("due_at")
    return (record.at + int(record.body.get("delay_ms") or 0)) * 1000 if due_at is None else due_at


def in_order(records: Iterable[Record]) -> list[Record]:
    """Return the records, sorted by topic, partition and offset."""
    return sorted(records, key=lambda r: r.place)


class Life:
    """All records of one job, by topic, by run and by release.

    ``whole``: no record of the job was trimmed or skipped, because the job's submission was appended at `Scope.horizon`
    or later, or because the horizon is 0. ``letters``: the dead letters of the job. ``ends``: the outcomes, by run.
    ``closes``: the closing facts, by release. ``starts``: each `JobStarted`, by release. ``leases``: the facts about
    job leases, by release.
    """

    def __init__(self, records: Sequence[Record], scope: Scope) -> None:
        self.job_id, self.scope = str(records[0].head["job_id"]), scope
        records = in_order(records)
        self.work = [r for r in records if scope.is_work(r)]
        self.lifecycle = [r for r in records if r.topic == scope.lifecycle]
        self.coordination = [r for r in records if r.topic == scope.coordination]
        self.letters = [r for r in records if r.topic == scope.dead_letter and r.fact == "DeadLettered"]
        self.facts = [*self.work, *self.lifecycle, *self.coordination, *self.letters]
        self.submissions = [r for r in (*self.work, *self.coordination) if r.fact == "JobSubmitted"]
        self.whole = any(r.at >= scope.horizon for r in self.submissions) or scope.horizon == 0
        self.ends: dict[int, list[Record]] = defaultdict(list)
        self.closes: dict[Release, list[Record]] = defaultdict(list)
        self.starts: dict[Release, list[Record]] = defaultdict(list)
        for record in self.lifecycle:
            if record.fact in TERMINAL:
                self.ends[record.head["run"]].append(record)
                self.closes[record.release].append(record)
            elif record.fact in PASSING_ON and not in_place(record):
                self.closes[record.release].append(record)
            elif record.fact == "JobStarted":
                self.starts[record.release].append(record)
        self.leases: dict[Release, list[Record]] = defaultdict(list)
        for record in self.facts:
            if record.fact in ("JobLeased", "Leased", "LeaseRenewed"):
                self.leases[record.release].append(record)


Rule = Callable[[Life, Findings], None]


def judge_job(records: Sequence[Record], scope: Scope, findings: Findings) -> Life:
    """Check all records of one job with every rule, and return them as a `Life`. ``findings`` gets faults and notes."""
    life = Life(records, scope)
    for rule in RULES:
        rule(life, findings)
    return life


# -- outcomes -------------------------------------------------------------------------------------------------------


def has_ended(life: Life, findings: Findings) -> None:
    """Check that every job has a submission, and an outcome of its last run."""
    facts = [r for r in life.facts if r.fact in OF_A_JOB]
    if not facts:
        return
    if not life.whole:
        findings.note("submission-trimmed")
    elif not life.submissions:
        if any(map(life.scope.is_subject, facts)):
            findings.fault("submission-missing", life.job_id, "its submission is not in the log", facts[0])
        return
    last = max(r.head["run"] for r in facts)
    if life.ends.get(last, []) or not life.whole:
        return
    findings.note("open")
    latest = max(facts, key=lambda r: r.at)
    waits = [due_of(r) // 1000 for r in facts if r.body.get("delay_ms") is not None or r.body.get("due_at") is not None]
    before = life.scope.open_before
    since = max([latest.at, *waits])
    if life.scope.finished or (before is not None and since < before):
        findings.fault("not-ended", life.job_id, f"its last record is {latest.fact}", latest)


def ends_agree(life: Life, findings: Findings) -> None:
    """Check that the outcomes of one run do not contradict each other.

    The same outcome twice is only a note: the job's code ran twice, or the record was written again.
    """
    for run, ends in life.ends.items():
        if len(ends) > 1:
            findings.note("ended-again")
        kinds = {end.fact: end for end in reversed(ends)}
        if len(kinds) > 1:
            text = " and ".join(sorted(str(kind) for kind in kinds))
            findings.fault("ends-contradict", life.job_id, f"run {run} has {text}", *in_order(kinds.values()))
    for closes in life.closes.values():
        if len(closes) > 1:
            findings.note("closed-again")
            if len({close.fact for close in closes}) > 1:
                findings.note("closed-differently")


def starts_end(life: Life, findings: Findings) -> None:
    """Check that a release is not started again after it was closed, or after its run had an outcome."""
    for release, starts in life.starts.items():
        if len(starts) > 1:
            findings.note("started-again")
        ends = [*life.ends.get(release[1], []), *(c for c in life.closes.get(release, []) if c.fact in PASSING_ON)]
        for start in starts:
            earlier = [end for end in ends if _before(end, start) and not _overtook(life, end, start)]
            if earlier:
                end = min(earlier, key=lambda r: (r.at, r.place))
                worker = start.body.get("worker", "?")
                text = f"started by {worker} {start.at - end.at} ms after its {end.fact}"
                findings.fault("started-after-end", life.job_id, text, start, end)


def _overtook(life: Life, end: Record, start: Record) -> bool:
    """Return whether the report of a leased job overtook the job's start.

    The worker writes both records, but to different topics, so the report may be appended first. The worker's own times
    show the order.
    """
    if end.release != start.release or end.head["source"] != start.head["source"]:
        return False
    leased = any(r.fact == "JobLeased" and r.release == start.release for r in life.lifecycle)
    return leased and bool(start.head["occurred_at"] <= end.head["occurred_at"])


def _before(one: Record, other: Record) -> bool:
    """Return whether the log shows that ``one`` was written before ``other``.

    Records of one partition are compared by offset, other records by time.
    """
    if one.place[:2] == other.place[:2]:
        return one.offset < other.offset
    return one.at < other.at


# -- times ----------------------------------------------------------------------------------------------------------


def not_early(life: Life, findings: Findings) -> None:
    """Check that no job is released or started before its due time.

    The due time counts from the append time of the record that requested the release.
    """
    untimed = sum(1 for r in (*life.work, *life.coordination, *life.lifecycle) if not r.timed)
    findings.note("writer-time", untimed)
    requested, due_by_facts = _requested_due_times(life), _due_times_by_facts(life)
    overdue = {r.release for r in life.coordination if r.fact == "ReleaseOverdue"}
    findings.note("overdue", len(overdue))
    allowed_at: dict[Release, int] = {}
    for record in life.work:
        if record.fact != "JobDue":
            continue
        if _by_lease(life, record, findings):
            continue
        times = requested[record.release]
        # The first request counts, and the coordinator ignores later ones. A request of the watchdog follows from the
        # worker's facts.
        causes = times[:1]
        if record.release in due_by_facts and (record.release in overdue or not causes):
            causes.append(due_by_facts[record.release])
        if not causes:
            if life.whole and life.scope.is_subject(record):
                findings.fault("release-without-request", life.job_id, "there is no request for this release", record)
            continue
        allowed = allowed_at[record.release] = min(causes)
        if untimed:
            continue
        if record.at * 1000 < allowed:
            text = f"released {(allowed - record.at * 1000) / 1000:g} ms before its time"
            findings.fault("released-early", life.job_id, text, record)
        if record.body["due_at"] not in (*times, *causes) and record.release not in overdue and life.whole:
            text = f"its due time is {record.body['due_at']} µs, but the log requests {', '.join(map(str, causes))} µs"
            findings.fault("due-time-without-request", life.job_id, text, record)
    for release, starts in life.starts.items():
        for start in starts:
            if not untimed and start.at * 1000 < allowed_at.get(release, 0):
                text = f"started {(allowed_at[release] - start.at * 1000) / 1000:g} ms before its time"
                findings.fault("started-early", life.job_id, text, start)


def _requested_due_times(life: Life) -> dict[Release, list[int]]:
    """Return the due times that were requested for each release, in the order of the log."""
    requested: dict[Release, list[int]] = defaultdict(list)
    accepted = {r.release for r in life.lifecycle if r.fact in PASSING_ON}
    for record in life.coordination:
        job, run, release = record.release
        if record.fact == "JobSubmitted":
            requested[job, run, max(release, 1)].append(due_of(record))
        elif record.fact == "ReleaseRequested":
            requested[record.release].append(due_of(record))
        # The report of a leased job counts only if the coordinator copied it to the lifecycle topic: its lease was
        # valid.
        elif record.fact in PASSING_ON and record.release in accepted:
            requested[job, run, release + 1].append(due_of(record))
    return requested


def _due_times_by_facts(life: Life) -> dict[Release, int]:
    """Return the due time of each next release according to the facts on the lifecycle topic."""
    due_times: dict[Release, int] = {}
    for record in life.lifecycle:
        if record.fact in PASSING_ON and not in_place(record):
            job, run, release = record.release
            due = due_of(record)
            due_times[job, run, release + 1] = min(due, due_times.get((job, run, release + 1), due))
    return due_times


def _by_lease(life: Life, due: Record, findings: Findings) -> bool:
    """Return whether a release followed from the end of the previous release's job lease. If so, check its time."""
    job, run, release = due.release
    leases = [r for r in life.leases.get((job, run, release - 1), []) if r.topic == life.scope.coordination]
    # A worker that takes the partition over sends the `Leased` again. Only the first one counts for the coordinator.
    copies = [r for r in leases if r.fact == "Leased"][1:]
    leases = [r for r in leases if r not in copies]
    if not leases or any(r.fact in PASSING_ON and r.release == (job, run, release - 1) for r in life.lifecycle):
        return False
    decided = due.body["due_at"]
    earlier = [r for r in leases if r.at * 1000 <= decided]
    given_back = any(r.body["lease_ms"] == 0 for r in earlier)
    # A record that was appended in the same millisecond as the decision may be before or after the decision.
    holds = [(r.at + r.body["lease_ms"]) * 1000 for r in earlier if r.at * 1000 < decided]
    if all(r.timed for r in (due, *leases)) and (
        due.at * 1000 < decided or (holds and not given_back and max(holds) > decided)
    ):
        findings.fault("released-early", life.job_id, "released before the previous release's lease was over", due)
    return True


def in_place_waits(life: Life, findings: Findings) -> None:
    """Check that an attempt in place does not begin before the delay that precedes it is over.

    The delay counts from the append time of the `JobRetried` or `JobSnoozed`.
    """
    for release, starts in life.starts.items():
        waits = [r for r in life.lifecycle if r.release == release and r.fact in PASSING_ON and in_place(r)]
        for start in starts:
            earlier = [w for w in waits if w.partition == start.partition and w.offset < start.offset and w.timed]
            attempt = start.head["attempt"]
            # A retry may be in the log twice; then its first delay counts. The snoozes of one attempt follow each
            # other, so the last one counts.
            retried = [w for w in earlier if w.fact == "JobRetried" and w.head["attempt"] == attempt - 1][:1]
            snoozed = [w for w in earlier if w.fact == "JobSnoozed" and w.head["attempt"] == attempt][-1:]
            for wait in snoozed or retried:
                ms = due_of(wait) // 1000 - start.at
                if ms > 0 and start.timed:
                    findings.fault(
                        "retried-early", life.job_id, f"an attempt began {ms} ms before its delay was over", start, wait
                    )


# -- causes, derived records and commits ----------------------------------------------------------------------------


def causes_come_first(life: Life, findings: Findings) -> None:
    """Check that the next release was requested only after the closing fact of the release before it was in the log.

    In the opposite order, the worker could die between the two records. Then the next owner would run the job again,
    although the retry of the job is scheduled.
    """
    if not life.whole:
        return
    causes: dict[Release, int] = {}
    for record in life.lifecycle:
        if record.fact in PASSING_ON and not in_place(record):
            job, run, release = record.release
            key = (job, run, release + 1)
            causes[key] = min(record.at, causes.get(key, record.at))
    for record in life.coordination:
        if record.fact == "ReleaseRequested" and record.release[2] > 1 and life.scope.is_subject(record):
            cause = causes.get(record.release)
            if cause is None or (cause > record.at and record.timed):
                findings.fault(
                    "request-before-cause",
                    life.job_id,
                    "the fact that causes this request is missing, or was written later",
                    record,
                )


def what_follows_is_there(life: Life, findings: Findings) -> None:
    """Check that the records that derive from a closing fact are in the log.

    These are the request for the next release, and the dead letter. A worker commits a work record only after they are
    in the log.
    """
    scope = life.scope
    requested = {r.release for r in life.coordination if r.fact == "ReleaseRequested"}
    with_dead_letter = {r.release for r in life.letters}
    passed = {r.release for r in life.work if scope.passed(r)}
    # The releases of workers that may still have derived records to send. The coordinator writes a closing fact
    # together with its derived records, so a leased release, and a release without a work record, are not among them.
    waits = {r.release for r in life.work} - passed - life.leases.keys()
    for release, closes in life.closes.items():
        job, run, number = release
        if (release in waits and not scope.finished) or closes[0].at < scope.horizon:
            continue
        close = closes[0]
        continues = (
            close.fact in PASSING_ON and release in passed and release not in life.leases and not life.ends.get(run, [])
        )
        if continues and (job, run, number + 1) not in requested:
            findings.fault("request-missing", job, f"release {number + 1} was not requested", close)
        failed = next((r for r in closes if r.fact == "JobFailed"), None)
        if any(end.fact == "JobSucceeded" for end in life.ends.get(run, [])):
            failed = None  # the success counts; the contradiction is a separate fault
        if failed is not None and release not in with_dead_letter and scope.is_subject(failed):
            findings.fault("dead-letter-missing", job, f"no dead letter of release {number}", failed)


def letters_follow(life: Life, findings: Findings) -> None:
    """Check that each dead letter belongs to one failure.

    A dead letter or a request may be in the log twice with the same event_id; this is only a note.
    """
    for letters in by_release(life.letters):
        if life.whole and life.scope.is_subject(letters[0]):
            failed = any(r.fact == "JobFailed" and r.release == letters[0].release for r in life.lifecycle)
            if not failed:
                findings.fault("dead-letter-without-failure", life.job_id, "no JobFailed of this release", letters[0])
        _check_event_ids(letters, "dead-letter-twice", "derived-again", findings)
    for requests in by_release(r for r in life.coordination if r.fact == "ReleaseRequested"):
        if len(requests) > 1:
            findings.note("derived-again")


def work_stands_once(life: Life, findings: Findings) -> None:
    """Check that a release has one work record.

    The record may be in the log twice with the same event_id. This is only a note, because workers drop the second
    record.
    """
    for records in by_release(r for r in life.work if belongs(r)):
        _check_event_ids(records, "work-twice", "work-again", findings)


def _check_event_ids(records: Sequence[Record], fault: str, note: str, findings: Findings) -> None:
    if len(records) < 2:
        return
    first, *others = records
    different = [r for r in others if r.head["event_id"] != first.head["event_id"]]
    if different:
        text = f"release {first.head['release']} has records with the event_id {first.head['event_id']} and with others"
        findings.fault(fault, first.head["job_id"], text, *in_order([first, *different]))
    else:
        findings.note(note)


def by_release(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Return the records of each release, in the order of their positions."""
    ordered = sorted(records, key=lambda r: (r.release, r.place))
    return (list(group) for _, group in groupby(ordered, key=lambda r: r.release))


def belongs(record: Record) -> bool:
    """Return whether a record on a work topic hands over a job to workers.

    A fact of a later version of Jobledger, which is not known here, may do so.
    """
    if record.fact == "JobSubmitted":
        return record.body["delay_ms"] is None and record.body["due_at"] is None
    return record.fact is not None and record.fact not in NO_WORK


def committed_is_closed(life: Life, findings: Findings) -> None:
    """Check that every work record below a committed offset has a closing fact, or a job lease.

    This fact must be in the lifecycle partition with the number of the work record's partition.
    """
    scope = life.scope
    for record in life.work:
        if not scope.passed(record):
            findings.note("not-committed")
        elif belongs(record):
            closed = {r.partition for r in (*life.closes.get(record.release, []), *life.leases.get(record.release, []))
                      if r.topic == scope.lifecycle}  # fmt: skip
            if not closed:
                if record.at >= scope.horizon:
                    findings.fault("committed-open", life.job_id, "no fact closes this work record", record)
            elif record.partition not in closed:
                text = f"closed in partition {', '.join(map(str, sorted(closed)))} of {scope.lifecycle}"
                findings.fault("closed-elsewhere", life.job_id, text, record, *life.closes.get(record.release, []))


RULES: tuple[Rule, ...] = (
    has_ended,
    ends_agree,
    starts_end,
    not_early,
    in_place_waits,
    causes_come_first,
    what_follows_is_there,
    letters_follow,
    work_stands_once,
    committed_is_closed,
)


# -- records that are no events or are on a wrong topic ---------------------------------------------------------------


def judge_place(records: Sequence[Record], scope: Scope, findings: Findings) -> None:
    """Compare the record at one position with the dead letters that report this record as rejected.

    ``records``: at most one record that is not an event, or that is on a work topic and does not hand over a job; and
    each `RecordRejected` that names this position.
    """
    letters = in_order(r for r in records if r.fact == "RecordRejected")
    bad = next((r for r in records if r.fact != "RecordRejected"), None)
    if bad is not None and bad.fact is not None and not bad.head["job_id"]:
        findings.note("no-job-id")
        return
    if letters:
        findings.note("rejected")
    for letter in letters:
        body = letter.body
        partition = (body["topic"], body["partition"])
        if bad is None:
            low, bound = scope.lowest.get(partition), scope.bound.get(partition)
            if low is not None and bound is not None and low <= body["offset"] < bound:
                text = f"{body['topic']}[{body['partition']}]@{body['offset']} is a valid record"
                findings.fault("rejected-good", "", text, letter)
        elif not _kept_whole(bad.raw, body):
            findings.fault(
                "rejected-altered", "", f"the dead letter does not have the bytes of {bad.position}", letter, bad
            )
    if bad is None or letters:
        return
    if scope.is_work(bad):
        if bad.fact is not None and scope.passed(bad):
            findings.fault("committed-misplaced", bad.head["job_id"], f"{bad.fact} is not a work record", bad)
        elif bad.fact is None and scope.passed(bad):
            findings.fault("unreadable-lost", "", bad.why, bad)
    elif bad.topic in (scope.lifecycle, scope.coordination) and bad.at >= scope.horizon and scope.finished:
        findings.fault("unreadable-lost", "", bad.why, bad)


def _kept_whole(raw: bytes | None, body: Mapping[str, Any]) -> bool:
    """Return whether a dead letter contains the record's bytes.

    For a record that is too large, the beginning of the bytes is enough, if the dead letter's error says how many bytes
    of how many are kept.
    """
    kept = body["raw_value"]
    if kept == raw:
        return True
    if kept is None or raw is None:
        return False
    said = _KEPT.search(str(body["error"]))
    return said is not None and raw.startswith(kept) and (int(said[1]), int(said[2])) == (len(kept), len(raw))
