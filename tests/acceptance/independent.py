"""A second opinion: reads the raw topics of a namespace, folds them its own naive way, and audits them.

Imports nothing of Jobledger: it frames and decodes the records by hand from the schema file, keeps every fact of every
job in a list, sorts, and looks. Slow and simple on purpose. Run as a script it compares the log with a SQLite status
table and says what differs; exit code 1 then, 2 if the log itself breaks a promise.

    python tests/acceptance/independent.py --bootstrap 127.0.0.1:9092 --namespace shop --status status.db --json
"""

from __future__ import annotations

import argparse
import io
import json
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import fastavro.schema
from confluent_kafka import Consumer, TopicPartition

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "schemas" / "job_event.avsc"
SINGLE_OBJECT = b"\xc3\x01"

TERMINAL_RANK = {"JobSucceeded": 0, "JobFailed": 1, "JobCancelled": 2, "JobExpired": 3}
TERMINAL_STATE = {"JobSucceeded": "succeeded", "JobFailed": "failed", "JobCancelled": "cancelled", "JobExpired": "expired"}
CLOSING = {*TERMINAL_RANK, "JobRetried", "JobSnoozed"}
ENDED = set(TERMINAL_STATE.values())
#: Examples that are kept of each kind of violation.
EXAMPLES = 10
#: How long after its SIGCONT a process that stood still may show what it did not know yet, milliseconds.
WAKE_MS = 3_000


# -- bytes ----------------------------------------------------------------------------------------------------------


def fingerprint(schema_text: str) -> bytes:
    """CRC-64-AVRO of the canonical form, little endian (Avro specification, "Schema Fingerprints")."""
    empty = 0xC15D213AA4D7A795
    table = []
    for byte in range(256):
        word = byte
        for _ in range(8):
            word = (word >> 1) ^ (empty & -(word & 1))
        table.append(word)
    crc = empty
    for byte in fastavro.schema.to_parsing_canonical_form(json.loads(schema_text)).encode():
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc.to_bytes(8, "little")


def plain(node: Any) -> Any:
    """A schema without logical types, so that times stay the numbers they are."""
    if isinstance(node, list):
        return [plain(n) for n in node]
    if isinstance(node, dict):
        return {k: plain(v) for k, v in node.items() if k != "logicalType"}
    return node


class Schemas:
    """Writers' schemas by fingerprint: the file's own, and what was published."""

    def __init__(self) -> None:
        self._by_mark: dict[bytes, Any] = {}
        self.add(SCHEMA_FILE.read_text(encoding="utf-8"))

    def add(self, text: str) -> None:
        """Take one more. Raises whatever a text that is no schema makes the parser raise."""
        self._by_mark[fingerprint(text)] = fastavro.parse_schema(plain(json.loads(text)))

    def decode(self, value: bytes | None) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """The header, the fact's bare name and the fact. Raises `ValueError` saying why not."""
        if value is None:
            raise ValueError("null")
        if value[:2] != SINGLE_OBJECT or len(value) < 10:
            raise ValueError("framing")
        schema = self._by_mark.get(value[2:10])
        if schema is None:
            raise ValueError("unknown schema")
        try:
            datum: Any = fastavro.schemaless_reader(io.BytesIO(value[10:]), schema, None, return_record_name=True)
            name, fact = datum["fact"]
        except Exception as exc:
            raise ValueError(f"damaged: {exc!r}") from exc
        return datum, str(name).rsplit(".", 1)[-1], fact


class Record(NamedTuple):
    """One record of the log. ``at``: append time, ms. ``fact`` None: it is no event, ``why`` says so."""

    topic: str
    partition: int
    offset: int
    at: int
    fact: str | None = None
    head: Mapping[str, Any] = {}
    body: Mapping[str, Any] = {}
    raw: bytes | None = None
    why: str = ""

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it stands."""
        return self.topic, self.partition, self.offset

    @property
    def release(self) -> tuple[str, int, int]:
        """Which job, run and release it speaks of."""
        return self.head["job_id"], self.head["run"], self.head["release"]


@dataclass
class Log:
    """Everything a namespace's topics hold. ``committed``, ``ends``: by (topic, partition), of the work topics."""

    namespace: str
    records: list[Record] = field(default_factory=list)
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)

    def work(self) -> Iterable[Record]:
        """Records of work topics."""
        return (r for r in self.records if r.topic.startswith(f"{self.namespace}.jobs."))

    def of(self, topic: str) -> Iterable[Record]:
        """Records of one other topic, by its short name."""
        return (r for r in self.records if r.topic == f"{self.namespace}.{topic}")


