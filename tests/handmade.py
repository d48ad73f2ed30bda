"""A log that is written by hand, record by record, for tests of the audit."""

from __future__ import annotations

from typing import Any

from jobledger.audit.records import Record

NS = "shop"
WORK, LIFE, COORD, DEAD = f"{NS}.jobs.mail", f"{NS}.lifecycle", f"{NS}.coordination", f"{NS}.dead-letter"
SPEC: dict[str, Any] = {"args": b"{}", "tags": {}, "parent": None}
ERROR = {"type": "ValueError", "message": "no", "traceback": None}
OK: dict[str, Any] = {"result": b"7", "duration_us": 1}


class Writer:
    """Writes records; time passes by 10 ms a record unless told otherwise. Ids of what derives from a job, and of
    submissions, are functions of it, as Jobledger's are."""

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
        """One more record of a topic; offsets count per topic, whatever the partition."""
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
        record = Record(topic, partition, offset, self.clock, fact, head if fact else {}, body or {}, raw, "framing")
        self.records.append(record)
        return record

    def submit(self, job: str = "a", **more: Any) -> Record:
        """A job to be run now."""
        return self.add(WORK, "JobSubmitted", {"spec": SPEC, "delay_ms": None, "due_at": None}, job=job, **more)

    def start(self, job: str = "a", **more: Any) -> Record:
        """A worker begins it."""
        return self.add(LIFE, "JobStarted", {"worker": "w"}, job=job, **more)

    def succeed(self, job: str = "a", **more: Any) -> Record:
        """It ends well."""
        return self.add(LIFE, "JobSucceeded", OK, job=job, **more)

    def fail(self, job: str = "a", **more: Any) -> Record:
        """It fails; the dead letter is another record."""
        return self.add(LIFE, "JobFailed", {"reason": "never", "error": ERROR, "duration_us": 1}, job=job, **more)

    def letter(self, job: str = "a", **more: Any) -> Record:
        """The dead letter of a failure."""
        return self.add(DEAD, "DeadLettered", {"spec": SPEC, "reason": "never", "error": ERROR}, job=job, **more)

    def last(self, fact: str, job: str) -> int:
        """The index of a job's last record of this fact."""
        found: list[int] = [i for i, r in enumerate(self.records) if r.fact == fact and r.head["job_id"] == job]
        return found[-1]

    def drop(self, fact: str, job: str) -> None:
        """Take a job's last record of this fact away."""
        del self.records[self.last(fact, job)]

    def move(self, fact: str, job: str, by: int) -> None:
        """Give a job's last record of this fact another append time."""
        at = self.last(fact, job)
        self.records[at] = self.records[at]._replace(at=self.records[at].at + by)


def good_log() -> Writer:
    """A plain job, one that was delayed and one that was tried twice and failed: all as it must be."""
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
