"""Builds a worker's report about itself, within a limit of its size whatever the app declares. Sends nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from jobledger.consumers.isolation.resident_memory import resident_memory
from jobledger.consumers.state.work import JobRun
from jobledger.schemas.events import RunningJob, WorkerReported

#: Largest size of an encoded report in bytes. The parts below, and the header with the worker's id, add up to less.
REPORT_BYTES = 8 * 1024
#: Largest sizes of the parts in bytes.
HOST_BYTES, LANES_BYTES, TASKS_BYTES, JOBS_BYTES = 256, 1_536, 3_584, 1_536
#: Largest number of tasks and of running jobs in a report.
TASKS_MOST, JOBS_MOST = 500, 20
#: Bytes of a text or a record in addition to its characters: its length, and of a job its start.
_TEXT_EXTRA, _JOB_EXTRA = 2, 12


@dataclass(frozen=True, slots=True)
class About:
    """The values that do not change while a worker runs.

    ``host``, ``pid``: of its process. ``version``: that of the app's code; ``jobledger``: that of Jobledger.
    ``started_at``: in µs since the epoch. ``lanes``, ``tasks``: all that the worker serves and knows. ``slots``: how
    many jobs it may run at once.
    """

    host: str
    pid: int
    version: str | None
    jobledger: str
    started_at: int
    lanes: Sequence[str]
    tasks: Sequence[str]
    slots: int


class ReportBuilder:
    """Builds the reports of one worker. The values that do not change are cut to their limits once."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._host = clipped(about.host, HOST_BYTES)
        self._lanes = fitting(about.lanes, len(about.lanes), LANES_BYTES)
        self._tasks = fitting(sorted(about.tasks), TASKS_MOST, TASKS_BYTES)

    def report(
        self, running: Sequence[JobRun], memory_bytes: int | None, partitions: int, now: float, now_us: int
    ) -> WorkerReported:
        """Return the report of one moment.

        ``running``: the jobs that the worker runs. ``memory_bytes``: of its process; None: not known. ``partitions``:
        how many partitions it owns. ``now``, ``now_us``: the present time by `time.monotonic`, and in µs since the epoch.
        """
        about = self._about
        return WorkerReported(
            self._host,
            about.pid,
            about.version,
            about.jobledger,
            about.started_at,
            self._lanes,
            len(about.lanes) - len(self._lanes),
            self._tasks,
            len(about.tasks) - len(self._tasks),
            about.slots,
            len(running),
            _longest(running, now, now_us),
            memory_bytes,
            partitions,
        )


def _longest(running: Iterable[JobRun], now: float, now_us: int) -> list[RunningJob]:
    """Return the jobs that have run for the longest time, the longest first. A job whose id is so long that it does not
    fit is left out: a part of an id would name another job."""
    begun = ((work.began, work.event.job_id) for work in running if work.event is not None and work.began)
    jobs: list[RunningJob] = []
    room = JOBS_BYTES
    for began, job_id in nsmallest(JOBS_MOST, begun):
        size = len(job_id.encode(errors="replace")) + _JOB_EXTRA
        if size <= room:
            room -= size
            jobs.append(RunningJob(job_id, now_us - int(max(0.0, now - began) * 1e6)))
    return jobs


def own_memory() -> int | None:
    """Return the resident memory of this process in bytes; None if the system does not tell it."""
    try:
        return resident_memory("self")
    except OSError:
        return None


def fitting(names: Iterable[str], most: int, room: int) -> list[str]:
    """Return the first ``most`` names, or as many of them as fit in ``room`` bytes."""
    kept: list[str] = []
    for name in names:
        room -= len(name.encode(errors="replace")) + _TEXT_EXTRA
        if room < 0 or len(kept) == most:
            break
        kept.append(name)
    return kept


def clipped(text: str, most: int) -> str:
    """Return ``text``, cut to ``most`` bytes of UTF-8."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")
