"""``jobledger backfill``: runs a handler for past events."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import Wrong, judged, moment_ms
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, StatusUrl, Target, moment
from jobledger.cli.output import Cell, Exit
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from jobledger.consumers.router.backfill import BackfillPlan, BackfillProgress


#: Seconds between two progress lines, if standard error is not a terminal.
PROGRESS_S = 5.0


def backfill(
    target: Target,
    handler: Annotated[
        str, typer.Argument(metavar="HANDLER", help="The handler's name.", autocompletion=completion.handlers)
    ],
    since: Annotated[
        str | None, moment("Events from this time on", "--from", show_default="the oldest event kept")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="TIME", help="Events before this time, in the format of --from.", show_default="now"
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="N/s", help="Maximum rate of events: 50/s, 3000/min, 1000/h.", show_default="no limit"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the jobs that would be submitted; submit none.")
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Also submit jobs of events from the time for which rows were removed from the status table. Those that "
            "the handler has run already run again.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard the progress of an interrupted backfill and start from the beginning."),
    ] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Submit a handler's jobs for past events, up to now. Jobs that the status table knows are skipped.

    Ctrl-C interrupts the backfill; the same command continues it. Example: jobledger backfill shop:app sync_crm --from
    2026-01-01 --rate 50/s --dry-run
    """
    from jobledger.cli.running import stopping
    from jobledger.consumers.router.backfill import Backfill, known_to
    from jobledger.errors import JobNotFound

    plan = _plan(handler, since, until, rate, dry_run, restart)
    app = load_app(target, bootstrap=bootstrap, status_url=status_url)
    with judged():
        app.registry.handler(handler)
    try:
        if not again:
            _refuse_removed(plan.since, app.status_table().removed())
        backfiller = Backfill(app.registry, app.settings, plan, known_to(app.status_table().job, JobNotFound))
        with _bar(handler, quiet=as_json, dry_run=dry_run) as tell, stopping() as stop:
            progress = backfiller.run(stop, tell)
    finally:
        app.close()
    if as_json:
        _print_json(plan, backfiller.topic, progress)
    else:
        _show(plan, backfiller.topic, progress)
    if not progress.done:
        raise typer.Exit(Exit.INTERRUPTED)


def _plan(
    handler: str, since: str | None, until: str | None, rate: str | None, dry_run: bool, restart: bool
) -> BackfillPlan:
    from jobledger.consumers.router.backfill import BackfillPlan, events_per_second

    begin = None if since is None else moment_ms(since, "--from")
    end = None if until is None else moment_ms(until, "--to")
    with judged("--rate"):
        pace = None if rate is None else events_per_second(rate)
    return BackfillPlan(handler, begin, end, pace, dry_run, restart)


def _refuse_removed(begin_ms: int | None, limits: Mapping[str, int]) -> None:
    """Raise `Wrong` if the backfill begins at a time for which rows were removed from the status table: the table cannot
    tell then which jobs have run. ``limits``: `StatusReader.removed`."""
    removed_ms = max(limits.values(), default=0)
    if removed_ms and (begin_ms is None or begin_ms < removed_ms):
        first = dt.datetime.fromtimestamp(-(-removed_ms // 1000), dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")
        raise Wrong(
            f"the status table no longer has the rows of all jobs before {first} (JOBLEDGER_TABLE_RETENTION), so it is not "
            f"known which jobs of earlier events have run: give --from {first} or later, or --again to run the handler for "
            "earlier events in any case"
        )


def _print_json(plan: BackfillPlan, topic: str, progress: BackfillProgress) -> None:
    output.print_json(
        {
            "handler": plan.handler,
            "topic": topic,
            "done": progress.done,
            "resumed": progress.resumed,
            "dry_run": plan.dry_run,
            "events": progress.events,
            "submitted": progress.submitted,
            "known": progress.known,
            "unreadable": progress.unreadable,
        }
    )


def _show(plan: BackfillPlan, topic: str, progress: BackfillProgress) -> None:
    resumed = ", continued after an interruption" if progress.resumed else ""
    fields: list[tuple[str, Cell]] = [
        ("events", f"{progress.events:,} of {topic}{resumed}"),
        ("would submit" if plan.dry_run else "submitted", counted(progress.submitted, "job")),
        ("already known", counted(progress.known, "job")),
    ]
    if progress.unreadable:
        fields.append(("not events", (f"{counted(progress.unreadable, 'record')}, skipped", "yellow")))
    if not progress.done:
        fields.append(("interrupted", ("run the same command again to continue", "yellow")))
    output.print_fields(fields)


@contextmanager
def _bar(what: str, *, quiet: bool, dry_run: bool) -> Iterator[Callable[[BackfillProgress], None]]:
    """Show a progress bar on standard error; if that is not a terminal, print a line every `PROGRESS_S` seconds. Yield
    the function that takes the progress."""
    if quiet:
        yield lambda progress: None
        return
    if not sys.stderr.isatty():
        yield _progress_lines(what, "would be submitted" if dry_run else "submitted")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=output.console(stderr=True), transient=True) as bar:
        line = bar.add_task(what, total=None)
        yield lambda progress: bar.update(line, completed=progress.passed, total=progress.total)


def _progress_lines(what: str, done: str) -> Callable[[BackfillProgress], None]:
    printed_at = time.monotonic()

    def tell(progress: BackfillProgress) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at < PROGRESS_S or progress.done:
            return
        printed_at = now
        print(
            f"{what}: {progress.passed:,} of {counted(progress.total, 'event')} read, "
            f"{counted(progress.submitted, 'job')} {done}, {progress.known:,} already known",
            file=sys.stderr,
            flush=True,
        )

    return tell
