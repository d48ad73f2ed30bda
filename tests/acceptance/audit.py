"""What a log must show after any faults: all ended, nothing early, nothing run again, nothing passed over.

Imports nothing of Jobledger. Part of `independent`; every check names what it found, and can fail.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.acceptance.fold import ENDED, TERMINAL_RANK, fold
from tests.acceptance.rawlog import Log, Record, show

CLOSING = {*TERMINAL_RANK, "JobRetried", "JobSnoozed"}
#: Facts that do not belong on a work topic.
NO_WORK = {
    *CLOSING,
    "JobStarted",
    "JobProgressed",
    "ReleaseRequested",
    "ReleaseDecided",
    "ReleaseOverdue",
    "DeadLettered",
    "RecordRejected",
}
#: Examples that are kept of each kind of violation.
EXAMPLES = 10
#: A worker that is paused for less than that has not lost its partitions: its session is 6 s, and it was heard of in the
#: last three of them.
PAUSE_MS = 3_000
#: How long after a fault its traces may appear in the log, milliseconds.
WAKE_MS = 3_000


class Window(NamedTuple):
    """A time in which a process of this role was paused (SIGSTOP to SIGCONT) or the broker was away, ms.

    ``pid``: of the process that was paused.
    """

    role: str
    begin: int
    end: int
    pid: int = 0


class Execution(NamedTuple):
    """One real run of a task's code, by its own account. ``ended`` None: it was killed. Times in ms."""

    job_id: str
    run: int
    release: int
    attempt: int
    began: int
    ended: int | None
    pid: int = 0


@dataclass
class Audit:
    """What the log shows. ``violations``: examples by kind, ``counts``: how many of each;
    ``noted``: within the limits."""

    counts: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def broken(self, kind: str, example: str) -> None:
        """Count a violation, and keep it if it is among the first."""
        self.counts[kind] += 1
        if len(self.violations[kind]) < EXAMPLES:
            self.violations[kind].append(example)

    @property
    def good(self) -> bool:
        """Whether nothing was broken."""
        return not self.counts

    def __str__(self) -> str:
        lines = [f"{kind}: {n}, e.g. " + "; ".join(self.violations[kind][:3]) for kind, n in self.counts.items()]
        return "\n".join([*lines, f"within the limits: {dict(self.noted)}"])


def audit(
    log: Log,
    accepted: Collection[str] = (),
    frozen: Sequence[Window] = (),
    executions: Sequence[Execution] = (),
) -> Audit:
    """Hold the log against the promises. ``accepted``: ids of jobs whose submission was acknowledged."""
    found = Audit()
    _all_ended(log, accepted, found)
    _never_early(log, found)
    _no_rerun(log, frozen, executions, found)
    _causes_first(log, found)
    _closed_below_base(log, found)
    _rejects_kept(log, found)
    _dead_letters(log, found)
    return found


def _all_ended(log: Log, accepted: Collection[str], found: Audit) -> None:
    submitted = {r.head["job_id"] for r in log.records if r.fact == "JobSubmitted"}
    for job in sorted(set(accepted) - submitted):
        found.broken("accepted, but its submission is not in the log", job)
    states = fold(log.records)
    for job in sorted(submitted):
        if states[job].state not in ENDED:
            found.broken("not ended", f"{job} is {states[job].state}, release {states[job].release}")
    for job in sorted(set(states) - submitted):
        found.broken("facts of a job that nobody submitted", job)


def _due(at_ms: int, body: Mapping[str, Any]) -> int:
    """When a request is due, microseconds of the broker's clock."""
    due_at: int | None = body.get("due_at")
    return (at_ms + int(body["delay_ms"] or 0)) * 1000 if due_at is None else due_at


