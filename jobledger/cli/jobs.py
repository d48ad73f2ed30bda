"""``jobledger jobs list|show|wait|cancel``: jobs on the command line."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import (
    CommandGroup,
    Words,
    Wrong,
    moment_ms,
    pair_of,
    pairs_of,
    seconds,
    states_of,
    words_of,
)
from jobledger.cli.job_views import COLUMNS, args_json, fields, finish, row, status_json, submissions, timeline
from jobledger.cli.loading import find_app
from jobledger.cli.options import TIMES, AppOption, Bootstrap, Json, Namespace, Queues, StatusUrl
from jobledger.cli.waiting import showing_progress

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.client.commands import Job
    from jobledger.job import JobStatus

app = CommandGroup(name="jobs", help="Ask the status table about jobs.", no_args_is_help=True)

#: Minimum characters of a shortened id. The first eight characters of Jobledger's own ids stand for a time span of
#: about a minute.
PREFIX_LEAST = 6
#: How many matching ids an error about a shortened id lists.
_CANDIDATES = 5
#: Seconds after which a job that was not started counts as late.
LATE_S = 10.0
#: Length of a whole id, a UUID.
_WHOLE = 36

OneJob = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:APP] ID",
        help=f"The job's id, or its first characters, {PREFIX_LEAST} or more; put the app before it, unless an option names the app.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]


@app.command("list")
def list_jobs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODULE:APP]", help="The app, unless an option names it.", show_default=False),
    ] = None,
    app: AppOption = None,
    namespace: Namespace = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="Jobs in this state: scheduled, queued, running, …; repeat it for several.",
            show_default="any",
            autocompletion=completion.states,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Jobs of this task; repeat it for several.", show_default="any", autocompletion=completion.tasks
        ),
    ] = None,
    queue: Queues = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Jobs with this tag; if repeated, with all of these tags.", show_default="any"
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=f"Jobs submitted at this time or later: {TIMES}",
            show_default="any",
        ),
    ] = None,
    late: Annotated[
        bool,
        typer.Option(
            "--late",
            help=f"Jobs not started although they were due, or queued without a delay, at least {LATE_S:g} seconds ago.",
        ),
    ] = False,
    show: Annotated[
        list[str] | None,
        typer.Option(
            metavar="tags,args",
            help="More columns: tags, and arguments, which are read from the log (shortened, except with --json).",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of jobs.")] = 50,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first. A job must match all given options.

    Example: jobledger jobs list shop:app --state failed --state expired --tag tenant=acme --since 2h --show tags,args
    """
    import datetime as dt

    more = _columns(show)
    wanted = states_of(state), pairs_of(tag, "--tag")
    begin = None if since is None else dt.datetime.fromtimestamp(moment_ms(since, "--since") / 1000, dt.UTC)
    asked = _asked(words_of(words, _named(app, namespace), "argument", 0), app, namespace, bootstrap, status_url)
    try:
        found = list(
            asked.jobs(
                state=wanted[0] or None,
                task=task or None,
                queue=queue or None,
                tag=wanted[1],
                since=begin,
                late=LATE_S if late else None,
                limit=limit,
            )
        )
        args = submissions(asked, found) if "args" in more else {}
    finally:
        asked.close()
    if as_json:
        output.print_json([status_json(each) | (args_json(args[each.job_id]) if args else {}) for each in found])
        return
    headings = ("job", "task", "queue", "state", "try", "submitted", "took", *more, "")
    rows = [row(each, more, args.get(each.job_id)) for each in found]
    output.print_table(headings, rows, optional=("queue", "took", "try", "submitted"), empty="no such jobs")
    if len(found) == limit:
        output.console(stderr=True).print(f"only the newest {limit}; use --limit for more", style="dim")


