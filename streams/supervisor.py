"""Runs child processes: starts them, passes their output on with their names, restarts those that die, and stops them
cleanly.

The supervisor gets the commands as arguments and does not know what the children do. When the supervisor's process
ends, even by kill -9, the children notice that through a pipe, the *leash* (`obey_leash`), and stop as after SIGTERM.
So no orphan continues to run beside a child of the next supervisor.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field

from jobledger.process.signals import SignalHandlers
from jobledger.process.wording import counted

#: Default time in seconds between asking a child to stop and killing it. This time is longer than the worker's own
#: grace time.
DEFAULT_GRACE_S = 45.0
#: Seconds that a child may take to stop by itself after its parent has ended.
ORPHAN_GRACE_S = 60.0
#: Exit code of a child that the Kafka cluster refused (EX_NOPERM of sysexits.h): the cluster would refuse another
#: start, too.
DENIED = 77
#: Environment variable with the file descriptor of the leash. Its name is not ``JOBLEDGER_*``, as it is not a setting.
LEASH = "_JOBLEDGER_LEASH"


@dataclass(frozen=True, slots=True)
class Child:
    """A process to keep running. ``name``: passed to `Say` with its output. ``command``: its argument list."""

    name: str
    command: tuple[str, ...]


@dataclass(slots=True)
class Restarts:
    """Decides when to start a child again. Pure; all times are in seconds.

    Pauses double from ``initial`` to ``cap``. If a child ran for at least ``healthy`` seconds, earlier deaths no longer
    count. After more than ``most`` deaths in a row the child is not restarted.
    """

    most: int = 5
    initial: float = 0.5
    cap: float = 10.0
    healthy: float = 10.0
    deaths: int = 0

    def died(self, lived: float) -> float | None:
        """Count a death after ``lived`` seconds. Return the seconds to wait before the next start; None: give up."""
        self.deaths = 1 if lived >= self.healthy else self.deaths + 1
        if self.deaths > self.most:
            return None
        return float(min(self.cap, self.initial * 2.0 ** min(self.deaths - 1, 30)))


#: Called with a child's name and one line of its output, or with the supervisor's name and a message of its own.
Say = Callable[[str, str], None]


@dataclass(slots=True)
class _Running:
    """One child's present state. ``process``: None while the child does not run. ``start_at``: when to start it,
    ``kill_at``: when to kill it, as times of `time.monotonic` in seconds; None: not planned. ``again``: whether the
    child is being stopped for a restart."""

    child: Child
    restarts: Restarts
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float | None = 0.0
    kill_at: float | None = None
    again: bool = False
    readers: list[threading.Thread] = field(default_factory=list)


class Supervisor:
    """Keeps children running until it is stopped or one of them dies too often.

    ``say`` is called from several threads, one call at a time. ``restarts`` creates each child's policy. ``grace``:
    seconds from the request to stop to the kill. If one child keeps dying, all children are stopped: an incomplete
    stream processor would look as if it worked. All children are also stopped after an `OSError` of ``say``, because
    their output is lost.
    """

    NAME = "supervisor"

    def __init__(
        self,
        children: Iterable[Child],
        say: Say,
        *,
        restarts: Callable[[], Restarts] = Restarts,
        grace: float = DEFAULT_GRACE_S,
    ) -> None:
        self._running = {child.name: _Running(child, restarts()) for child in children}
        self._output, self._output_lock = say, threading.Lock()
        self._output_error: OSError | None = None
        self._grace = grace
        # Signal handlers put messages into this queue, so its `put` must be reentrant. `SimpleQueue.put` is reentrant,
        # `Queue.put` is not.
        self._inbox: queue.SimpleQueue[tuple[str, str, int]] = queue.SimpleQueue()
        self._stopping = False
        self._code = 0
        self._leash = -1

    def stop(self) -> None:
        """Ask for a clean stop; a second call kills the children. Any thread or signal handler."""
        self._inbox.put(("stop", "", 0))

    def restart(self, names: Sequence[str]) -> None:
        """Stop these children cleanly and start them again at once. Unknown names are ignored. The restart does not
        count as a death, and earlier deaths no longer count. Any thread."""
        for name in names:
            if name in self._running:
                self._inbox.put(("restart", name, 0))

    def run(self) -> int:
        """Run the children until the supervisor has stopped. Return 0, or 1 if a child died too often, 77 if the
        cluster refused a child. In the main thread SIGINT, SIGTERM and SIGHUP (unless SIGHUP is ignored) stop the
        supervisor. Raises an `OSError` of ``say`` after the children have stopped."""
        inherited, self._leash = os.pipe()
        try:
            with self._signal_handlers():
                return self._run_children(inherited)
        finally:
            os.close(inherited)
            os.close(self._leash)

    def _run_children(self, inherited: int) -> int:
        try:
            while True:
                now = time.monotonic()
                for each in self._running.values():
                    self._start_or_kill(each, inherited, now)
                if self._stopping and all(each.process is None for each in self._running.values()):
                    if self._output_error is not None:
                        raise self._output_error
                    return self._code
                try:
                    event, name, code = self._inbox.get(timeout=self._seconds_to_next_step(time.monotonic()))
                except queue.Empty:
                    continue
                if event == "stop":
                    self._begin_stop(force=self._stopping)
                elif event == "unheard":
                    if not self._stopping:
                        self._begin_stop(force=False)
                elif event == "restart":
                    self._begin_restart(self._running[name])
                else:
                    self._ended(self._running[name], code)
        finally:
            self._kill_all()

    # -- one step each --------------------------------------------------------------------------------------------

    def _start_or_kill(self, each: _Running, inherited: int, now: float) -> None:
        if each.process is None:
            if not self._stopping and each.start_at is not None and now >= each.start_at:
                self._start(each, inherited)
        elif each.kill_at is not None and now >= each.kill_at:
            each.kill_at = None
            self.say(f"{each.child.name} did not stop within {self._grace:g} s: killed")
            each.process.kill()

    def _start(self, each: _Running, inherited: int) -> None:
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", LEASH: str(inherited)}
        process = subprocess.Popen(
            each.child.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            pass_fds=(inherited,),
            process_group=0,  # Ctrl-C in a terminal reaches only the supervisor, which then stops the children
        )
        each.process, each.started, each.start_at, each.kill_at, each.again = (
            process,
            time.monotonic(),
            None,
            None,
            False,
        )
        reader = threading.Thread(target=self._read, args=(each.child.name, process), daemon=True)
        reader.start()
        threading.Thread(target=self._await_end, args=(each.child.name, process, reader), daemon=True).start()

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                self._pass_on(name, line.decode("utf-8", "replace").rstrip("\r\n"))

    def _await_end(self, name: str, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        code = process.wait()
        # Pass on the child's last output before its end is reported. Wait at most 1 s, as a grandchild may hold the
        # pipe open.
        reader.join(1.0)
        self._inbox.put(("ended", name, code))

    def _ended(self, each: _Running, code: int) -> None:
        each.process, each.kill_at = None, None
        name, now = each.child.name, time.monotonic()
        if self._stopping:
            if code not in (0, -signal.SIGTERM):
                self.say(f"{name} ended with {how(code)}")
            return
        if each.again:
            each.start_at = now
            return
        if code == DENIED:
            self.say(
                f"{name} ended with {how(code)}: the Kafka cluster refused it, and would refuse another start, too"
            )
            self._code = DENIED
            self._begin_stop(force=False)
            return
        lived = now - each.started
        pause = each.restarts.died(lived)
        if pause is None:
            self.say(
                f"{name} ended with {how(code)}; it died {counted(each.restarts.deaths, 'time')} in a row and is not started again"
            )
            self._code = 1
            self._begin_stop(force=False)
            return
        self.say(f"{name} ended with {how(code)} after {lived:.1f} s; starting it again in {pause:g} s")
        each.start_at = now + pause

    def _begin_stop(self, force: bool) -> None:
        self._stopping = True
        for each in self._running.values():
            if each.process is not None:
                if force:
                    each.process.kill()
                else:
                    each.kill_at = time.monotonic() + self._grace
                    each.process.terminate()

    def _begin_restart(self, each: _Running) -> None:
        if self._stopping:
            return
        each.restarts.deaths = 0
        if each.process is None:
            each.start_at = time.monotonic()
        elif not each.again:
            each.again = True
            each.kill_at = time.monotonic() + self._grace
            each.process.terminate()

    def _kill_all(self) -> None:
        for each in self._running.values():
            if each.process is not None:
                each.process.kill()
                each.process.wait()
                each.process = None

    def _seconds_to_next_step(self, now: float) -> float | None:
        """Return the seconds until the next start or kill; None: none is planned."""
        times = [each.kill_at for each in self._running.values() if each.kill_at is not None]
        if not self._stopping:
            times += [each.start_at for each in self._running.values() if each.start_at is not None]
        return max(0.0, min(times) - now) if times else None

    def say(self, what: str) -> None:
        """Pass on a message under the supervisor's own name."""
        self._pass_on(self.NAME, what)

    def _pass_on(self, name: str, line: str) -> None:
        with self._output_lock:
            if self._output_error is not None:
                return  # reading continues: a child that waits for its output to be read never ends
            try:
                self._output(name, line)
            except OSError as exc:
                self._output_error = exc
                self._inbox.put(("unheard", "", 0))

    def _signal_handlers(self) -> contextlib.AbstractContextManager[None]:
        if threading.current_thread() is not threading.main_thread():
            return contextlib.nullcontext()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # keep what nohup has set
            numbers.append(signal.SIGHUP)
        return SignalHandlers(numbers, lambda number, frame: self.stop())


def how(code: int) -> str:
    """Describe how a process ended: with its exit code, or the signal that ended it."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def obey_leash(environ: MutableMapping[str, str] | None = None) -> None:
    """Stop this process (SIGTERM to itself) when the `Supervisor` that started it has ended. Call this function in the
    child; it does nothing if no supervisor started the process.

    All children inherit the reading end of one pipe, and only the supervisor has the writing end. Nothing is ever
    written, so a read returns when the supervisor has ended, for whatever reason. Unlike ``PR_SET_PDEATHSIG`` this
    works on every Unix, and does not depend on the thread that started the child. The process kills itself
    `ORPHAN_GRACE_S` seconds after the SIGTERM if it still runs.
    """
    descriptor = (os.environ if environ is None else environ).pop(LEASH, None)
    if descriptor is None:
        return
    end = int(descriptor)
    os.set_inheritable(end, False)
    threading.Thread(target=_end_with_parent, args=(end,), name="jobledger-leash", daemon=True).start()


def _end_with_parent(end: int) -> None:
    os.read(end, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
