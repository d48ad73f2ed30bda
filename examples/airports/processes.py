"""The child processes of the demo: started with a log file each, watched, and stopped again whatever happens.

Each child is ended by its process id alone. Should the demo itself be killed, a shell that waits for the far end of a
pipe of ours ends the child (the pipe closes with its last holder, however that one ends).
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
    """A child ended by itself; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Child:
    """One process of ours. ``log`` has what it wrote."""

    name: str
    process: subprocess.Popen[bytes]
    leash: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The last lines of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(it wrote nothing)"


class Processes:
    """Starts children; as a context manager it stops them all, the last started first."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._children: list[Child] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str]) -> Child:
        """Start ``argv``; what it prints goes to ``<logs>/<name>.log``."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as out:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops its children in order.
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
        """Raise `ProcessDied` if a child has ended."""
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                raise ProcessDied(f"{child.name} ended with {code}; the end of {child.log}:\n{child.tail()}")

    def first_line(self, child: Child, timeout: float) -> dict[str, Any]:
        """The JSON object that ``child`` writes as its first line. Raises `ProcessDied`, also after ``timeout`` s."""
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
        """End these children (none named: all) and what they started: politely, all at the same time, then by force."""
        ending = [child for child in reversed(self._children) if not names or child.name in names]
        family: list[psutil.Process] = []
        for child in ending:
            _release(child.leash)
            if child.process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Taken before it ends: an orphan could no longer be told from a stranger.
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
    # Before its process ends: afterwards the number may be a stranger's.
    leash.kill()
    leash.communicate()
