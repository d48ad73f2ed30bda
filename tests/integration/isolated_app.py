"""Tasks of the tests of child processes. An app at a module's top level: a child imports it by its name.

One namespace a process, handed to the children in the environment; each test has a queue of its own.
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
    """The lines of a file; none if there is none."""
    return Path(path).read_text("utf-8").splitlines() if os.path.exists(path) else []


class Unpicklable(Exception):
    """Holds what cannot be pickled, and has no text."""

    def __init__(self) -> None:
        self.held = lambda: None

    def __str__(self) -> str:
        raise RuntimeError("no text")


@app.resource
def opened() -> Any:
    """Says in which process it was opened."""
    yield os.getpid()


@app.task(isolation="process")
def where(n: int, *, pid: int = Depends(opened)) -> dict[str, Any]:
    """Tells about its process."""
    job = current_job()
    job.progress(1, 2, "half")
    return {"n": n, "pid": os.getpid(), "opened": pid, "attempt": job.attempt, "tags": dict(job.tags)}


@app.task(isolation="process")
def echoes(text: str) -> str:
    """Gives back what it was given."""
    return text


@app.task(isolation="process")
async def where_async(n: int) -> int:
    """The same on an event loop."""
    await asyncio.sleep(0.01)
    return os.getpid()


@app.task(isolation="process")
def parent(n: int) -> str:
    """Submits a job from a child process."""
    return where.submit(n).job_id


@app.task(isolation="process", retry=ONCE)
def fails(how: str) -> Any:
    """Ends badly in one of several ways."""
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
    """Dies while something it forked, with all its files open, lives on."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    note(path, pid)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(isolation="process", retry=NO_RETRY)
def reports_nonsense() -> None:
    """A report that is none."""
    current_job().progress(1, 2, 3)  # type: ignore[arg-type]  # it is the point


def _report_until_refused(job: JobContext, path: str) -> None:
    """What a job leaves behind: reports in its name for as long as that is possible."""
    for n in range(3_000):
        try:
            job.progress(n, message="left behind")
        except JobEnded:
            note(path, "refused")
            return
        time.sleep(0.01)


@app.task(isolation="process")
def leaves_a_reporter(path: str) -> int:
    """Ends, and its thread goes on reporting."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()
    return os.getpid()


@app.task
def leaves_a_reporter_in_a_thread(path: str) -> None:
    """The same in the worker's own process."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()


@app.task
async def leaves_a_reporter_on_the_loop(path: str) -> None:
    """The same, of a coroutine."""
    threading.Thread(target=_report_until_refused, args=(current_job(), path), daemon=True).start()


@app.task(isolation="process", retry=NO_RETRY)
def comes_after(path: str) -> int:
    """Runs until the thread of the job before it has been refused."""
    deadline = time.monotonic() + 80
    while not noted(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid()


@app.task(isolation="process", timeout=3.0, retry=NO_RETRY)
def hangs(how: str, path: str) -> str:
    """Does not end, and is told to."""
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
    while True:  # deaf
        try:
            time.sleep(60)
        except BaseException as told:  # noqa: BLE001  # it is the point
            note(path, type(told).__name__)


@app.task(isolation="process", timeout=3.0, retry=NO_RETRY)
async def hangs_async(how: str) -> None:
    """A coroutine that does not end; blocking, nobody can cancel it."""
    if how == "blocks":
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
    await asyncio.sleep(60)


@app.task(isolation="process", max_memory="200MiB", retry=NO_RETRY)
def takes(mebibytes: int, at_once: bool) -> int:
    """Takes memory, bit by bit or at once."""
    if at_once:
        return len(bytearray(mebibytes << 20))
    kept = []
    for _ in range(mebibytes // 10):
        kept.append(b"x" * (10 << 20))
        time.sleep(0.05)
    if mebibytes > 200:
        time.sleep(60)  # until somebody has measured it
    return len(kept)


@app.task(isolation="process", queue="deadly")
def dies(how: str) -> None:
    """Takes its process along."""
    print(f"about to die: {how}", file=sys.stderr, flush=True)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(7)


@app.task(isolation="process", queue="deadly")
def dies_once(path: str) -> str:
    """Takes its process along at the first time."""
    if not os.path.exists(path):
        note(path, "was here")
        os._exit(7)
    return "alive"


@app.task(isolation="process", queue="deadly")
def good(n: int) -> int:
    """Minds its own business."""
    return n


@app.task(isolation="process")
def waits(path: str) -> None:
    """Runs until it is told to end."""
    try:
        note(path, os.getpid())
        time.sleep(600)
    except TaskCancelled:
        note(path, "told")
        raise


@app.task(queue="threads", timeout=3.0, retry=NO_RETRY)
def hangs_in_thread(how: str) -> str:
    """A thread that is told at its next bytecode."""
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
    """Runs until it is told to end."""
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
    """Ends at once."""
    return n


def unawaited(fn: Any) -> Any:
    """A decorator that is not ``async``: what it makes of a coroutine function returns a coroutine."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def blocks_until(path: str) -> None:
    """Lets nothing else run on its event loop until the file is there, and not for ever."""
    end = time.monotonic() + 40
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.01)


async def _coroutine(how: str, path: str) -> Any:
    """Says whose job it is, raises, or waits until it is told to end."""
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
    """In a thread."""
    return await _coroutine(how, path)


@app.task(name="wrapped_in_child", isolation="process", timeout=60.0, retry=NO_RETRY)
@unawaited
async def wrapped_in_child(how: str, path: str) -> Any:
    """In a child."""
    return await _coroutine(how, path)


@app.task(name="wrapped_briefly", queue="threads", timeout=3.0, retry=NO_RETRY)
@unawaited
async def wrapped_briefly(how: str, path: str) -> Any:
    """In a thread, with less time."""
    return await _coroutine(how, path)


@app.task(name="wrapped_in_child_briefly", isolation="process", timeout=3.0, retry=NO_RETRY)
@unawaited
async def wrapped_in_child_briefly(how: str, path: str) -> Any:
    """In a child, with less time."""
    return await _coroutine(how, path)


@app.task(name="hooked", queue="threads", timeout=60.0, retry=NO_RETRY)
@unawaited
async def hooked(how: str, path: str) -> Any:
    """In a thread, with something around it."""
    note(path, "inside")
    return await _coroutine(how, path)


def surrounding(job: JobContext) -> Iterator[None]:
    """Says when the code had ended."""
    yield
    note(job.tags["path"], "behind")


app.around(surrounding, tasks=["hooked"])
