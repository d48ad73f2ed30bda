"""``jobledger queues|tasks list|pause|resume|limit``: what people order of queues and tasks, from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, Target
from jobledger.cli.output import Cell
from jobledger.policy import Limits

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.orders import Kind, Standing

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
Reason = Annotated[str | None, typer.Option("--reason", "-r", help="Why, for those who ask later.", show_default=False)]
By = Annotated[str | None, typer.Option("--by", help="Who orders it.", show_default="user@host")]


def _made(kind: Kind) -> typer.Typer:
    """The commands of one kind: they differ in what they are about, not in what they do."""
    made = typer.Typer(name=f"{kind}s", help=f"Pause, resume and limit {kind}s; see which are.", no_args_is_help=True)

    @made.command("list", help=f"The app's {kind}s, their limits, and what was ordered of them.")
    def list_them(target: Target, bootstrap: Bootstrap = None, as_json: Json = False) -> None:
        loaded = load_app(target, bootstrap=bootstrap)
        try:
            standing = {(each.kind, each.name): each for each in loaded.orders.standing()}
        finally:
            loaded.close()
        rows = [_row(loaded, kind, name, standing.get((kind, name))) for name in _names(loaded, kind)]
        if as_json:
            output.print_json(rows)
            return
        table: list[list[Cell]] = [
            [
                row[kind],
                *([row["queue"]] if kind == "task" else [str(row["partitions"])]),
                (f"paused {row['paused']}", "magenta") if row["paused"] else ("open", "green"),
                "" if row["rate"] is None else f"{row['rate']:g}/s",
                "" if row["concurrency"] is None else str(row["concurrency"]),
                (f"ordered {row['limited']}", "magenta") if row["limited"] else "",
            ]
            for row in rows
        ]
        second = "queue" if kind == "task" else "partitions"
        output.print_table((kind, second, "state", "rate", "at once", ""), table, optional=(second,), empty="none")

    @made.command(
        "pause", help=f"Start nothing more of a {kind}, on any worker, until it is resumed; what runs goes on."
    )
    def pause(
        target: Target,
        name: Name,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        as_json: Json = False,
    ) -> None:
        loaded = _found(target, kind, name, bootstrap)
        try:
            loaded.orders.pause(kind, name, reason, by)
        finally:
            loaded.close()
        _say(as_json, {kind: name, "paused": True}, f"{kind} {name} is paused")

    @made.command("resume", help=f"Let a paused {kind} go on.")
    def resume(
        target: Target,
        name: Name,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        as_json: Json = False,
    ) -> None:
        loaded = _found(target, kind, name, bootstrap)
        try:
            loaded.orders.resume(kind, name, reason, by)
        finally:
            loaded.close()
        _say(as_json, {kind: name, "paused": False}, f"{kind} {name} goes on")

    @made.command(
        "limit",
        help=f"Limit a {kind} for all workers together, in place of what the code says; without --rate and --concurrency "
        "the code's limits count again.",
    )
    def limit(
        target: Target,
        name: Name,
        rate: Annotated[str | None, typer.Option(metavar="RATE", help="100/s, 30/min, 1000/h or 5/d.")] = None,
        concurrency: Annotated[int | None, typer.Option(min=1, help="Jobs running at once.")] = None,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        as_json: Json = False,
    ) -> None:
        from jobledger.queues import check_shares

        loaded = _found(target, kind, name, bootstrap)
        limits = Limits.of(_number(rate), concurrency, f"{kind} {name!r}")
        try:
            queue = loaded.queues[name if kind == "queue" else loaded.tasks[name].queue]
            check_shares(f"{kind} {name!r}", queue, limits, loaded.partitions)
            loaded.orders.limit(kind, name, limits or None, reason, by)
        finally:
            loaded.close()
        words = [
            *([f"{limits.rate:g} a second"] if limits.rate else []),
            *([f"{concurrency} at once"] if concurrency else []),
        ]
        _say(
            as_json,
            {kind: name, "rate": limits.rate, "concurrency": limits.concurrency},
            f"{kind} {name}: " + (" and ".join(words) if words else "limits as in the code"),
        )

    return made


def _number(rate: str | None) -> str | float | None:
    try:
        return None if rate is None else float(rate)
    except ValueError:
        return rate


def _names(loaded: App, kind: Kind) -> list[str]:
    return sorted(loaded.queues if kind == "queue" else loaded.tasks)


def _found(target: str, kind: Kind, name: str, bootstrap: str | None) -> App:
    """The app, if it has such a queue or task. Raises `UnknownQueue` or `UnknownTask`."""
    loaded = load_app(target, bootstrap=bootstrap)
    if kind == "queue":
        loaded.registry.check_queue(name)
    else:
        loaded.registry.task(name)
    return loaded


def _row(loaded: App, kind: Kind, name: str, standing: Standing | None) -> dict[str, Any]:
    limits = loaded.queues[name].limits if kind == "queue" else loaded.tasks[name].policy.limits
    if standing is not None and standing.limits is not None:
        limits = standing.limits
    about: dict[str, Any] = (
        {"partitions": loaded.queues[name].partitions, "priorities": loaded.queues[name].priorities}
        if kind == "queue"
        else {"queue": loaded.tasks[name].queue}
    )
    return {
        kind: name,
        **about,
        "paused": None if standing is None else standing.paused,
        "rate": limits.rate,
        "concurrency": limits.concurrency,
        "limited": None if standing is None else standing.limited,
    }


def _say(as_json: bool, plain: dict[str, Any], text: str) -> None:
    if as_json:
        output.print_json(plain)
    else:
        output.console().print(text, markup=False)


queues = _made("queue")
tasks = _made("task")
