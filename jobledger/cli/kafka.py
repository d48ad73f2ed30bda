"""``jobledger kafka start|stop|status``: the embedded broker on the command line.

Exit codes: 0 done; 1 an error, which is reported; 3 from ``status`` if no broker runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli.commands import CommandGroup
from jobledger.cli.options import Json, timespan
from jobledger.cli.output import Exit, console, duration, print_fields, print_json
from jobledger.kafka.embedded import defaults
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from jobledger.kafka.embedded import KafkaStatus
    from jobledger.kafka.embedded.jars import Progress as Report

STOPPED = 143  # exit code of a JVM after SIGTERM, e.g. from `jobledger kafka stop` in another terminal

app = CommandGroup(
    name="kafka",
    help="The embedded broker: real Apache Kafka for development, without Docker or an installed Java.",
    no_args_is_help=True,
)

#: Download size of a first start.
SIZE = "about 45 MB"
#: Seconds between two progress lines of a download.
EVERY_S = 5.0

_STEPS = {
    "resolve": "looking up the files of Apache Kafka {version}",
    "fetch": "fetching Apache Kafka {version}",
    "format": "formatting the data folder",
    "boot": "starting the broker",
}


@app.command("start")
def start(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free port.")] = defaults.PORT,
    data: Annotated[
        Path | None, typer.Option(help="Data folder, kept between starts.", show_default="under JOBLEDGER_HOME")
    ] = None,
    heap: Annotated[int, typer.Option(min=128, help="Heap size of the broker in MB.")] = defaults.HEAP_MB,
    version: Annotated[str, typer.Option(help="Version of Apache Kafka, 4.0 or later.")] = defaults.KAFKA_VERSION,
    timeout: Annotated[float, timespan("How long the broker may take to start.")] = defaults.START_TIMEOUT_S,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Keep running, and stop the broker on Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the embedded broker. If it is already running, print its address.

    The first start downloads Apache Kafka (about 45 MB), once per user and version.
    """
    from jobledger.config import Settings
    from jobledger.errors import KafkaStartFailed
    from jobledger.kafka import embedded

    home = Settings.from_env().home
    with _progress(version, quiet=as_json) as report:
        broker = embedded.start(
            home,
            port=port,
            data=data,
            heap_mb=heap,
            version=version,
            detach=not foreground,
            progress=report,
            timeout=timeout,
        )
    _show(broker, as_json)
    if not foreground:
        return
    try:
        code = embedded.wait(home)
    except KeyboardInterrupt:
        embedded.stop(home)
        return
    if code not in (None, 0, STOPPED):
        raise KafkaStartFailed(f"the embedded broker exited with code {code}; its log is {broker.log}")


@app.command("stop")
def stop(
    timeout: Annotated[
        float, timespan("How long the broker may take to stop before it is killed.")
    ] = defaults.STOP_TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Stop the embedded broker; its data is kept. It is not an error if no broker runs."""
    from jobledger.config import Settings
    from jobledger.kafka import embedded

    stopped = embedded.stop(Settings.from_env().home, timeout)
    if as_json:
        print_json({"stopped": stopped})
    else:
        console().print("stopped" if stopped else "no embedded broker was running")


@app.command("status")
def status(as_json: Json = False) -> None:
    """Show whether the embedded broker runs, and its address. Exit code 3 if it does not run."""
    from jobledger.config import Settings
    from jobledger.kafka import embedded

    broker = embedded.status(Settings.from_env().home)
    _show(broker, as_json)
    if not broker.running:
        raise typer.Exit(Exit.NOT_FOUND)


def _show(broker: KafkaStatus, as_json: bool) -> None:
    if as_json:
        print_json(broker.as_dict())
    elif not broker.running:
        console().print("no embedded broker is running; start it with `jobledger kafka start`")
    else:
        print_fields(
            [
                ("bootstrap", (str(broker.bootstrap), "bold green")),
                ("version", str(broker.version)),
                ("pid", str(broker.pid)),
                ("uptime", duration(broker.uptime or 0.0)),
                ("data", str(broker.data)),
                ("log", str(broker.log)),
            ]
        )


def in_lines(version: str, say: Callable[[str], None]) -> Report:
    """Return a function that passes each step to ``say`` once, and a download's progress every `EVERY_S` seconds."""
    begun: set[str] = set()
    reported_at = 0.0

    def report(step: str, done: int, total: int) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if step not in begun:
            begun.add(step)
            about = f" ({SIZE} from a Maven repository, once per user and version)" if step == "resolve" else ""
            size = f": {counted(total, 'file')}" if step == "fetch" and total else ""
            say(f"{_STEPS[step].format(version=version)}{about}{size} …")
            reported_at = now
        elif step == "fetch" and (done == total or now - reported_at >= EVERY_S):
            say(f"fetched {done} of {counted(total, 'file')}")
            reported_at = now

    return report


@contextmanager
def _progress(version: str, quiet: bool) -> Iterator[Report | None]:
    """Show progress on standard error, so that scripts can read standard output: a bar on a terminal, else lines. Yield
    the function that takes the reports; None if ``quiet``."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield in_lines(version, lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        line = bar.add_task("", total=None)

        def report(step: str, done: int, total: int) -> None:
            bar.update(line, description=_STEPS[step].format(version=version), completed=done, total=total or None)

        yield report
