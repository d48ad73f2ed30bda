"""What a job system must offer to be measured here; `bench.peers.measure` does the same with each.

Every system comes with three jobs, which return what they were given, so that there is a result to keep: ``noop``;
``nap``, which takes 50 ms; ``stamp``, which writes down how long ago it was submitted. And with a program that submits
them (`bench.peers.submitting` is its command line).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

ROOT = Path(__file__).resolve().parents[2]
#: What is installed for the peers, apart from everything else; `make clean` removes it.
HOME = ROOT / ".bench-peers"
#: Where ``stamp`` jobs write, one number of nanoseconds a line.
STAMPS = "BENCH_STAMPS"


class NotRun(Exception):
    """Why a peer cannot be measured here, and the way out."""


class Setting(msgspec.Struct, frozen=True):
    """One way to run a system's workers.

    ``name`` says what is particular about it. ``arguments`` go to the worker's command
    line, ``env`` to its environment.
    """

    name: str
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = {}


class Command(msgspec.Struct, frozen=True):
    """A process to start: ``env`` beside this process's own, minus what would lead its Python to our packages."""

    argv: Sequence[str]
    env: Mapping[str, str] = {}


class Progress(msgspec.Struct, frozen=True):
    """How far the jobs are: ``stored`` results, and jobs that are ``unacknowledged``, waiting ones included."""

    stored: int
    unacknowledged: int


class Session(Protocol):
    """A system with its broker running."""

    @property
    def brokers(self) -> Sequence[int]:
        """Process ids whose CPU time is the broker's; none if it runs elsewhere."""

    def fresh(self) -> None:
        """An empty queue and no results."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """The program that submits, with the arguments that `bench.peers.submitting` reads."""

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Workers in ``processes`` processes that execute jobs."""

    def progress(self, jobs: int) -> Progress:
        """How far ``jobs`` submitted jobs are. ``unacknowledged`` need be right only once all results are stored."""


class Peer(Protocol):
    """A job system."""

    @property
    def name(self) -> str:
        """On the command line."""

    @property
    def title(self) -> str:
        """In the table."""

    @property
    def settings(self) -> Sequence[Setting]:
        """Those tried for no-op jobs and for the time to a start, the best one first."""

    @property
    def naps(self) -> Sequence[Setting]:
        """Those tried for 50 ms jobs with at most 500 at once, the best one first."""

    @property
    def bulk(self) -> bool:
        """Whether it can submit many jobs faster than one after another."""

    def install(self) -> Mapping[str, str]:
        """Install what it needs under `HOME`; returns names and versions. Raises `NotRun`."""

    def session(self, folder: Path) -> AbstractContextManager[Session]:
        """Its broker, running with its data in ``folder`` until the block ends. Raises `NotRun`."""


def child_env(extra: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child: ``inherited`` without a virtual environment's traces, this checkout importable."""
    dropped = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP")
    kept = {name: value for name, value in inherited.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | dict(extra)


def python(venv: str | None = None) -> str:
    """The Python of the private environment ``venv``, or the one that runs this."""
    return sys.executable if venv is None else str(HOME / venv / "bin" / "python")
