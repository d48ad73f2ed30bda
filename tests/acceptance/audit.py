"""The product's audit (`jobledger.audit`), together with what only a test knows.

A test knows which submissions were acknowledged and when it paused a process or stopped the broker. It also knows which
code really ran, because the tests' tasks write a side log. A worker that was paused beyond its session may have running
jobs that another worker runs again, so both outcomes may be in the log. Such faults are excused, and no others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobledger.audit import order, rules
from jobledger.audit.findings import Finding, Findings
from jobledger.audit.order import Turn
from jobledger.audit.records import Record, show
from jobledger.audit.rules import Scope
from jobledger.audit.spill import keys_of
from tests.acceptance.promises import BROKEN_BY
from tests.acceptance.rawlog import Log, by_time

#: A worker that is paused for a shorter time, in ms, has not lost its partitions: its session is 6 s, and the group has
#: heard of the worker in the last three of them.
PAUSE_MS = 3_000
#: Milliseconds in which workers may reconnect after an outage: the client's longest pause between two attempts.
BACK_MS = 10_000
#: Milliseconds after a fault in which its effects may appear in the log.
WAKE_MS = 3_000

#: Faults that the product cannot see, because it does not know which submissions were acknowledged, and which code
#: really ran.
ONLY_HERE = {
    "accepted-lost": "accepted, but its submission is not in the log",
    "run-after-end": "run after its end was in the log",
    "success-without-run": "succeeded without having been run",
}


class Window(NamedTuple):
    """A time in which a process of this role was paused (from SIGSTOP to SIGCONT), or the broker was unavailable; in
    ms.

    ``pid``: the paused process.
    """

    role: str
    begin: int
    end: int
    pid: int = 0


class Execution(NamedTuple):
    """One real run of a task's code, from the side log. ``ended`` is None if the code was killed. Times are in ms."""

    job_id: str
    run: int
    release: int
    attempt: int
    began: int
    ended: int | None
    pid: int = 0


class Pauses:
    """What workers had started when they were paused. None of it had ended before the pause, so it may run again."""

    def __init__(self, log: Log, windows: Sequence[Window]) -> None:
        long = [w for w in windows if w.end - w.begin >= PAUSE_MS]
        self._windows = [w for w in long if w.role == "worker"]
        #: Windows in which workers had no connection to the broker. Records in their Kafka clients are sent afterwards.
        self._outages = [w for w in long if w.role == "broker"]
        self._begun: dict[tuple[tuple[str, int, int], str], float] = {}
        for record in log.of("lifecycle"):
            if record.fact == "JobStarted":
                # The time of the worker's clock, because a paused worker's Kafka client sends queued records only
                # later.
                self._begun.setdefault((record.release, record.head["source"]), int(record.head["occurred_at"]) / 1000)

    def ended(self, end: Record) -> bool:
        """Return whether a worker wrote this closing fact after a pause or an outage, about a job that it had started
        before."""
        source = str(end.head["source"])
        begun = self._begun.get((end.release, source))
        return begun is not None and (
            any(source.endswith(f":{w.pid}") and begun <= w.end and w.begin <= end.at for w in self._windows)
            or any(begun <= w.end and w.begin <= end.at <= w.end + BACK_MS for w in self._outages)
        )

    def started(self, start: Record) -> bool:
        """Return whether a worker had started this job before a pause. Its Kafka client sends queued records when the
        worker continues."""
        source, at = str(start.head["source"]), int(start.head["occurred_at"]) / 1000
        return any(source.endswith(f":{w.pid}") and at <= w.end and w.begin <= start.at for w in self._windows)


