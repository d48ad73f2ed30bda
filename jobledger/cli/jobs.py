"""``jobledger jobs list|count|show|explain|wait|cancel|redrive``: jobs on the command line."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import completion, conditions, output
from jobledger.cli.commands import CommandGroup, Words, Wrong, words_of
from jobledger.cli.job_lists import count_jobs, list_jobs
from jobledger.cli.job_views import explanation, fields, finish, timeline
from jobledger.cli.loading import find_app
from jobledger.cli.options import (
    AppOption,
    Bootstrap,
    Json,
    Namespace,
    Reason,
    StatusUrl,
    Yes,
    timespan,
)
from jobledger.cli.plans import show_made
from jobledger.cli.waiting import showing_progress
from jobledger.process.wording import counted
from jobledger.views.jobs import args_json, status_json
from jobledger.views.records import submissions

if TYPE_CHECKING:
    from jobledger.app import App, JobFilter
    from jobledger.client.commands import Job
    from jobledger.definitions.handles import Plan
    from jobledger.job import JobStatus

app = CommandGroup(
    name="jobs",
    help="List, count, show and explain jobs, wait for them, cancel them and run them again.",
    no_args_is_help=True,
)
app.command("list")(list_jobs)
app.command("count")(count_jobs)

#: Minimum characters of a shortened id. The first eight characters of Jobledger's own ids stand for a time span of
#: about a minute.
PREFIX_LEAST = 6
#: How many matching ids an error about a shortened id lists.
_CANDIDATES = 5
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
ManyJobs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:APP] [ID]...",
        help="The jobs' ids, or the ids' first characters; put the app before them, unless an option names the app.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]


Rate = Annotated[str | None, typer.Option(metavar="N/s", help="How many jobs in a time.", show_default="no limit")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count the jobs, and show some of them.")]


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
    parsed = words_of(words, _names_app(app, namespace), "ID", 1)
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        status = queried.job(whole_id(queried, parsed.others[0]))
        args = submissions(queried.settings, queried.names, [status])[status.job_id]
        steps = timeline(queried, status) if timeline_too else None
    finally:
        queried.close()
    if as_json:
        shown = status_json(status) | args_json(args)
        if steps is not None:
            shown["timeline"] = [step_json for step_json, _ in steps]
        output.print_json(shown)
        return
    output.print_fields(fields(status, args))
    if steps is not None:
        print()
        columns = ("appended", "after", "event", "attempt", "position", "")
        output.print_table(columns, [cells for _, cells in steps], optional=("position", "after"))


@app.command("explain")
def explain(
    words: OneJob = None,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Show why a job is where it is, and when it is likely to start; exit code 3 if the status table does not know it.

    The most decisive cause comes first. The limits in the code are known only if the app is given. What cannot be read
    is named, and is no error.

    Example: jobledger jobs explain shop:app 0198f2c4-51
    """
    parsed = words_of(words, _names_app(app, namespace), "ID", 1)
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        job_id = parsed.others[0]
        if len(job_id) < _WHOLE:
            job_id = whole_id(queried, job_id)
        explained = queried.explain(job_id)
    finally:
        queried.close()
    if as_json:
        output.print_json(explained)
    else:
        output.print_fields(explanation(explained))
    if explained.state == "unknown":
        raise typer.Exit(output.Exit.NOT_FOUND)