def _never_early(log: Log, found: Audit) -> None:
    asked: dict[tuple[str, int, int], int] = {}  # the first request counts: the coordinator takes no other
    told: dict[tuple[str, int, int], int] = {}  # what the worker's own fact says
    overdue: set[tuple[str, int, int]] = set()
    for record in sorted(log.of("coordination"), key=lambda r: r.place):
        if record.fact == "JobSubmitted":
            job, run, release = record.release
            asked.setdefault((job, run, max(release, 1)), _due(record.at, record.body))
        elif record.fact == "ReleaseRequested":
            asked.setdefault(record.release, _due(record.at, record.body))
        elif record.fact == "ReleaseOverdue":
            overdue.add(record.release)
    for record in log.of("lifecycle"):
        if record.fact in ("JobRetried", "JobSnoozed"):
            job, run, release = record.release
            due = _due(record.at, record.body)
            told[job, run, release + 1] = min(due, told.get((job, run, release + 1), due))
    let_go: Counter[tuple[str, int, int]] = Counter()
    allowed_at: dict[tuple[str, int, int], int] = {}
    for record in log.work():
        if record.fact != "JobDue":
            continue
        let_go[record.release] += 1
        causes = [asked[record.release]] if record.release in asked else []
        if record.release in told and (record.release in overdue or not causes):
            causes.append(told[record.release])
        if not causes:
            found.broken("let go, but nothing asked for it", show(record))
            continue
        allowed = allowed_at[record.release] = min(causes)
        if record.at * 1000 < allowed:
            found.broken("let go early", f"{show(record)}: {(allowed - record.at * 1000) / 1000:g} ms")
        if record.body["due_at"] not in causes and record.release not in overdue:
            found.broken("a due time that nobody asked for", f"{show(record)}: {record.body['due_at']} of {causes}")
    found.noted["released more than once"] = sum(1 for n in let_go.values() if n > 1)
    found.noted["asked for by the watchdog"] = len(overdue)
    for record in log.of("lifecycle"):
        due_us = allowed_at.get(record.release) if record.fact == "JobStarted" else None
        if due_us is not None and record.at * 1000 < due_us:
            found.broken("started early", show(record))


def _within(windows: Sequence[Window], *times: int) -> bool:
    return any(all(w.begin <= t <= w.end + WAKE_MS for t in times) for w in windows)


class _Pauses:
    """What workers had begun when they were paused: none of it had ended before the pause, so it may run again."""

    def __init__(self, log: Log, windows: Sequence[Window]) -> None:
        self._windows = [w for w in windows if w.role == "worker" and w.end - w.begin >= PAUSE_MS]
        self._begun: dict[tuple[tuple[str, int, int], str], float] = {}
        for record in log.of("lifecycle"):
            if record.fact == "JobStarted":
                # By the worker's clock: what lies in its Kafka client is sent on waking.
                self._begun.setdefault((record.release, record.head["source"]), int(record.head["occurred_at"]) / 1000)

    def ended(self, end: Record) -> bool:
        """Whether a worker wrote this end after a pause, of a job that it had begun before."""
        source = str(end.head["source"])
        begun = self._begun.get((end.release, source))
        return begun is not None and any(
            source.endswith(f":{w.pid}") and begun <= w.end and w.begin <= end.at for w in self._windows
        )

    def started(self, start: Record) -> bool:
        """Whether a worker had begun this before a pause: what lay in its Kafka client is sent on waking."""
        source, at = str(start.head["source"]), int(start.head["occurred_at"]) / 1000
        return any(source.endswith(f":{w.pid}") and at <= w.end and w.begin <= start.at for w in self._windows)


def _no_rerun(log: Log, frozen: Sequence[Window], executions: Sequence[Execution], found: Audit) -> None:
    pauses = _Pauses(log, frozen)
    closes: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    terminals: dict[tuple[str, int], Record] = {}
    started: dict[tuple[str, int, int], int] = Counter()
    ran_until: dict[tuple[str, int, int], int] = {}  # when the last run of a release began
    for execution in executions:
        release = (execution.job_id, execution.run, execution.release)
        ran_until[release] = max(execution.began, ran_until.get(release, 0))
    facts = sorted(log.of("lifecycle"), key=lambda r: (r.at, r.partition, r.offset))
    for record in facts:
        if record.fact == "JobStarted":
            started[record.release] += 1
            done = terminals.get(record.release[:2]) or next(iter(closes[record.release]), None)
            if done is not None:
                if executions and ran_until.get(record.release, 0) < done.at:
                    # A suspect's start is said before its code runs, and its partition may be lost in between.
                    found.noted["said to start after its end, and not run"] += 1
                elif pauses.started(record):
                    found.noted["said to start by a paused process, when it woke"] += 1
                elif done.release == record.release and all(map(pauses.ended, closes[record.release])):
                    found.noted["started again, after an end that a paused process wrote"] += 1
                else:
                    found.broken("started after its end was in the log", f"{show(record)} after {show(done)}")
        elif record.fact in CLOSING:
            closes[record.release].append(record)
            if record.fact in TERMINAL_RANK:
                terminals.setdefault(record.release[:2], record)
    found.noted["releases started more than once"] = sum(1 for n in started.values() if n > 1)
    for several in closes.values():
        if len(several) > 1:
            found.noted["closed more than once"] += 1
            if len({r.fact for r in several}) > 1:
                found.noted["closed in different ways"] += 1
            if not _within(frozen, *(r.at for r in several)):
                found.noted["closed more than once though nothing was paused"] += 1
    runs: Counter[tuple[str, int, int]] = Counter()
    for execution in executions:
        release = (execution.job_id, execution.run, execution.release)
        runs[release] += 1
        done = terminals.get(release[:2])
        early = [r for r in (*closes[release], *([done] if done is not None else [])) if r.at < execution.began]
        if early:
            if all(map(pauses.ended, early)):
                found.noted["run again, after an end that a paused process wrote"] += 1
            else:
                found.broken("run after its end was in the log", f"{execution} after {show(early[0])}")
    found.noted["releases run more than once"] = sum(1 for n in runs.values() if n > 1)
    if executions:
        for record in facts:
            if record.fact == "JobSucceeded" and not runs[record.release]:
                found.broken("succeeded without having been run", show(record))


