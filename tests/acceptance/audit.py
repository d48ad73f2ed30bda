"""The product's audit (`jobledger.audit`), held against what only a test knows.

A test knows which submissions were acknowledged, when it paused a process or took the broker away, and, by the side log
that its own tasks write, which code really ran. A worker that was paused beyond its session had not ended what it ran,
so another runs it again, and both ends may stand in the log: that is excused, and nothing else.
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

#: A worker that is paused for less than that has not lost its partitions: its session is 6 s, and it was heard of in the
#: last three of them.
PAUSE_MS = 3_000
#: How long after an outage workers may reconnect, milliseconds: the client's longest pause between two attempts.
BACK_MS = 10_000
#: How long after a fault its traces may appear in the log, milliseconds.
WAKE_MS = 3_000

#: Faults that the product cannot see: it knows neither who was told what, nor what code really ran.
ONLY_HERE = {
    "accepted-lost": "accepted, but its submission is not in the log",
    "run-after-end": "run after its end was in the log",
    "success-without-run": "succeeded without having been run",
}


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


class Pauses:
    """What workers had begun when they were paused: none of it had ended before the pause, so it may run again."""

    def __init__(self, log: Log, windows: Sequence[Window]) -> None:
        long = [w for w in windows if w.end - w.begin >= PAUSE_MS]
        self._windows = [w for w in long if w.role == "worker"]
        #: In which workers were cut off from the broker. What lay in their Kafka clients is sent when it is back.
        self._outages = [w for w in long if w.role == "broker"]
        self._begun: dict[tuple[tuple[str, int, int], str], float] = {}
        for record in log.of("lifecycle"):
            if record.fact == "JobStarted":
                # By the worker's clock: what lies in its Kafka client is sent on waking.
                self._begun.setdefault((record.release, record.head["source"]), int(record.head["occurred_at"]) / 1000)

    def ended(self, end: Record) -> bool:
        """Whether a worker wrote this end after a pause, or an outage, of a job that it had begun before."""
        source = str(end.head["source"])
        begun = self._begun.get((end.release, source))
        return begun is not None and (
            any(source.endswith(f":{w.pid}") and begun <= w.end and w.begin <= end.at for w in self._windows)
            or any(begun <= w.end and w.begin <= end.at <= w.end + BACK_MS for w in self._outages)
        )

    def started(self, start: Record) -> bool:
        """Whether a worker had begun this before a pause: what lay in its Kafka client is sent on waking."""
        source, at = str(start.head["source"]), int(start.head["occurred_at"]) / 1000
        return any(source.endswith(f":{w.pid}") and at <= w.end and w.begin <= start.at for w in self._windows)


class Audit(Findings):
    """The product's findings, less those that the test's own knowledge excuses.

    ``product``: all that the product found, by kind, as `jobledger audit` must tell it. ``noted``: its notes, and how
    often what was excused.
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
        self._ran_until: dict[tuple[str, int, int], int] = {}  # when the last run of a release began
        for each in executions:
            release = (each.job_id, each.run, each.release)
            self._ran_until[release] = max(each.began, self._ran_until.get(release, 0))

    @property
    def good(self) -> bool:
        """Whether nothing was broken."""
        return not self.counts

    @property
    def violations(self) -> Mapping[str, list[str]]:
        """Examples of each kind."""
        return {kind: list(map(str, several)) for kind, several in self.faults.items()}

    def __str__(self) -> str:
        lines = [f"{kind}: {n}, e.g. " + "; ".join(self.violations[kind][:3]) for kind, n in self.counts.items()]
        return "\n".join([*lines, f"within the limits: {dict(self.noted)}"])

    def fault(self, kind: str, job_id: str, detail: str, *records: Record) -> None:
        """One of the product's: counted, and kept unless it is excused."""
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
        """One that only the test can see."""
        self.counts[kind] += 1
        if len(self.faults[kind]) < self.most:
            self.faults[kind].append(Finding(kind, job_id, detail, records))

    def _start_excused(self, start: Record, end: Record) -> str | None:
        release = start.release
        if self._executions and self._ran_until.get(release, 0) < end.at:
            # A suspect's start is said before its code runs, and its partition may be lost in between.
            return "said to start after its end, and not run"
        if self._pauses.started(start):
            return "said to start by a paused process, when it woke"
        earlier = [c for c in self._closes.get(release, ()) if (c.at, c.place) < (start.at, start.place)]
        if end.release == release and earlier and all(map(self._pauses.ended, earlier)):
            return "started again, after an end that a paused process wrote"
        return None

    def runs(self, lifecycle: Iterable[Record]) -> None:
        """Hold the side log against the log."""
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
    """Hold a log against the promises. ``accepted``: ids of jobs whose submission was acknowledged. ``finished``: every job
    of it must have ended."""
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
    """Break the promise that a log breaks, if it does. ``finished``: every job of it must have ended."""
    found = audit(log, frozen=frozen, finished=finished)
    for kind, number in found.counts.items():
        first = found.violations[kind][0].partition(":")[0]
        lives = [f"{show(r)} {dict(r.body)}" for r in by_time(log) if r.head.get("job_id") == first]
        BROKEN_BY[kind].hold(False, "\n".join([f"{kind}: {number}", *found.violations[kind], *lives]))
    return found


def grouped(log: Log) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The records of each job, and those that are judged by their place, as the product's audit groups them."""
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
    """Whether all of these times lie in one of the windows."""
    return any(all(w.begin <= t <= w.end + WAKE_MS for t in times) for w in windows)


def read_executions(path: str | Path) -> list[Execution]:
    """The side log that a test's own tasks write: ``B|E job run release attempt ms pid``, a line each."""
    begun: dict[tuple[str, ...], list[Execution]] = defaultdict(list)
    out: list[Execution] = []
    source = Path(path)
    text = source.read_text() if source.exists() else ""
    for line in text.rpartition("\n")[0].splitlines():  # the last one may just be being written
        kind, job, run, release, attempt, at, pid = line.split()
        mark = (job, run, release, attempt, pid)
        if kind == "B":
            begun[mark].append(Execution(job, int(run), int(release), int(attempt), int(at), None, int(pid)))
        else:
            out.append(begun[mark].pop()._replace(ended=int(at)))
    return sorted([*out, *(e for left in begun.values() for e in left)], key=lambda e: e.began)
