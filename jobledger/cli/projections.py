"""``jobledger projections run|list|verify|rebuild``: people's own tables, folded from the log."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import logs, output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, LogFormat, Metrics, StatusUrl, Target
from jobledger.cli.output import Cell, Exit
from jobledger.cli.running import stopping
from jobledger.cli.table import progress_bar
from jobledger.errors import ConfigError, JobledgerError

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.streams.projections import Checked, Runner

app = typer.Typer(name="projections", help="Your own tables, folded from the log.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The projection's name.")]


@app.command("run")
def run(
    target: Target,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which.", show_default="all of the app")
    ] = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Keep projections abreast of the log, until SIGTERM or Ctrl-C. One that fails ends all; the next start goes on."""
    from jobledger.cli.metrics import serving

    logs.set_up()
    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    runners = [_runner(loaded, name) for name in names or _all(loaded)]
    failed: list[JobledgerError] = []

    def counts() -> dict[str, int]:
        return {"folded": sum(r.folded for r in runners), "unreadable": sum(r.unreadable for r in runners)}

    with ExitStack() as stack, serving(metrics, "jobledger_projections", counts), stopping() as stop:
        for runner in runners:
            stack.callback(runner.close)

        def follow(runner: Runner) -> None:
            try:
                runner.run(stop)
            except JobledgerError as exc:
                failed.append(exc)
                stop.set()

        threads = [threading.Thread(target=follow, args=(r,), name=f"projection-{r.projection.name}") for r in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            # Not without a bound: a signal is served between two waits only.
            while thread.is_alive():
                thread.join(0.2)
    if failed:
        raise failed[0]


@app.command("list")
def show(target: Target, as_json: Json = False) -> None:
    """List an app's projections."""
    loaded = load_app(target)
    rows = [
        {
            "projection": each.name,
            "table": each.table.name,
            "of": sorted(e.name for e in each.events.values()) or [f.__name__ for f in each.facts],
        }
        for each in loaded.registry.projections.values()
    ]
    if as_json:
        output.print_json(rows)
    else:
        cells: list[Sequence[Cell]] = [(str(r["projection"]), str(r["table"]), ", ".join(r["of"])) for r in rows]
        output.print_table(("projection", "table", "of"), cells, empty="the app has no projections")


@app.command("verify")
def verify(
    target: Target, name: Name, bootstrap: Bootstrap = None, status_url: StatusUrl = None, as_json: Json = False
) -> None:
    """Fold the log again and compare: exit code 0 when the table equals it, 4 when it does not."""
    found = _checked(target, name, bootstrap, status_url, as_json, rebuild=False)
    _tell(found, as_json)
    if not found.equal:
        raise typer.Exit(Exit.DIFFERS)


@app.command("rebuild")
def rebuild(
    target: Target,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Fold the whole log anew and put the rows in the table's place. What follows the log
    meanwhile goes on from there."""
    if not yes:
        typer.confirm(f"Replace the rows of projection {name} by a fold of the whole log?", abort=True, err=True)
    _tell(_checked(target, name, bootstrap, status_url, as_json, rebuild=True), as_json)


def _checked(
    target: str, name: str, bootstrap: str | None, status_url: str | None, quiet: bool, *, rebuild: bool
) -> Checked:
    runner = _runner(load_app(target, bootstrap=bootstrap, status_url=status_url), name)
    try:
        with progress_bar("folding the log", quiet=quiet) as tell, stopping() as stop:
            work = runner.rebuild if rebuild else runner.verify
            return work(stop, tell or (lambda done, total: None))
    finally:
        runner.close()


def _tell(found: Checked, as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    fields: list[tuple[str, Cell]] = [("projection", found.projection)]
    if found.equal is not None:
        fields.append(("equal", ("yes", "bold green") if found.equal else ("NO", "bold red")))
    fields += [
        ("rows", f"{found.rows:,}"),
        ("digest of the table", found.live_digest if found.equal is not None else found.digest),
        ("digest of the log", found.digest),
        ("read", f"{found.records:,} records in {output.duration(found.seconds)}"),
    ]
    if found.unreadable:
        fields.append(("no events", (f"{found.unreadable:,} records, passed", "yellow")))
    output.print_fields(fields)


def _all(loaded: App) -> list[str]:
    if not loaded.registry.projections:
        raise ConfigError(f"app {loaded.names.namespace!r} has no projections: decorate a fold with @app.projection(…)")
    return list(loaded.registry.projections)


def _runner(loaded: App, name: str) -> Runner:
    from jobledger.streams.projections import Runner

    found = loaded.registry.projections.get(name)
    if found is None:
        raise ConfigError(f"no projection is called {name!r}: there are {sorted(loaded.registry.projections)}")
    url = loaded.settings.resolve_status_url(loaded.names.namespace)
    return Runner(found, loaded.settings, loaded.names, list(loaded.lanes), url)
