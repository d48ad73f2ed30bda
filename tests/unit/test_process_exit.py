"""The end of a process whose app left something behind, stage by stage of Python's own end: in real processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

#: Seconds that the processes of these tests give what is left.
BOUND_S = 1.0
#: Seconds for which the leftovers would keep a process alive. The tests wait for at most half of that time. This is
#: long, because starting a process may be slow.
LEFT_S = 400
#: A time limit that no test here reaches.
NEVER_S = 1_000.0

POOL = "from concurrent.futures import ThreadPoolExecutor as Pool\n"
LEFT = {
    "a pool's thread": (POOL + f"Pool(1, 'busy').submit(time.sleep, {LEFT_S})", "thread busy_0"),
    "a pool's thread that is a daemon": (
        POOL + f"t = threading.Thread(target=lambda: Pool(1, 'kept').submit(time.sleep, {LEFT_S}), daemon=True)\n"
        "t.start()\nt.join()",
        "thread kept_0",
    ),
    "a thread": (f"threading.Thread(target=time.sleep, args=({LEFT_S},), name='left').start()", "thread left"),
    "a call at exit": (f"atexit.register(time.sleep, {LEFT_S})", "a handler of atexit"),
    "a function at exit": (
        f"@atexit.register\ndef flush():\n    time.sleep({LEFT_S})",
        "the main thread, in flush() at <string>:",
    ),
    "a child process": (
        (
            "import multiprocessing as m\n"
            f"p = m.get_context('fork').Process(target=time.sleep, args=({LEFT_S},), name='Child')\n"
            "p.start()\nprint(p.pid, flush=True)"
        ),
        "child process Child (pid ",
    ),
}
#: Stages at which Python runs no other thread any more.
LEFT_NATIVE = {
    "a finaliser in the teardown": f"class D:\n    def __del__(self): time.sleep({LEFT_S})\nd = D()",
    "code that holds the interpreter's lock": f"import ctypes\natexit.register(ctypes.PyDLL(None).sleep, {LEFT_S})",
    "closed standard error": (
        f"import ctypes, os\natexit.register(ctypes.PyDLL(None).sleep, {LEFT_S})\nsys.stderr.close()\nos.closerange(2, 3)"
    ),
}


def ended(
    code: str, exit_code: int = 7, *, bound: float = BOUND_S, hard: float = NEVER_S
) -> tuple[int, str, str, float]:
    """Exit code, standard output and error of a process that leaves what ``code`` makes, and how long it took.

    ``bound``: seconds that it gives what is left; ``hard``: seconds after that in which Python code may still run.
    """
    program = (
        "import atexit, sys, threading, time\nfrom jobledger.process import process_exit\n"
        f"process_exit.HARD_S = {hard}\n{code}\n"
        f"process_exit.bound_exit({exit_code}, {bound})\nsys.exit({exit_code})\n"
    )
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            process.wait(LEFT_S / 2)
            assert process.stdout is not None
            assert process.stderr is not None
            return process.returncode, process.stdout.read(), process.stderr.read(), time.monotonic() - began
        finally:
            process.kill()


@pytest.mark.parametrize("what", LEFT)
def test_what_an_app_left_behind_keeps_no_process(what: str) -> None:
    """A thread, a pool, a handler of atexit, a child process: after the bound the process is gone with the code it had
    earned, and one line says what was still running."""
    code, said = LEFT[what]
    status, out, err, _ = ended(code)
    assert status == 7
    assert len(err.splitlines()) == 1, err
    assert "does not wait any longer than 1 s for what the app's code left behind: " in err
    assert said in err
    if out:  # the child's number: it was killed, and not left to hold copies of its parent's sockets
        deadline = time.monotonic() + 80
        while runs(int(out)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("what", LEFT_NATIVE)
def test_a_process_that_runs_no_python_any_more_is_ended_as_well(what: str) -> None:
    """Where no thread of Python's can run, the native timer exits with code 1, and stacks if there is where to."""
    # Python's shutdown must reach the code of `LEFT_NATIVE` within the bound, else the exit thread ends the process
    # first. So the bound is longer here.
    status, _, err, _ = ended(LEFT_NATIVE[what], bound=2 * BOUND_S, hard=0.5)
    assert status == 1
    assert ("Timeout (0:00:02" in err) == ("closed" not in what), err


def test_a_clean_exit_is_not_touched() -> None:
    """A process that has left nothing exits at once, with its code, its handlers called, and says nothing."""
    status, out, err, _ = ended("atexit.register(lambda: print('called', time.monotonic()))", 5, bound=60.0)
    assert (status, err) == (5, "")
    called, at = out.split()
    assert called == "called"
    assert time.monotonic() - float(at) < 10.0


def test_a_bound_that_was_taken_back_ends_nothing() -> None:
    """After `unbound_exit` the process runs for as long as it likes."""
    likes = BOUND_S + 2.0
    code = f"process_exit.bound_exit(3, {BOUND_S})\nprocess_exit.unbound_exit()\ntime.sleep({likes})\nprint('there')"
    status, out, err, seconds = ended(code, 0, bound=NEVER_S, hard=0.5)
    assert (status, out, err) == (0, "there\n", "")
    assert seconds > likes


def test_no_command_is_kept_by_what_an_import_started(tmp_path: Path) -> None:
    """A thread that an app starts when it is imported keeps no `jobledger` command that has given its answer."""
    (tmp_path / "threaded_shop.py").write_text(
        "import threading, time\nfrom jobledger import App\nfrom jobledger.process import process_exit\napp = App('shop')\n"
        f"process_exit.HARD_S = {NEVER_S}\n"
        f"threading.Thread(target=time.sleep, args=({LEFT_S},), name='imported').start()\n"
    )
    command = [sys.executable, "-m", "jobledger", "projections", "list", "threaded_shop:app", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LEFT_S / 2, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert "left behind: thread imported" in done.stderr
