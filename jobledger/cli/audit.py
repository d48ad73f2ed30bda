"""``jobledger audit``: checks the log independently, with rules that share no code with the programs that write it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import output
from jobledger.cli.commands import among, moment_ms
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, Queues, StatusUrl, Target, moment
from jobledger.cli.output import Cell, Exit
from jobledger.cli.table import progress_bar
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from jobledger.audit.run import AuditReport


def audit(
    target: Target,
    finished: Annotated[
        bool,
        typer.Option("--finished", help="Assume that nothing runs any more: every job that has not ended is a fault."),
    ] = False,
    open_for: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="A job that has not ended is a fault if its last record and its due time are older than this age: 2h, 3d.",
            show_default="never",
        ),
    ] = None,
    queue: Queues = None,
    since: Annotated[
        str | None, moment("Only records appended from this time on", show_default="the whole log")
    ] = None,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Compare the status table with the log.")] = True,
    most: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="How many faults of each kind to list; all are counted.")
    ] = 100,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Check the log independently of the code that wrote it. Exit code 4, with the positions of each fault,
    if the log breaks a promise; 0 if not.

    The audit looks for jobs that have not ended, outcomes that contradict each other, starts after an outcome (and by
    which worker), releases before their due time, jobs of a key that were started out of order, missing or duplicate
    work records and dead letters, and rows of the status table that differ from the log. The audit decodes every record
    with fastavro alone and uses neither the worker's nor the table's code. Workers may run meanwhile. Anything that
    docs/promises.md allows, such as a duplicate success after a crash, is counted as a note. Memory is bounded; a
    scratch file next to the status table takes some hundred bytes per record.
    """
    from jobledger.audit.run import Wanted
    from jobledger.audit.run import audit as judge

    since_ms = None if since is None else moment_ms(since, "--since")
    before = None if open_for is None else moment_ms(open_for, "--open-for")
    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    for each in queue or ():
        among(each, app.queues, "queue", target)
    wanted = Wanted(queue or (), since_ms, finished, before, most)
    url = app.settings.resolve_status_url(app.names.namespace)
    with _scratch(url) as folder, progress_bar("auditing the log", quiet=as_json) as tell:
        copied = _copy(url, app.names.namespace, folder) if table else None
        report = judge(app.names, app.settings, wanted, folder, copied, tell)
    if as_json:
        output.print_json(report)
    else:
        _show(report)
    if not report.clean:
        raise typer.Exit(Exit.DIFFERS)


@contextmanager
def _scratch(url: str) -> Iterator[Path]:
    """Yield a temporary folder next to the status table, where there is enough space; for a table in PostgreSQL, inside
    the system's temporary folder. Delete the folder afterwards."""
    from jobledger.streams.status.store import scratch

    parent = scratch(url)
    if parent is not None:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".audit-", dir=parent) as folder:
        yield Path(folder)


def _copy(url: str, namespace: str, folder: Path) -> Path:
    """Copy the status table before the log is read, and return the path of the copy. Raises `StoreNotFound`."""
    from jobledger.streams.status.store import copy

    path = folder / "table.db"
    copy(url, namespace, path)
    return path


def _show(report: AuditReport) -> None:
    from jobledger.audit.findings import NOTES

    verdict: Cell = ("clean", "bold green")
    if not report.clean:
        verdict = (counted(sum(fault.count for fault in report.faults), "fault"), "bold red")
    rows = "not compared" if report.rows is None else f"{counted(report.rows, 'row')} compared"
    fields: list[tuple[str, Cell]] = [
        ("verdict", verdict),
        ("jobs", f"{report.jobs:,}, not ended: {report.open:,}"),
        ("status table", rows),
        ("read", f"{counted(report.records, 'record')} in {output.duration(report.seconds)}"),
    ]
    if report.complete_from_ms:
        moment = output.clock(report.complete_from_ms * 1000)
        fields.append(("complete", f"from {moment} on: earlier records were trimmed, or excluded by --since"))
    if report.not_asked:
        text = f"{', '.join(report.not_asked)}: this user may not read the committed offsets of these work topics"
        fields.append(("not judged", (text, "yellow")))
    for kind, number in sorted(report.notes.items()):
        fields.append((f"note: {kind}", f"{number:,} × {NOTES[kind]}"))
    output.print_fields(fields)
    for fault in report.faults:
        print()
        output.console().print(f"{fault.kind}: {fault.count:,} × {fault.says}", style="red", markup=False)
        for each in fault.first:
            where = ", ".join(each.positions) or "no record"
            line = f"  {where}  {each.job_id or '-'}  {each.detail}"
            output.console().print(line, markup=False, soft_wrap=True)
        if fault.count > len(fault.first):
            print(f"  … and {fault.count - len(fault.first):,} more; use --limit to list them")
