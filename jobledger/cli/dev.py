"""``jobledger dev``: a broker, the topics, a worker, the stream processor and the dashboard in one terminal, with reload
on change.

This module defines the order in which these parts start and stop. Each of them is the same process as in production.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli.loading import load_app, module_name
from jobledger.cli.options import HOST, Bootstrap, LogFormat, StatusUrl, Target, repeatable
from jobledger.cli.running import Prefixed, command, passed_on, stream_children
from jobledger.cli.web import PORT, free_from
from jobledger.process.extras import lacking, need
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.config import Settings
    from jobledger.streams.supervisor import Child, Say, Supervisor

#: Seconds that running jobs get before a reload or the end; short, because the developer is waiting.
WORKER_GRACE_S = 5.0
#: Seconds before a process that does not stop is killed. Longer than threads or processes that a job has left behind
#: can keep a worker running.
KILL_AFTER_S = 20.0
#: Seconds within which the new code must be imported and its topics created.
CHECK_TIMEOUT_S = 60.0

#: The parts that run the app's code. They are restarted when it changes.
APP_PARTS = ("worker", "router", "projections", "web")


def dev(
    target: Target,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the embedded broker, if one is started; 0: a free port.")
    ] = 9092,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of jobs running at once.", show_default="the worker's default"),
    ] = None,
    web: Annotated[
        bool, typer.Option("--web/--no-web", help="Also serve the dashboard and the HTTP API, if they are installed.")
    ] = True,
    web_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the dashboard; if it is in use, the next free one.")
    ] = PORT,
    reload: Annotated[bool, typer.Option("--reload/--no-reload", help="Restart when a .py file changes.")] = True,
    watch: Annotated[
        list[Path] | None, repeatable("Folder to watch", exists=True, show_default="the working directory")
    ] = None,
    log_format: LogFormat = None,
) -> None:
    """Run everything: embedded broker (if none is configured or running), topics, worker, stream processor, dashboard.

    Ctrl-C stops everything except a broker that ran before. If changed code cannot be loaded, the old code keeps
    running.
    """
    from jobledger.kafka import topics
    from jobledger.streams.supervisor import Child, Restarts, Supervisor

    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    broker = ["kafka"] if app.settings.bootstrap is None else []
    need("jobledger dev", "worker", "streams", *(["watch"] if reload else []), *broker)
    say = Prefixed(["dev", "kafka", *APP_PARTS, "coordinator", "materializer"])
    with _broker(app.settings, port, say) as address:
        settings = app.settings.with_bootstrap(address)
        plan = topics.ensure(app, settings)
        created = sum(change.kind == "topic" for change in plan.pending)
        state = f"{counted(created, 'topic')} created" if created else "topics are up to date"
        say("dev", f"{app!r} on {address}, {state}")
        children = _children(app, target, address, status_url, concurrency)
        if web and not lacking("web"):
            page = f"{HOST}:{free_from(web_port)}"
            options = ["--listen", page, *passed_on(address, status_url)]
            children.append(Child("web", command("web", target, *options)))
            say("dev", f"dashboard and HTTP API at http://{page}")
        # A developer's process may die any number of times, because the next change of the code may fix it.
        supervisor = Supervisor(
            children,
            lambda name, line: say("dev" if name == Supervisor.NAME else name, line),
            restarts=lambda: Restarts(most=1_000_000, cap=5.0),
            grace=KILL_AFTER_S,
        )
        code = 0
        restarted = [child.name for child in children if child.name in APP_PARTS]
        folders = _folders(target, watch)
        with _reloading(supervisor, restarted, target, address, folders) if reload else _nothing():
            code = supervisor.run()
        say("dev", "stopped")
    if code:
        raise typer.Exit(code)


def _children(app: App, target: str, address: str, status_url: str | None, concurrency: int | None) -> list[Child]:
    """Return the processes to run: a worker, the stream processor and, if the app needs them, a router and a process
    for projections."""
    from jobledger.streams.supervisor import Child

    more = [] if concurrency is None else ["--concurrency", str(concurrency)]
    work = command("worker", target, "--bootstrap", address, "--grace", str(WORKER_GRACE_S), *more)
    children = [Child("worker", work)]
    if app.registry.handlers:
        children.append(Child("router", command("router", target, "--bootstrap", address)))
    children += stream_children(target, address, status_url)
    if app.registry.projections:
        children.append(Child("projections", command("projections", "run", target, *passed_on(address, status_url))))
    return children


@contextmanager
def _broker(settings: Settings, port: int, say: Say) -> Iterator[str]:
    """Yield the address of the configured broker; else of an embedded broker that runs already; else of an embedded
    broker that is started here, and stops after the block."""
    from jobledger.cli.kafka import in_lines
    from jobledger.errors import BrokerUnavailable
    from jobledger.kafka import embedded
    from jobledger.kafka.embedded import defaults

    try:
        address: str | None = settings.resolve_bootstrap()
    except BrokerUnavailable:
        address = None
    if address is not None:
        yield address
        return
    began = time.monotonic()
    report = in_lines(defaults.KAFKA_VERSION, lambda line: say("kafka", line))
    status = embedded.start(settings.home, port=port, detach=False, progress=report)
    assert status.bootstrap is not None
    say(
        "kafka",
        f"Apache Kafka {status.version} runs on {status.bootstrap}, started in {time.monotonic() - began:.1f} s",
    )
    try:
        yield status.bootstrap
    finally:
        say("kafka", "stopping …")
        embedded.stop(settings.home)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _folders(target: str, watch: Sequence[Path] | None) -> list[Path]:
    if watch:
        return list(watch)
    working_dir, app_dir = Path.cwd(), module_name(target)[1]
    return [working_dir] if app_dir.is_relative_to(working_dir) else [working_dir, app_dir]


@contextmanager
def _reloading(
    supervisor: Supervisor, parts: Sequence[str], target: str, address: str, folders: Sequence[Path]
) -> Iterator[None]:
    """Watch ``folders`` in a thread while the block runs. ``parts``: the child processes to restart after a change."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(supervisor, parts, target, address, folders, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(CHECK_TIMEOUT_S)


