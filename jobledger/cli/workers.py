"""``jobledger workers list``: the workers that report, on the command line."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import output
from jobledger.cli.commands import CommandGroup, words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import AppOption, AppWord, Bootstrap, Json, Namespace, StatusUrl
from jobledger.cli.output import Cell
from jobledger.views.groups import worker_json

if TYPE_CHECKING:
    from jobledger.worker_status import WorkerStatus

app = CommandGroup(
    name="workers", help="List the workers: what they run, and when they reported.", no_args_is_help=True
)

#: Colours of the states.
_STYLES = {"alive": "green", "silent": "bold red"}
_MIB = 1024 * 1024


@app.command("list")
def list_workers(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of workers.")] = 1_000,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List the workers, in order of their ids: those that report, and for ten minutes those that no longer do.

    A worker is silent if its last report is older than 15 s.
    """
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    queried = find_app(parsed.target or app, namespace, bootstrap, status_url)
    try:
        found = queried.workers(limit)
    finally:
        queried.close()
    now = dt.datetime.now(dt.UTC)
    if as_json:
        output.print_json([worker_json(status, now) for status in found])
        return
    headings = (
        *("worker", "host", "pid", "version", "slots", "running", "queues"),
        *("memory", "last report", "state"),
    )
    optional = ("host", "pid", "memory", "version")
    output.print_table(headings, [_row(status, now) for status in found], optional=optional, empty="no workers")


def _row(status: WorkerStatus, now: dt.datetime) -> list[Cell]:
    state = status.state(now).value
    queues = ", ".join(status.queues) + (f" and {status.more_lanes} more" if status.more_lanes else "")
    memory = "-" if status.memory_bytes is None else f"{status.memory_bytes / _MIB:,.0f} MiB"
    return [
        *(status.worker, status.host, str(status.pid), status.version or "-", str(status.slots), str(status.running)),
        *(queues, memory, output.brief(status.reported_at), (state, _STYLES[state])),
    ]
