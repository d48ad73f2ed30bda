"""``jobledger errors list``: failed and retrying jobs, in groups of errors of the same kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import output
from jobledger.cli.commands import CommandGroup, moment_ms, words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import AppOption, AppWord, Json, Namespace, StatusUrl, moment
from jobledger.cli.output import Cell
from jobledger.views.groups import group_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jobledger.streams.status.store.protocol import ErrorGroup, LastSuccess

app = CommandGroup(name="errors", help="Errors of jobs, in groups of the same kind.", no_args_is_help=True)


@app.command("list")
def list_errors(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    since: Annotated[str | None, moment("Only jobs submitted at this time or later", show_default="any")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of groups.")] = 50,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List the errors of failed and retrying jobs, in groups of the same kind; the group with the last submission comes
    first.

    The times are those of submissions. "again": jobs that had the error again after a redrive. At most 500 jobs of each
    group are counted, those submitted last. `jobs list --where fingerprint=…` lists the jobs of a group, and `jobs
    redrive --where fingerprint=…` runs them again.

    Example: jobledger errors list shop:app --since 2h
    """
    since_ms = None if since is None else moment_ms(since, "--since")
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    queried = find_app(parsed.target or app, namespace, None, status_url)
    try:
        table = queried.status_table()
        groups = table.errors(since_ms, limit)
        successes = table.last_success(*dict.fromkeys(task for group in groups for task in group.tasks))
    finally:
        queried.close()
    if as_json:
        output.print_json([group_json(group, successes) for group in groups])
        return
    headings = ("fingerprint", "error", "jobs", "first", "last", "tasks", "versions", "last success", "message")
    rows = [_row(group, successes) for group in groups]
    output.print_table(headings, rows, optional=("first", "versions", "last success", "tasks"), empty="no errors")
    if len(groups) == limit:
        output.console(stderr=True).print(f"only the last {limit} groups; use --limit for more", style="dim")


def _row(group: ErrorGroup, successes: Mapping[str, LastSuccess]) -> list[Cell]:
    known = [success for task in group.tasks if (success := successes.get(task)) is not None]
    last = max(known, key=lambda success: success.ended_ms, default=None)
    worked = "" if last is None else f"{last.version or 'unknown'}, {output.brief(last.ended_ms * 1000)}"
    return [
        group.fingerprint,
        (group.type.rpartition(".")[2], "red"),
        f"{group.jobs:,}" + ("" if group.exact else " or more") + (f", {group.again:,} again" if group.again else ""),
        output.brief(group.first_ms * 1000),
        output.brief(group.last_ms * 1000),
        _numbers(group.tasks),
        _numbers(group.versions),
        worked,
        output.shorten(group.message),
    ]


def _numbers(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'unknown'} {number}" for name, number in numbers.items())
