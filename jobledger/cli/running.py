"""``jobledger worker|streams|coordinator|materializer``: the processes that run until they are told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import logs, output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, StatusUrl, Target

if TYPE_CHECKING:
    from rich.text import Text

    from jobledger.streams.supervisor import Child

#: The colour of each part's name before its lines.
PART_STYLES = {
    "worker": "green",
    "coordinator": "magenta",
    "materializer": "blue",
    "kafka": "yellow",
    "dev": "bold cyan",
    "supervisor": "bold cyan",
}

MetricsPort = Annotated[
    int | None,
    typer.Option(metavar="PORT", min=0, max=65535, help="Serve Prometheus metrics on 127.0.0.1.", show_default="no"),
]


def command(*words: str) -> tuple[str, ...]:
    """The argument list that runs ``jobledger`` with ``words`` in a process of its own, by this same Python."""
    return (sys.executable, "-m", "jobledger", *words)


def stream_children(target: str, passed: Sequence[str]) -> list[Child]:
    """The two halves of the stream processor."""
    from jobledger.streams.supervisor import Child

    return [Child(name, command(name, target, *passed)) for name in ("coordinator", "materializer")]


def passed_on(bootstrap: str | None, status_url: str | None) -> list[str]:
    """Options as they are handed to a child."""
    words: list[str] = []
    if bootstrap is not None:
        words += ["--bootstrap", bootstrap]
    if status_url is not None:
        words += ["--status-url", status_url]
    return words


class Prefixed:
    """Prints a child's line under its name; every name as wide as the widest."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max(map(len, names))
        self._console = output.console()
        self._coloured = output.looked_at()

    def __call__(self, name: str, line: str) -> None:
        from rich.text import Text

        said: Text = Text.from_ansi(line) if self._coloured else Text(line)
        head = Text(name.ljust(self._width), style=PART_STYLES.get(name, ""))
        self._console.print(Text.assemble(head, (" │ ", "dim"), said), soft_wrap=True)


def supervised(children: Sequence[Child], *, restarts: int, grace: float) -> int:
    """Run children under one parent with their names before their lines; the exit code."""
    from jobledger.streams.supervisor import Restarts, Supervisor

    say = Prefixed([Supervisor.NAME, *[child.name for child in children]])
    return Supervisor(children, say, restarts=lambda: Restarts(most=restarts), grace=grace).run()


def worker(
    target: Target,
    queues: Annotated[
        str | None, typer.Option(metavar="A,B", help="Queues to serve.", show_default="all of the app")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Jobs at once, in each process.")] = 100,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Of these, plain functions at once.", show_default="32 at most")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes, supervised.")] = 1,
    grace: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="For running jobs to end on SIGTERM.")] = 30.0,
    bootstrap: Bootstrap = None,
    metrics_port: MetricsPort = None,
) -> None:
    """Run jobs until SIGTERM or Ctrl-C; then finish what runs, commit, and leave. A second one cuts the grace time.

    With --processes above 1 each is a worker of its own, started again if it dies; they serve metrics on following ports.
    """
    from jobledger.consumers.worker import WorkerOptions

    names = None if queues is None else [name.strip() for name in queues.split(",") if name.strip()]
    options = WorkerOptions(queues=names, concurrency=concurrency, threads=threads, grace=grace)
    logs.set_up()
    app = load_app(target, bootstrap=bootstrap)
    for name in names or []:
        app.registry.check_queue(name)
    if processes > 1:
        _worker_processes(target, processes, options, bootstrap, metrics_port)
    from jobledger.consumers.worker import run_worker

    with serving(metrics_port) as metrics:
        code = run_worker(app.registry, app.settings, options)
    if code:
        raise typer.Exit(code)


def _worker_processes(
    target: str, processes: int, options: WorkerOptions, bootstrap: str | None, metrics_port: int | None
) -> None:
    from jobledger.streams.supervisor import Child

    words = [target, "--concurrency", str(options.concurrency), "--grace", str(options.grace)]
    words += passed_on(bootstrap, None)
    if options.queues is not None:
        words += ["--queues", ",".join(options.queues)]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    children = []
    for number in range(processes):
        port = [] if metrics_port is None else ["--metrics-port", str(metrics_port + number if metrics_port else 0)]
        children.append(Child(f"worker-{number + 1}", command("worker", *words, *port)))
    raise typer.Exit(supervised(children, restarts=5, grace=options.grace + 15.0))
