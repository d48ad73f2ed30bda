"""``jobledger worker|router|streams|coordinator|materializer``: the processes that run until they get a signal to
stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import completion, logs, output
from jobledger.cli.commands import judged
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Listen, LogFormat, Metrics, StatusUrl, Target, repeatable, timespan
from jobledger.cli.stdio import OutputLost
from jobledger.errors import JobledgerError
from jobledger.process import greenlets
from jobledger.process.extras import need
from jobledger.process.logger import get_logger
from jobledger.process.process_exit import EXIT_S, HARD_S
from jobledger.process.signals import SignalHandlers

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.consumers.worker.worker import WorkerOptions
    from jobledger.streams.status.materializer import Materializer
    from jobledger.streams.supervisor import Child

LOG = get_logger("jobledger.cli")

#: Seconds that a running round of maintenance gets to end.
MAINTENANCE_END_S = 5.0
#: Seconds that the coordinator and the materializer get to stop.
STREAMS_GRACE_S = 30.0

#: Seconds that the supervisor waits beyond a worker's longest shutdown before it kills the process. The exit of the
#: interpreter takes at most the first two terms.
KILL_MARGIN_S = EXIT_S + HARD_S + 1.0

#: The colour of each part's name in front of its lines.
PART_STYLES = {
    "worker": "green",
    "router": "cyan",
    "projections": "blue",
    "coordinator": "magenta",
    "materializer": "blue",
    "kafka": "yellow",
    "dev": "bold cyan",
    "supervisor": "bold cyan",
}


def command(*words: str) -> tuple[str, ...]:
    """Return the argument list that runs ``jobledger`` with ``words`` in a separate process of the same Python."""
    return (sys.executable, "-m", "jobledger", *words)


def stream_children(target: str, bootstrap: str | None, status_url: str | None) -> list[Child]:
    """Return the two processes of the stream processor."""
    from jobledger.streams.supervisor import Child

    return [
        Child("coordinator", command("coordinator", target, *passed_on(bootstrap, None))),
        Child("materializer", command("materializer", target, *passed_on(bootstrap, status_url))),
    ]


def passed_on(bootstrap: str | None, status_url: str | None) -> list[str]:
    """Return options as they are passed to a child process."""
    words: list[str] = []
    if bootstrap is not None:
        words += ["--bootstrap", bootstrap]
    if status_url is not None:
        words += ["--status-url", status_url]
    return words


class Prefixed:
    """Prints a child's lines after the child's name; all names get the same width. `OutputLost` is raised once; later
    lines are dropped, so that the children can still log while they stop."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max(map(len, names))
        self._console = output.console()
        self._lost = False

    def __call__(self, name: str, line: str) -> None:
        if self._lost:
            return
        try:
            self._print(name, line)
        except OutputLost:
            self._lost = True
            raise

    def _print(self, name: str, line: str) -> None:
        from rich.text import Text

        if line.startswith("{"):  # programs read JSON, and expect no prefix
            self._console.print(Text(line), soft_wrap=True)
            return
        text = Text.from_ansi(line)  # keeps the colours of the line
        head = Text(name.ljust(self._width), style=PART_STYLES.get(name, ""))
        self._console.print(Text.assemble(head, (" │ ", "dim"), text), soft_wrap=True)


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)


def supervised(children: Sequence[Child], *, restarts: int, grace: float) -> int:
    """Run child processes under one supervisor, with their names in front of their lines. Return the exit code.

    ``restarts``: how often in a row a child process may die; ``grace``: seconds that a child process gets to stop
    before it is killed.
    """
    from jobledger.streams.supervisor import Restarts, Supervisor

    say = Prefixed([Supervisor.NAME, *[child.name for child in children]])
    greenlets.refuse("a process that supervises others")
    return Supervisor(children, say, restarts=lambda: Restarts(most=restarts), grace=grace).run()


