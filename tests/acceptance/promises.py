"""What Jobledger promises, with the limits of each promise.

A test of processes and faults asserts through the promise that it tries to break. So the failure names the promise, and
not only a number (`Promise.hold`).
"""

from __future__ import annotations

import enum


class Promise(enum.Enum):
    """One promise. ``says``: what is promised; ``limits``: its limits, as in the documentation."""

    AT_LEAST_ONCE = (
        "Every accepted job ends: its code is run until an end of it is in the log, whatever dies in between.",
        (
            "A job whose code was cut off runs again, so it may run more than once. One that took its process down three "
            "times is failed as crashed."
        ),
    )
    NO_RERUN_AFTER_SUCCESS = (
        "A job whose end is in the log when a worker takes over is not run again, kill -9 of its worker included.",
        (
            "A worker that was paused beyond its session (SIGSTOP, a suspended machine) had not ended what it ran: another "
            "runs it again, and both ends may stand in the log. A work record that was written twice is recognised within 10 minutes or "
            "100,000 records of its partition, whichever is less."
        ),
    )
    KEY_ORDER = (
        "Jobs of one key run one at a time, in the order of their submission, retries included.",
        (
            "After a kill the one job of a key that was running runs again. A job that its worker continues after a pause, or "
            "longer than the handover of its partition takes, may run while the next owner runs it again. Adding partitions "
            "moves keys."
        ),
    )
    NEVER_EARLY = (
        "No job is let go or started before it is due, on the broker's clock, from the append of what asked for it.",
        "The broker's clock counts, not the submitter's. If brokers of a cluster disagree, so do their partitions.",
    )
    STATUS_CONVERGES = (
        "Once everything has been read, the status table says what a fold of the whole log says, whatever was killed.",
        (
            "Until then it is behind, and a query can ask for a position it shall have reached. Jobs older than the log's "
            "retention are as they were copied."
        ),
    )
    POISON_IS_CONTAINED = (
        (
            "A job that takes its process down is failed as crashed at the third start, and the jobs beside it run once "
            "more at most. Bytes that are no event are kept in the dead letters with their place and counted; nothing waits "
            "for them and nothing is lost. A fact from the future on a topic that must be acted on is waited for, never passed."
        ),
        (
            "A job that dies before its first start is in the log, or when that lies 20,000 facts back, may be started a "
            "fourth time. An app that children cannot "
            "import has no witness: there the worker dies three times. Of a record at the size limit only the beginning may "
            "be kept."
        ),
    )
    GRACEFUL_STOP = (
        "SIGTERM ends a process without running any job twice: a rolling restart reruns nothing.",
        "Jobs that outlive the grace time of the stop are cut off and run again.",
    )
    BOUNDED_MEMORY = (
        "The memory of a process does not grow with what waits for it.",
        "The coordinator keeps a timer in memory for each job that waits for a time.",
    )
    NOTHING_PASSED_OVER = (
        "Every work record below a committed base has its end in the log or its bytes in the dead letters.",
        "None: the continuous audit's metric must be 0.",
    )

    def __init__(self, says: str, limits: str) -> None:
        self.says, self.limits = says, limits
        self.__doc__ = f"{says} Limits: {limits}"

    def hold(self, kept: bool, evidence: object = "") -> None:
        """Fail the test and name this promise, unless the promise was kept."""
        if not kept:
            raise PromiseBroken(f"{self.name}: {self.says}\nBroken: {evidence}")


class PromiseBroken(AssertionError):
    """A promise was not kept. The message names the promise and shows the evidence."""


#: The promise that each fault breaks: the faults of `jobledger.audit.findings.FAULTS`, and those that only a test can
#: see.
BROKEN_BY = {
    "not-ended": Promise.AT_LEAST_ONCE,
    "submission-missing": Promise.STATUS_CONVERGES,
    "ends-contradict": Promise.NO_RERUN_AFTER_SUCCESS,
    "started-after-end": Promise.NO_RERUN_AFTER_SUCCESS,
    "released-early": Promise.NEVER_EARLY,
    "started-early": Promise.NEVER_EARLY,
    "retried-early": Promise.NEVER_EARLY,
    "key-order": Promise.KEY_ORDER,
    "release-without-request": Promise.NEVER_EARLY,
    "due-time-without-request": Promise.NEVER_EARLY,
    "request-before-cause": Promise.NO_RERUN_AFTER_SUCCESS,
    "request-missing": Promise.AT_LEAST_ONCE,
    "work-twice": Promise.NO_RERUN_AFTER_SUCCESS,
    "committed-open": Promise.NOTHING_PASSED_OVER,
    "committed-misplaced": Promise.NOTHING_PASSED_OVER,
    "closed-elsewhere": Promise.NOTHING_PASSED_OVER,
    "dead-letter-missing": Promise.POISON_IS_CONTAINED,
    "dead-letter-without-failure": Promise.POISON_IS_CONTAINED,
    "dead-letter-twice": Promise.POISON_IS_CONTAINED,
    "unreadable-lost": Promise.POISON_IS_CONTAINED,
    "rejected-altered": Promise.POISON_IS_CONTAINED,
    "rejected-good": Promise.POISON_IS_CONTAINED,
    "row-missing": Promise.STATUS_CONVERGES,
    "row-differs": Promise.STATUS_CONVERGES,
    "row-unknown": Promise.STATUS_CONVERGES,
    "accepted-lost": Promise.AT_LEAST_ONCE,
    "run-after-end": Promise.NO_RERUN_AFTER_SUCCESS,
    "success-without-run": Promise.AT_LEAST_ONCE,
}
