"""Our jobs, and the program that submits them; namespace and partitions come from the environment."""

from __future__ import annotations

import asyncio
import os
import time

from bench.peers.port import STAMPS
from bench.peers.submitting import Course
from jobledger import App

app = App(os.environ.get("BENCH_NAMESPACE", "bench"), partitions=int(os.environ.get("BENCH_PARTITIONS", "6")))


@app.task(name="noop")
async def noop(number: int) -> int:
    """Do nothing, but return a result to store."""
    return number


@app.task(name="nap")
async def nap(number: int) -> int:
    """Wait, as a job does that calls another service."""
    await asyncio.sleep(0.05)
    return number


@app.task(name="stamp")
async def stamp(at_ns: int) -> int:
    """Write to a file how long ago the job was submitted."""
    with open(os.environ[STAMPS], "a", encoding="ascii") as file:  # noqa: ASYNC230  # one short line
        file.write(f"{time.time_ns() - at_ns}\n")
    return at_ns


def main() -> None:
    """Submit the jobs that the command line describes."""
    course = Course()
    task = app.tasks[course.task]
    if course.bulk:
        for numbers in course.chunks(10_000):
            app.submit_many(task.job(number) for number in numbers)
    else:
        for number in course:
            task.submit(number)
    app.close()


if __name__ == "__main__":
    main()