def _watch(
    supervisor: Supervisor,
    parts: Sequence[str],
    target: str,
    address: str,
    folders: Sequence[Path],
    done: threading.Event,
) -> None:
    from watchfiles import PythonFilter
    from watchfiles import watch as changes_in

    supervisor.say(f"watching {', '.join(str(f) for f in folders)}")
    for changes in changes_in(*folders, watch_filter=PythonFilter(), stop_event=done, debounce=300, step=50):
        names = sorted({_relative(path) for _, path in changes})
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        fits = fits_as_it_is(target, address, supervisor)
        if done.is_set():
            return
        if fits:
            supervisor.say(f"{shown} changed: restarting {', '.join(parts)}")
            supervisor.restart(parts)
        else:
            supervisor.say(f"{shown} changed: the old code keeps running until the error is fixed")


def fits_as_it_is(target: str, address: str, supervisor: Supervisor) -> bool:
    """Create the topics of the current code. Return whether this code can be loaded and its topics exist; if not, print
    the reason.

    A separate process does this, since this one cannot reload a module. The stream processor needs no reload: it runs
    none of the app's code and finds new topics by itself.
    """
    words = command("topics", "apply", target, "--yes", "--json", "--bootstrap", address)
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        supervisor.say(f"error: importing {target} and creating its topics took more than {CHECK_TIMEOUT_S:g} s")
        return False
    if ended.returncode:
        supervisor.say(_error_of(ended.stderr) or f"error: {target} does not load (exit code {ended.returncode})")
    return not ended.returncode


def _error_of(stderr: str) -> str:
    """Return the error of a child process that was started with ``--json``: its message, or its last line if that is
    not JSON."""
    lines = stderr.strip().splitlines()
    if not lines:
        return ""
    try:
        return f"error: {json.loads(lines[-1])['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return lines[-1]


def _relative(path: str) -> str:
    file_path, working_dir = Path(path), Path.cwd()
    return str(file_path.relative_to(working_dir)) if file_path.is_relative_to(working_dir) else path
