"""Functions that the tests of processes run in separate processes: ``python processes_app.py NAME`` calls the function
NAME.

The broker, the namespace and the status table come from the environment. Each function checks its result itself, and
raises an error if something is wrong.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LATE: list[Callable[[], None]] = []
# This handler is registered before Jobledger is imported, so it runs after all exit handlers of Jobledger.
atexit.register(lambda: [each() for each in LATE])

from jobledger import App, ConnectionUnusable, JobledgerError, Settings, StatusTimeout  # after the exit handler
from jobledger.kafka.topics import ensure  # after the exit handler

app: App = App(os.environ.get("NAMESPACE", "processes"), settings=Settings.from_env(), partitions=3)
#: Seconds in which a child process must have ended. On a busy machine it takes some of them.
PATIENCE_S = 120.0


@app.task
def echo(n: int) -> int:
    """Return the argument."""
    return n


@app.event
@dataclass(frozen=True)
class Happened:
    """A domain event."""

    n: int


def _fork_in_a_job(how: str) -> int:
    """Fork a child process that submits a job and then exits, fails or returns, as ``how`` says. Return the child's
    exit code, or -1 if it did not end."""
    pid = os.fork()
    if pid == 0:
        echo.submit(1)
        match how:
            case "exit":
                sys.exit(3)
            case "raise":
                raise ValueError("a child's")
        return 0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@app.task
def forks_in_a_thread(how: str) -> int:
    """Fork in a job thread of the worker."""
    return _fork_in_a_job(how)


@app.task
async def forks_on_the_loop(how: str) -> int:
    """Fork on the worker's event loop."""
    return _fork_in_a_job(how)


@app.task(isolation="process")
def forks_in_a_process(how: str) -> int:
    """Fork in a child process of the worker."""
    return _fork_in_a_job(how)


