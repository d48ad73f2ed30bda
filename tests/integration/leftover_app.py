"""Jobs that end and leave something running. ``CHAOS_NAMESPACE`` is the namespace. With ``LEFT_AT_IMPORT``, the import
of this module leaves a thread running."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jobledger import NO_RETRY, App, TaskTimedOut

app = App(os.environ.get("CHAOS_NAMESPACE", "leftover"), partitions=2)

#: Seconds for which the things left behind would run.
LEFT_S = 600

if os.environ.get("LEFT_AT_IMPORT"):
    threading.Thread(target=time.sleep, args=(LEFT_S,), name="left-at-import").start()


@app.task
def leave_a_pool() -> None:
    """Leave a thread pool with a busy thread."""
    ThreadPoolExecutor(1, "left-pool").submit(time.sleep, LEFT_S)


@app.task
async def leave_a_thread() -> None:
    """Leave a thread that is not a daemon."""
    threading.Thread(target=time.sleep, args=(LEFT_S,), name="left-thread").start()


@app.task
async def leave_a_handler() -> None:
    """Leave an exit handler."""
    atexit.register(time.sleep, LEFT_S)


@app.task
async def leave_a_process() -> int:
    """Leave a child process that is never joined."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(LEFT_S,), name="left-process")
    process.start()
    assert process.pid is not None
    return process.pid


@app.task(timeout=0.1, retry=NO_RETRY)
async def leave_a_thread_of_the_loop() -> None:
    """Leave a thread of the event loop's own pool."""
    await asyncio.to_thread(time.sleep, LEFT_S)


@app.task
async def leave_a_task_that_will_not_end() -> None:
    """Leave an asyncio task that ignores every cancellation."""

    async def stay() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(LEFT_S)

    app.left = asyncio.create_task(stay())  # type: ignore[attr-defined]  # a reference, so that the task is not collected


async def _fail_in_a_group(mib: int) -> None:
    held = b"x" * (mib << 20)

    async def fail() -> None:
        raise ValueError(len(held))

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())


@app.task(retry=NO_RETRY)
async def make_a_cycle(mib: int) -> None:
    """Raise an error that is part of a reference cycle and holds ``mib`` MiB of memory."""
    await _fail_in_a_group(mib)


@app.task(retry=NO_RETRY, isolation="process")
async def make_a_cycle_in_a_child(mib: int) -> None:
    """Do the same in a child process."""
    await _fail_in_a_group(mib)


@app.task(timeout=1.0, retry=NO_RETRY)
async def block_the_loop(seconds: float) -> str:
    """Block the event loop until long after the time limit."""
    time.sleep(seconds)  # noqa: ASYNC251  # intended
    return "succeeded"


def blocks_until(path: str) -> None:
    """Block the thread until the file exists."""
    end = time.monotonic() + LEFT_S
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.01)


@app.task
async def block_without_a_limit(path: str) -> str:
    """Block the event loop until the file exists, without a time limit."""
    blocks_until(path)
    return "succeeded"


@app.task(timeout=1.0, retry=NO_RETRY)
async def clean_up_after_blocking(seconds: float) -> str:
    """Block the event loop, catch the timeout and return nevertheless."""
    try:
        time.sleep(seconds)  # noqa: ASYNC251  # intended
    except TaskTimedOut:
        return "cleaned up"
    return "succeeded"


@app.task(timeout=3.0, retry=NO_RETRY, isolation="process")
async def block_the_loop_of_a_child(seconds: float) -> str:
    """Block the event loop of a child process, on which no other job runs."""
    time.sleep(seconds)  # noqa: ASYNC251  # intended
    return "succeeded"


@app.task
async def wait(seconds: float) -> str:
    """Wait without blocking, beside the other jobs."""
    await asyncio.sleep(seconds)
    return "succeeded"


def _say_and_sleep(told: int) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    os.write(told, b"d" if handlers == [signal.SIG_DFL, signal.SIG_DFL] else b"w")
    time.sleep(LEFT_S)


def _end_what_it_forked() -> tuple[bool, int | None]:
    """Fork a process in a worker and terminate it. Return whether it had the default signal handlers, and its exit
    code."""
    ours, theirs = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_say_and_sleep, args=(theirs,))
    process.start()
    told = os.read(ours, 1)  # a signal before Python is ready in the child process would be lost
    process.terminate()
    process.join(60)
    code = process.exitcode
    process.kill()
    return told == b"d", code


@app.task
async def end_what_a_coroutine_forked() -> tuple[bool, int | None]:
    """Fork in the worker's main thread, which has a running event loop."""
    return _end_what_it_forked()


@app.task
def end_what_a_thread_forked() -> tuple[bool, int | None]:
    """Fork in another thread of the worker."""
    return _end_what_it_forked()


@app.task(isolation="process")
def end_what_a_child_forked() -> tuple[bool, int | None]:
    """Fork in a child process, which itself ignores SIGTERM."""
    return _end_what_it_forked()
