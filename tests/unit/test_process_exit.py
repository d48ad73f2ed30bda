"""The exit of a process whose app left code running, at each stage of Python's exit. The tests use real processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

#: Seconds for which the processes of these tests wait for the code that is left.
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
#: Code for the stages at which Python does not run other threads any more.
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
    """Run a process with ``code``; return its exit code, standard output, standard error and duration in seconds.

    ``bound``: seconds for which the process waits for the code that is left; ``hard``: seconds after them in which
    Python code may still run.
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
def test_code_that_an_app_left_running_does_not_keep_the_process_alive(what: str) -> None:
    """The code is in a thread, a pool, a handler of atexit or a child process. After the bound the process ends with
    its own exit code, and one line says what was still running."""
    code, named = LEFT[what]
    status, out, err, _ = ended(code)
    assert status == 7
    assert len(err.splitlines()) == 1, err
    assert "does not wait any longer than 1 s for what the app's code left behind: " in err
    assert named in err
    if out:  # the child's pid: it was killed, because it could hold copies of its parent's sockets
        deadline = time.monotonic() + 80
        while runs(int(out)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def runs(pid: int) -> bool:
    """Return whether the process exists and has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("what", LEFT_NATIVE)
def test_a_process_in_which_no_python_thread_can_run_is_ended(what: str) -> None:
    """A native timer exits with code 1. It prints the stacks, unless standard error is closed."""
    # Python's shutdown must reach the code of `LEFT_NATIVE` within the bound; otherwise the exit thread ends the
    # process first. So the bound is longer here.
    status, _, err, _ = ended(LEFT_NATIVE[what], bound=2 * BOUND_S, hard=0.5)
    assert status == 1
    assert ("Timeout (0:00:02" in err) == ("closed" not in what), err


def test_a_clean_exit_is_not_touched() -> None:
    """A process without code that is left exits at once with its exit code. Its handlers are called, and nothing is
    printed."""
    status, out, err, _ = ended("atexit.register(lambda: print('called', time.monotonic()))", 5, bound=60.0)
    assert (status, err) == (5, "")
    called, at = out.split()
    assert called == "called"
    assert time.monotonic() - float(at) < 10.0


def test_a_process_with_a_withdrawn_bound_is_not_ended() -> None:
    """After `unbound_exit` the process runs as long as its code needs."""
    needed = BOUND_S + 2.0
    code = f"process_exit.bound_exit(3, {BOUND_S})\nprocess_exit.unbound_exit()\ntime.sleep({needed})\nprint('there')"
    status, out, err, seconds = ended(code, 0, bound=NEVER_S, hard=0.5)
    assert (status, out, err) == (0, "there\n", "")
    assert seconds > needed


def test_a_thread_that_an_import_started_does_not_keep_a_command_alive(tmp_path: Path) -> None:
    """The `jobledger` command has printed its answer, and a thread that the app started at its import still runs."""
    (tmp_path / "threaded_shop.py").write_text(
        "import threading, time\nfrom jobledger import App\nfrom jobledger.process import process_exit\napp = App('shop')\n"
        f"process_exit.HARD_S = {NEVER_S}\n"
        f"threading.Thread(target=time.sleep, args=({LEFT_S},), name='imported').start()\n"
    )
    command = [sys.executable, "-m", "jobledger", "projections", "list", "threaded_shop:app", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LEFT_S / 2, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert "left behind: thread imported" in done.stderr
