"""Defines every fault and every note that an audit can report, and collects and counts them. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jobledger.audit.records import Record

#: The description of each fault by its code. The JSON output has the codes, and scripts test them.
FAULTS: Mapping[str, str] = {
    "not-ended": "a job has no outcome",
    "submission-missing": "the log has facts of a job, but not its submission",
    "ends-contradict": "one run has two outcomes that contradict each other",
    "started-after-end": "a release was started after the log had closed it, or after an outcome of its run",
    "released-early": "a job was released before its time",
    "started-early": "a job was started before its time",
    "retried-early": "a keyed job's next attempt in place began before its delay was over",
    "key-order": "a job was started before the log had a closing fact of an earlier job of the same key",
    "release-without-request": "a job was released, but the log has no request for this release",
    "due-time-without-request": "a release has a due time that no request in the log has",
    "request-before-cause": "a release was requested before the JobRetried or JobSnoozed that causes it was in the log",
    "request-missing": "another attempt must follow, but the log has no request for its release",
    "work-twice": "one release has two different work records",
    "committed-open": "a work record is committed, but no fact closes it",
    "committed-misplaced": "a record that is not a work record was committed on a work topic, and was not rejected",
    "closed-elsewhere": "the fact that closes a work record is in a lifecycle partition with another number",
    "dead-letter-missing": "a job failed, but has no dead letter",
    "dead-letter-without-failure": "a job has a dead letter, but did not fail",
    "dead-letter-twice": "one failure has two different dead letters",
    "unreadable-lost": "a record that cannot be read was committed, but is not in the dead letters",
    "rejected-altered": "the dead letter of a rejected record has other bytes than the record",
    "rejected-good": "a valid record was rejected",
    "row-missing": "the status table has no row of a job",
    "row-differs": "a row of the status table differs from the log",
    "row-unknown": "the status table has a job of which the log has no record",
}

#: The description of each note by its code.
NOTES: Mapping[str, str] = {
    "open": "jobs without an outcome",
    "ended-again": "runs with more than one outcome in the log",
    "closed-again": "releases that were closed more than once",
    "closed-differently": "releases that were closed by facts of different kinds",
    "started-again": "releases that were started more than once",
    "work-again": "work records that are in the log more than once, with the same event_id",
    "derived-again": "requests and dead letters that are in the log more than once, with the same event_id",
    "overdue": "overdue releases about which the materializer's watchdog asked the coordinator",
    "rejected": "records that were rejected",
    "not-committed": "work records that are not committed yet",
    "writer-time": "records with their writer's time (message.timestamp.type=CreateTime); their times were not checked",
    "submission-trimmed": "jobs whose first records were trimmed or not read; only a part of their records was checked",
    "no-job-id": "records without a job_id",
    "rows-behind": "jobs of which the status table has not read all records; their rows were not compared",
    "rows-removed": "jobs whose rows were removed from the status table after their end; they were not compared",
}


class Finding(NamedTuple):
    """One fault. ``records``: the records that show the fault, the wrong record first."""

    kind: str
    job_id: str
    detail: str
    records: tuple[Record, ...]

    @property
    def positions(self) -> list[str]:
        """The records' positions, each as ``topic[partition]@offset``."""
        return [record.position for record in self.records]

    def __str__(self) -> str:
        where = ", ".join(self.positions)
        return f"{self.job_id or 'no job'}: {self.detail}" + (f" ({where})" if where else "")


class Findings:
    """The faults and notes of one audit.

    ``counts``: the number of faults of each kind. ``faults``: the first ``most`` faults of each kind. ``notes``: the
    number of notes of each kind. A kind is a code of `FAULTS` or `NOTES`.
    """

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.faults: dict[str, list[Finding]] = defaultdict(list)

    def fault(self, kind: str, job_id: str, detail: str, *records: Record) -> None:
        """Add one fault."""
        assert kind in FAULTS
        self.counts[kind] += 1
        if len(self.faults[kind]) < self.most:
            self.faults[kind].append(Finding(kind, job_id, detail, records))

    def note(self, kind: str, number: int = 1) -> None:
        """Add ``number`` notes of one kind."""
        assert kind in NOTES
        self.notes[kind] += number
