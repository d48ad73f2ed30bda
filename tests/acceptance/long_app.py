"""Long jobs for the fault tests of job leases. Each writes to a side log what it does.

``python -m tests.acceptance.long_app submit TASK ARGUMENT…`` submits a job and prints its id; ``delayed SECONDS TASK
ARGUMENT…`` submits with a delay; ``cancel ID…`` cancels.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from jobledger import App, Retry, Snooze, current_job

app = App(os.environ.get("CHAOS_NAMESPACE", "long"), partitions=4)
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)
#: When this file exists, running jobs end at once.
OVER = f"{EXECUTIONS}.over"
AGAIN = Retry(max_attempts=2, initial=0.2, jitter=False)


def note(what: str) -> None:
    """Write one line at once, so that it is in the file even if the process dies directly afterwards."""
    file = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{current_job().job_id} {what} {os.getpid()} {time.time():.3f}\n".encode())
    finally:
        os.close(file)


def work(seconds: float) -> int:
    """Work in small steps, so that an exception can be raised in the thread."""
    note("began")
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not os.path.exists(OVER):
            time.sleep(0.02)
    except BaseException as told:
        note(type(told).__name__)
        raise
    note("ended")
    return current_job().release


@app.task(long=True, lease=8)
async def coroutine(seconds: float) -> int:
    """Run on the event loop."""
    note("began")
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not os.path.exists(OVER):
            await asyncio.sleep(0.02)
    except BaseException as told:
        note(type(told).__name__)
        raise
    note("ended")
    return current_job().release


@app.task(long=True, lease=8)
def thread(seconds: float) -> int:
    """Run in a thread."""
    return work(seconds)


@app.task(long=True, lease=8, isolation="process")
def process(seconds: float) -> int:
    """Run in a child process."""
    return work(seconds)


@app.task(long=True, lease=8, retry=AGAIN, fallback="console")
async def fails(seconds: float) -> int:
    """Fail in both attempts."""
    note("began")
    await asyncio.sleep(seconds)
    raise ValueError(f"attempt {current_job().attempt}")


@app.task
async def console(seconds: float) -> str:
    """The fallback of `fails`."""
    return "consoled"


@app.task(long=True, lease=8)
async def snoozes(seconds: float) -> int:
    """Snooze once."""
    note("began")
    if current_job().release == 1:
        raise Snooze(seconds)
    return current_job().release


@app.task(long=True, lease=8)
def kills() -> None:
    """Kill the process in which the job runs, each time."""
    note("began")
    os.kill(os.getpid(), 9)


@app.task
async def short(number: int) -> int:
    """Run for some milliseconds."""
    await asyncio.sleep(0.005)
    return number


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["submit", name, *words]:
            print(app.tasks[name].submit(*(float(word) for word in words)).job_id)
        case ["delayed", delay, name, *words]:
            task: Any = app.tasks[name]
            print(task.using(delay=float(delay)).submit(*(float(word) for word in words)).job_id)
        case ["expiring", expiry, delay, name, *words]:
            task = app.tasks[name]
            print(task.using(delay=float(delay), expires_in=float(expiry)).submit(*(float(w) for w in words)).job_id)
        case ["short", count]:
            app.submit_many(short.job(n) for n in range(int(count)))
        case ["cancel", *ids]:
            for job_id in ids:
                app.cancel(job_id, "by a test")
    app.close()
