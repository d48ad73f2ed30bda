"""Runs one audit of one namespace.

An audit reads the log once, groups the records by job, checks each job, and compares the rows of the status table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jobledger.audit import order, rules
from jobledger.audit.findings import FAULTS, Findings
from jobledger.audit.order import Turn
from jobledger.audit.records import Record
from jobledger.audit.rules import Life, Scope
from jobledger.audit.source import Source
from jobledger.audit.spill import PLACE, Spill
from jobledger.audit.table import Row, StatusFile, differences, feeds, final, past
from jobledger.config import Settings
from jobledger.kafka.topic_names import Names

Tell = Callable[[int, int], None]
#: Groups between two updates of the progress bar.
TELL_EVERY = 1_000


class Place(msgspec.Struct, frozen=True):
    """One fault: its job, a description, and the positions of its records, with the wrong record first."""

    job_id: str
    detail: str
    positions: list[str]


class Fault(msgspec.Struct, frozen=True):
    """All faults of one kind.

    ``kind``: the code of the fault. ``says``: its description. ``count``: the number of faults. ``first``: the first
    faults, at most `Wanted.most`.
    """

    kind: str
    says: str
    count: int
    first: list[Place]


class AuditReport(msgspec.Struct, frozen=True):
    """The result of an audit.

    ``clean``: there is no fault. ``jobs``: number of jobs of which a record that affects the job's state was read.
    ``open``: number of jobs without an outcome. ``records``: number of records that were read. ``rows``: number of
    compared rows of the status table; None: no table was given. ``notes``: number of notes by kind. ``not_asked``: work
    topics whose committed offsets this user may not read, so that the rules about commits were not applied to them.
    ``complete_from_ms``: the append time from which on no record of any partition is missing, in ms; 0: all partitions
    begin with their first record. ``seconds``: the duration of the audit.
    """

    namespace: str
    clean: bool
    jobs: int
    open: int
    records: int
    rows: int | None
    faults: list[Fault]
    notes: dict[str, int]
    not_asked: list[str]
    complete_from_ms: int
    seconds: float


@dataclass(frozen=True)
class Wanted:
    """The part of the log to check.

    ``queues``: check only these queues; if empty, all queues. ``since_ms``: read only records that were appended at
    this time (ms) or later. ``finished``, ``open_before``: see `Scope`. ``most``: number of faults of each kind that
    are kept.
    """

    queues: Collection[str] = ()
    since_ms: int | None = None
    finished: bool = False
    open_before: int | None = None
    most: int = 100


def audit(
    names: Names,
    settings: Settings,
    wanted: Wanted,
    folder: Path,
    table: Path | None = None,
    tell: Tell | None = None,
) -> AuditReport:
    """Check the log of a namespace and return the report. The audit commits nothing and writes to no topic.

    ``folder``: the folder for scratch files, which take some hundred bytes for each record. ``table``: a SQLite file
    with the status table as it was before the audit began. ``tell``: called with the progress and its total. Raises
    `TopicMissing`, `BrokerUnavailable`, `AccessDenied`, `LogTrimmed`.
    """
    began = time.monotonic()
    prefix = names.jobs("")
    spill = Spill(folder)
    try:
        with Source(settings, names, queues=wanted.queues, since_ms=wanted.since_ms) as source:
            read_progress = None if tell is None else lambda done, total: tell(done, 2 * total)
            for record in source.records(read_progress):
                spill.add(record, prefix)
        span = source.span
        scope = Scope(
            names.namespace,
            span.committed,
            span.bound,
            span.low,
            span.horizon,
            wanted.finished,
            wanted.open_before,
        )
        status_file = None if table is None else StatusFile(table)
        judge = Judge(scope, Findings(wanted.most), status_file, wanted.queues, spill.keep)
        judge.all(_with_progress(spill.groups(), spill.count, tell))
        order.in_turn(spill.turns(), judge.found)
    finally:
        spill.close()
    findings = judge.found
    return AuditReport(
        namespace=names.namespace,
        clean=not findings.counts,
        jobs=judge.jobs,
        open=findings.notes.pop("open", 0),
        records=spill.count,
        rows=judge.rows if table is not None else None,
        faults=faults_of(findings),
        notes={kind: number for kind, number in findings.notes.items() if number},
        not_asked=sorted(source.refused),
        complete_from_ms=span.horizon,
        seconds=time.monotonic() - began,
    )


def faults_of(findings: Findings) -> list[Fault]:
    """Return every kind of fault that was found, in the order of `FAULTS`."""
    return [
        Fault(
            kind, says, findings.counts[kind], [Place(f.job_id, f.detail, f.positions) for f in findings.faults[kind]]
        )
        for kind, says in FAULTS.items()
        if findings.counts[kind]
    ]


def _with_progress(
    groups: Iterator[tuple[str, list[Record]]], count: int, tell: Tell | None
) -> Iterator[tuple[str, list[Record]]]:
    done = 0
    for number, (key, records) in enumerate(groups):
        yield key, records
        done += len(records)
        if tell is not None and number % TELL_EVERY == 0:
            tell(min(count + done, 2 * count), 2 * count)


class Judge:
    """Checks groups of records, and compares the rows of their jobs.

    ``jobs``, ``rows``: the numbers for the `AuditReport`. ``keep``: receives the turns of keyed jobs, which are checked
    after all groups.
    """

    def __init__(
        self,
        scope: Scope,
        found: Findings,
        table: StatusFile | None = None,
        queues: Collection[str] = (),
        keep: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        self.scope, self.found, self.jobs, self.rows = scope, found, 0, 0
        self._table, self._queues, self._keep = table, frozenset(queues), keep
        self._next_offsets = {} if table is None else table.offsets()
        self._limits = {} if table is None else table.removed()

    def all(self, groups: Iterator[tuple[str, list[Record]]]) -> None:
        """Check every group, and close the table.

        The groups must be sorted by the bytes of their keys, as the rows of the table are.
        """
        table = self._table
        rows = iter(()) if table is None else table.rows()
        row = next(rows, None)
        for key, records in groups:
            if key.startswith(PLACE):
                rules.judge_place(records, self.scope, self.found)
                continue
            while row is not None and row.job_id.encode() < key.encode():
                self._unknown(row)
                row = next(rows, None)
            job_row = row if row is not None and row.job_id == key else None
            self._job(records, job_row)
            if job_row is not None:
                row = next(rows, None)
        while row is not None:
            self._unknown(row)
            row = next(rows, None)
        if table is not None:
            table.close()

    def _job(self, records: Sequence[Record], row: Row | None) -> None:
        life = rules.judge_job(records, self.scope, self.found)
        for turn in order.turns(life):
            self._keep(turn)
        self.jobs += any(map(feeds, records))
        if self._table is not None and life.whole:
            self._compare(life, row)

    def _compare(self, life: Life, row: Row | None) -> None:
        """Compare a job's row with its records, if the status table has read all of these records."""
        state_facts = [r for r in life.facts if feeds(r)]
        if not state_facts:
            return
        if any(r.offset >= self._next_offsets.get((r.topic, r.partition), 0) for r in state_facts):
            self.found.note("rows-behind")
            return
        wrong = [] if row is None else differences(life.job_id, final(state_facts), row.final)
        if (row is None or wrong) and past(state_facts, self._limits):
            self.found.note("rows-removed")
            return
        self.rows += 1
        if row is None:
            self.found.fault(
                "row-missing", life.job_id, "the status table has read all records of this job", *state_facts[-1:]
            )
            return
        if wrong:
            text = "; ".join(f"{d.field}: log {d.log!r}, table {d.table!r}" for d in wrong)
            self.found.fault("row-differs", life.job_id, text, *state_facts[-1:])

    def _unknown(self, row: Row) -> None:
        """Report a row without a record as a fault, unless its records may have been trimmed or not read."""
        if row.carried or row.submitted_ms < self.scope.horizon:
            return
        if self._queues and row.final.queue not in self._queues:
            return
        self.rows += 1
        self.found.fault("row-unknown", row.job_id, f"the status table has the state {row.final.state}", *())
