"""A worker as the process it is: its signals, its interpreter's settings, and the bound on its end."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from jobledger.config import Settings
from jobledger.consumers.options import WorkerOptions
from jobledger.consumers.worker import LEAVING_S, Worker
from jobledger.process_exit import bound_exit, exit_hard, unbound_exit
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
    worker = Worker(registry, settings, options, must_end_in=exit_hard, has_ended=bound_exit)
    if on_ready is not None:
        on_ready(worker)
    restore = _handle_signals(worker) if threading.current_thread() is threading.main_thread() else lambda: None
    try:
        return run_tuned(worker)
    finally:
        restore()
        unbound_exit()


def run_tuned(worker: Worker) -> int:
    """`Worker.run` with the interpreter's settings of a process that does nothing else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # a job makes hundreds of short-lived objects, none of them in a cycle
    return worker.run()


def _handle_signals(worker: Worker) -> Callable[[], None]:
    received, owner = 0, os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != owner:  # a process that a job has forked: the signal ends it, as it would without a worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        received += 1
        if received >= 3:
            os._exit(128 + number)
        if received == 1:  # a task that blocks the event loop would keep the worker from even beginning to stop
            exit_hard(worker.options.grace + LEAVING_S)
        worker.stop(hurry=received > 1)

    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