def wsgi(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
    """Submit jobs, as a web application that gunicorn serves."""
    path = environ["PATH_INFO"]
    if path == "/die":
        os.kill(os.getpid(), signal.SIGKILL)
    ids = (
        [h.job_id for h in app.submit_many(echo.job(n) for n in range(20))]
        if path == "/many"
        else [echo.submit(1).job_id]
    )
    start("200 OK", [("Content-Type", "text/plain")])
    return ["\n".join(ids).encode()]


if "PRELOADED" in os.environ:
    echo.submit(0)  # an app may submit while it is loaded, before its server forks


def ask() -> None:
    """Query the status table, which is empty, for a list of jobs and for one job."""
    assert list(app.jobs(limit=1)) == []
    try:
        echo.submit(1).status(timeout=0.01)
    except StatusTimeout:
        return
    raise AssertionError("an empty table knows a job")


def forked(act: Callable[[], object]) -> int:
    """Fork a child process that calls ``act`` and exits, and return its pid."""
    pid = os.fork()
    if pid == 0:
        act()
        sys.exit(0)
    return pid


def ended(pid: int) -> None:
    """Wait until a child process exits with code 0."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert status == 0, f"a child ended with {status}"
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("a child does not end")


def submit_and_close() -> None:
    """Submit a job and close the app, as programs should."""
    echo.submit(1)
    app.close()


def every_use() -> list[Callable[[], object]]:
    """Return functions that use the app in all ways."""
    return [
        lambda: None,
        lambda: echo.submit(1),
        lambda: app.submit_many([echo.job(1), echo.job(2)]),
        lambda: app.emit(Happened(n=1)),
        lambda: app.emit_many([Happened(n=1)]),
        lambda: asyncio.run(echo.submit_async(1)),
        lambda: echo.submit(1).cancel("in vain"),
        ask,
        app.close,
        submit_and_close,
    ]


def forks() -> None:
    """Use everything, then fork twenty child processes, which use it too."""
    for use in every_use():
        use()
    for use in every_use() * 2:
        echo.submit(1)
        ask()
        ended(forked(use))
        echo.submit(1)


def inherits_no_database() -> None:
    """Fork after a query: the child process has no connection of SQLite."""
    ask()

    def look() -> None:
        held = [
            os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")
        ]
        assert not [path for path in held if path.endswith((".db", ".db-wal", ".db-shm"))], held

    ended(forked(look))
    ask()


def busy() -> None:
    """Fork child processes while other threads use the app without a pause."""
    stop = threading.Event()

    def again(use: Callable[[], object]) -> None:
        while not stop.is_set():
            use()

    uses = [u for u in every_use() if u is not app.close][:-1]
    threads = [threading.Thread(target=again, args=(use,)) for use in (uses[1], uses[2], uses[3], ask)]
    for thread in threads:
        thread.start()
    try:
        for use in every_use() * 2:
            ended(forked(use))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def first() -> None:
    """Fork child processes while another thread opens its first connection."""
    for n in range(12):
        app.close()
        thread = threading.Thread(target=echo.submit, args=(n,))
        thread.start()
        time.sleep(n * 0.002)  # at another moment in each round
        ended(forked(lambda: echo.submit(1)))
        thread.join()


def prefork() -> None:
    """Fork four child processes that submit a hundred jobs each, and one that is killed meanwhile. Print the ids of the
    jobs."""
    print(echo.submit(0).job_id)
    killed = forked(lambda: [echo.submit(n) for n in range(100_000)])
    read, write = os.pipe()

    def work() -> None:
        os.write(write, "".join(f"{echo.submit(n).job_id}\n" for n in range(100)).encode())

    children = [forked(work) for _ in range(4)]
    for pid in children:
        ended(pid)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        print(pipe.read(), end="")
    print(echo.submit(0).job_id)


def _submits(n: int) -> str:
    return echo.submit(n).job_id


def pool() -> None:
    """Submit in processes that multiprocessing has forked, and print the ids of the jobs."""
    echo.submit(0)
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as workers:
        print("\n".join(workers.map(_submits, range(100))))
    one = context.Process(target=_submits, args=(1,))
    one.start()
    one.join(PATIENCE_S)
    assert one.exitcode == 0
    echo.submit(0)


def stream() -> None:
    """Open a stream and fork: in the child process, reading raises an error, and closing does not."""
    with app.lifecycle("readers", timeout=1.0) as records:
        list(records)

        def use() -> None:
            try:
                next(iter(records))
            except ConnectionUnusable as exc:
                if "a fork of it" in str(exc):
                    return
            raise AssertionError("it reads with its parent's connection")

        ended(forked(use))
        ended(forked(lambda: None))


def jobs_that_fork() -> None:
    """Submit a job for each place and each end of its fork. Print the expected exit code and the id of each job."""
    for task in (forks_in_a_thread, forks_on_the_loop, forks_in_a_process):
        for how, code in (("exit", 3), ("raise", 1), ("return", 0)):
            print(code, task.submit(how).job_id)


def topics() -> None:
    """Create the app's topics."""
    ensure(app, app.settings)


# -- signals and exit -----------------------------------------------------------------------------------------------------


def signals() -> None:
    """Use everything in a signal handler, at any moment of a first use. Each call returns, or raises an error of
    Jobledger, within 20 s."""
    outcomes: list[str] = []
    slowest = 0.0
    uses = every_use()
    turn: Iterator[Callable[[], object]] = iter(())

    def handler(number: int, frame: object) -> None:
        nonlocal slowest
        began = time.monotonic()
        try:
            next(turn)()
            outcomes.append("done")
        except JobledgerError as exc:
            outcomes.append(type(exc).__name__)
        slowest = max(slowest, time.monotonic() - began)

    signal.signal(signal.SIGALRM, handler)
    for n in range(len(uses) * 5):
        app.close()
        turn = iter([uses[n % len(uses)]])
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + (n // len(uses)) * 0.003)
        try:
            [uses[1], ask, uses[2], uses[3]][n % 4]()
        except ConnectionUnusable:  # the handler has closed the app
            assert uses[n % len(uses)] in (uses[8], uses[9])
        while not outcomes or len(outcomes) <= n:  # the signal may come after the call
            time.sleep(0.001)
    assert set(outcomes) <= {"done", "ConnectionUnusable"}, outcomes
    assert outcomes.count("done") > len(outcomes) / 2, outcomes
    assert slowest < 20.0, slowest


def ask_late() -> None:
    """Query the status table while the interpreter exits. From Python 3.12 on, the interpreter then starts no threads,
    and a query needs one."""
    try:
        ask()
    except ConnectionUnusable:
        if sys.version_info < (3, 12):
            raise


def _last_words() -> None:
    for use in (*every_use()[1:7], ask_late):
        use()
    print("said")


def exits() -> None:
    """Submit in exit handlers that run before and after the connections are closed."""
    atexit.register(_last_words)
    LATE.append(_last_words)
    for use in every_use()[:4]:
        use()


def exits_unused() -> None:
    """Use the app for the first time in such an exit handler."""
    atexit.register(_last_words)
    LATE.append(_last_words)


class Goodbye:
    """An object whose finalizer submits a job and prints what happened."""

    def __del__(self) -> None:
        try:
            echo.submit(1)
        except JobledgerError as exc:
            print(type(exc).__name__)
        else:
            print("done")


def freed() -> None:
    """Leave an object that submits when the exiting interpreter frees it."""
    echo.submit(1)
    globals()["kept"] = Goodbye()


def threads_end() -> None:
    """Start a thread that is not a daemon and submits for the first time when the main thread has ended."""

    def later() -> None:
        threading.main_thread().join()
        for use in (*every_use()[1:5], every_use()[6], ask_late, *every_use()[8:]):
            use()
        print("said")

    threading.Thread(target=later).start()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
