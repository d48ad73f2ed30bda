"""The child processes of one measurement: starts them with their output in files, watches them, and ends them by their
process ids."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from bench.peers.port import Command, child_env

#: Seconds that processes get to end by themselves after SIGTERM.
STOP_S = 15.0


class Died(RuntimeError):
    """A process has ended unexpectedly, or with an error. The message has the end of its output."""


class Family:
    """Processes with all processes below them."""

    def __init__(self, commands: Sequence[Command], folder: Path, name: str) -> None:
        self._logs = [folder / f"{name}-{number}.log" for number in range(len(commands))]
        self._running: list[subprocess.Popen[bytes]] = []
        for command, path in zip(commands, self._logs, strict=True):
            with open(path, "wb") as log:
                self._running.append(
                    subprocess.Popen(
                        command.argv,
                        env=child_env(command.env, os.environ),
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that were started, without those of the processes below them."""
        return [process.pid for process in self._running]

    def check(self) -> None:
        """Raise `Died` if a process has ended."""
        for process, path in zip(self._running, self._logs, strict=True):
            if process.poll() is not None:
                raise Died(f"{process.args!r} ended with {process.returncode}: {tail(path)}")

    def cpu_s(self) -> float:
        """Return the CPU seconds, user and system, that all processes that still run have used so far."""
        return cpu_s(self.pids)

    def finished(self) -> str:
        """Wait for the end of all processes, and return the end of their output. Raises `Died` for exit codes other
        than 0."""
        for process, path in zip(self._running, self._logs, strict=True):
            if process.wait():
                raise Died(f"{process.args!r} ended with {process.returncode}: {tail(path)}")
        return self.said()

    def said(self) -> str:
        """Return the end of the processes' output."""
        return " / ".join(filter(None, map(tail, self._logs)))

    def stop(self) -> None:
        """Send SIGTERM to the processes, and SIGKILL to those that still run after `STOP_S` seconds and to all
        processes below them."""
        below = [child for process in self._running for child in _below(process.pid)]
        for process in self._running:
            process.terminate()
        _, left = psutil.wait_procs([psutil.Process(p.pid) for p in self._running if p.poll() is None], STOP_S)
        for each in [*left, *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self._running:
            process.wait()


@contextlib.contextmanager
def running(commands: Sequence[Command], folder: Path, name: str) -> Iterator[Family]:
    """Run the processes until the block ends."""
    family = Family(commands, folder, name)
    try:
        yield family
    finally:
        family.stop()


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of these processes and of all processes below them."""
    total = 0.0
    for pid in pids:
        for process in [*_itself(pid), *_below(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def tail(path: Path, size: int = 2_000) -> str:
    """Return the end of a file, for messages: at most ``size`` characters."""
    return path.read_text("utf-8", errors="replace")[-size:].strip()


def _itself(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []
