"""An app whose jobs fail at random, but always the same way: what a job does is a function of the seed and its number.

So a test can say beforehand how every job must end (`expected`), and every real run of a task's code is noted beside
the log (one line in a file, appended in one write), so runs that the log does not know of are counted too.

``CHAOS_NAMESPACE``, ``CHAOS_SEED`` and ``CHAOS_EXECUTIONS`` (the file) come from the environment: every process of a
test, and the test itself, must mean the same.
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
#: Children are submitted inside a job; while the broker is away that fails, so these are tried more often.
PATIENT = Retry(max_attempts=50, initial=0.2, factor=1.5, cap=2.0)

Step = Literal["ok", "error", "later", "snooze", "reject", "never", "hang"]
Kind = Literal["quick", "thread", "timed", "consoled", "parent", "delayed"]


class Flaky(Exception):
    """What retried attempts fail with."""


class Hopeless(Exception):
    """What no retry helps against."""


FAST = Retry(max_attempts=4, initial=0.05, factor=2.0, cap=0.5, never=(Hopeless,))
#: Seconds. A worker that stands still makes good jobs pass it as well, so how these end is left to chance.
TIME_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class Fate:
    """A job's life: its ``kind`` of task, what each release does, and its delay in seconds, if any."""

    kind: Kind
    steps: tuple[Step, ...]
    delay: float | None
    pause: float


def fate(number: int, seed: str = SEED) -> Fate:
    """What the job of this number does at each release: the n-th release takes the n-th step."""
    dice = random.Random(f"{seed}/{number}")
    kind: Kind = dice.choices(("quick", "thread", "timed", "consoled", "parent", "delayed"), (55, 15, 4, 4, 4, 18))[0]
    delay = dice.choice((0.0, 0.2, 0.5, 1.0, 2.0, 4.0)) if kind == "delayed" else None
    # Long enough, often enough, that whoever is killed is always in the middle of some.
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
    """How a job must end; None: the faults decide."""

    state: str | None
    attempt: int | None
    result: str | None
    error: str | None


def expected(task: str, number: int, seed: str = SEED) -> Expected:
    """How the job of this number ends, whatever is killed meanwhile."""
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
    """Notes that a task's code begins, and that it ended; a line that is missing means that it was cut off."""

    def __init__(self) -> None:
        job = current_job()
        self._words = f"{job.job_id} {job.run} {job.release} {job.attempt} %d {os.getpid()}\n"

    def __enter__(self) -> None:
        self._write("B")

    def __exit__(self, *exc: object) -> None:
        self._write("E")

    def _write(self, kind: str) -> None:
        # O_APPEND and one write: lines of several processes never mix, and survive a kill -9 of the writer.
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
    """Most jobs: asynchronous, short."""
    with _Noted():
        await asyncio.sleep(fate(number).pause)
        return _end(_step(number), number)


@app.task(retry=FAST)
def thread(number: int) -> int:
    """The same in a thread."""
    with _Noted():
        time.sleep(fate(number).pause)
        return _end(_step(number), number)


@app.task(retry=FAST, timeout=TIME_LIMIT)
async def timed(number: int) -> int:
    """Hangs where others fail, until its time is over."""
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
    """Always fails, so that its fallback runs."""
    with _Noted():
        return _end(_step(number), number)


@app.task(retry=PATIENT)
async def child(number: int) -> int:
    """A job that another job submitted."""
    with _Noted():
        return number


@app.task(retry=PATIENT)
async def parent(number: int) -> int:
    """Submits two children; when it is run again, they must be the same."""
    with _Noted():
        for each in range(2):
            await child.submit_async(number * 10 + each)
        return number


def request(number: int) -> JobRequest[Any]:
    """The job of this number, to be submitted."""
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
    """The jobs from one number up to, not including, another."""
    return (request(n) for n in range(first, last))


def submit(first: int, last: int, rate: float) -> None:
    """Be a service: submit jobs at so many a second, and print ``number job_id`` of each once it is acknowledged."""
    began = time.monotonic()
    at = first
    while at < last:
        room = int((time.monotonic() - began) * rate) - (at - first)
        if room <= 0:
            time.sleep(1 / rate)
            continue
        until = min(last, at + min(room, 200))
        # What was not acknowledged is submitted again; that it may have arrived all the same is the client's word.
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
