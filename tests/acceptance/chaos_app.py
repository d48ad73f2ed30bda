"""An app whose jobs fail at random, but always in the same way: what a job does is computed from the seed and its
number.

So a test knows beforehand how every job must end (`expected`). Every real run of a task's code is written to a side log
(one line in a file, in one write), so that runs which are not in the log are counted, too.

``CHAOS_NAMESPACE``, ``CHAOS_SEED`` and ``CHAOS_EXECUTIONS`` (the file) come from the environment, because they must be
the same in all processes of a test and in the test itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jobledger import App, Reject, Retry, RetryLater, Snooze, current_job
from jobledger.definitions.task import JobRequest, Task
from jobledger.errors import BrokerUnavailable

SEED = os.environ.get("CHAOS_SEED", "0")
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)

app = App(os.environ.get("CHAOS_NAMESPACE", "chaos"), partitions=4)
#: For tasks that submit jobs: this fails while the broker is unavailable, so they have more attempts.
PATIENT = Retry(max_attempts=50, initial=0.2, factor=1.5, cap=2.0)

Step = Literal["ok", "error", "later", "snooze", "reject", "never", "hang"]
Kind = Literal["quick", "thread", "timed", "consoled", "parent", "delayed"]


class Flaky(Exception):
    """The error of attempts that are retried."""


class Hopeless(Exception):
    """An error that is not retried."""


FAST = Retry(max_attempts=4, initial=0.05, factor=2.0, cap=0.5, never=(Hopeless,))
#: Seconds. In a frozen worker, also successful jobs exceed this limit, so the outcome of these jobs is not checked.
TIME_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class Fate:
    """The life of a job: its ``kind`` of task, what each release does, its delay in seconds, if any, and how long the
    code takes."""

    kind: Kind
    steps: tuple[Step, ...]
    delay: float | None
    pause: float


def fate(number: int, seed: str = SEED) -> Fate:
    """Return the life of the job with this number. The n-th release does the n-th step."""
    dice = random.Random(f"{seed}/{number}")
    kind: Kind = dice.choices(("quick", "thread", "timed", "consoled", "parent", "delayed"), (55, 15, 4, 4, 4, 18))[0]
    delay = dice.choice((0.0, 0.2, 0.5, 1.0, 2.0, 4.0)) if kind == "delayed" else None
    # Long and frequent enough that some jobs are running whenever a worker is killed.
    pause = dice.choice((0.0, 0.0, 0.005, 0.02, 0.1, 0.3, 1.0))
    if kind == "parent":
        return Fate(kind, ("ok",), delay, pause)
    if kind == "consoled":
        return Fate(kind, ("error",) * 2, delay, pause)
    steps: list[Step] = []
    attempts = 0
    while True:
        step: Step = dice.choices(("ok", "error", "later", "snooze", "reject", "never"), (72, 12, 5, 5, 3, 3))[0]
        if kind == "timed" and step == "error":
            step = "hang"
        steps.append(step)
        attempts += step != "snooze"
        if step in ("ok", "reject", "never") or attempts == FAST.max_attempts:
            return Fate(kind, tuple(steps), delay, pause)


@dataclass(frozen=True, slots=True)
class Expected:
    """How a job must end. None: this depends on the faults."""

    state: str | None
    attempt: int | None
    result: str | None
    error: str | None


def expected(task: str, number: int, seed: str = SEED) -> Expected:
    """Return how the job with this number ends, whatever is killed meanwhile."""
    if task == "console":
        return Expected("succeeded", None, str(-number), None)
    if task == "child":
        return Expected("succeeded", None, str(number), None)
    life = fate(number, seed)
    if life.kind == "parent":
        return Expected("succeeded", None, str(number), None)
    if life.kind == "timed":
        return Expected(None, None, None, None)
    attempt = sum(1 for s in life.steps if s != "snooze")
    error = {
        "ok": None,
        "error": f"{__name__}.Flaky",
        "later": "jobledger.definitions.retry.RetryLater",
        "reject": "jobledger.definitions.retry.Reject",
        "never": f"{__name__}.Hopeless",
    }[life.steps[-1]]
    if error is None:
        return Expected("succeeded", attempt, str(number), None)
    return Expected("failed", attempt, None, error)


class _Noted:
    """Writes to the side log when a task's code begins and when it ends. Without the second line, the code was cut off."""

    def __init__(self) -> None:
        job = current_job()
        self._words = f"{job.job_id} {job.run} {job.release} {job.attempt} %d {os.getpid()}\n"

    def __enter__(self) -> None:
        self._write("B")

    def __exit__(self, *exc: object) -> None:
        self._write("E")

    def _write(self, kind: str) -> None:
        # O_APPEND and one write: lines of several processes are not mixed, and survive a kill -9 of the writer.
        line = f"{kind} {self._words % (time.time_ns() // 1_000_000)}".encode()
        out = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(out, line)
        finally:
            os.close(out)


def _step(number: int) -> Step:
    steps = fate(number).steps
    release = current_job().release
    if release > len(steps):
        raise Hopeless(f"job {number} was let go {release} times, its life has {len(steps)} steps")
    return steps[release - 1]


def _end(step: Step, number: int) -> int:
    if step == "error":
        raise Flaky(f"job {number}")
    if step == "later":
        raise RetryLater(0.1)
    if step == "snooze":
        raise Snooze(0.15)
    if step == "reject":
        raise Reject(f"job {number} is not wanted")
    if step == "never":
        raise Hopeless(f"job {number}")
    return number


@app.task(retry=FAST)
async def quick(number: int) -> int:
    """Most jobs: asynchronous and short."""
    with _Noted():
        await asyncio.sleep(fate(number).pause)
        return _end(_step(number), number)


@app.task(retry=FAST)
def thread(number: int) -> int:
    """Do the same in a thread."""
    with _Noted():
        time.sleep(fate(number).pause)
        return _end(_step(number), number)


@app.task(retry=FAST, timeout=TIME_LIMIT)
async def timed(number: int) -> int:
    """Hang until the time limit, where other tasks fail."""
    with _Noted():
        step = _step(number)
        await asyncio.sleep(3600 if step == "hang" else fate(number).pause)
        return _end(step, number)


@app.task
async def console(number: int) -> int:
    """The fallback of `consoled`."""
    with _Noted():
        return -number


@app.task(retry=Retry(max_attempts=2, initial=0.05, cap=0.2), fallback=console)
async def consoled(number: int) -> int:
    """Always fail, so that the fallback runs."""
    with _Noted():
        return _end(_step(number), number)


@app.task(retry=PATIENT)
async def child(number: int) -> int:
    """A job that another job submits."""
    with _Noted():
        return number


@app.task(retry=PATIENT)
async def parent(number: int) -> int:
    """Submit two jobs. If this job runs again, the two jobs must be the same."""
    with _Noted():
        for each in range(2):
            await child.submit_async(number * 10 + each)
        return number


def request(number: int) -> JobRequest[Any]:
    """Return the job with this number, to be submitted."""
    life = fate(number)
    if life.kind == "delayed":
        return quick.using(delay=life.delay).job(number)
    tasks: dict[str, Task[[int], Any]] = {
        "quick": quick,
        "thread": thread,
        "timed": timed,
        "consoled": consoled,
        "parent": parent,
    }
    return tasks[life.kind].job(number)


def requests(first: int, last: int) -> Iterator[JobRequest[Any]]:
    """Return the jobs from number ``first`` up to, and not including, ``last``."""
    return (request(n) for n in range(first, last))


def submit(first: int, last: int, rate: float) -> None:
    """Submit jobs as a service does, ``rate`` a second. Print ``number job_id`` of each job when it is acknowledged."""
    began = time.monotonic()
    at = first
    while at < last:
        room = int((time.monotonic() - began) * rate) - (at - first)
        if room <= 0:
            time.sleep(1 / rate)
            continue
        until = min(last, at + min(room, 200))
        # Jobs without an acknowledgement are submitted again, although some of them may be in the log already.
        try:
            for number, handle in zip(range(at, until), app.submit_many(requests(at, until)), strict=True):
                print(number, handle.job_id)
        except BrokerUnavailable as exc:
            print(f"again from {at}: {exc}", file=sys.stderr)
            continue
        at = until
    sys.stdout.flush()


if __name__ == "__main__":
    submit(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
