"""Supervision: the pure rules for restarts, and restarts of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.streams.supervisor import LEASH, Child, Restarts, Supervisor, how

WAIT_S = 60.0


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-c", code)


#: Code of a child that prints its pid, waits, and exits with 0 when it is asked to stop.
PATIENT = "import os, signal, sys\nsignal.signal(15, lambda *_: sys.exit(0))\nprint('up', os.getpid())\nwhile True: signal.pause()"


class Running:
    """A supervisor in a thread of this test. ``said``: its output lines, with the names of the children."""

    def __init__(self, *children: Child, restarts: Callable[[], Restarts] = Restarts, grace: float = 10.0) -> None:
        self.said: list[tuple[str, str]] = []
        self._new = threading.Condition()
        self.supervisor = Supervisor(children, self._say, restarts=restarts, grace=grace)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.code = self.supervisor.run()

    def _say(self, name: str, line: str) -> None:
        with self._new:
            self.said.append((name, line))
            self._new.notify_all()

    def wait_for(self, wanted: Callable[[list[tuple[str, str]]], bool]) -> None:
        with self._new:
            assert self._new.wait_for(lambda: wanted(self.said), WAIT_S), self.said

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[1]) for who, line in self.said if who == name and line.startswith("up ")]

    def end(self) -> int | None:
        self.supervisor.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.code


@given(st.lists(st.floats(0, 9.9), min_size=1, max_size=20), st.integers(1, 10))
def test_a_child_that_dies_quickly_is_restarted_a_bounded_number_of_times(lives: list[float], most: int) -> None:
    """A child is started again at most ``most`` times in a row. The pauses never become shorter, and are at most the
    cap."""
    policy = Restarts(most=most)
    pauses = [policy.died(lived) for lived in lives]
    given_up = [p for p in pauses[:most] if p is None]
    assert not given_up
    assert all(p is None for p in pauses[most:])
    kept = [p for p in pauses if p is not None]
    assert kept == sorted(kept)
    assert all(0 < p <= policy.cap for p in kept)


@given(st.lists(st.floats(10, 1e6), max_size=50))
def test_after_a_long_life_earlier_deaths_do_not_count(lives: list[float]) -> None:
    """A child that lives long between its deaths is started again forever, each time after the first pause."""
    policy = Restarts(most=1)
    assert [policy.died(lived) for lived in lives] == [policy.initial] * len(lives)


def test_the_pause_after_thousands_of_deaths_is_the_cap() -> None:
    """The computation of the pause does not overflow."""
    policy = Restarts(most=10**9, deaths=5_000)
    assert policy.died(0.0) == policy.cap


def test_output_has_the_childs_name_and_a_stop_ends_all_children() -> None:
    """Lines of stdout and stderr are passed on with the child's name. After a stop all children end, and the exit code
    is 0."""
    both = Running(
        Child("a", python(PATIENT)), Child("b", python("import sys; print('err', file=sys.stderr)\n" + PATIENT))
    )
    both.wait_for(lambda lines: bool(both.pids("a")) and bool(both.pids("b")) and ("b", "err") in lines)
    assert both.end() == 0
    assert not any(psutil.pid_exists(pid) for name in "ab" for pid in both.pids(name))


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_in_the_main_thread_a_signal_stops_the_children(number: signal.Signals) -> None:
    """Afterwards the signals are handled as before."""
    supervisor = Supervisor(
        [Child("a", python(PATIENT))],
        lambda name, line: os.kill(os.getpid(), number) if line.startswith("up ") else None,
    )
    inherited = signal.signal(number, signal.SIG_DFL)  # under `nohup` this process ignores SIGHUP
    try:
        before = [signal.getsignal(each) for each in NUMBERS]
        assert supervisor.run() == 0
        assert [signal.getsignal(each) for each in NUMBERS] == before
    finally:
        signal.signal(number, inherited)


def test_an_ignored_hangup_stays_ignored() -> None:
    """As ``nohup`` sets it. The other signals stop the children."""
    seen: list[object] = []

    def say(name: str, line: str) -> None:
        if line.startswith("up "):
            seen.append(signal.getsignal(signal.SIGHUP))
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Supervisor([Child("a", python(PATIENT))], say).run() == 0
        assert (seen, signal.getsignal(signal.SIGHUP)) == ([signal.SIG_IGN], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_child_is_started_again() -> None:
    """After kill -9 a new child is started, and the signal is in the output. The other child is not restarted."""
    both = Running(Child("a", python(PATIENT)), Child("b", python(PATIENT)), restarts=lambda: Restarts(initial=0.01))
    both.wait_for(lambda _: len(both.pids("a")) == 1 and len(both.pids("b")) == 1)
    os.kill(both.pids("a")[0], signal.SIGKILL)
    both.wait_for(lambda _: len(both.pids("a")) == 2)
    assert both.end() == 0
    assert len(both.pids("b")) == 1
    assert any("signal SIGKILL" in line for who, line in both.said if who == Supervisor.NAME)


def test_a_child_that_keeps_dying_ends_all_children() -> None:
    """After too many quick deaths the other children are stopped, and the exit code is not 0."""
    both = Running(
        Child("bad", python("raise SystemExit(3)")),
        Child("good", python(PATIENT)),
        restarts=lambda: Restarts(most=2, initial=0.01, healthy=600.0),  # each death counts as a quick one
    )
    both.thread.join(WAIT_S)
    assert both.code == 1
    lines = [line for who, line in both.said if who == Supervisor.NAME]
    assert [line for line in lines if "exit code 3" in line and "not started again" in line]
    assert not any(psutil.pid_exists(pid) for pid in both.pids("good"))


def test_a_child_that_the_cluster_refuses_ends_all_children_at_once() -> None:
    """A child with exit code 77 is not restarted. The supervisor stops the other children and exits with the same
    code."""
    running = Running(Child("refused", python("raise SystemExit(77)")), Child("other", python(PATIENT)))
    running.thread.join(WAIT_S)
    assert running.code == 77
    assert sum("the Kafka cluster refused it" in line for _, line in running.said) == 1
    assert not any("starting it again" in line for _, line in running.said)


def test_a_restart_that_was_asked_for_counts_as_no_death() -> None:
    """`restart` stops a child cleanly and starts it again at once, also if the policy allows no death."""
    one = Running(Child("a", python(PATIENT)), restarts=lambda: Restarts(most=0))
    one.wait_for(lambda _: len(one.pids("a")) == 1)
    one.supervisor.restart(["a"])
    one.wait_for(lambda _: len(one.pids("a")) == 2)
    assert one.end() == 0


def test_a_child_that_does_not_stop_is_killed() -> None:
    """A child that ignores the request to stop is killed after the grace time, and the output says so."""
    one = Running(
        Child(
            "a", python("import signal\nsignal.signal(15, signal.SIG_IGN)\nprint('up 0')\nwhile True: signal.pause()")
        ),
        grace=0.2,
    )
    one.wait_for(lambda _: bool(one.pids("a")))
    assert one.end() == 0
    assert any("did not stop within" in line for _, line in one.said)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_stop_when_their_supervisor_is_gone(number: signal.Signals, tmp_path: Path) -> None:
    """After kill -9 of the supervisor no child remains: the children stop as after a request to stop."""
    mark = tmp_path / "stopped"
    child = (
        "import os, pathlib, signal, sys\n"
        "from jobledger.streams.supervisor import obey_leash\n"
        f"def stop(*_): pathlib.Path({str(mark)!r}).write_text('cleanly'); sys.exit(0)\n"
        "signal.signal(15, stop)\nobey_leash()\nprint('up', os.getpid())\nwhile True: signal.pause()"
    )
    parent = (
        "import sys\nfrom jobledger.streams.supervisor import Child, Supervisor\n"
        f"c = Child('c', (sys.executable, '-u', '-c', {child!r}))\n"
        "sys.exit(Supervisor([c], lambda name, line: print(line, flush=True)).run())"
    )
    with subprocess.Popen(python(parent), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline().split()[1]))
        process.send_signal(number)
        assert process.wait(WAIT_S) == (0 if number is signal.SIGTERM else -number)
        psutil.wait_procs([orphan], WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mark.read_text() == "cleanly"
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_the_variable_of_the_leash_does_not_begin_like_a_setting() -> None:
    """An unknown variable ``JOBLEDGER_*`` would be refused."""
    assert not LEASH.startswith("JOBLEDGER_")


def test_the_end_of_a_process_is_described_by_exit_code_or_signal() -> None:
    """A signal is shown with its name."""
    assert [how(0), how(3), how(-9)] == ["exit code 0", "exit code 3", "signal SIGKILL"]


def test_if_output_cannot_be_passed_on_all_children_are_stopped_cleanly() -> None:
    """The supervisor still reads the children's pipes, asks the children to stop, and ends with the error of the
    output."""
    chatty = (
        "import signal, sys\n"
        "signal.signal(15, lambda *_: (sys.stdout.write('x' * 1_000_000), sys.exit(0)))\n"
        "print('up')\n"
        "while True: signal.pause()"
    )
    names: list[str] = []

    def say(name: str, line: str) -> None:
        names.append(name)
        raise BrokenPipeError

    made = Supervisor([Child("a", python(chatty)), Child("b", python(chatty))], say, grace=WAIT_S)
    began = time.monotonic()
    with pytest.raises(BrokenPipeError):
        made.run()
    assert time.monotonic() - began < WAIT_S  # no child was killed
    assert len(names) == 1
