"""Jobs for the fault tests of poison: good jobs of each kind, and jobs that kill the process in which they run.

``python -m tests.acceptance.poison_app submit GOOD MODE…`` submits ``GOOD`` good jobs, with a poison job of each mode
in the middle, and prints the ids of the poison jobs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

from jobledger import App, current_job
from jobledger.definitions.task import JobRequest

app = App(os.environ.get("CHAOS_NAMESPACE", "poison"), partitions=4)
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)


def note(what: str) -> None:
    """Write one line at once, so that it is in the file even if the process dies directly afterwards."""
    file = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{current_job().job_id} {what}\n".encode())
    finally:
        os.close(file)


def die(after: float) -> None:
    """Kill this process, as the system does when memory is short."""
    time.sleep(after)
    print(f"job {current_job().job_id} takes process {os.getpid()} along", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
async def good_async(number: int) -> int:
    """Run for some milliseconds on the event loop."""
    note("good")
    await asyncio.sleep(0.005)
    return number


@app.task
def good_thread(number: int) -> int:
    """Run for some milliseconds in a thread."""
    note("good")
    time.sleep(0.005)
    return number


@app.task(isolation="process")
def good_process(number: int) -> int:
    """Run for some milliseconds in a child process."""
    note("good")
    time.sleep(0.005)
    return number


@app.task
async def poison_async(after: float) -> None:
    """Kill the worker from its event loop."""
    note("poison")
    await asyncio.sleep(after)
    die(0.0)


@app.task
def poison_thread(after: float) -> None:
    """Kill the worker from a thread."""
    note("poison")
    die(after)


@app.task(isolation="process")
def poison_process(after: float) -> None:
    """Kill the child process."""
    note("poison")
    die(after)


GOOD = (good_async, good_thread, good_process)
POISON = {"async": poison_async, "thread": poison_thread, "process": poison_process}

if __name__ == "__main__":
    count, modes = int(sys.argv[2]), sys.argv[3:]
    jobs: list[JobRequest[Any]] = [GOOD[n % len(GOOD)].job(n) for n in range(count)]
    for place, mode in enumerate(modes):
        # The first job dies at once, the second after a while in which many other jobs are started and committed.
        jobs.insert(count // 2 + place, POISON[mode].job(0.0 if place % 2 == 0 else 0.4))
    for request, handle in zip(jobs, app.submit_many(jobs), strict=True):
        if request.task.name.startswith("poison"):
            print(handle.job_id)