class Audit(Findings):
    """The product's findings without those that the test's knowledge excuses.

    ``product``: the number of all findings of the product, by kind, as `jobledger audit` must report them. ``noted``:
    the product's notes, and the number of excused findings.
    """

    def __init__(self, log: Log, frozen: Sequence[Window], executions: Sequence[Execution]) -> None:
        super().__init__(most=10)
        self.product: Counter[str] = Counter()
        self.noted: Counter[str] = self.notes
        self._frozen, self._pauses = frozen, Pauses(log, frozen)
        self._closes: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
        for record in log.of("lifecycle"):
            if record.fact in rules.TERMINAL or (record.fact in rules.PASSING_ON and not rules.in_place(record)):
                self._closes[record.release].append(record)
        self._executions = executions
        self._ran_until: dict[tuple[str, int, int], int] = {}  # when the last run of each release began
        for each in executions:
            release = (each.job_id, each.run, each.release)
            self._ran_until[release] = max(each.began, self._ran_until.get(release, 0))

    @property
    def good(self) -> bool:
        """Return whether no promise was broken."""
        return not self.counts

    @property
    def violations(self) -> Mapping[str, list[str]]:
        """Return examples of each kind."""
        return {kind: list(map(str, several)) for kind, several in self.faults.items()}

    def __str__(self) -> str:
        lines = [f"{kind}: {n}, e.g. " + "; ".join(self.violations[kind][:3]) for kind, n in self.counts.items()]
        return "\n".join([*lines, f"within the limits: {dict(self.noted)}"])

    def fault(self, kind: str, job_id: str, detail: str, *records: Record) -> None:
        """Take a finding of the product: count it, and keep it unless it is excused."""
        self.product[kind] += 1
        excuse = None
        if kind == "started-after-end":
            excuse = self._start_excused(*records)
        elif kind == "ends-contradict" and (
            within(self._frozen, *(r.at for r in records)) or any(map(self._pauses.ended, records))
        ):
            excuse = "ends that contradict each other, of a paused process or while the broker was away"
        if excuse is None:
            super().fault(kind, job_id, detail, *records)
        else:
            self.noted[excuse] += 1

    def broken(self, kind: str, job_id: str, detail: str, *records: Record) -> None:
        """Take a finding that only the test can make."""
        self.counts[kind] += 1
        if len(self.faults[kind]) < self.most:
            self.faults[kind].append(Finding(kind, job_id, detail, records))

    def _start_excused(self, start: Record, end: Record) -> str | None:
        release = start.release
        if self._executions and self._ran_until.get(release, 0) < end.at:
            # A suspect's start is recorded before its code runs, and the worker may lose the partition in between.
            return "said to start after its end, and not run"
        if self._pauses.started(start):
            return "said to start by a paused process, when it woke"
        # The paused process's run succeeded, and the second run of the same release may have been retried.
        retried = end.release != release
        earlier = [
            closed
            for closed in self._closes.get(end.release, ())
            if (closed.at, closed.place) < (start.at, start.place) and (not retried or closed.fact in rules.TERMINAL)
        ]
        if earlier and all(map(self._pauses.ended, earlier)):
            return "started again, after an end that a paused process wrote"
        return None

    def runs(self, lifecycle: Iterable[Record]) -> None:
        """Compare the side log with the log."""
        if not self._executions:
            return
        terminals: dict[tuple[str, int], Record] = {}
        facts = sorted(lifecycle, key=lambda r: (r.at, r.partition, r.offset))
        for record in facts:
            if record.fact in rules.TERMINAL:
                terminals.setdefault(record.release[:2], record)
        runs: Counter[tuple[str, int, int]] = Counter()
        for execution in self._executions:
            release = (execution.job_id, execution.run, execution.release)
            runs[release] += 1
            done = terminals.get(release[:2])
            ends = (*self._closes.get(release, ()), *([done] if done is not None else []))
            early = [r for r in ends if r.at < execution.began]
            if not early:
                continue
            if all(map(self._pauses.ended, early)):
                self.noted["run again, after an end that a paused process wrote"] += 1
            else:
                self.broken("run-after-end", execution.job_id, f"{execution} after {show(early[0])}", early[0])
        self.noted["releases run more than once"] = sum(1 for n in runs.values() if n > 1)
        for record in facts:
            if record.fact == "JobSucceeded" and not runs[record.release]:
                self.broken("success-without-run", record.head["job_id"], "no run of it is known", record)


