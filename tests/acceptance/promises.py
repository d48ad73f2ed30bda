"""What Jobledger promises, with the limits of each promise.

A test of processes and faults asserts through the promise that it tries to break. So the failure names the promise, and
not only a number (`Promise.hold`).
"""

from __future__ import annotations

import enum


class Promise(enum.Enum):
    """One promise. ``says``: what is promised, as in docs/promises.md; ``limits``: its most important limits. That page
    has all of them."""

    AT_LEAST_ONCE = (
        (
            "Every job whose submission was acknowledged gets an outcome: it succeeds, fails (no further attempt follows), "
            "is cancelled or expires."
        ),
        (
            "A job's code may run more than once, because a worker can be killed after the code did its work and before the "
            "outcome is in the log. A record that the cluster has lost is lost."
        ),
    )
    NO_RERUN_AFTER_SUCCESS = (
        "A job whose success is in the log when another worker takes over its partition is not run again.",
        (
            "The jobs that a worker was running when it was paused may run twice, and so may a job that runs longer than the "
            "handover of its partition. Both outcomes may then be in the log. A second work record of a job is recognised "
            "for 10 minutes or 100,000 records of its partition, whichever is less."
        ),
    )
    KEY_ORDER = (
        "Jobs of one key run one at a time, in the order of their submission.",
        (
            "After a kill, the one job of a key that was running is run again. If a worker is paused, or a job runs longer "
            "than the handover of its partition, the job continues while the next owner runs it again. Adding partitions "
            "moves keys to other partitions."
        ),
    )
    NEVER_EARLY = (
        "No delayed job and no retry starts before its time, by the broker's clock.",
        (
            "The lateness of a release is not promised. On a topic with message.timestamp.type=CreateTime, the records carry "
            "the clocks of their writers."
        ),
    )
    STATUS_CONVERGES = (
        (
            "The status table equals a fold of the log: the state computed from all facts. Order, duplicates and restarts "
            "make no difference."
        ),
        (
            "The table lags behind the log. A query can wait until the table has read a position. Rows of jobs whose records "
            "are not in the log any more are kept as they are."
        ),
    )
    POISON_IS_CONTAINED = (
        (
            "A job that kills its process fails with the reason `crashed` after its third start, and the worker's other "
            "jobs run at most once more. Records that are not valid events are copied to the dead letters, and the jobs "
            "behind them continue."
        ),
        (
            "A job may be started four times if the fact of one of its starts was never sent, or lies more than 20,000 facts "
            "back in the log. While child processes are available, the death of a whole worker fails a job only at its tenth "
            "start. If child processes cannot import the app, the worker itself dies three times. If several jobs "
            "kill their process at the same time, or one job does so a fourth time, the other jobs may be executed once "
            "more for each. Of a very long record only the beginning "
            "is kept, or nothing."
        ),
    )
    GRACEFUL_STOP = (
        "A rolling restart runs no job twice.",
        (
            "Jobs that run longer than the grace time are interrupted and run again. A job that runs longer than the handover "
            "of a partition between running workers may run on both."
        ),
    )
    BOUNDED_MEMORY = (
        (
            "The memory of a process does not grow with the backlog; only the coordinator needs about 100 bytes for each "
            "delayed job."
        ),
        "Objects that the app keeps stay in memory.",
    )
    NOTHING_PASSED_OVER = (
        (
            "Each work record below the committed offset of its worker group has a closing fact or, for a long job, a job "
            "lease. Or it was rejected, and is in the dead letters."
        ),
        "None: the metric jobledger_unclosed_records must be 0.",
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