def worker(
    target: Target,
    queue: Annotated[
        list[str] | None,
        repeatable("Serve only this queue", show_default="all of the app", autocompletion=completion.queues),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Maximum number of jobs running at once, in each worker process.")
    ] = 100,
    threads: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Maximum number of plain functions running at once, each in a thread.",
            show_default="32 at most",
        ),
    ] = None,
    children: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Child processes for tasks with isolation='process', in each worker process.",
            show_default="one per CPU",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes, under one supervisor.")] = 1,
    grace: Annotated[float, timespan("Time that running jobs get to end after SIGTERM.")] = 30.0,
    bootstrap: Bootstrap = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Run jobs until SIGTERM or Ctrl-C; then finish the running jobs, commit, and leave the group. A second signal ends
    the grace time.

    With --processes above 1 each process is a separate worker, which is restarted if it dies. The workers serve metrics
    on consecutive ports.
    """
    need("jobledger worker", "worker")
    from jobledger.consumers.worker.worker import WorkerOptions

    options = WorkerOptions(
        queues=queue or None, concurrency=concurrency, threads=threads, children=children, grace=grace
    )
    app = load_app(target, bootstrap=bootstrap)
    logs.set_up()
    for name in queue or []:
        with judged("--queue"):
            app.registry.check_queue(name)
    if processes > 1:
        _worker_processes(target, processes, options, bootstrap, metrics)
    _end(_run_worker(app, options, metrics))


def _run_worker(app: App, options: WorkerOptions, metrics: Listen | None) -> int:
    """Run a worker in this process, with its metrics, and return its exit code."""
    from jobledger.cli.metrics import serving
    from jobledger.consumers.worker.main import run_worker
    from jobledger.consumers.worker.metrics import WorkerMetrics
    from jobledger.consumers.worker.worker import Worker

    with ExitStack() as stack:

        def serve(made: Worker) -> None:
            stack.enter_context(serving(metrics, "jobledger_worker", made.health, [WorkerMetrics(made)]))

        return run_worker(app.registry, app.settings, options, on_ready=serve)


def _worker_processes(
    target: str, processes: int, options: WorkerOptions, bootstrap: str | None, metrics: Listen | None
) -> None:
    from jobledger.consumers.worker.worker import LEAVING_S
    from jobledger.streams.supervisor import Child

    words = [target, "--concurrency", str(options.concurrency), "--grace", str(options.grace)]
    words += passed_on(bootstrap, None)
    for queue in options.queues or ():
        words += ["--queue", queue]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    if options.children is not None:
        words += ["--children", str(options.children)]
    children = []
    for number in range(processes):
        port = [] if metrics is None else ["--metrics-port", str(metrics.following(number))]
        children.append(Child(f"worker-{number + 1}", command("worker", *words, *port)))
    # Before this time is over, a worker that cannot stop cleanly exits by itself. So no worker is killed while it
    # commits.
    raise typer.Exit(supervised(children, restarts=5, grace=options.grace + LEAVING_S + KILL_MARGIN_S))


def router(target: Target, bootstrap: Bootstrap = None, metrics: Metrics = None, log_format: LogFormat = None) -> None:
    """Submit a job for each handler of each domain event, until SIGTERM or Ctrl-C. Several routers share the
    partitions."""
    need("jobledger router", "worker")
    app = load_app(target, bootstrap=bootstrap)
    logs.set_up()
    from jobledger.cli.metrics import serving
    from jobledger.consumers.router.router import Router

    made = Router(app.registry, app.settings)
    with serving(metrics, "jobledger_router", made.health), stopping() as stop:
        made.run(stop)


def coordinator(
    target: Target, bootstrap: Bootstrap = None, metrics: Metrics = None, log_format: LogFormat = None
) -> None:
    """Release delayed and retried jobs when they are due, until SIGTERM or Ctrl-C. Several coordinators share the
    partitions."""
    need("jobledger coordinator", "streams")
    app = load_app(target, bootstrap=bootstrap)
    logs.set_up()
    from prometheus_client import REGISTRY

    from jobledger.cli.metrics import serving
    from jobledger.streams.coordinator.coordinator import run_coordinator

    with serving(metrics):
        _end(run_coordinator(app.names, app.settings, app.partitions, registry=REGISTRY))


def materializer(
    target: Target,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    maintenance: Annotated[
        bool,
        typer.Option(
            "--maintenance/--no-maintenance",
            help="Also run watchdog, commit check, trimming, the removal of old cancels, of old rows and of workers that are "
            "gone, and plans (redrives), based on this status table.",
        ),
    ] = True,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Keep the status table up to date with the log, until SIGTERM or Ctrl-C. A second materializer waits as a standby
    until the first ends.

    If a namespace has several status tables, run all materializers but one with --no-maintenance.
    """
    need("jobledger materializer", "streams")
    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    logs.set_up()
    from prometheus_client import REGISTRY

    from jobledger.cli.metrics import serving
    from jobledger.streams.status.materializer import Materializer

    url = app.settings.resolve_status_url(app.names.namespace)
    app.settings.resolve_bootstrap()
    made = Materializer(app.names, app.settings, list(app.lanes), url, registry=REGISTRY)
    with serving(metrics), stopping() as stop:
        rounds = threading.Thread(target=_maintain, args=(app, url, made, stop), name="jobledger-maintenance")
        if maintenance:
            rounds.start()
        try:
            made.run(stop)
        finally:
            stop.set()
            if maintenance:
                rounds.join(MAINTENANCE_END_S)


