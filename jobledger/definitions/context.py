"""The running job, as its code sees it: `current_job()`. The worker sets this job; tasks and the client read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from operator import index

from jobledger.errors import ConfigError, JobEnded
from jobledger.schemas.events import JobProgressed
from jobledger.schemas.ids import derived_id


class JobContext:
    """One attempt of one job, as the task's code sees it.

    ``job_id``, ``task``, ``queue``, ``run``, ``attempt`` (1 at first), ``release``, ``tags`` and ``parent`` are those
    of the job. ``ended``: whether the attempt has ended here. If code of the attempt still runs then, for example in a
    thread that the attempt started, and reports progress, submits a job or emits an event, `JobEnded` is raised.
    """

    __slots__ = (
        "_children",
        "_report",
        "_sequence",
        "_tags",
        "attempt",
        "ended",
        "job_id",
        "parent",
        "queue",
        "release",
        "run",
        "task",
        "trace",
    )

    def __init__(
        self,
        *,
        job_id: str,
        task: str,
        queue: str,
        run: int,
        attempt: int,
        release: int,
        tags: Mapping[str, str],
        parent: str | None,
        trace: str | None,
        report: Callable[[JobContext, JobProgressed], None] | None,
    ) -> None:
        self.job_id, self.task, self.queue = job_id, task, queue
        self.run, self.attempt, self.release = run, attempt, release
        self.parent, self.trace = parent, trace
        self._tags = tags
        self._report = report  # None: `progress` raises `JobEnded`
        self._sequence = 0
        self.ended = False
        self._children: dict[bytes, count[int]] | None = None

    @property
    def tags(self) -> Mapping[str, str]:
        """A copy of the job's tags: changing it does not change the job."""
        return dict(self._tags)

    def progress(self, done: int, total: int | None = None, message: str | None = None) -> None:
        """Report the job's progress, without waiting. ``done``, ``total``: counts in a unit of the task's choice, whole
        numbers >= 0. ``message``: a text for people.

        Callable from any thread that runs the task's code. The status shows the last report of an attempt. Raises
        `ConfigError` if ``done`` or ``total`` is not a whole number from 0 to 2^63 - 1 or ``message`` is not a text,
        and `JobEnded` when the attempt has ended.
        """
        report = self._report
        if self.ended or report is None:
            raise self._over("report progress")
        for name, value in (("done", done), ("total", total)):
            if name == "total" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise ConfigError(f"progress({name}={value!r}) is not a whole number from 0 to 2^63 - 1")
        if message is not None and not isinstance(message, str):
            raise ConfigError(f"progress(message={message!r}) is not a text")
        # Convert instances of subclasses to plain values, and the message to text that UTF-8 can encode: a file name,
        # for example, may contain lone surrogates.
        done, total = index(done), None if total is None else index(total)
        if message is not None:
            message = str.encode(message, "utf-8", "replace").decode("utf-8")
        self._sequence += 1
        report(self, JobProgressed(self._sequence, done, total, message))

    def child_id(self, task: str, args: bytes) -> str:
        """Return the id of a job that is submitted inside this job: a UUID v5 of (parent, run, task, arguments, number
        of identical submissions before).

        So a rerun of the parent submits jobs with the same ids, and workers drop the duplicates. Raises `JobEnded` when
        the attempt has ended: the next attempt submits the jobs that this attempt would submit.
        """
        if self.ended:
            raise self._over("submit jobs or emit events")
        what = task.encode() + b"\0" + hashlib.blake2b(args, digest_size=16).digest()
        # A task may submit from several threads and signal handlers, and in a fork. So there is no lock, but steps that
        # nothing can interrupt: CPython switches threads and runs signal handlers only at calls of Python code and at
        # backward jumps.
        if self._children is None:
            self._children = {}
        nth = next(self._children.setdefault(what, count(1)))
        return derived_id(self.job_id, self.run, task, what[-16:].hex(), nth)

    def _over(self, what: str) -> JobEnded:
        return JobEnded(
            f"attempt {self.attempt} of job {self.job_id} ({self.task}) has ended: its code that still runs cannot {what}. Let "
            "the task wait for the threads and asyncio tasks it starts, or start them outside the job: "
            "contextvars.Context().run(…)"
        )


_CURRENT: ContextVar[JobContext | None] = ContextVar("jobledger_current_job", default=None)


def current_job() -> JobContext:
    """Return the job in which this code runs. Raises `ConfigError` outside a job."""
    job = _CURRENT.get()
    if job is None:
        raise ConfigError(
            "current_job() works only inside a task that a Jobledger worker runs; in a test, inside of "
            "jobledger.testing.job_context()"
        )
    return job


def maybe_current_job() -> JobContext | None:
    """Return the job in which this code runs, or None."""
    return _CURRENT.get()


@contextmanager
def entered(context: JobContext) -> Iterator[None]:
    """Make ``context`` the current job for a block. After the block, the previous job is current again."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def enter(context: JobContext | None) -> None:
    """Make ``context`` the current job of this asyncio task or thread. The worker calls this."""
    _CURRENT.set(context)
