"""The status of a worker, from its last report. Pure: no Kafka, no Avro, no database, no clock.

A worker reports about itself every `REPORT_EVERY_S` seconds (`jobledger.schemas.events.WorkerReported`), and its last
report replaces the reports before it. A worker that ends without an error removes its report.
"""

from __future__ import annotations

import datetime as dt
import enum

import msgspec

from jobledger.schemas.events import FAR_US, Recorded, WorkerReported

#: Seconds between two reports of a worker.
REPORT_EVERY_S = 5.0
#: Seconds after its last report from which a worker counts as silent: two reports are missing then.
SILENT_AFTER_S = 15.0


class WorkerState(enum.StrEnum):
    """Whether a worker still reports. ``silent``: it has died, is paused, or cannot reach the log."""

    ALIVE = "alive"
    SILENT = "silent"


class WorkerStatus(msgspec.Struct, frozen=True):
    """A worker as its last report says.

    ``worker``: its id, ``host:pid``, as in `JobStatus.worker`. ``version``: the version of the app's code, if it is
    known; ``jobledger``: that of Jobledger. ``started_at``: when the worker was started, on its own clock. ``lanes``:
    the lanes that it serves; ``tasks``: the first tasks that it knows, by name. ``more_lanes``, ``more_tasks``: how many
    are left out, because the report would be too large. ``slots``: how many jobs the worker may run at once;
    ``running``: how many jobs it runs; ``jobs``: at most 20 of these, those that have run for the longest time, each with
    its id and when the present attempt began, on the worker's clock.
    ``memory_bytes``: of the worker's process, without child processes; None: not known. ``partitions``: how many
    partitions of work topics it owns. ``reported_at``: the broker's append time of the report.
    """

    worker: str
    host: str
    pid: int
    version: str | None
    jobledger: str
    started_at: dt.datetime
    reported_at: dt.datetime
    lanes: tuple[str, ...] = ()
    more_lanes: int = 0
    tasks: tuple[str, ...] = ()
    more_tasks: int = 0
    slots: int = 0
    running: int = 0
    jobs: dict[str, dt.datetime] = {}
    memory_bytes: int | None = None
    partitions: int = 0

    @property
    def queues(self) -> tuple[str, ...]:
        """The queues of `lanes`, each once."""
        return tuple(dict.fromkeys(lane.partition(".")[0] for lane in self.lanes))

    def state(self, now: dt.datetime) -> WorkerState:
        """Return whether the worker still reports. ``now``: the present time, with a time zone. The report has the
        broker's time, so the clock behind ``now`` must agree with the broker's clock within a few seconds."""
        silent = (now - self.reported_at).total_seconds() > SILENT_AFTER_S
        return WorkerState.SILENT if silent else WorkerState.ALIVE


def of_report(worker: str, record: Recorded) -> WorkerStatus | None:
    """Return the status of a worker whose last report is ``record``; None if the record is no report."""
    fact = record.event.fact
    if not isinstance(fact, WorkerReported):
        return None
    return WorkerStatus(
        worker,
        fact.host,
        fact.pid,
        fact.version,
        fact.jobledger,
        _moment(fact.started_at),
        _moment(record.appended_ms * 1000),
        tuple(fact.lanes),
        fact.more_lanes,
        tuple(fact.tasks),
        fact.more_tasks,
        fact.slots,
        fact.running,
        {job.job_id: _moment(job.started_at) for job in fact.jobs},
        fact.memory_bytes,
        fact.partitions,
    )


def _moment(micros: int) -> dt.datetime:
    """Return a time. A record may contain any number: a time outside the calendar becomes its first or last moment."""
    return _EPOCH + dt.timedelta(microseconds=min(max(micros, 0), FAR_US))


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
