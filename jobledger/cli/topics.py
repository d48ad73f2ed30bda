"""``jobledger topics plan|apply|acls MODULE:APP``: compares the topics that an app declares with those of the cluster,
creates and alters topics, and shows or grants the rights that each part needs.

Exit codes: 0 in order (this includes a plan with pending steps); 1 an error, or a plan with a refused step.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli.commands import CommandGroup, Wrong, judged
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, Target, Yes
from jobledger.cli.output import Cell, Exit, console, print_json, print_table
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from jobledger.app import App
    from jobledger.kafka.acls import Right
    from jobledger.kafka.topology import Change, TopicPlan

app = CommandGroup(
    name="topics", help="Topics as code: compare, create and alter the topics that the app needs.", no_args_is_help=True
)

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
    """Show what `apply` would do; nothing is changed. Exit code 1 if `apply` would refuse a change."""
    _, planned, address = _plan(target, bootstrap, replication)
    _show(planned, address, as_json)
    if planned.refused:
        raise typer.Exit(Exit.ERROR)


@app.command("apply")
def apply(
    target: Target,
    bootstrap: Bootstrap = None,
    replication: Replication = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Create and alter topics and groups to match what the app declares; asks for confirmation.

    If a change would lose or misplace state, the change is refused, and nothing is changed.
    """
    from jobledger.kafka import topics

    admin, planned, address = _plan(target, bootstrap, replication)
    if not as_json or planned.refused:
        _show(planned, address, as_json)
    if planned.refused:
        raise typer.Exit(Exit.ERROR)
    if planned.pending and not yes:
        typer.confirm(f"Apply {counted(len(planned.pending), 'change')} to {address}?", abort=True, err=True)
    notes = topics.apply(admin, planned, address=address)
    if as_json:
        print_json({**planned.as_dict(), "applied": len(planned.pending), "notes": notes})
        return
    for note in notes:
        console().print(f"note: {note}", style="yellow", markup=False)
    if planned.pending:
        console().print(f"applied {counted(len(planned.pending), 'change')}")


@app.command("acls")
def acls(
    target: Target,
    principal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=PRINCIPAL",
            help="The user of a role, e.g. worker=User:jobs; repeat the option for several. `streams` means coordinator and "
            "materializer.",
            show_default="list what each role needs",
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Create the ACLs; asks for confirmation.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --apply: do not ask for confirmation.")] = False,
    bootstrap: Bootstrap = None,
    as_json: Json = False,
) -> None:
    """Print the minimal rights that each part needs, as `kafka-acls.sh` commands; with --apply create them.

    Example: jobledger topics acls shop:app --principal client=User:web --principal worker=User:jobs
    """
    from jobledger.kafka import acls as rules

    if yes and not apply:
        raise Wrong("--yes needs --apply, which creates the ACLs")
    loaded = load_app(target, bootstrap=bootstrap)
    foreign = [event.topic for event in loaded.events.values() if event.foreign]
    given = [_principal(each) for each in principal or ()]
    with judged("--principal"):
        wanted = [
            (role, who, right)
            for role, who in given or [(role, "") for role in rules.TABLE]
            for right in rules.rights(role, loaded.names.namespace, foreign)
        ]
    if apply:
        _grant(loaded, [(who, right) for _, who, right in wanted if who], yes, as_json)
    elif as_json:
        print_json([{"role": role, "principal": who or None, **asdict(right)} for role, who, right in wanted])
    elif given:
        server = loaded.settings.bootstrap or "HOST:PORT"
        for role, who in given:
            print(f"# {role}: {', '.join(rules.WHO[each] for each in rules.roles(role))}")
            for line in rules.commands(who, [right for r, w, right in wanted if (r, w) == (role, who)], server):
                print(line)
    else:
        print_table(["role", "right", "on", "without it"], [_right(role, right) for role, _, right in wanted])


def _principal(text: str) -> tuple[str, str]:
    role, equals, who = text.partition("=")
    if not equals or ":" not in who:
        raise Wrong(f"--principal {text!r} is not ROLE=PRINCIPAL, e.g. worker=User:jobs")
    return role, who


def _right(role: str, right: Right) -> list[Cell]:
    name = f"{right.name}*" if right.pattern == "prefixed" else right.name
    return [role, right.operation, f"{right.kind} {name}", f"no {right.lost}" if right.lost else "does not run"]


def _grant(loaded: App, wanted: list[tuple[str, Right]], yes: bool, as_json: bool) -> None:
    from jobledger.kafka import acls as rules
    from jobledger.kafka import clients
    from jobledger.kafka.auth import check_connection

    if not wanted:
        raise Wrong("--apply needs the users: --principal ROLE=PRINCIPAL, e.g. --principal worker=User:jobs")
    settings = loaded.settings.acting_as("admin")
    address = settings.resolve_bootstrap()
    if not yes:
        typer.confirm(f"Allow {counted(len(wanted), 'operation')} at {address}?", abort=True, err=True)
    check_connection(settings)
    rules.grant(clients.admin(settings), settings, [rules.binding(who, right) for who, right in wanted])
    if as_json:
        print_json({"granted": [{"principal": who, **asdict(right)} for who, right in wanted]})
    else:
        console().print(f"allowed {counted(len(wanted), 'operation')} at {address}")


def _plan(target: str, bootstrap: str | None, replication: int | None) -> tuple[AdminClient, TopicPlan, str]:
    from jobledger.kafka import clients, topics, topology
    from jobledger.kafka.auth import check_connection

    loaded = load_app(target, bootstrap=bootstrap)
    settings = loaded.settings.acting_as("admin")
    address = settings.resolve_bootstrap()
    check_connection(settings)
    admin = clients.admin(settings)
    copies = replication or topics.default_replication(admin, address=address)
    planned = topics.plan(admin, *topology.wanted(loaded, copies), address=address)
    return admin, planned, address


def _show(planned: TopicPlan, address: str, as_json: bool) -> None:
    if as_json:
        print_json(planned.as_dict())
        return
    print_table(["name", "step", "partitions", "settings"], [_row(change) for change in planned.changes])
    for change in planned.refused:
        console().print(f"refused: {change.reason}", style="bold red", markup=False)
    for change in planned.advice:
        console().print(f"note: {change.reason}", style="yellow", markup=False)
    if not planned.pending and not planned.refused:
        console().print(f"nothing to do: {address} has what the app declares")


def _row(change: Change) -> list[Cell]:
    step = change.step.value
    return [change.name, (step, _STYLES[step]), _partitions(change), _settings(change)]


def _partitions(change: Change) -> str:
    if change.partitions is None:
        return ""
    current, wanted = change.partitions
    copies = f" × {change.replication}" if change.replication else ""
    return f"{wanted}{copies}" if current in (0, wanted) else f"{current} → {wanted}"


def _settings(change: Change) -> str:
    return "\n".join(
        f"{key}={new}" if old is None else f"{key}: {old} → {new}" for key, (old, new) in change.config.items()
    )
