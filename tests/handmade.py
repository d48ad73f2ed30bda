"""Writes a log by hand, record by record, for tests of the audit."""

from __future__ import annotations

from typing import Any

from jobledger.audit.records import Record

NS = "shop"
WORK, LIFE, COORD, DEAD = f"{NS}.jobs.mail", f"{NS}.lifecycle", f"{NS}.coordination", f"{NS}.dead-letter"
SPEC: dict[str, Any] = {"args": b"{}", "tags": {}, "parent": None}
ERROR = {"type": "ValueError", "message": "no", "traceback": None}
OK: dict[str, Any] = {"result": b"7", "duration_us": 1}


class Writer:
    """Writes records, by default 10 ms after each other. The event ids of submissions and of derived records are
    computed from the job, as in Jobledger."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.clock = 1_000_000
        self.next: dict[str, int] = {}

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
        event_id: str | None = None,
        source: str = "worker@here:7",
        key: str | None = None,
    ) -> Record:
        """Append a record to a topic. Offsets are counted per topic, for all its partitions together."""
        self.clock += after
        offset = self.next.get(topic, 0)
        self.next[topic] = offset + 1
        derived = fact in ("JobSubmitted", "JobDue", "ReleaseRequested", "DeadLettered")
        head = {
            "event_id": event_id or (f"{job}/{run}/{release}/{fact}" if derived else f"{topic}/{offset}"),
            "job_id": job,
            "run": run,
            "release": release,
            "attempt": attempt,
            "task": "t",
            "queue": "mail",
            "key": key,
            "source": source,
            "occurred_at": self.clock * 1000,
        }
        record = Record(
            topic,
            partition,
            offset,
            self.clock,
            fact,
            head if fact else {},
            body or {},
            raw,
            "the first bytes are not the head of an event",
        )
        self.records.append(record)
        return record

    def submit(self, job: str = "a", **more: Any) -> Record:
        """Add the submission of a job that may run now."""
        return self.add(WORK, "JobSubmitted", {"spec": SPEC, "delay_ms": None, "due_at": None}, job=job, **more)

    def start(self, job: str = "a", **more: Any) -> Record:
        """Add the start of a job by a worker."""
        return self.add(LIFE, "JobStarted", {"worker": "w"}, job=job, **more)

    def succeed(self, job: str = "a", **more: Any) -> Record:
        """Add the success of a job."""
        return self.add(LIFE, "JobSucceeded", OK, job=job, **more)

    def fail(self, job: str = "a", **more: Any) -> Record:
        """Add the failure of a job, without its dead letter."""
        return self.add(LIFE, "JobFailed", {"reason": "never", "error": ERROR, "duration_us": 1}, job=job, **more)

    def letter(self, job: str = "a", **more: Any) -> Record:
        """Add the dead letter of a failed job."""
        return self.add(DEAD, "DeadLettered", {"spec": SPEC, "reason": "never", "error": ERROR}, job=job, **more)

    def last(self, fact: str, job: str) -> int:
        """Return the index of the job's last record with this fact."""
        found: list[int] = [i for i, r in enumerate(self.records) if r.fact == fact and r.head["job_id"] == job]
        return found[-1]

    def drop(self, fact: str, job: str) -> None:
        """Remove the job's last record with this fact."""
        del self.records[self.last(fact, job)]

    def move(self, fact: str, job: str, by: int) -> None:
        """Change the append time of the job's last record with this fact by ``by`` ms."""
        at = self.last(fact, job)
        self.records[at] = self.records[at]._replace(at=self.records[at].at + by)


def good_log() -> Writer:
    """Return a log without faults: a plain job, a delayed job, and a job that failed at its second attempt."""
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
    retried = {"error": ERROR, "delay_ms": 100, "duration_us": 1, "in_place": False}
    out.add(LIFE, "JobRetried", retried, job="c")
    requested = {"spec": SPEC, "delay_ms": 100, "due_at": None}
    out.add(COORD, "ReleaseRequested", requested, job="c", release=2, attempt=2)
    again = {"spec": SPEC, "due_at": (out.clock + 100) * 1000}
    out.add(WORK, "JobDue", again, job="c", release=2, attempt=2, after=101)
    out.start("c", release=2, attempt=2)
    out.fail("c", release=2, attempt=2)
    out.letter("c", release=2, attempt=2)
    return out
