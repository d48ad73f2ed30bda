"""``jobledger jobs list|count``: which jobs match filters, for people and for pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import completion, conditions, output
from jobledger.cli.commands import Wrong, pairs_of, states_of, words_of
from jobledger.cli.job_views import COLUMNS, row
from jobledger.cli.loading import find_app
from jobledger.cli.options import (
    AppOption,
    AppWord,
    Bootstrap,
    Json,
    Namespace,
    Queues,
    StatusUrl,
    moment,
    repeatable,
)
from jobledger.views.arguments import choose
from jobledger.views.jobs import args_json, status_json
from jobledger.views.records import submissions

if TYPE_CHECKING:
    from jobledger.app import App, JobFilter
    from jobledger.job import JobStatus

#: Seconds after which a job that was not started counts as late.
LATE_S = 10.0
#: Number of jobs whose arguments are read at a time, and are compared with the wanted ones at most.
_ARGS_AT_ONCE, _COMPARED_MOST = 200, 10_000

States = Annotated[
    list[str] | None, repeatable("Jobs in this state: scheduled, queued, running, …", autocompletion=completion.states)
]
Tasks = Annotated[list[str] | None, repeatable("Jobs of this task", autocompletion=completion.tasks)]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Jobs with this tag; if repeated, with all of these tags.", show_default="any"
    ),
]
Since = Annotated[str | None, moment("Jobs submitted at this time or later", show_default="any")]
Late = Annotated[
    bool,
    typer.Option(
        "--late",
        help=f"Jobs that have not started although they could have started {LATE_S:g} seconds ago or earlier.",
    ),
]
Where = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help=f"{conditions.HELP}.", show_default="any")]


class Format(StrEnum):
    """What a list is printed as."""

    TABLE = "table"
    IDS = "ids"
    JSONL = "jsonl"


def list_jobs(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    state: States = None,
    task: Tasks = None,
    queue: Queues = None,
    tag: Tags = None,
    since: Since = None,
    late: Late = False,
    where: Where = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            "--arg",
            metavar="PATH=VALUE",
            help="Jobs with this argument, such as user.id=1; if repeated, with all of them. Arguments are read from the log, "
            f"for the newest {_COMPARED_MOST:,} jobs that match the other options.",
            show_default="any",
        ),
    ] = None,
    show: Annotated[
        list[str] | None,
        typer.Option(
            metavar="tags,args",
            help="More columns: tags, and arguments, which are read from the log (shortened, except in JSON).",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of jobs.")] = 50,
    form: Annotated[
        Format,
        typer.Option("--format", help="A table; or for pipes one id, or one JSON object, in each line."),
    ] = Format.TABLE,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first. A job must match all given options.

    Example: jobledger jobs list shop:app --state failed --state expired --tag tenant=acme --since 2h --show tags,args

    Example: jobledger jobs list shop:app --where key=order-7 --format ids | xargs jobledger jobs cancel shop:app
    """
    more = _columns(show)
    if as_json and form is not Format.TABLE:
        raise Wrong(f"--json prints one array, and --format {form} lines: give only one of them")
    filters = _filters(state, task, queue, tag, since, late, where)
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    wanted = pairs_of(arg, "--arg")
    queried = find_app(parsed.target or app, namespace, bootstrap, status_url)
    try:
        jobs = queried.jobs(**filters, limit=_COMPARED_MOST if wanted else limit)
        if wanted:
            jobs = islice(_having(queried, jobs, wanted), limit)
        number = _printer(form, as_json)(queried, jobs, more)
    finally:
        queried.close()
    if number == limit and not as_json:
        output.console(stderr=True).print(f"only the newest {limit}; use --limit for more", style="dim")
    elif wanted and not as_json:
        output.console(stderr=True).print(
            f"at most the newest {_COMPARED_MOST:,} jobs that match the other options were compared", style="dim"
        )


