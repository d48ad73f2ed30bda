"""The app of `test_big_plan`: jobs that fail until a file exists. Each run of the task's code is written to a side log, as
`chaos_app` writes it.

As a program, ``python -m tests.acceptance.plan_app JOBS``, it submits this many jobs: of each twenty, two fail with
another error than the others, and one succeeds at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from jobledger import App, current_job

EXECUTIONS = Path(os.environ.get("CHAOS_EXECUTIONS", os.devnull))
#: While this file does not exist, jobs fail.
MENDED = EXECUTIONS.with_name("mended")
app = App(os.environ.get("CHAOS_NAMESPACE", "plans"), partitions=4)


class Down(Exception):
    """The error of the jobs that the plan redrives."""


class Other(Exception):
    """The error of jobs that the plan must leave as they are."""


def fate(number: int) -> type[Exception] | None:
    """Return the error of the job with this number; None: the job succeeds at once."""
    rest = number % 20
    return None if rest == 0 else Other if rest < 3 else Down


def _note(kind: str) -> None:
    job = current_job()
    line = f"{kind} {job.job_id} {job.run} {job.release} {job.attempt} {time.time_ns() // 1_000_000} {os.getpid()}\n"
    handle = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line.encode())  # one write, so that lines of several processes are not mixed
    finally:
        os.close(handle)


@app.task(retry=1)
async def call(number: int) -> int:
    """Fail as the number says, until `MENDED` exists."""
    _note("B")
    try:
        error = fate(number)
        if error is not None and not MENDED.exists():
            raise error(f"the service is down ({number})")
        return number
    finally:
        _note("E")


if __name__ == "__main__":
    jobs = int(sys.argv[1])
    for begin in range(0, jobs, 10_000):
        app.submit_many(call.job(number) for number in range(begin, min(begin + 10_000, jobs)))
    app.close()
