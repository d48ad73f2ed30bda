"""Jobs for the worker's fault tests. They are short, some fail, and each writes to a side log when its code begins."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time

from jobledger import App, AsyncTask, PlainTask, Retry, current_job

app = App(os.environ.get("CHAOS_NAMESPACE", "faults"), partitions=4)
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)


def note(what: str) -> None:
    """Write one line at once, so that it is in the file even if the process dies directly afterwards."""
    file = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{current_job().job_id} {what} {os.getpid()} {time.time_ns() // 1_000_000}\n".encode())
    finally:
        os.close(file)


@app.task(retry=Retry(max_attempts=3, initial=3600.0))
async def work(number: int) -> int:
    """Run for some milliseconds; one in ten jobs fails. The number -1 takes an hour, and smaller numbers take two
    seconds."""
    note("began")
    dice = random.Random(number)
    await asyncio.sleep(3600 if number == -1 else 2 if number < 0 else dice.random() * 0.05)
    if number >= 0 and dice.random() < 0.1:
        raise ValueError(f"number {number}")
    return number


@app.task(retry=Retry(max_attempts=3, initial=3600.0), timeout=8)
async def timed(number: int) -> int:
    """Run for two seconds. The time limit of eight seconds is shorter than the pause of a worker."""
    note("began")
    await asyncio.sleep(2)
    return number


@app.task(retry=Retry(max_attempts=3, initial=3600.0))
def thread(number: int) -> int:
    """Run for some milliseconds in a thread; one in ten jobs fails."""
    note("began")
    dice = random.Random(number)
    time.sleep(dice.random() * 0.02)
    if dice.random() < 0.1:
        raise ValueError(f"number {number}")
    return number


@app.task(isolation="process", retry=Retry(max_attempts=3, initial=3600.0))
def isolated(number: int) -> int:
    """Run for three seconds in a child process."""
    note("began")
    time.sleep(3)
    return number


if __name__ == "__main__":
    first, last = int(sys.argv[1]), int(sys.argv[2])

    def task_of(number: int) -> PlainTask[[int], int] | AsyncTask[[int], int]:
        if number <= -1000:
            return isolated
        if number >= 0:
            return thread if number % 4 == 3 else work
        return timed if number % 2 == 0 else work

    app.submit_many(task_of(n).job(n) for n in range(first, last))
    app.close()
