"""Tasks for the tests of child processes. The app is a global of this module, because child processes import it by its
name.

Each process has one namespace, and passes it to the child processes in the environment.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobledger import (
    NO_RETRY,
    App,
    Depends,
    JobContext,
    JobEnded,
    Reject,
    Retry,
    Snooze,
    TaskCancelled,
    TaskTimedOut,
    current_job,
)

if os.environ.get("ISOLATED_BREAK"):
    raise RuntimeError("this cannot be imported here")
NAMESPACE = os.environ.setdefault("ISOLATED_NAMESPACE", f"t{uuid.uuid4().hex[:12]}")
app = App(NAMESPACE, partitions=2)
ONCE = Retry(max_attempts=2, initial=0.1, jitter=False)


def note(path: str, line: object) -> None:
    """Add a line to a file, in one write."""
    with open(path, "a") as file:
        file.write(f"{line}\n")


def noted(path: str) -> list[str]:
    """Return the lines of a file; no lines if the file does not exist."""
    return Path(path).read_text("utf-8").splitlines() if os.path.exists(path) else []


class Unpicklable(Exception):
    """An exception that cannot be pickled, and whose ``str()`` fails."""

    def __init__(self) -> None:
        self.held = lambda: None

    def __str__(self) -> str:
        raise RuntimeError("no text")


@app.resource
def opened() -> Any:
    """Yield the id of the process in which the resource was opened."""
    yield os.getpid()


@app.task(isolation="process")
def where(n: int, *, pid: int = Depends(opened)) -> dict[str, Any]:
    """Report progress, and return facts about the process and the job."""
    job = current_job()
    job.progress(1, 2, "half")
    return {"n": n, "pid": os.getpid(), "opened": pid, "attempt": job.attempt, "tags": dict(job.tags)}


@app.task(isolation="process")
def echoes(text: str) -> str:
    """Return the argument."""
    return text


@app.task(isolation="process")
async def where_async(n: int) -> int:
    """Return the process id, from an event loop."""
    await asyncio.sleep(0.01)
    return os.getpid()


@app.task(isolation="process")
def parent(n: int) -> str:
    """Submit a job from a child process."""
    return where.submit(n).job_id


@app.task(isolation="process", retry=ONCE)
def fails(how: str) -> Any:
    """Raise an error, exit or return a bad result, as ``how`` says."""
    match how:
        case "unpicklable":
            raise Unpicklable
        case "reject":
            raise Reject("never")
        case "snooze":
            raise Snooze(9.0, "not yet")
        case "result":
            return object()
        case "exit":
            sys.exit(3)
    raise ValueError(how)


@app.task(isolation="process", timeout=60.0, retry=NO_RETRY)
def leaves_a_fork(path: str) -> None:
    """Die, while a process that the job forked, which has all the job's files open, continues to run."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    note(path, pid)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(isolation="process", retry=NO_RETRY)
def reports_nonsense() -> None:
    """Report progress with a message that is not text."""
    current_job().progress(1, 2, 3)  # type: ignore[arg-type]  # intended


def _report_until_refused(job: JobContext, path: str) -> None:
    """Report progress for the job, until a report is refused. A thread does this after its job has ended."""
    for n in range(3_000):
        try:
            job.progress(n, message="left behind")
        except JobEnded:
            note(path, "refused")
            return
        time.sleep(0.01)


@app.task(isolation="process")
def leaves_a_reporter(path: str) -> int:
    """Return, while a thread continues to report for the job."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()
    return os.getpid()


@app.task
def leaves_a_reporter_in_a_thread(path: str) -> None:
    """Do the same in a thread of the worker."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()


