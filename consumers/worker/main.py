"""Runs a worker as a process: handles signals, sets up the interpreter, and limits how long a stop may take."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from jobledger.config import Settings
from jobledger.consumers.worker.options import WorkerOptions
from jobledger.consumers.worker.worker import LEAVING_S, Worker
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.process.process_exit import bound_exit, exit_hard, unbound_exit
from jobledger.process.signals import SignalHandlers


def run_worker(
    registry: TaskRegistry,
    settings: Settings,
    options: WorkerOptions | None = None,
    *,
    on_ready: Callable[[Worker], None] | None = None,
) -> int:
    """Run a worker in this process until SIGTERM or SIGINT, and return the exit code.

    A second signal ends the grace time, and a third signal ends the process. Outside the main thread no signals are
    handled.
    ``on_ready(worker)`` is called before the worker starts, for example to use its `Worker.health`. Raises what
    `Worker.run` raises, and `ConfigError` if the options do not fit the app.
    """
    worker = Worker(registry, settings, options, must_end_in=exit_hard, has_ended=bound_exit)
    if on_ready is not None:
        on_ready(worker)
    main = threading.current_thread() is threading.main_thread()
    try:
        with _stopped_by_signals(worker) if main else contextlib.nullcontext():
            return run_tuned(worker)
    finally:
        unbound_exit()


def run_tuned(worker: Worker) -> int:
    """Call `Worker.run` with interpreter settings for a process that only runs a worker. Return the exit code."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # a job creates hundreds of short-lived objects, none of them in a cycle
    return worker.run()


def _stopped_by_signals(worker: Worker) -> SignalHandlers:
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received >= 3:
            os._exit(128 + number)
        if received == 1:  # a task that blocks the event loop could keep the worker from stopping at all
            exit_hard(worker.options.grace + LEAVING_S)
        worker.stop(hurry=received > 1)

    return SignalHandlers((signal.SIGTERM, signal.SIGINT), handle)
