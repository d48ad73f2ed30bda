"""Holds the jobs that a worker runs, and answers whether a job is still this worker's."""

from __future__ import annotations

import time

from jobledger.consumers.state.work import JobRun

_monotonic = time.monotonic


class RunningJobs:
    """All jobs that were begun, in `jobs`, until the dispatcher has handled their end. At most ``concurrency`` jobs run
    at once.

    ``accepting``: whether jobs may begin; False when the worker stops. ``begun``: how many attempts were begun; a
    long job counts when its lease is requested.
    """

    __slots__ = ("accepting", "begun", "concurrency", "jobs")

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.jobs: dict[JobRun, None] = {}
        self.accepting = True
        self.begun = 0

    def ours(self, work: JobRun) -> bool:
        """Return whether this worker should still run a job that is counted as running.

        A suspect belongs to the next owner as soon as its partition is given up or stopped, or the worker takes no more
        jobs. A long job is this worker's while its lease is valid. Any other job stays this worker's until the
        partition is gone, because the worker waits for it at a handover.
        """
        partition = work.partition
        if work.suspect and not self.accepting:
            return False
        if work.lease is not None:
            return _monotonic() <= work.lease.until and not work.abandoned
        return partition.owned and partition.stopped is None if work.suspect else not partition.gone

    @staticmethod
    def partition_certain(work: JobRun) -> bool:
        """Return whether this worker certainly owns the job's partition; always true for a long job (see `ours` for its
        lease). If this is not known, request a confirmation from the group."""
        return work.lease is not None or work.partition.certain()

    def may_begin(self, work: JobRun) -> bool:
        """Return whether a job's code may begin on the loop or in the thread to which the job was passed. Any thread.

        Callers check cheaply first, and call this only if the job was abandoned, its partition was lost, or the lease
        is over. A long job is this worker's as long as the worker holds the job lease.
        """
        return not work.abandoned and self.partition_certain(work) and (work.lease is None or self.ours(work))