@app.task
async def leaves_a_reporter_on_the_loop(path: str) -> None:
    """Do the same in a coroutine on the worker's event loop."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()


@app.task(isolation="process", retry=NO_RETRY)
def comes_after(path: str) -> int:
    """Run until a report of the previous job's thread has been refused."""
    deadline = time.monotonic() + 80
    while not noted(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid()


@app.task(isolation="process", timeout=3.0, retry=NO_RETRY)
def hangs(how: str, path: str) -> str:
    """Run beyond the time limit, and react to the timeout as ``how`` says."""
    if how == "waits":
        time.sleep(60)
    if how == "cleans up":
        try:
            time.sleep(60)
        except TaskTimedOut:
            note(path, "cleaned up")
            raise
    if how == "returns":
        try:
            time.sleep(60)
        except TaskTimedOut:
            return "in time after all"
    child = subprocess.Popen(["sleep", "600"])
    note(path, child.pid)
    while True:  # ignores everything
        try:
            time.sleep(60)
        except BaseException as told:  # noqa: BLE001  # intended
            note(path, type(told).__name__)


@app.task(isolation="process", timeout=3.0, retry=NO_RETRY)
async def hangs_async(how: str) -> None:
    """Run a coroutine beyond the time limit. If it blocks the event loop, it cannot be cancelled."""
    if how == "blocks":
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
    await asyncio.sleep(60)


@app.task(isolation="process", max_memory="200MiB", retry=NO_RETRY)
def takes(mebibytes: int, at_once: bool) -> int:
    """Allocate memory, step by step or at once."""
    if at_once:
        return len(bytearray(mebibytes << 20))
    kept = []
    for _ in range(mebibytes // 10):
        kept.append(b"x" * (10 << 20))
        time.sleep(0.05)
    if mebibytes > 200:
        time.sleep(60)  # long enough to be measured
    return len(kept)


@app.task(isolation="process", queue="deadly")
def dies(how: str) -> None:
    """End the process in which the job runs."""
    print(f"about to die: {how}", file=sys.stderr, flush=True)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(7)


@app.task(isolation="process", queue="deadly")
def dies_once(path: str) -> str:
    """End the process in which the job runs, but only the first time."""
    if not os.path.exists(path):
        note(path, "was here")
        os._exit(7)
    return "alive"


@app.task(isolation="process", queue="deadly")
def good(n: int) -> int:
    """Return the argument."""
    return n


@app.task(isolation="process")
def waits(path: str) -> None:
    """Run until the job is cancelled."""
    try:
        note(path, os.getpid())
        time.sleep(600)
    except TaskCancelled:
        note(path, "told")
        raise


@app.task(queue="threads", timeout=3.0, retry=NO_RETRY)
def hangs_in_thread(how: str) -> str:
    """Run beyond the time limit in a thread. The timeout is raised there when the thread next executes Python code."""
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.01)
    except TaskTimedOut:
        if how == "returns":
            return "in time after all"
        raise
    return "was not told"


@app.task(queue="threads")
def waits_in_thread(path: str) -> None:
    """Run until the job is cancelled, in a thread."""
    try:
        note(path, "began")
        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.01)
    except TaskCancelled:
        note(path, "told")
        raise


@app.task(queue="threads")
def quick(n: int) -> int:
    """Return at once."""
    return n


def unawaited(fn: Any) -> Any:
    """Decorate a coroutine function with a function that is not ``async``, but returns the coroutine."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def blocks_until(path: str) -> None:
    """Block the event loop until the file exists, but not longer than 40 s."""
    end = time.monotonic() + 40
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.01)


async def _coroutine(how: str, path: str) -> Any:
    """Return the job's id and the process id, raise an error, block, or wait until the job is cancelled, as ``how``
    says."""
    await asyncio.sleep(0.01)
    if how == "raises":
        raise ValueError("in the coroutine")
    if how == "blocks":
        blocks_until(path)
    if how == "waits":
        note(path, "began")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            note(path, "cleaned up")
    return {"job": current_job().job_id, "here": os.getpid()}


@app.task(name="wrapped", queue="threads", timeout=60.0, retry=NO_RETRY)
@unawaited
async def wrapped(how: str, path: str) -> Any:
    """Run in a job thread."""
    return await _coroutine(how, path)


@app.task(name="wrapped_in_child", isolation="process", timeout=60.0, retry=NO_RETRY)
@unawaited
async def wrapped_in_child(how: str, path: str) -> Any:
    """Run in a child process."""
    return await _coroutine(how, path)


@app.task(name="wrapped_briefly", queue="threads", timeout=3.0, retry=NO_RETRY)
@unawaited
async def wrapped_briefly(how: str, path: str) -> Any:
    """Run in a job thread with a short time limit."""
    return await _coroutine(how, path)


@app.task(name="wrapped_in_child_briefly", isolation="process", timeout=3.0, retry=NO_RETRY)
@unawaited
async def wrapped_in_child_briefly(how: str, path: str) -> Any:
    """Run in a child process with a short time limit."""
    return await _coroutine(how, path)


@app.task(name="hooked", queue="threads", timeout=60.0, retry=NO_RETRY)
@unawaited
async def hooked(how: str, path: str) -> Any:
    """Run in a job thread with a hook around the job."""
    note(path, "inside")
    return await _coroutine(how, path)


def surrounding(job: JobContext) -> Iterator[None]:
    """Add a line to the file after the job's code has ended."""
    yield
    note(job.tags["path"], "behind")


app.around(surrounding, tasks=["hooked"])
