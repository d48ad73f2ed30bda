"""A worker as the process it is: its signals, its interpreter's settings, and the bound on its end."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from jobledger.config import Settings
from jobledger.consumers.options import WorkerOptions
from jobledger.consumers.worker import LEAVING_S, Worker
from jobledger.task_registry import Registry


def run_worker(
    registry: Registry,
    settings: Settings,
    options: WorkerOptions | None = None,
    *,
    on_ready: Callable[[Worker], None] | None = None,
) -> int:
    """Run a worker in this process until SIGTERM or SIGINT; the exit code.

    A second signal ends the grace time, a third one the process. ``on_ready(worker)`` is called before it starts, for
    those who want its `Worker.health`. Raises what `Worker.run` raises.
    """
    worker = Worker(registry, settings, options, must_end_in=_end_at_last)
    if on_ready is not None:
        on_ready(worker)
    restore = _handle_signals(worker) if threading.current_thread() is threading.main_thread() else lambda: None
    try:
        return run_tuned(worker)
    finally:
        restore()
        faulthandler.cancel_dump_traceback_later()


def run_tuned(worker: Worker) -> int:
    """`Worker.run` with the interpreter's settings of a process that does nothing else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # a job makes hundreds of short-lived objects, none of them in a cycle
    return worker.run()


def _handle_signals(worker: Worker) -> Callable[[], None]:
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received >= 3:
            os._exit(128 + number)
        if received == 1:  # a task that blocks the event loop would keep the worker from even beginning to stop
            _end_at_last(worker.options.grace + LEAVING_S)
        worker.stop(hurry=received > 1)

    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _end_at_last(seconds: float) -> None:
    """End the process with exit code 1 and the stacks of its threads on stderr, unless it has ended by then.

    The watch needs no interpreter lock: neither a task that holds it nor a client that does not return keeps a stopping
    worker alive. What was not committed is taken over like a killed worker's.
    """
    with contextlib.suppress(Exception):  # stderr may be no file
        faulthandler.dump_traceback_later(seconds, exit=True)