def count_jobs(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    state: States = None,
    task: Tasks = None,
    queue: Queues = None,
    tag: Tags = None,
    since: Since = None,
    late: Late = False,
    where: Where = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", "-n", min=1, help="Count at most so many jobs. Counts by state, task and queue have no limit."
        ),
    ] = 10_000,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Count jobs. A job must match all given options.

    The number is that of the table's counters if only states, tasks and queues are given. Otherwise the table's rows are
    counted up to the limit.

    Example: jobledger jobs count shop:app --state failed --where error=TimeoutError
    """
    from jobledger.app import filters_of

    filters = filters_of(**_filters(state, task, queue, tag, since, late, where))
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    queried = find_app(parsed.target or app, namespace, None, status_url)
    try:
        counted = queried.status_table().count(limit, **filters)
    finally:
        queried.close()
    if as_json:
        output.print_json(counted)
        return
    print(counted.jobs)
    if not counted.exact:
        output.console(stderr=True).print("not all jobs were counted: there may be more", style="dim")


def _filters(
    states: list[str] | None,
    tasks: list[str] | None,
    queues: list[str] | None,
    tags: list[str] | None,
    since: str | None,
    late: bool,
    where: list[str] | None,
) -> JobFilter:
    options: JobFilter = {
        "state": states_of(states),
        "task": tasks,
        "queue": queues,
        "tag": pairs_of(tags, "--tag"),
        "since": None if since is None else conditions.moment_of(since, "--since"),
        "late": LATE_S if late else None,
    }
    return conditions.together(options, conditions.conditions_of(where))


def _columns(texts: Sequence[str] | None) -> list[str]:
    names = [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS:
            raise Wrong(f"--show {name!r} is not a column; the columns are {', '.join(COLUMNS)}")
    return list(dict.fromkeys(names))


def _having(app: App, jobs: Iterable[JobStatus], wanted: Mapping[str, str]) -> Iterator[JobStatus]:
    """Yield the jobs that have all of these arguments. A job whose arguments are not known any more has none of them."""
    iterator = iter(jobs)
    while some := list(islice(iterator, _ARGS_AT_ONCE)):
        yield from choose(some, submissions(app.settings, app.names, some), wanted, len(some)).jobs


#: Prints jobs with additional columns, and returns their number.
Printer = Callable[["App", "Iterable[JobStatus]", Sequence[str]], int]


def _printer(form: Format, as_json: bool) -> Printer:
    if as_json:
        return _print_array
    return {Format.TABLE: _print_table, Format.IDS: _print_ids, Format.JSONL: _print_lines}[form]


def _print_array(app: App, jobs: Iterable[JobStatus], more: Sequence[str]) -> int:
    rows = list(_as_json(app, jobs, more))
    output.print_json(rows)
    return len(rows)


def _print_lines(app: App, jobs: Iterable[JobStatus], more: Sequence[str]) -> int:
    number = 0
    for each in _as_json(app, jobs, more):
        output.print_json(each)
        number += 1
    return number


def _print_ids(app: App, jobs: Iterable[JobStatus], more: Sequence[str]) -> int:
    number = 0
    for each in jobs:
        print(output.printable(each.job_id))
        number += 1
    return number


def _print_table(app: App, jobs: Iterable[JobStatus], more: Sequence[str]) -> int:
    statuses = list(jobs)
    args: Mapping[str, bytes | str | None] = submissions(app.settings, app.names, statuses) if "args" in more else {}
    headings = ("job", "task", "queue", "state", "attempt", "submitted", "took", *more, "")
    rows = [row(each, more, args.get(each.job_id)) for each in statuses]
    output.print_table(headings, rows, optional=("queue", "took", "attempt", "submitted"), empty="no such jobs")
    return len(statuses)


def _as_json(app: App, jobs: Iterable[JobStatus], more: Sequence[str]) -> Iterator[dict[str, Any]]:
    iterator = iter(jobs)
    if "args" not in more:
        yield from map(status_json, iterator)
        return
    while some := list(islice(iterator, _ARGS_AT_ONCE)):
        args = submissions(app.settings, app.names, some)
        yield from (status_json(each) | args_json(args[each.job_id]) for each in some)