def _causes_first(log: Log, found: Audit) -> None:
    """A worker asks for the next release once the end of this one is in the log, not before: it might die in between, and
    the next owner run the job again while its retry is under way."""
    causes: dict[tuple[str, int, int], int] = {}
    for record in log.of("lifecycle"):
        if record.fact in ("JobRetried", "JobSnoozed"):
            job, run, release = record.release
            key = (job, run, release + 1)
            causes[key] = min(record.at, causes.get(key, record.at))
    for record in log.of("coordination"):
        if record.fact == "ReleaseRequested" and record.release[2] > 1:
            cause = causes.get(record.release)
            if cause is None or cause > record.at:
                found.broken("asked for before its cause was in the log", show(record))


def _belongs(record: Record) -> bool:
    """Whether a record on a work topic hands a job to workers: a fact from the future may, as far as this knows."""
    if record.fact == "JobSubmitted":
        return record.body["delay_ms"] is None and record.body["due_at"] is None
    return record.fact is not None and record.fact not in NO_WORK


def _closed_below_base(log: Log, found: Audit) -> None:
    closed: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    rejected = {
        (r.body["topic"], r.body["partition"], r.body["offset"])
        for r in log.of("dead-letter")
        if r.fact == "RecordRejected"
    }
    for record in log.of("lifecycle"):
        if record.fact in CLOSING:
            closed[record.release].add(record.partition)
    for record in log.work():
        if record.offset >= log.committed.get((record.topic, record.partition), 0):
            continue
        if not _belongs(record):
            if record.place not in rejected:
                found.broken("passed, but neither closed nor rejected", show(record))
        elif not closed[record.release]:
            found.broken("passed, but not closed", show(record))
        elif record.partition not in closed[record.release]:
            found.broken("closed in another partition than its work record's", show(record))
    found.noted["work records at or above a committed base"] = sum(
        1 for r in log.work() if r.offset >= log.committed.get((r.topic, r.partition), 0)
    )


def _rejects_kept(log: Log, found: Audit) -> None:
    kept = {
        (r.body["topic"], r.body["partition"], r.body["offset"]): r.body["raw_value"]
        for r in log.of("dead-letter")
        if r.fact == "RecordRejected"
    }
    misplaced = (r for r in log.work() if not _belongs(r))
    rejects = {r.place: r for r in (*(r for r in log.records if r.fact is None), *misplaced)}
    for place, raw in kept.items():
        if place not in rejects:
            found.broken("rejected, but it is a good record", str(place))
        elif raw != rejects[place].raw:
            found.broken("rejected with other bytes than it has", str(place))
    found.noted["records rejected"] = len(kept)
    for record in log.records:
        acted_on = record.topic.startswith(f"{log.namespace}.jobs.") or record.topic in (
            f"{log.namespace}.lifecycle",
            f"{log.namespace}.coordination",
        )
        # Work records that nobody has passed yet are not lost.
        passed = record.offset < log.committed.get((record.topic, record.partition), sys.maxsize)
        if record.fact is None and acted_on and passed and record.place not in kept:
            found.broken("unreadable, but not rejected", show(record))


def _dead_letters(log: Log, found: Audit) -> None:
    kept = {r.release for r in log.of("dead-letter") if r.fact == "DeadLettered"}
    for record in log.of("lifecycle"):
        if record.fact == "JobFailed" and record.release not in kept:
            found.broken("failed, but not in the dead letters", show(record))


def read_executions(path: str | Path) -> list[Execution]:
    """The side log that a test's own tasks write: ``B|E job run release attempt ms pid``, a line each."""
    begun: dict[tuple[str, ...], list[Execution]] = defaultdict(list)
    out: list[Execution] = []
    source = Path(path)
    for line in source.read_text().splitlines() if source.exists() else ():
        kind, job, run, release, attempt, at, pid = line.split()
        mark = (job, run, release, attempt, pid)
        if kind == "B":
            begun[mark].append(Execution(job, int(run), int(release), int(attempt), int(at), None, int(pid)))
        else:
            out.append(begun[mark].pop()._replace(ended=int(at)))
    return sorted([*out, *(e for left in begun.values() for e in left)], key=lambda e: e.began)
