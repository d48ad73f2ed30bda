"""Bounds the time from the end of a process's own work until the interpreter has exited.

At exit Python waits for what the app's code has left behind: threads, pools, ``atexit`` handlers, child processes of
``multiprocessing``. All of them together get `EXIT_S` seconds. After that a daemon thread logs what still runs and
exits with the process's exit code. A daemon thread cannot run while other code holds the interpreter's lock, or while
modules are being torn down. For these cases `faulthandler`'s native timer is the fallback: it exits with code 1 and
prints the stacks of all threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import traceback
from types import FrameType
from typing import Any

from jobledger.process.logger import get_logger

LOG = get_logger("jobledger")

#: Seconds in which the threads, pools and child processes of the app may end. Longer than a client waits for
#: acknowledgements when it is closed.
EXIT_S = 8.0
#: Seconds after that until a process that can no longer run Python code is ended.
HARD_S = 2.0

_NAME = "jobledger-exit"
_lock = threading.Lock()
_cancelled: threading.Event | None = None


def bound_exit(code: int, seconds: float = EXIT_S) -> None:
    """Exit with ``code`` in ``seconds``, unless the process has exited by then. A second call replaces the first.

    Call this when the process has finished its work. Child processes that ``multiprocessing`` would wait for are killed
    as well: forked ones hold copies of this process's sockets.
    """
    global _cancelled
    unbound_exit()
    cancelled = threading.Event()
    thread = threading.Thread(target=_exit_late, args=(code, seconds, cancelled), name=_NAME, daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads can be started: the native timer remains
        thread.start()
    with _lock:
        _cancelled = cancelled
    exit_hard(seconds + HARD_S)


def unbound_exit() -> None:
    """Remove the bound: this process continues with other work."""
    global _cancelled
    with _lock:
        cancelled, _cancelled = _cancelled, None
    if cancelled is not None:
        cancelled.set()
    faulthandler.cancel_dump_traceback_later()


def exit_hard(seconds: float) -> None:
    """Exit with code 1 and the stacks of all threads on standard error in ``seconds``, unless the process has exited by
    then. Needs no interpreter lock. Replaces an earlier call."""
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
    except Exception:  # noqa: BLE001  # standard error is closed, or is not a file: exit without the stacks
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback_later(seconds, exit=True, file=os.open(os.devnull, os.O_WRONLY))


def _exit_late(code: int, seconds: float, cancelled: threading.Event) -> None:
    if cancelled.wait(seconds):
        return
    children: list[Any] = []
    with contextlib.suppress(Exception):
        children = _children()
        _say(
            f"the process exits with code {code} and does not wait any longer than {seconds:g} s for what the app's code "
            f"left behind: {left_behind(children)}"
        )
    for child in children:
        with contextlib.suppress(Exception):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    if logging.getLogger().handlers:
        LOG.warning("%s", text)
    else:  # a command that does not configure logging
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _children() -> list[Any]:
    """Live child processes of ``multiprocessing``."""
    used = sys.modules.get("multiprocessing.process")
    return [] if used is None else list(used.active_children())


def left_behind(children: list[Any]) -> str:
    """Return a description of what keeps this process alive."""
    # A pool's threads may be daemons, because the thread that created them is a daemon. Python still waits for them.
    pools = sys.modules.get("concurrent.futures.thread")
    pooled, waits = getattr(pools, "_threads_queues", ()), getattr(getattr(pools, "_worker", None), "__code__", None)
    main, frames = threading.main_thread(), sys._current_frames()
    idle = {
        ident for ident, frame in frames.items() if frame.f_code is waits
    }  # these threads wait for work, and end when Python asks them to
    remaining = [
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread is not main
        and (not thread.daemon or thread in pooled)
        and thread.ident not in idle
        and not thread.name.startswith("jobledger-")  # Jobledger's own threads end by themselves
    ]
    remaining += [f"child process {child.name} (pid {child.pid})" for child in children if not child.daemon]
    return ", ".join(remaining) or _what_runs_in(frames.get(main.ident or 0))


def _what_runs_in(frame: FrameType | None) -> str:
    if frame is None:
        return "a handler of atexit"
    last = traceback.extract_stack(frame)[-1]
    return f"the main thread, in {last.name}() at {last.filename}:{last.lineno}"
