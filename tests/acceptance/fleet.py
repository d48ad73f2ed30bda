"""Real processes of one namespace, and what tests do with them: start, kill, freeze, stop and restart them.

Each process is ended by the id with which it was started, and none is left when the fleet is closed. `EmbeddedKafka`
stops and kills the broker. The module knows the commands, and nothing of the code behind them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from jobledger.kafka.embedded import EmbeddedKafka
from tests.acceptance.audit import Window
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TARGET = "tests/acceptance/chaos_app.py:app"
ROLES = ("worker", "coordinator", "materializer")
#: Seconds in which a process must have stopped after SIGTERM, and must have ended after SIGKILL.
GRACE_S, GONE_S = 120.0, 10.0 * PATIENCE


class FleetError(AssertionError):
    """A process did something that it must not do. The message has the end of its output."""


def now_ms() -> int:
    """Return the time of this machine's clock, which is also the embedded broker's."""
    return time.time_ns() // 1_000_000


@dataclass(eq=False)
class Member:
    """A member of the fleet: the same role and options, for several processes one after the other."""

    role: str
    name: str
    argv: list[str]
    log: Path
    cwd: Path = ROOT
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True
    lives: int = 0
    frozen_at: int | None = None
    codes: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Return the id of the running process. Raises `FleetError` if there is none."""
        if self.process is None:
            raise FleetError(f"{self.name} does not run")
        return self.process.pid

    def output(self) -> str:
        """Return all output of all processes of this member."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 25) -> str:
        """Return the end of the output."""
        return "\n".join(self.output().splitlines()[-lines:])


class Fleet:
    """The processes of one namespace with one broker. ``folder`` has the logs, the status table and the side log."""

    def __init__(self, folder: Path, bootstrap: str, namespace: str, *, seed: str = "0", target: str = TARGET) -> None:
        self.folder, self.bootstrap, self.namespace, self.target = folder, bootstrap, namespace, target
        self.status = folder / "status.db"
        self.executions = folder / "executions.log"
        folder.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JOBLEDGER_", "CHAOS_"))}
        self.environ = {
            **kept,
            "JOBLEDGER_BOOTSTRAP": bootstrap,
            "JOBLEDGER_STATUS_URL": f"sqlite:///{self.status}",
            "JOBLEDGER_HOME": str(folder / "home"),
            "CHAOS_NAMESPACE": namespace,
            "CHAOS_SEED": seed,
            "CHAOS_EXECUTIONS": str(self.executions),
            "PYTHONUNBUFFERED": "1",
            # A crash inside the C clients must leave a trace in the log.
            "PYTHONFAULTHANDLER": "1",
        }
        self.members: list[Member] = []
        self.windows: list[Window] = []
        self.did: Counter[str] = Counter()
        self.deaths: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- processes ----------------------------------------------------------------------------------------------------

    def start(
        self, role: str, *options: str, name: str | None = None, target: str | None = None, cwd: Path = ROOT
    ) -> Member:
        """Start a new member with the ``options`` of its command. ``cwd``: the checkout whose code it runs."""
        name = name or f"{role}-{sum(m.role == role for m in self.members) + 1}"
        argv = [sys.executable, "-m", "jobledger", role, target or self.target, *options]
        member = Member(role, name, argv, self.folder / f"{name}.log", cwd)
        self.members.append(member)
        self.restart(member)
        return member

    def restart(self, member: Member) -> None:
        """Start a member that does not run."""
        with member.log.open("ab") as out:
            member.lives += 1
            out.write(f"--- life {member.lives} at {now_ms()}\n".encode())
            out.flush()
            member.process = subprocess.Popen(
                member.argv,
                cwd=member.cwd,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        member.wanted = True

    def tend(self) -> None:
        """Start members again that were killed or ended by themselves, as a supervisor does, and note their exit codes."""
        for member in self.members:
            if member.frozen_at is not None:
                continue
            code = None if member.process is None else member.process.poll()
            if code is not None:
                member.codes.append(code)
                member.process = None
                if member.wanted:
                    self.deaths.append((member.name, code))
                    if len([d for d in self.deaths if d[0] == member.name]) > 20:
                        raise FleetError(f"{member.name} keeps dying ({code}); the end of its output:\n{member.tail()}")
            if member.process is None and member.wanted:
                self.restart(member)

    # -- faults -------------------------------------------------------------------------------------------------------

    def kill(self, member: Member) -> None:
        """Kill a process with SIGKILL. Its child processes must notice that by themselves."""
        self._signal(member, signal.SIGKILL)
        self._reap(member, GONE_S)
        self.did[f"{member.role} killed"] += 1

    def freeze(self, member: Member) -> None:
        """Pause a process with SIGSTOP."""
        member.frozen_at = now_ms()
        self._signal(member, signal.SIGSTOP)

    def thaw(self, member: Member) -> None:
        """Let a paused process continue (SIGCONT), and keep the time of the pause as a `Window`."""
        assert member.frozen_at is not None
        self.windows.append(Window(member.role, member.frozen_at, now_ms(), member.pid))
        self._signal(member, signal.SIGCONT)
        member.frozen_at = None
        self.did[f"{member.role} frozen"] += 1

    def stop(self, member: Member, timeout: float = GRACE_S) -> int:
        """Stop a process with SIGTERM, wait for its end and return its exit code. Raises `FleetError` after ``timeout``
        seconds."""
        member.wanted = False
        self._signal(member, signal.SIGTERM)
        try:
            code = self._reap(member, timeout)
        except subprocess.TimeoutExpired:
            raise FleetError(f"{member.name} did not stop within {timeout:g} s:\n{member.tail()}") from None
        self.did[f"{member.role} stopped"] += 1
        return code

    def outage(self, kafka: EmbeddedKafka, seconds: float) -> None:
        """Stop the broker, and start it again after this time."""
        began = now_ms()
        kafka.stop()
        until = time.monotonic() + seconds
        while time.monotonic() < until:  # the outage must last as long as requested
            self.tend()
            time.sleep(0.1)
        kafka.start()
        self.windows.append(Window("broker", began, now_ms()))
        self.did["broker stopped"] += 1

    def _signal(self, member: Member, number: int) -> None:
        process = member.process
        if process is not None and process.poll() is None:
            os.kill(process.pid, number)

    def _reap(self, member: Member, timeout: float) -> int:
        assert member.process is not None
        code = member.process.wait(timeout)
        member.codes.append(code)
        member.process = None
        return code

    # -- questions ----------------------------------------------------------------------------------------------------

    def of(self, role: str) -> list[Member]:
        """Return the members with this role."""
        return [m for m in self.members if m.role == role]

    def lines(self) -> list[str]:
        """Return the complete lines of the side log, which the jobs' code writes."""
        text = self.executions.read_text() if self.executions.exists() else ""
        return text.rpartition("\n")[0].splitlines()

    def until(self, check: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll ``check`` and tend the fleet until ``check`` is true. Raises `FleetError` after ``timeout`` seconds
        times `PATIENCE`, with ``what`` and the ends of all outputs."""
        deadline = time.monotonic() + PATIENCE * timeout
        while not check():
            self.tend()
            if time.monotonic() > deadline:
                tails = "\n".join(f"== {m.name} (lives {m.lives}, codes {m.codes})\n{m.tail(12)}" for m in self.members)
                raise FleetError(f"{what}: not within {PATIENCE * timeout:g} s\n{tails}")
            time.sleep(0.1)

    def run(self, *words: str, timeout: float = 60.0 * PATIENCE) -> tuple[int, Any, str]:
        """Run ``jobledger WORDS --json`` to its end. Return its exit code, its output as JSON (None: no output) and its
        errors."""
        argv = [sys.executable, "-m", "jobledger", *words, "--json"]
        done = subprocess.run(
            argv, cwd=ROOT, env=self.environ, capture_output=True, timeout=timeout, text=True, check=False
        )
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every process that was started here, with its child processes."""
        family: list[psutil.Process] = []
        for member in self.members:
            if member.process is None:
                continue
            member.wanted = False
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(member.process.pid).children(recursive=True)
            self._signal(member, signal.SIGCONT)
            self._signal(member, signal.SIGTERM)
        deadline = time.monotonic() + 15.0
        for member in self.members:
            if member.process is None:
                continue
            try:
                self._reap(member, max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._signal(member, signal.SIGKILL)
                self._reap(member, GONE_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5.0)


@contextlib.contextmanager
def paused(fleet: Fleet, member: Member, seconds: float) -> Iterator[None]:
    """Pause a member until the end of the block, and at least for this time."""
    fleet.freeze(member)
    until = time.monotonic() + seconds
    try:
        yield
        while time.monotonic() < until:
            fleet.tend()
            time.sleep(0.05)
    finally:
        fleet.thaw(member)


def wait_until_serving(fleet: Fleet, worker: Member) -> None:
    """Wait until a worker serves its queues. Before that it does not react to signals."""
    fleet.until(lambda: "serves" in worker.output().rpartition("--- life ")[2], 30.0, f"{worker.name} that serves")