@app.command("wait")
def wait(
    words: OneJob = None,
    app: AppOption = None,
    namespace: Namespace = None,
    timeout: Annotated[float | None, timespan("Give up after this time (exit code 6).", show_default="never")] = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Wait until a job has ended: exit code 0 if it succeeded, 5 if not, 3 if it is unknown, 6 if the time is over.

    On a terminal a bar shows its progress.
    """
    parsed = words_of(words, _names_app(app, namespace), "ID", 1)
    queried = _queried_app(parsed, app, namespace, None, status_url)
    try:
        job_id = parsed.others[0]
        if len(job_id) < _WHOLE:
            job_id = whole_id(queried, job_id)
        with showing_progress(queried, job_id, quiet=as_json):
            status = queried.client.wait(job_id, timeout=timeout)
    finally:
        queried.close()
    finish(status, as_json)


@app.command("cancel")
def cancel(
    words: ManyJobs = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help=f"{conditions.HELP}. Without state only jobs that have not ended are chosen."
        ),
    ] = None,
    reason: Reason = None,
    by: Annotated[str | None, typer.Option("--by", help="Who cancels the jobs.", show_default="user@host")] = None,
    rate: Rate = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --where: wait until the last cancel is requested.")
    ] = False,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Cancel jobs: a waiting job is not started, a running job is asked to stop, a job that has ended is not changed.

    With ids the cancels are requested at once. An id that the status table does not know is accepted if it is a UUID:
    the table may not have read the job yet.

    With --where the list of the jobs is written to the log, and the stream processor carries it out as a plan, also if
    this command is ended: see `jobledger plans`. A job that has ended meanwhile is skipped. The plan is done when all
    cancels are requested; a running job may need some time to stop.

    Example: jobledger jobs cancel shop:app --where task=send_mail --where tag.tenant=acme --reason "wrong list"
    """
    parsed = words_of(words, _names_app(app, namespace), "ID", None)
    if not parsed.others and not where:
        raise Wrong("which jobs? Give their ids, or --where NAME=VALUE")
    if parsed.others and where:
        raise Wrong("give ids or --where, not both")
    if parsed.others and (rate is not None or wait):
        raise Wrong(f"{'--wait' if rate is None else '--rate'} is for --where: cancels by ids are requested at once")
    chosen = _chosen(where, "cancel")
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        if where:
            preview = queried.cancel_many(where=chosen, dry_run=True)
            if _confirmed("Cancel", preview, yes, dry_run, as_json):
                show_made(queried.cancel_many(where=chosen, rate=rate, by=by, reason=reason), wait, as_json)
            return
        targets, notes = _by_id(queried, parsed.others)
        targets, notes_on_ids = _with_whole_ids(targets)
        notes += notes_on_ids
        if targets and not dry_run:
            queried.commands.cancel(targets, reason, by)
    finally:
        queried.close()
    if as_json:
        cancelled = 0 if dry_run else len(targets)
        output.print_json({"cancelled": cancelled, "jobs": [job.job_id for job in targets], "notes": notes})
    else:
        _show_cancelled(targets, notes, dry_run)


@app.command("redrive")
def redrive(
    words: ManyJobs = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help=f"{conditions.HELP}. Without state only failed jobs are chosen; state=cancelled and state=expired choose "
            "others.",
        ),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(
            help="The queue in which the jobs run.", autocompletion=completion.queues, show_default="that of each job"
        ),
    ] = None,
    rate: Rate = None,
    reason: Reason = None,
    by: Annotated[str | None, typer.Option("--by", help="Who redrives the jobs.", show_default="user@host")] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the last job is released.")] = False,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Run jobs again that failed, were cancelled or expired: as the next run of the same id, with the same arguments.

    The list of the jobs is written to the log, and the stream processor carries it out as a plan, also if this command
    is ended: see `jobledger plans`. A job that has changed meanwhile is skipped.

    Example: jobledger jobs redrive shop:app --where task=send_mail --where error=TimeoutError --rate 50/s
    """
    parsed = words_of(words, _names_app(app, namespace), "ID", None)
    if not parsed.others and not where:
        raise Wrong("which jobs? Give their ids, or --where NAME=VALUE")
    if parsed.others and where:
        raise Wrong("give ids or --where, not both")
    chosen = _chosen(where, "redrive")
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        ids = [whole_id(queried, text) for text in parsed.others] or None
        which: dict[str, Any] = {"ids": ids, "where": None if ids else chosen, "queue": queue}
        preview = queried.redrive(**which, dry_run=True)
        if _confirmed("Redrive", preview, yes or ids is not None, dry_run, as_json):
            show_made(queried.redrive(**which, rate=rate, by=by, reason=reason), wait, as_json)
    finally:
        queried.close()


def _confirmed(what: str, preview: Plan, yes: bool, dry_run: bool, as_json: bool) -> bool:
    """Return whether to make a plan for the jobs of a preview. If not, or if there are none, the preview is printed.
    Raises `typer.Abort` if the user does not agree."""
    if dry_run or not preview.matched:
        _show_preview(preview, as_json)
        return False
    if not (yes or as_json):
        typer.confirm(f"{what} {counted(preview.matched, 'job')}?", abort=True, err=True)
    return True


def _chosen(where: Sequence[str] | None, action: str) -> JobFilter:
    """Return the filter of ``--where`` for an action on many jobs. Raises `Wrong`."""
    from jobledger.plan import SCOPES

    return conditions.conditions_of(where, SCOPES[action].states, SCOPES[action].refusal)


def _show_preview(preview: Plan, as_json: bool) -> None:
    if as_json:
        output.print_json({"plan": None, "matched": preview.matched, "examples": list(preview.examples)})
        return
    for job_id in preview.examples:
        output.console().print(job_id, markup=False, highlight=False)
    more = preview.matched - len(preview.examples)
    ending = f", {more} more" if more else ""
    text = f"{counted(preview.matched, 'job')}{ending}; nothing was changed" if preview.matched else "no such jobs"
    output.console(stderr=True).print(text, style="dim")


def _show_cancelled(targets: Sequence[Job], notes: Sequence[str], dry_run: bool) -> None:
    jobs = counted(len(targets), "job")
    for note in notes:
        output.console(stderr=True).print(note, style="yellow", markup=False)
    if dry_run:
        for job in targets:
            output.console().print(f"{job.job_id}  {job.task}  {job.queue}", markup=False, highlight=False)
        output.console(stderr=True).print(f"{jobs}; nothing was changed", style="dim")
    else:
        output.console().print(
            f"requested the cancel of {jobs}" if targets else "no job is left to cancel", markup=False
        )


def _names_app(app: str | None, namespace: str | None) -> bool:
    return app is not None or namespace is not None


def _queried_app(
    parsed: Words, app: str | None, namespace: str | None, bootstrap: str | None, status_url: str | None
) -> App:
    return find_app(parsed.target or app, namespace, bootstrap, status_url)


def whole_id(app: App, text: str) -> str:
    """Return the id of the one job with this id, or whose id begins with this text. A text with the length of a whole
    id is returned without a check.

    Raises `Wrong` if several ids begin with the text, or if it is too short; `JobNotFound` if no id does.
    """
    from jobledger.errors import JobNotFound

    table = app.status_table()
    if len(text) >= _WHOLE:
        return text
    try:
        return str(table.job(text).job_id)
    except JobNotFound:
        pass
    if len(text) < PREFIX_LEAST:
        raise Wrong(f"{text!r} is too short for the beginning of an id: give {PREFIX_LEAST} characters or more")
    matches = table.ids(text, _CANDIDATES + 1)
    if not matches:
        raise JobNotFound(f"the status table knows no job with the id {text}, or with an id that begins with it")
    if len(matches) > 1:
        more = ", …" if len(matches) > _CANDIDATES else ""
        raise Wrong(
            f"{text!r} is the beginning of several ids: {', '.join(matches[:_CANDIDATES])}{more}; give more characters"
        )
    return str(matches[0])


def _by_id(app: App, job_ids: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Return the jobs with these ids that have not ended, as far as the status table knows, and notes about the other
    ids. A UUID that the status table does not know is returned, too, with a note.

    Raises `Wrong` for a text that is not a job's id, before anything is cancelled.
    """
    from jobledger.client.commands import Job
    from jobledger.errors import JobNotFound, StoreError

    jobs: dict[str, Job] = {}
    notes: list[str] = []
    try:
        table = app.status_table()
    except StoreError as exc:
        notes.append(f"it is not known whether these jobs exist: {exc}")
        table = None
    for text in dict.fromkeys(job_ids):
        try:
            status: JobStatus | None = None if table is None else table.job(whole_id(app, text))
        except JobNotFound:
            status = None
        if status is not None:
            if status.state.ended:
                notes.append(f"{status.job_id} has ended: {status.state.value}")
            else:
                jobs[status.job_id] = Job(status.job_id, status.run, status.task, status.queue)
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
            notes.append(
                f"the status table does not know {text}: the cancel has an effect only if the job was just submitted"
            )
        jobs[text] = Job(text)
    return list(jobs.values()), notes


def _with_whole_ids(targets: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """Return the jobs whose ids the status table stores unchanged, and notes about the other jobs: a cancel needs the
    id that is in the log."""
    from jobledger.streams.status.store.rows import KEY_MOST, is_changed

    notes = [
        f"{job.job_id} is not cancelled: the status table does not store the whole id of this job of another writer, "
        f"because the id has more than {KEY_MOST} characters or a character that the table cannot store"
        for job in targets
        if is_changed(job.job_id)
    ]
    return [job for job in targets if not is_changed(job.job_id)], notes