def _maintain(app: App, url: str, made: Materializer, stop: threading.Event) -> None:
    """Run watchdog, commit check and trimming, as soon as the materializer holds the lease of the status table."""
    from jobledger.streams.maintenance.maintenance import Maintenance
    from jobledger.streams.maintenance.plans import PlanRunner
    from jobledger.streams.status.store import open_reader

    while not made.active:
        if stop.wait(0.2):
            return
    try:
        with closing(open_reader(url, app.names.namespace)) as reader:
            runner = PlanRunner(app.names, app.settings, app.lanes, reader, active=lambda: made.active)
            plans = threading.Thread(target=runner.run, args=(stop,), name="jobledger-plans", daemon=True)
            plans.start()
            maintenance = Maintenance(
                *(app.names, app.settings, list(app.lanes), reader),
                active=lambda: made.active,
                remover=made.remover,
                forget_workers=made.forget_workers,
            )
            maintenance.run(stop)
            plans.join(MAINTENANCE_END_S)
    except JobledgerError as exc:
        LOG.error("watchdog, commit check and trimming do not run: %s", exc)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set while the block runs. A second signal of the same kind has the effect
    that it had before the block."""
    stop = threading.Event()
    from jobledger.kafka import outage

    def on_signal(number: int, frame: FrameType | None) -> None:
        outage.stopping()
        stop.set()
        handlers.restore(number)

    handlers = SignalHandlers((signal.SIGTERM, signal.SIGINT), on_signal)
    with handlers:
        yield stop


def streams(
    target: Target,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often in a row a process may die soon after its start, before the command ends with exit code 1.",
        ),
    ] = 5,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Run the stream processor: coordinator and materializer, each as a separate, supervised process.

    The coordinator serves metrics on --metrics-port, the materializer on the next port. A process that dies is
    restarted, after pauses that grow. If the supervisor is killed, both processes stop by themselves.
    """
    need("jobledger streams", "streams")
    from dataclasses import replace

    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    app.settings.resolve_bootstrap()  # a missing broker is reported once, here, and not repeatedly by each child
    children = stream_children(target, bootstrap, status_url)
    if metrics is not None:
        children = [
            replace(child, command=(*child.command, "--metrics-port", str(metrics.following(index))))
            for index, child in enumerate(children)
        ]
    _end(supervised(children, restarts=restarts, grace=STREAMS_GRACE_S))
