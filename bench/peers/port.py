"""Defines what a job system must offer to be measured here. `bench.peers.measure` does the same with each system.

Every system has three jobs, which return their argument, so that there is a result to store: ``noop``; ``nap``, which
takes 50 ms; ``stamp``, which writes to a file how long ago it was submitted. Every system also has a program that
submits these jobs (`bench.peers.submitting` is the program's command line).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

ROOT = Path(__file__).resolve().parents[2]
#: Folder of everything that is installed for the peers, separate from everything else; `make clean` removes it.
HOME = ROOT / ".bench-peers"
#: Environment variable with the file to which ``stamp`` jobs write, one number of nanoseconds per line.
STAMPS = "BENCH_STAMPS"


class NotRun(Exception):
    """A peer cannot be measured here. The message says why and what to do."""


class Setting(msgspec.Struct, frozen=True):
    """One way to run a system's workers.

    ``name`` says what is particular about the setting. ``arguments`` are for the worker's command line, ``env`` for its
    environment.
    """

    name: str
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = {}


class Command(msgspec.Struct, frozen=True):
    """A process to start. Its environment is this process's own with ``env``, without the variables that would lead the
    process's Python to our packages."""

    argv: Sequence[str]
    env: Mapping[str, str] = {}


class Progress(msgspec.Struct, frozen=True):
    """The progress of the jobs: the number of ``stored`` results, and the number of jobs that are ``unacknowledged``,
    which includes waiting jobs."""

    stored: int
    unacknowledged: int


class Session(Protocol):
    """A system, with its broker running."""

    @property
    def brokers(self) -> Sequence[int]:
        """The ids of the processes whose CPU time is the broker's; none if the broker runs elsewhere."""

    def fresh(self) -> None:
        """Make the queue empty, and delete all results."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """Return the program that submits, with the arguments that `bench.peers.submitting` reads."""

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return workers that run jobs in ``processes`` processes."""

    def progress(self, jobs: int) -> Progress:
        """Return the progress of ``jobs`` submitted jobs. ``unacknowledged`` must be right only when all results are
        stored."""


class Peer(Protocol):
    """A job system."""

    @property
    def name(self) -> str:
        """The system's name on the command line."""

    @property
    def title(self) -> str:
        """The system's name in the table."""

    @property
    def settings(self) -> Sequence[Setting]:
        """The settings that are tried for no-op jobs and for the time to a start, the best one first."""

    @property
    def naps(self) -> Sequence[Setting]:
        """The settings that are tried for 50 ms jobs with at most 500 at once, the best one first."""

    @property
    def bulk(self) -> bool:
        """Whether the system can submit many jobs faster than one after another."""

    def install(self) -> Mapping[str, str]:
        """Install what the system needs under `HOME`. Return names and versions. Raises `NotRun`."""

    def session(self, folder: Path) -> AbstractContextManager[Session]:
        """Run the system's broker with its data in ``folder`` until the block ends. Raises `NotRun`."""


def child_env(extra: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process: ``inherited`` without the variables of a virtual environment, then
    ``extra``. The child process can import this checkout."""
    dropped = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP")
    kept = {name: value for name, value in inherited.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | dict(extra)


def python(venv: str | None = None) -> str:
    """Return the path of the Python of the private environment ``venv``; None: of the Python that runs this."""
    return sys.executable if venv is None else str(HOME / venv / "bin" / "python")