def read(bootstrap: str, namespace: str, timeout: float = 120.0) -> Log:
    """The topics of a namespace from their first offset to the ends they have now."""
    base = {"bootstrap.servers": bootstrap, "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer({**base, "group.id": "independent", "enable.partition.eof": False})
    log = Log(namespace)
    try:
        names = [t for t in consumer.list_topics(timeout=20).topics.items() if t[0].startswith(namespace + ".")]
        kept = {f"{namespace}.{n}" for n in ("lifecycle", "coordination", "dead-letter", "control", "schemas")}
        places = [
            (name, partition)
            for name, meta in names
            if name in kept or name.startswith(f"{namespace}.jobs.")
            for partition in meta.partitions
        ]
        if not places:
            raise SystemExit(f"{bootstrap} has no topic of namespace {namespace}")
        # Schemas first: what they decode comes after.
        schemas = Schemas()
        for first in (True, False):
            chosen = [p for p in places if (p[0] == f"{namespace}.schemas") is first]
            ends = {p: consumer.get_watermark_offsets(TopicPartition(*p), timeout=20)[1] for p in chosen}
            for message in _drain(consumer, ends, timeout):
                topic, partition, offset = message.topic(), message.partition(), message.offset()
                where = (topic, partition, offset, message.timestamp()[1])
                value = message.value()
                if first:
                    try:
                        schemas.add(value.decode())
                        log.records.append(Record(*where, raw=value, why="schema"))
                    except Exception as exc:
                        log.records.append(Record(*where, raw=value, why=f"no schema: {exc!r}"))
                    continue
                try:
                    head, fact, body = schemas.decode(value)
                    log.records.append(Record(*where, fact, head, body, value))
                except ValueError as exc:
                    log.records.append(Record(*where, raw=value, why=str(exc)))
            log.ends.update({p: end for p, end in ends.items() if p[0].startswith(f"{namespace}.jobs.")})
    finally:
        consumer.close()
    for queue in {topic.removeprefix(f"{namespace}.jobs.") for topic, _ in log.ends}:
        asker = Consumer({**base, "group.id": f"{namespace}.worker.{queue}"})
        try:
            wanted = [TopicPartition(t, p) for t, p in log.ends if t == f"{namespace}.jobs.{queue}"]
            for found in asker.committed(wanted, timeout=20):
                log.committed[found.topic, found.partition] = max(0, found.offset)
        finally:
            asker.close()
    return log


def _drain(consumer: Consumer, ends: Mapping[tuple[str, int], int], timeout: float) -> Iterable[Any]:
    where = [TopicPartition(topic, partition, 0) for (topic, partition), end in ends.items() if end]
    left = {(p.topic, p.partition) for p in where}
    consumer.assign(where)
    deadline = time.monotonic() + timeout
    while left:
        for message in consumer.consume(2000, 0.1):
            if message.error() is not None:
                continue
            here = (message.topic(), message.partition())
            if message.offset() < ends[here]:
                yield message
        for at in consumer.position(where):
            if at.offset >= ends[at.topic, at.partition]:
                left.discard((at.topic, at.partition))
        if time.monotonic() > deadline:
            raise TimeoutError(f"not read within {timeout:g} s: {sorted(left)}")
    consumer.unassign()


# -- fold -----------------------------------------------------------------------------------------------------------


class Final(NamedTuple):
    """What became of a job. ``result``: JSON text. ``error``: the type of the error of a failed job."""

    state: str
    task: str
    queue: str
    run: int
    attempt: int
    release: int
    result: str | None = None
    error: str | None = None


_PHASE = {"JobSubmitted": 0, "JobDue": 1, "JobStarted": 2, "JobProgressed": 2, "JobRetried": 3, "JobSnoozed": 3}
_STATE = {"JobDue": "queued", "JobStarted": "running", "JobProgressed": "running", "JobRetried": "retrying"}


def fold(records: Iterable[Record]) -> dict[str, Final]:
    """Every job's last state: of its latest run the end, if it has one, else what came last in its life."""
    lives: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.fact in _PHASE or record.fact in TERMINAL_RANK:
            lives[record.head["job_id"]].append(record)
    return {job: _final(life) for job, life in lives.items()}


def _final(life: list[Record]) -> Final:
    run = max(r.head["run"] for r in life)
    life = [r for r in life if r.head["run"] == run]
    ends = sorted((TERMINAL_RANK[r.fact], *r.place, r) for r in life if r.fact in TERMINAL_RANK)
    if ends:
        last: Record = ends[0][-1]
        state = TERMINAL_STATE[str(last.fact)]
    else:
        last = max(life, key=lambda r: (r.head["release"], r.head["attempt"], _PHASE[str(r.fact)]))
        state = _STATE.get(str(last.fact), "scheduled")
        if last.fact == "JobSubmitted" and last.body["delay_ms"] is None and last.body["due_at"] is None:
            state = "queued"
    head, body = last.head, last.body
    result = error = None
    if last.fact == "JobSucceeded" and body["result"] is not None:
        result = json.dumps(json.loads(body["result"]), sort_keys=True)
    elif last.fact in ("JobFailed", "JobRetried"):
        error = body["error"]["type"]
    return Final(state, head["task"], head["queue"], head["run"], head["attempt"], head["release"], result, error)


# -- the table ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A job the log and the table tell apart; None: it is not there."""

    job_id: str
    field: str
    log: Any
    table: Any


def table(path: str | Path) -> dict[str, Final]:
    """The status table as the same tuples, read with nothing but SQL."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        connection.row_factory = sqlite3.Row
        found = {}
        for row in connection.execute("SELECT * FROM jobs"):
            result, error = row["result"], row["error_type"]
            text = None if result is None else json.dumps(json.loads(result), sort_keys=True)
            state = str(row["state"])
            found[str(row["job_id"])] = Final(
                state, row["task"], row["queue"], row["run"], row["attempt"], row["release"], text, error
            )
        return found
    finally:
        connection.close()


def compare(folded: Mapping[str, Final], kept: Mapping[str, Final]) -> list[Difference]:
    """Where the two do not say the same."""
    out: list[Difference] = []
    for job in sorted({*folded, *kept}):
        ours, theirs = folded.get(job), kept.get(job)
        if ours is None or theirs is None:
            out.append(Difference(job, "job", ours and ours.state, theirs and theirs.state))
            continue
        for name, a, b in zip(Final._fields, ours, theirs, strict=True):
            if a != b:
                out.append(Difference(job, name, a, b))
    return out


# -- audit ----------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A time in which a process of this role stood still (SIGSTOP to SIGCONT), ms."""

    role: str
    begin: int
    end: int


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
    """What the log shows. ``violations``: examples by kind, ``counts``: how many of each; ``noted``: within the limits."""

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
    zombies = [w for w in frozen if w.role == "worker"]
    _all_ended(log, accepted, found)
    _never_early(log, found)
    _no_rerun(log, zombies, executions, found)
    _closed_below_base(log, found)
    _rejects_kept(log, found)
    _dead_letters(log, found)
    return found


def show(record: Record) -> str:
    """A record in one line."""
    head = record.head
    who = f" {head['job_id']} run {head['run']} release {head['release']}" if head else f" {record.why}"
    return f"{record.fact}{who} at {record.topic}[{record.partition}]@{record.offset} ({record.at})"


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
    for record in log.of("lifecycle"):
        due_us = allowed_at.get(record.release) if record.fact == "JobStarted" else None
        if due_us is not None and record.at * 1000 < due_us:
            found.broken("started early", show(record))


def _within(zombies: Sequence[Window], *times: int) -> bool:
    return any(all(w.begin <= t <= w.end + WAKE_MS for t in times) for w in zombies)


def _no_rerun(log: Log, zombies: Sequence[Window], executions: Sequence[Execution], found: Audit) -> None:
    closes: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    terminals: dict[tuple[str, int], Record] = {}
    started: dict[tuple[str, int, int], int] = Counter()
    facts = sorted(log.of("lifecycle"), key=lambda r: (r.at, r.partition, r.offset))
    for record in facts:
        if record.fact == "JobStarted":
            started[record.release] += 1
            done = terminals.get(record.release[:2]) or next(iter(closes[record.release]), None)
            if done is not None:
                if _within(zombies, done.at, record.at):
                    found.noted["started again by a process that had stood still"] += 1
                else:
                    found.broken("started after its end was in the log", f"{show(record)} after {show(done)}")
        elif record.fact in CLOSING:
            closes[record.release].append(record)
            if record.fact in TERMINAL_RANK:
                terminals.setdefault(record.release[:2], record)
    found.noted["releases started more than once"] = sum(1 for n in started.values() if n > 1)
    for release, several in closes.items():
        if len(several) > 1:
            found.noted["closed more than once"] += 1
            if len({r.fact for r in several}) > 1:
                found.noted["closed in different ways"] += 1
            gap = several[1].at - several[0].at
            if not _within(zombies, several[0].at, several[1].at) and release not in _began_before(executions, several):
                found.noted[f"closed again outside a stand-still after {'<1 s' if gap < 1000 else '>=1 s'}"] += 1
    runs: Counter[tuple[str, int, int]] = Counter()
    for execution in executions:
        release = (execution.job_id, execution.run, execution.release)
        runs[release] += 1
        done = terminals.get(release[:2])
        early = [r for r in (*closes[release], *([done] if done is not None else [])) if r.at < execution.began]
        if early:
            if _within(zombies, early[0].at, execution.began):
                found.noted["run again by a process that had stood still"] += 1
            else:
                found.broken("run after its end was in the log", f"{execution} after {show(early[0])}")
    found.noted["releases run more than once"] = sum(1 for n in runs.values() if n > 1)
    if executions:
        for record in facts:
            if record.fact == "JobSucceeded" and not runs[record.release]:
                found.broken("succeeded without having been run", show(record))


def _began_before(executions: Sequence[Execution], several: Sequence[Record]) -> set[tuple[str, int, int]]:
    """The release, if a second execution of it was under way when the first one closed it: at least once, no more."""
    release = several[0].release
    began = [e.began for e in executions if (e.job_id, e.run, e.release) == release]
    return {release} if len(began) > 1 and max(began) <= several[0].at else set()


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
        if record.fact is None:
            if record.place not in rejected:
                found.broken("passed, but neither closed nor rejected", show(record))
        elif record.fact not in ("JobSubmitted", "JobDue"):
            found.broken("passed, but no work record", show(record))
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
    rejects = {r.place: r for r in log.records if r.fact is None}
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


def life_of(log: Log, job_id: str) -> list[str]:
    """All that the log says of one job, in order of time: for a failure's message."""
    return [show(r) for r in sorted(log.records, key=lambda r: (r.at, r.place)) if r.head.get("job_id") == job_id]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--status", help="the SQLite file of the status table")
    parser.add_argument("--executions", help="the side log of a chaos app")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    log = read(given.bootstrap, given.namespace)
    executions = read_executions(given.executions) if given.executions else []
    folded = fold(log.records)
    found = audit(log, executions=executions)
    differences = compare(folded, table(given.status)) if given.status else []
    states = Counter(f.state for f in folded.values())
    if given.json:
        report = {
            "records": len(log.records),
            "jobs": len(folded),
            "states": states,
            "equal": not differences,
            "differences": [d._asdict() for d in differences[:100]],
            "audit": asdict(found),
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"{len(log.records)} records, {len(folded)} jobs: {dict(states)}")
        print(found)
        for each in differences[:20]:
            print(f"{each.job_id} {each.field}: log {each.log!r}, table {each.table!r}")
    return 1 if differences else 0 if found.good else 2


if __name__ == "__main__":
    sys.exit(main())
