"""The child processes of the demo: starts each with a log file, watches them, and stops them in every case.

Each child process is ended by its process id alone. If the demo itself is killed, a shell ends the child process: the
shell reads from a pipe of which only the demo has the writing end, and this end is closed however the demo ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

#: Seconds that a child may take to end after SIGTERM.
GRACE_S = 20.0
LOG_TAIL_LINES = 15


class ProcessDied(Exception):
    """A child process has ended by itself, or was not ready in time. The message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Child:
    """One child process. ``leash``: the shell that ends the process if the demo is killed; ``log``: file with the
    process's output."""

    name: str
    process: subprocess.Popen[bytes]
    leash: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """Return the last lines of the child process's log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(it wrote nothing)"


class Processes:
    """Starts child processes. As a context manager, stops all of them at the end, the last started first."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._children: list[Child] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str]) -> Child:
        """Start ``argv``, and write its output to ``<logs>/<name>.log``."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as out:
            # A separate session, so that Ctrl-C reaches only the demo, which then stops its child processes in order.
            process = subprocess.Popen(
                list(argv),
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = Child(name, process, _leash(process.pid), log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise `ProcessDied` if a child process has ended."""
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                raise ProcessDied(f"{child.name} ended with {code}; the end of {child.log}:\n{child.tail()}")

    def first_line(self, child: Child, timeout: float) -> dict[str, Any]:
        """Return the JSON object that ``child`` writes as its first line. Raises `ProcessDied`, also after ``timeout``
        seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            first, newline, _ = child.log.read_bytes().partition(b"\n")
            if newline:
                with contextlib.suppress(ValueError):
                    found: dict[str, Any] = json.loads(first)
                    return found
            self.check()
            time.sleep(0.02)
        raise ProcessDied(f"{child.name} was not ready within {timeout:g} s; the end of {child.log}:\n{child.tail()}")

    def stop(self, *names: str) -> None:
        """End these child processes (no names: all) and the processes that they started. All these child processes get
        SIGTERM at the same time. Processes that still run after `GRACE_S` seconds get SIGKILL."""
        ending = [child for child in reversed(self._children) if not names or child.name in names]
        family: list[psutil.Process] = []
        for child in ending:
            _release(child.leash)
            if child.process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Before the child process ends: afterwards its orphans could not be distinguished from other
                    # processes.
                    family += psutil.Process(child.process.pid).children(recursive=True)
                child.process.terminate()
        deadline = time.monotonic() + GRACE_S
        for child in ending:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self._children.remove(child)
        _, alive = psutil.wait_procs(family, timeout=2.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5.0)


def _leash(pid: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -CONT "$1" 2>/dev/null; kill "$1" 2>/dev/null', "sh", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _release(leash: subprocess.Popen[bytes]) -> None:
    # Before the child process ends: afterwards its process id may belong to another process.
    leash.kill()
    leash.communicate()
