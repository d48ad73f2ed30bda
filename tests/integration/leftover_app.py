"""Jobs that end and leave something behind. ``CHAOS_NAMESPACE``: the namespace."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jobledger import NO_RETRY, App

app = App(os.environ.get("CHAOS_NAMESPACE", "leftover"), partitions=2)

#: Seconds that what is left behind would take.
LEFT_S = 120


@app.task
def leave_a_pool() -> None:
    """A pool whose thread is busy."""
    ThreadPoolExecutor(1, "left-pool").submit(time.sleep, LEFT_S)


@app.task
async def leave_a_thread() -> None:
    """A thread that is no daemon."""
    threading.Thread(target=time.sleep, args=(LEFT_S,), name="left-thread").start()


@app.task
async def leave_a_handler() -> None:
    """A handler of the interpreter's end."""
    atexit.register(time.sleep, LEFT_S)


@app.task
async def leave_a_process() -> int:
    """A child process that nobody joins."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(LEFT_S,), name="left-process")
    process.start()
    assert process.pid is not None
    return process.pid


@app.task(timeout=0.1, retry=NO_RETRY)
async def leave_a_thread_of_the_loop() -> None:
    """A thread of the loop's own pool."""
    await asyncio.to_thread(time.sleep, LEFT_S)


@app.task
async def leave_a_task_that_will_not_end() -> None:
    """A task of asyncio's that swallows every cancellation."""

    async def stay() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(LEFT_S)

    app.left = asyncio.create_task(stay())  # type: ignore[attr-defined]  # so that it is kept


def _say_and_sleep(told: int) -> None:
    os.write(told, b"x")
    time.sleep(LEFT_S)


@app.task
async def end_what_it_forked() -> int | None:
    """`Process.terminate` of a process that was forked in a worker; its exit code."""
    ours, theirs = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_say_and_sleep, args=(theirs,))
    process.start()
    await asyncio.to_thread(os.read, ours, 1)  # a signal before Python is set up in the child would be lost
    process.terminate()
    await asyncio.to_thread(process.join, 20)
    code = process.exitcode
    process.kill()
    return code
