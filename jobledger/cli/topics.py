"""``jobledger topics plan|apply MODULE:APP``: the topics an app declares, beside those the cluster has.

Exit codes: 0 in order (a plan with pending steps included); 1 an error, or a plan that refuses something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, Target
from jobledger.cli.output import Cell, Exit, console, print_json, print_table

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from jobledger.kafka.topics import Change, Plan

app = typer.Typer(name="topics", help="Topics as code: what the app needs, and how to get there.", no_args_is_help=True)

_STYLES = {
    "create": "green",
    "add-partitions": "yellow",
    "alter-config": "yellow",
    "refuse": "bold red",
    "advise": "yellow",
    "unchanged": "dim",
}

Replication = Annotated[
    int | None, typer.Option(min=1, help="Copies of each partition.", show_default="3, or the number of brokers")
]


@app.command("plan")
def plan(target: Target, bootstrap: Bootstrap = None, replication: Replication = None, as_json: Json = False) -> None:
    """Show what `apply` would do; nothing is changed. Exit code 1 if it would refuse."""
    _, made, address = _plan(target, bootstrap, replication)
    _show(made, address, as_json)
    if made.refused:
        raise typer.Exit(Exit.ERROR)


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
    from jobledger.kafka import topics

    admin, made, address = _plan(target, bootstrap, replication)
    if not as_json or made.refused:
        _show(made, address, as_json)
    if made.refused:
        raise typer.Exit(Exit.ERROR)
    if made.pending and not yes:
        typer.confirm(f"Apply {_changes(len(made.pending))} to {address}?", abort=True, err=True)
    notes = topics.apply(admin, made, address=address)
    if as_json:
        print_json({**made.as_dict(), "applied": len(made.pending), "notes": notes})
        return
    for note in notes:
        console().print(f"note: {note}", style="yellow", markup=False)
    if made.pending:
        console().print(f"applied {_changes(len(made.pending))}")


def _plan(target: str, bootstrap: str | None, replication: int | None) -> tuple[AdminClient, Plan, str]:
    from jobledger import log
    from jobledger.kafka import topics

    loaded = load_app(target, bootstrap=bootstrap)
    address = loaded.settings.resolve_bootstrap()
    admin = log.admin(loaded.settings)
    copies = replication or topics.default_replication(admin, address=address)
    made = topics.plan(admin, *topics.wanted(loaded, copies), address=address)
    return admin, made, address


def _show(made: Plan, address: str, as_json: bool) -> None:
    if as_json:
        print_json(made.as_dict())
        return
    print_table(["name", "step", "partitions", "settings"], [_row(change) for change in made.changes])
    for change in made.refused:
        console().print(f"refused: {change.reason}", style="bold red", markup=False)
    for change in made.advice:
        console().print(f"note: {change.reason}", style="yellow", markup=False)
    if not made.pending and not made.refused:
        console().print(f"nothing to do: {address} has what the app declares")


def _row(change: Change) -> list[Cell]:
    step = change.step.value
    return [change.name, (step, _STYLES[step]), _partitions(change), _settings(change)]


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


def _changes(count: int) -> str:
    return f"{count} change" if count == 1 else f"{count} changes"