def audit(
    log: Log,
    accepted: Collection[str] = (),
    frozen: Sequence[Window] = (),
    executions: Sequence[Execution] = (),
    finished: bool = True,
) -> Audit:
    """Check a log against the promises. ``accepted``: ids of jobs whose submission was acknowledged. ``finished``:
    whether every job must have ended."""
    found = Audit(log, frozen, executions)
    jobs, places = grouped(log)
    lowest = dict.fromkeys(((r.topic, r.partition) for r in log.records), 0)
    ends: dict[tuple[str, int], int] = {}
    for record in log.records:
        place = (record.topic, record.partition)
        ends[place] = max(record.offset + 1, ends.get(place, 0))
    scope = Scope(log.namespace, log.committed, ends, lowest, finished=finished)
    turns: list[Turn] = []
    for records in jobs.values():
        turns += order.turns(rules.judge_job(records, scope, found))
    order.in_turn(sorted(turns, key=lambda turn: (turn.line, turn.work.offset)), found)
    for records in places.values():
        rules.judge_place(records, scope, found)
    submitted = {r.head["job_id"] for r in log.records if r.fact == "JobSubmitted"}
    for job in sorted(set(accepted) - submitted):
        found.broken("accepted-lost", job, "its submission was acknowledged")
    found.runs(log.of("lifecycle"))
    return found


def hold(log: Log, frozen: Sequence[Window] = (), *, finished: bool = True) -> Audit:
    """Raise `PromiseBroken` with the promise that the log breaks, if it breaks one. ``finished``: whether every job
    must have ended."""
    found = audit(log, frozen=frozen, finished=finished)
    for kind, number in found.counts.items():
        first = found.violations[kind][0].partition(":")[0]
        lives = [f"{show(r)} {dict(r.body)}" for r in by_time(log) if r.head.get("job_id") == first]
        BROKEN_BY[kind].hold(False, "\n".join([f"{kind}: {number}", *found.violations[kind], *lives]))
    return found


def grouped(log: Log) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return the records of each job, and the records that are judged by their position, grouped as in the product's
    audit."""
    jobs: dict[str, list[Record]] = defaultdict(list)
    places: dict[str, list[Record]] = defaultdict(list)
    judged = {f"{log.namespace}.{name}" for name in ("lifecycle", "coordination", "dead-letter")}
    for record in log.records:
        if record.topic not in judged and not record.topic.startswith(f"{log.namespace}.jobs."):
            continue
        for key in keys_of(record, f"{log.namespace}.jobs."):
            (places if key.startswith("\0") else jobs)[key].append(record)
    return jobs, places


def within(windows: Sequence[Window], *times: int) -> bool:
    """Return whether all of these times are in one of the windows."""
    return any(all(w.begin <= t <= w.end + WAKE_MS for t in times) for w in windows)


def read_executions(path: str | Path) -> list[Execution]:
    """Read the side log that the tests' tasks write: one line ``B|E job run release attempt ms pid`` for each begin and
    end."""
    begun: dict[tuple[str, ...], list[Execution]] = defaultdict(list)
    out: list[Execution] = []
    source = Path(path)
    text = source.read_text() if source.exists() else ""
    for line in text.rpartition("\n")[0].splitlines():  # the last line may be incomplete
        kind, job, run, release, attempt, at, pid = line.split()
        mark = (job, run, release, attempt, pid)
        if kind == "B":
            begun[mark].append(Execution(job, int(run), int(release), int(attempt), int(at), None, int(pid)))
        else:
            out.append(begun[mark].pop()._replace(ended=int(at)))
    return sorted([*out, *(e for left in begun.values() for e in left)], key=lambda e: e.began)
