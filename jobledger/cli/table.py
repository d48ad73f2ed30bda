"""``jobledger verify`` and ``jobledger rebuild``: compare the status table with the log, and recreate it from the
log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from jobledger.cli import output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, StatusUrl, Target, Yes
from jobledger.cli.output import Cell, Exit
from jobledger.process.wording import counted

_EQUAL: Cell = ("yes", "bold green")
_DIFFERS: Cell = ("NO", "bold red")


def verify(
    target: Target,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Fold the whole log again and compare the result with the status table. Exit code 0 if they are equal, 4 if not.

    The materializer may run meanwhile. Jobs whose records the log no longer has completely are left out, and counted;
    so are jobs whose rows were removed some time after their end.
    """
    from jobledger.streams.status import rebuild as tables

    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    url = app.settings.resolve_status_url(app.names.namespace)
    with progress_bar("folding the log", quiet=as_json) as tell:
        result = tables.verify(app.names, app.settings, list(app.lanes), url, tell)
    if as_json:
        output.print_json(result)
    else:
        fields: list[tuple[str, Cell]] = [
            ("equal", _EQUAL if result.equal else _DIFFERS),
            ("table", result.url),
            ("jobs", f"{result.jobs:,} compared" + (f", {result.left_out:,} left out" if result.left_out else "")),
            ("counters equal", _EQUAL if result.counters_equal else _DIFFERS),
            ("digest of the table", result.table_digest),
            ("digest of the log", result.log_digest),
            ("read", f"{counted(result.records, 'record')} in {output.duration(result.seconds)}"),
        ]
        if result.removed:
            fields.append(("removed", f"{counted(result.removed, 'job')}, not compared: the table's retention is over"))
        if result.differing:
            fields.append(("differing", (f"{counted(result.differing, 'job')}, including", "red")))
            fields += [("", job_id) for job_id in result.first_differing]
            fields.append(("way out", f"stop the materializer and run `jobledger rebuild {target}`"))
        output.print_fields(fields)
    if not result.equal:
        raise typer.Exit(Exit.DIFFERS)


def rebuild(
    target: Target,
    yes: Yes = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Rebuild the status table from the log, next to the live table, and swap them. No job runs again.

    Stop the materializer first. Rows of jobs whose records the log no longer has completely are copied from the old
    table.
    """
    from jobledger.streams.status import rebuild as tables
    from jobledger.streams.status.store import shown

    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    url = app.settings.resolve_status_url(app.names.namespace)
    if not yes:
        typer.confirm(f"Replace the status table {shown(url)} with one rebuilt from the log?", abort=True, err=True)
    with progress_bar("folding the log", quiet=as_json) as tell:
        result = tables.rebuild(app.names, app.settings, list(app.lanes), url, tell)
    if as_json:
        output.print_json(result)
        return
    fields: list[tuple[str, Cell]] = [
        ("table", result.url),
        (
            "jobs",
            f"{result.jobs:,}" + (f", copied from the old table: {result.carried:,}" if result.carried else ""),
        ),
        ("read", f"{counted(result.records, 'record')} in {output.duration(result.seconds)}"),
    ]
    if result.removed:
        fields.append(("removed", f"{counted(result.removed, 'job')}, left out: the table's retention is over"))
    if result.rejected:
        fields.append(("not events", (f"{counted(result.rejected, 'record')}, skipped", "yellow")))
    output.print_fields(fields)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar of the records read, on standard error. Yield the function that takes the numbers of records
    that are read and of all records; None if standard error is not a terminal, or if ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.console(stderr=True), transient=True) as bar:
        line = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)
