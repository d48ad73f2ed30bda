"""``jobledger projections run|list|verify|rebuild``: users' own tables, folded from the log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import completion, logs, output
from jobledger.cli.commands import CommandGroup, among
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, LogFormat, Metrics, StatusUrl, Target, Yes
from jobledger.cli.output import Cell, Exit
from jobledger.cli.running import stopping
from jobledger.cli.table import progress_bar
from jobledger.errors import ConfigError, JobledgerError, text_of, type_of
from jobledger.process.extras import need
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.streams.projections.runner import Checked, ProjectionRunner

LOG = get_logger("jobledger.projection")

app = CommandGroup(name="projections", help="Your own tables, folded from the log.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The projection's name.", autocompletion=completion.projections)
]


@app.command("run")
def run(
    target: Target,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Projections to run.", show_default="all of the app")
    ] = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Keep projections up to date with the log, until SIGTERM or Ctrl-C. If one projection fails, all of them stop; the
    next start continues from where they stopped."""
    need("jobledger projections run", "streams")
    from jobledger.cli.metrics import serving

    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    logs.set_up()
    runners = [_runner(loaded, name) for name in names or _all(loaded)]
    failed: list[tuple[str, BaseException]] = []

    def counts() -> dict[str, int]:
        return {"folded": sum(r.folded for r in runners), "unreadable": sum(r.unreadable for r in runners)}

    with ExitStack() as stack, serving(metrics, "jobledger_projections", counts), stopping() as stop:
        for runner in runners:
            stack.callback(runner.close)

        def follow(runner: ProjectionRunner) -> None:
            try:
                runner.run(stop)
            except BaseException as exc:
                # Any error stops all projections: otherwise the other threads and the metrics would hide that this
                # thread has ended.
                if not isinstance(exc, JobledgerError):
                    LOG.exception("projection %s failed", runner.projection.name)
                failed.append((runner.projection.name, exc))
                stop.set()

        threads = [threading.Thread(target=follow, args=(r,), name=f"projection-{r.projection.name}") for r in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            # Each wait is short, because signal handlers run only between two waits.
            while thread.is_alive():
                thread.join(0.2)
    for name, error in failed[:1]:
        if isinstance(error, JobledgerError):
            raise error
        raise JobledgerError(f"projection {name} failed: {type_of(error)}: {text_of(error)}") from error


@app.command("list")
def show(target: Target, as_json: Json = False) -> None:
    """List an app's projections."""
    from jobledger.schemas.events import fact_name

    loaded = load_app(target)
    rows = [
        {
            "projection": each.name,
            "table": each.table.name,
            "of": sorted(e.name for e in each.events.values()) or [fact_name(f) for f in each.facts],
        }
        for each in loaded.registry.projections.values()
    ]
    if as_json:
        output.print_json(rows)
    else:
        cells: list[Sequence[Cell]] = [(str(r["projection"]), str(r["table"]), ", ".join(r["of"])) for r in rows]
        output.print_table(("projection", "table", "folds"), cells, empty="the app has no projections")


@app.command("verify")
def verify(
    target: Target, name: Name, bootstrap: Bootstrap = None, status_url: StatusUrl = None, as_json: Json = False
) -> None:
    """Fold the log again and compare the result with the table. Exit code 0 if they are equal, 4 if not, and 1 if the
    log was trimmed and they differ: then the table may still be correct."""
    runner = _runner(load_app(target, bootstrap=bootstrap, status_url=status_url), name)
    with _folding(runner, as_json) as (stop, tell):
        result = runner.verify(stop, tell)
    _tell(result, as_json, verified=True)
    if result.equal is None:
        raise JobledgerError(f"projection {name} is not comparable: the log was trimmed: {'; '.join(result.trimmed)}")
    if not result.equal:
        raise typer.Exit(Exit.DIFFERS)


@app.command("rebuild")
def rebuild(
    target: Target,
    name: Name,
    yes: Yes = False,
    from_what_is_left: Annotated[
        bool, typer.Option("--from-what-is-left", help="Allow a trimmed log: rows from its missing part are lost.")
    ] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Fold the whole log again and replace the table's rows with the result. A `projections run` that runs meanwhile
    continues from the result. If the log was trimmed, the command fails and changes nothing, unless --from-what-is-left
    is given."""
    if not yes:
        typer.confirm(f"Replace the rows of projection {name} with a fold of the whole log?", abort=True, err=True)
    runner = _runner(load_app(target, bootstrap=bootstrap, status_url=status_url), name)
    with _folding(runner, as_json) as (stop, tell):
        result = runner.rebuild(stop, tell, from_what_is_left=from_what_is_left)
    _tell(result, as_json, verified=False)


@contextmanager
def _folding(runner: ProjectionRunner, quiet: bool) -> Iterator[tuple[threading.Event, Callable[[int, int], None]]]:
    """Yield an event that stops a fold, and a function that reports the fold's progress. Close the runner
    afterwards."""
    with closing(runner), progress_bar("folding the log", quiet=quiet) as tell, stopping() as stop:
        yield stop, tell or (lambda done, total: None)


def _tell(result: Checked, as_json: bool, *, verified: bool) -> None:
    if as_json:
        output.print_json(result)
        return
    fields: list[tuple[str, Cell]] = [("projection", result.projection)]
    if verified:
        verdicts: dict[bool | None, Cell] = {
            True: ("yes", "bold green"),
            False: ("NO", "bold red"),
            None: ("not comparable: the log was trimmed", "bold yellow"),
        }
        fields.append(("equal", verdicts[result.equal]))
    fields += [
        ("rows", f"{result.rows:,}"),
        ("digest of the table", result.live_digest if verified else result.digest),
        ("digest of the log", result.digest),
        ("read", f"{counted(result.records, 'record')} in {output.duration(result.seconds)}"),
    ]
    if result.unreadable:
        fields.append(("not events", (f"{counted(result.unreadable, 'record')}, skipped", "yellow")))
    fields += [("trimmed", (each, "yellow")) for each in result.trimmed]
    output.print_fields(fields)


def _all(loaded: App) -> list[str]:
    if not loaded.registry.projections:
        raise ConfigError(
            f"app {loaded.names.namespace!r} has no projections: decorate a function with @app.projection(…)"
        )
    return list(loaded.registry.projections)


def _runner(loaded: App, name: str) -> ProjectionRunner:
    from jobledger.streams.projections.runner import ProjectionRunner

    known = loaded.registry.projections
    projection = known[among(name, known, "projection", f"app {loaded.names.namespace!r}")]
    url = loaded.settings.resolve_status_url(loaded.names.namespace)
    return ProjectionRunner(projection, loaded.settings, loaded.names, list(loaded.lanes), url)
