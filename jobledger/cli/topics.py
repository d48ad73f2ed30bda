"""``jobledger topics plan|apply MODULE:APP``: the topics an app declares, beside those the cluster has.

Exit codes: 0 in order (a plan with pending steps included); 1 an error, or a plan that refuses something.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from confluent_kafka.admin import AdminClient
from rich.console import Console
from rich.table import Table

from jobledger import log
from jobledger.cli.loading import load_app
from jobledger.kafka import topics
from jobledger.kafka.topics import Change, Plan, Step

EXIT_REFUSED = 1

app = typer.Typer(name="topics", help="Topics as code: what the app needs, and how to get there.", no_args_is_help=True)

_STYLES = {
    Step.CREATE: "green",
    Step.PARTITIONS: "yellow",
    Step.CONFIG: "yellow",
    Step.REFUSE: "bold red",
    Step.UNCHANGED: "dim",
}

Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="The app, e.g. shop.jobs:app.")]
Bootstrap = Annotated[str | None, typer.Option(help="host:port[,host:port] of the cluster.", show_default="settings")]
Replication = Annotated[
    int | None, typer.Option(min=1, help="Copies of each partition.", show_default="3, or the number of brokers")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command("plan")
def plan(target: Target, bootstrap: Bootstrap = None, replication: Replication = None, as_json: Json = False) -> None:
    """Show what `apply` would do; nothing is changed. Exit code 1 if it would refuse."""
    _, made, address = _plan(target, bootstrap, replication)
    _show(made, address, as_json)
    if made.refused:
        raise typer.Exit(EXIT_REFUSED)


@app.command("apply")
def apply(
    target: Target,
    bootstrap: Bootstrap = None,
    replication: Replication = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Create and alter topics and groups until they are what the app declares; asks first.

    A change that would lose or misplace state is refused, and then nothing is changed.
    """
    admin, made, address = _plan(target, bootstrap, replication)
    if not as_json or made.refused:
        _show(made, address, as_json)
    if made.refused:
        raise typer.Exit(EXIT_REFUSED)
    if made.pending and not yes:
        typer.confirm(f"Apply {len(made.pending)} changes to {address}?", abort=True, err=True)
    notes = topics.apply(admin, made, address=address)
    if as_json:
        print(json.dumps({**made.as_dict(), "applied": len(made.pending), "notes": notes}))
        return
    console = Console()
    for note in notes:
        console.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    if made.pending:
        console.print(f"applied {len(made.pending)} changes")


def _plan(target: str, bootstrap: str | None, replication: int | None) -> tuple[AdminClient, Plan, str]:
    loaded = load_app(target)
    settings = loaded.settings.with_bootstrap(bootstrap)
    address = settings.resolve_bootstrap()
    admin = log.admin(settings)
    copies = replication or topics.default_replication(admin, address=address)
    queues = topics.queue_partitions(loaded)
    specs = topics.desired(loaded.names, queues, partitions=loaded.partitions, replication=copies)
    made = topics.plan(admin, specs, topics.worker_groups(loaded.names, queues), address=address)
    return admin, made, address


def _show(made: Plan, address: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(made.as_dict()))
        return
    console = Console()
    table = Table(title=f"topics and groups at {address}", title_justify="left")
    for heading in ("", "name", "partitions", "settings"):
        table.add_column(heading, overflow="fold")
    for change in made.changes:
        style = _STYLES[change.step]
        table.add_row(f"[{style}]{change.step.value}[/]", change.name, _partitions(change), _settings(change))
    console.print(table)
    for change in made.refused:
        console.print(f"[bold red]refused:[/] {change.reason}", soft_wrap=True)
    if not made.pending and not made.refused:
        console.print("nothing to do: the cluster has what the app declares")


def _partitions(change: Change) -> str:
    if change.partitions is None:
        return ""
    there, wanted = change.partitions
    copies = f" × {change.replication}" if change.replication else ""
    return f"{wanted}{copies}" if there in (0, wanted) else f"{there} → {wanted}"


def _settings(change: Change) -> str:
    return "\n".join(
        f"{key}={new}" if old is None else f"{key}: {old} → {new}" for key, (old, new) in change.config.items()
    )