@app.command("show")
def show(
    words: OneJob = None,
    app: AppOption = None,
    namespace: Namespace = None,
    timeline_too: Annotated[
        bool, typer.Option("--timeline", "-t", help="Show every event of the job, from the log.")
    ] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Show one job; exit code 3 if the status table does not know it.

    The job's arguments are read from the log, as the table does not have them. If the log no longer has them, the
    command reports this.
    """
    named = words_of(words, _named(app, namespace), "ID", 1)
    asked = _asked(named, app, namespace, bootstrap, status_url)
    try:
        status = asked.job(whole_id(asked, named.others[0]))
        args = submissions(asked, [status])[status.job_id]
        steps = timeline(asked, status) if timeline_too else None
    finally:
        asked.close()
    if as_json:
        shown = status_json(status) | args_json(args)
        if steps is not None:
            shown["timeline"] = [step_json for step_json, _ in steps]
        output.print_json(shown)
        return
    output.print_fields(fields(status, args))
    if steps is not None:
        print()
        columns = ("appended", "after", "event", "try", "position", "")
        output.print_table(columns, [cells for _, cells in steps], optional=("position", "after"))


@app.command("wait")
def wait(
    words: OneJob = None,
    app: AppOption = None,
    namespace: Namespace = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="SECONDS", help="Give up after this time (exit code 6).", show_default="never"
        ),
    ] = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Wait until a job has ended: exit code 0 if it succeeded, 5 if not, 3 if it is unknown, 6 if the time is over.

    On a terminal a bar shows its progress.
    """
    named = words_of(words, _named(app, namespace), "ID", 1)
    asked = _asked(named, app, namespace, None, status_url)
    try:
        job_id = named.others[0]
        if len(job_id) < _WHOLE:
            job_id = whole_id(asked, job_id)
        with showing_progress(asked, job_id, quiet=as_json):
            status = asked.client.wait(job_id, timeout=timeout)
    finally:
        asked.close()
    finish(status, as_json)


@app.command("cancel")
def cancel(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODULE:APP] [ID]...",
            help="The jobs' ids, or the ids' first characters; put the app before them, unless an option names the app.",
            autocompletion=completion.jobs,
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="All jobs that have not ended and have this task, queue, state or tag (tag.NAME=VALUE). If repeated, one of "
            "several tasks, queues or states must match, and every other condition.",
        ),
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", "-r", help="The reason, kept in the log.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="Who cancels the jobs.", show_default="user@host")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the jobs.")] = False,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Cancel jobs: a waiting job is not started, a running job is asked to stop, a job that has ended is not changed.

    An id that the status table does not know is accepted if it is a UUID: the table may not have read the job yet.

    Example: jobledger jobs cancel shop:app --where task=send_mail --where tag.tenant=acme --reason "wrong list"
    """
    from jobledger.client.commands import Job

    named = words_of(words, _named(app, namespace), "ID", None)
    if not named.others and not where:
        raise Wrong("which jobs? Give their ids, or --where NAME=VALUE")
    if named.others and where:
        raise Wrong("give ids or --where, not both")
    chosen = _where(where or [])
    asked = _asked(named, app, namespace, bootstrap, status_url)
    notes: list[str] = []
    try:
        if named.others:
            found, notes = _by_id(asked, named.others)
        else:
            found = [Job(s.job_id, s.run, s.task, s.queue) for s in _open_jobs(asked, chosen)]
            if not as_json and not dry_run and found and not yes:
                typer.confirm(f"Cancel {_jobs(len(found))}?", abort=True, err=True)
        if found and not dry_run:
            asked.orders.cancel(found, reason, by)
    finally:
        asked.close()
    if as_json:
        cancelled = 0 if dry_run else len(found)
        output.print_json({"cancelled": cancelled, "jobs": [job.job_id for job in found], "notes": notes})
        return
    for note in notes:
        output.console(stderr=True).print(note, style="yellow", markup=False)
    if dry_run:
        for job in found:
            output.console().print(f"{job.job_id}  {job.task}  {job.queue}", markup=False, highlight=False)
        output.console(stderr=True).print(f"{_jobs(len(found))}; nothing was changed", style="dim")
    else:
        output.console().print(
            f"requested the cancel of {_jobs(len(found))}" if found else "no job is left to cancel", markup=False
        )


def _named(app: str | None, namespace: str | None) -> bool:
    return app is not None or namespace is not None


def _asked(named: Words, app: str | None, namespace: str | None, bootstrap: str | None, status_url: str | None) -> App:
    return find_app(named.target or app, namespace, bootstrap, status_url)


def _columns(texts: Sequence[str] | None) -> list[str]:
    found = [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
    for name in found:
        if name not in COLUMNS:
            raise Wrong(f"--show {name!r} is not a column; there are {', '.join(COLUMNS)}")
    return list(dict.fromkeys(found))


def whole_id(asked: App, text: str) -> str:
    """Return the id of the one job with this id, or whose id begins with this text. A text with the length of a whole
    id is returned without a check.

    Raises `Wrong` if several ids begin with the text, or if it is too short; `JobNotFound` if no id does.
    """
    from jobledger.errors import JobNotFound

    table = asked.status_table()
    if len(text) >= _WHOLE:
        return text
    try:
        return str(table.job(text).job_id)
    except JobNotFound:
        pass
    if len(text) < PREFIX_LEAST:
        raise Wrong(f"{text!r} is too short for the beginning of an id: give {PREFIX_LEAST} characters or more")
    found = table.ids(text, _CANDIDATES + 1)
    if not found:
        raise JobNotFound(f"the status table knows no job with the id {text}, or with an id that begins with it")
    if len(found) > 1:
        more = ", …" if len(found) > _CANDIDATES else ""
        raise Wrong(f"{text!r} is the beginning of several ids: {', '.join(found[:_CANDIDATES])}{more}")
    return str(found[0])


def _by_id(asked: App, job_ids: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Return the jobs with these ids that have not ended, as far as the status table knows, and notes about the other
    ids. A UUID that the status table does not know is returned, too, with a note.

    Raises `Wrong` for a text that is not a job's id, before anything is cancelled.
    """
    from jobledger.client.commands import Job
    from jobledger.errors import JobNotFound, StoreError

    found: dict[str, Job] = {}
    notes: list[str] = []
    try:
        table = asked.status_table()
    except StoreError as exc:
        notes.append(f"whether these jobs exist is not known: {exc}")
        table = None
    for text in dict.fromkeys(job_ids):
        try:
            status: JobStatus | None = None if table is None else table.job(whole_id(asked, text))
        except JobNotFound:
            status = None
        if status is not None:
            if status.state.ended:
                notes.append(f"{status.job_id} has ended: {status.state.value}")
            else:
                found[status.job_id] = Job(status.job_id, status.run, status.task, status.queue)
            continue
        try:
            uuid.UUID(text)
        except ValueError:
            known = (
                ""
                if table is None
                else ", and the status table knows no job with this id, or with an id that begins with it"
            )
            raise Wrong(f"{text!r} is not a job's id: job ids are UUIDs{known}") from None
        if table is not None:
            notes.append(f"the status table does not know {text}: it can be cancelled only if it was just submitted")
        found[text] = Job(text)
    return list(found.values()), notes


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _where(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the conditions of ``--where`` by name; tags are ``NAME=VALUE``. Raises `Wrong`."""
    from jobledger.job import State

    found: dict[str, list[str]] = {"state": [], "task": [], "queue": [], "tag": []}
    for each in texts:
        name, value = pair_of(each, "--where")
        if name.startswith("tag.") and len(name) > len("tag."):
            found["tag"].append(f"{name[len('tag.') :]}={value}")
        elif name in ("state", "task", "queue"):
            found[name].append(value)
        else:
            raise Wrong(f"--where {each!r}: write task=…, queue=…, state=… or tag.NAME=…")
    pairs_of(found["tag"], "--where tag")
    if ended := [each for each in states_of(found["state"], "--where state") if State(each).ended]:
        raise Wrong(f"--where state={ended[0]}: those jobs have ended")
    return found


def _open_jobs(asked: App, where: dict[str, list[str]]) -> Iterator[JobStatus]:
    """Yield the jobs that have not ended and match every condition."""
    from jobledger.job import State

    yield from asked.jobs(
        state=where["state"] or [each for each in State if not each.ended],
        task=where["task"] or None,
        queue=where["queue"] or None,
        tag=pairs_of(where["tag"], "--where tag"),
    )
