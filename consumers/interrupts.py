"""Ends a function that runs in a thread, as far as Python lets anybody: an exception is raised inside it.

It is raised at the next bytecode the thread executes. Code that waits in a call outside of Python (a `time.sleep`, a
socket, a C library) learns of it when that call returns; nothing can be done about that but `isolation="process"`.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from jobledger.consumers.work import Work
from jobledger.errors import TaskCancelled, TaskInterrupted

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Interrupts:
    """Which thread runs which job's code now. An attempt is interrupted once at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: dict[Work, int] = {}

    def call(self, work: Work) -> Any:
        """Run the job's code in this thread; nothing interrupts it any more when this has returned or raised.

        Raises what the code raises. An interrupt that comes when the code has returned already is dropped.
        """
        assert work.plan is not None
        value: Any = None
        returned = False
        error: BaseException | None = None
        try:
            try:
                with self._lock:
                    self._inside[work] = threading.get_ident()
                if work.stop_outcome is not None:  # cancelled before it was here
                    raise TaskCancelled
                value = work.plan.fn(**work.kwargs)
                returned = True
            except BaseException as raised:  # noqa: BLE001  # whatever it is, it is raised again below
                error = raised
            self._leave(work)
        except TaskInterrupted as late:  # there is one at most, so what follows is undisturbed
            self._leave(work)
            if not returned and error is None:
                error = late
        if error is None:
            return value
        try:
            raise error
        finally:
            error = None  # or its frame would hold it, and it the frame

    def _leave(self, work: Work) -> None:
        with self._lock:
            if self._inside.pop(work, None) is not None and work.interrupted is not None:
                # Asked for, and perhaps not raised yet.
                _raise_in(ctypes.c_ulong(threading.get_ident()), None)

    def interrupt(self, work: Work, error: type[TaskInterrupted]) -> bool:
        """Raise ``error`` inside the job's code; False if no thread runs it, or it was
        told already. From any thread."""
        with self._lock:
            thread = self._inside.get(work)
            if thread is None or work.interrupted is not None:
                return False
            work.interrupted = error
            return bool(_raise_in(ctypes.c_ulong(thread), ctypes.py_object(error)))
