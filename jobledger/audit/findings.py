"""What an audit can find: every fault and every note by its code, and how they are counted. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jobledger.audit.records import Record

#: Each fault by its code, which JSON has and scripts test.
FAULTS: Mapping[str, str] = {
    "not-ended": "a job has no end",
    "submission-missing": "facts of a job whose submission is not in the log",
    "ends-contradict": "two ends of one run that contradict each other",
    "started-after-end": "a job was started after its end was in the log",
    "released-early": "a job was released before its time",
    "started-early": "a job was started before its time",
    "retried-early": "the next attempt in place began before its delay was over",
    "release-without-request": "a job was released, and the log has no request for it",
    "due-time-without-request": "a release has a due time that no request in the log has",
    "request-before-cause": "a release was requested before its cause was in the log",
    "request-missing": "an attempt is to be followed by another, and nothing requested it",
    "work-twice": "two different work records of one release",
    "committed-open": "a work record is committed, and no fact closes it",
    "committed-misplaced": "a record that hands over no job is committed on a work topic, and was not rejected",
    "closed-elsewhere": "a work record was closed in another partition than its own",
    "dead-letter-missing": "a job failed, and has no dead letter",
    "dead-letter-without-failure": "a dead letter of a job that did not fail",
    "dead-letter-twice": "two different dead letters of one failure",
    "unreadable-lost": "a record that cannot be read was committed, and is not in the dead letters",
    "rejected-altered": "a rejected record is kept with other bytes than it has",
    "rejected-good": "a good record was rejected",
    "row-missing": "the status table has no row of a job",
    "row-differs": "a row of the status table differs from the log",
    "row-unknown": "the status table has a job of which the log has no record",
}

#: Each note by its code.
NOTES: Mapping[str, str] = {
    "open": "jobs without an end",
    "ended-again": "runs whose end stands more than once",
    "closed-again": "releases that were closed more than once",
    "closed-differently": "releases that were closed in different ways",
    "started-again": "releases that were started more than once",
    "work-again": "work records that stand more than once, with the same event_id",
    "derived-again": "requests and dead letters that stand more than once, with the same event_id",
    "overdue": "releases that the watchdog requested",
    "rejected": "records that were rejected",
    "not-committed": "work records at or above a committed offset",
    "writer-time": "records with their writer's time (message.timestamp.type=CreateTime), not judged by time",
    "submission-trimmed": "jobs that begin before the log does, judged in part",
    "no-job-id": "records without a job_id",
    "rows-behind": "jobs that the status table has not read to the end, not compared",
}


class Finding(NamedTuple):
    """One fault. ``records``: where it stands, the one that is wrong first."""

    kind: str
    job_id: str
    detail: str
    records: tuple[Record, ...]

    @property
    def positions(self) -> list[str]:
        """The places, each as ``topic[partition]@offset``."""
        return [record.position for record in self.records]

    def __str__(self) -> str:
        where = ", ".join(self.positions)
        return f"{self.job_id or 'no job'}: {self.detail}" + (f" ({where})" if where else "")


class Findings:
    """What was found. ``counts``: faults by kind, of which the first ``most`` of each kind are kept in ``faults``;
    ``notes``: counts by kind."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.faults: dict[str, list[Finding]] = defaultdict(list)

    def fault(self, kind: str, job_id: str, detail: str, *records: Record) -> None:
        """One more fault."""
        assert kind in FAULTS
        self.counts[kind] += 1
        if len(self.faults[kind]) < self.most:
            self.faults[kind].append(Finding(kind, job_id, detail, records))

    def note(self, kind: str, number: int = 1) -> None:
        """So many more of what is within the limits."""
        assert kind in NOTES
        self.notes[kind] += number
