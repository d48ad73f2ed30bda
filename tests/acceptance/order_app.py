"""Jobs for the fault tests of order and cancels. The keyed jobs fail and are retried, and each job writes to a side log
what it did.

``python -m tests.acceptance.order_app submit ACCOUNTS EACH`` submits; ``cancel REASON`` cancels the jobs whose ids it
reads.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from jobledger import App, Retry, current_job
from jobledger.client.commands import Job

app = App(os.environ.get("CHAOS_NAMESPACE", "order"), partitions=4)
EXECUTIONS = os.environ.get("CHAOS_EXECUTIONS", os.devnull)


def note(what: str) -> None:
    """Write one line at once, so that it is in the file even if the process dies directly afterwards."""
    file = os.open(EXECUTIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{current_job().job_id} {what}\n".encode())
    finally:
        os.close(file)


RETRY = Retry(max_attempts=4, initial=0.1, factor=1.0)


@app.task(key="account", timeout=20, retry=RETRY)
async def book(account: str, number: int) -> int:
    """Run for some milliseconds. Every seventh job fails in its first attempt, and every fiftieth in each attempt."""
    return await booked(account, number)


@app.task(key="account", timeout=20, retry=RETRY, isolation="process")
async def book_apart(account: str, number: int) -> int:
    """Do the same in a child process."""
    return await booked(account, number)


async def booked(account: str, number: int) -> int:
    """The code of both tasks."""
    attempt = current_job().attempt
    note(f"began {account} {number} {attempt}")
    await asyncio.sleep(random.random() * 0.01)
    if (number % 7 == 3 and attempt == 1) or number % 50 == 49:
        raise ValueError(f"number {number}, attempt {attempt}")
    note(f"ended {account} {number} {attempt}")
    return number


@app.task
async def plain(number: int) -> int:
    """Run for some milliseconds."""
    note(f"began {number}")
    await asyncio.sleep(random.random() * 0.02)
    return number


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["submit", accounts, each]:
            app.submit_many(
                (book_apart if number % 12 == 10 else book).job(f"account-{account}", number)
                for number in range(int(each))
                for account in range(int(accounts))
            )
        case ["plain", count]:
            for handle in app.submit_many(plain.job(n) for n in range(int(count))):
                print(handle.job_id)
        case ["cancel", reason]:
            app.commands.cancel([Job(line.strip()) for line in sys.stdin], reason)
    app.close()
