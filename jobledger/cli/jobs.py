"""``jobledger jobs list|show|wait|cancel|redrive``: jobs on the command line."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import CommandGroup, Words, Wrong, moment_ms, pair_of, pairs_of, states_of, words_of
from jobledger.cli.job_views import COLUMNS, fields, finish, row, timeline
from jobledger.cli.loading import find_app
from jobledger.cli.options import (
    AppOption,
    AppWord,
    Bootstrap,
    Json,
    Namespace,
    Queues,
    Reason,
    StatusUrl,
    Yes,
    moment,
    repeatable,
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
    name="jobs", help="List and show jobs, wait for them, cancel them and run them again.", no_args_is_help=True
)

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
ManyJobs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:APP] [ID]...",
        help="The jobs' ids, or the ids' first characters; put the app before them, unless an option names the app.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]


@app.command("list")
def list_jobs(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    state: Annotated[
        list[str] | None,
        repeatable("Jobs in this state: scheduled, queued, running, …", autocompletion=completion.states),
    ] = None,
    task: Annotated[list[str] | None, repeatable("Jobs of this task", autocompletion=completion.tasks)] = None,
    queue: Queues = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Jobs with this tag; if repeated, with all of these tags.", show_default="any"
        ),
    ] = None,
    since: Annotated[str | None, moment("Jobs submitted at this time or later", show_default="any")] = None,
    late: Annotated[
        bool,
        typer.Option(
            "--late",
            help=f"Jobs that have not started although they could have started {LATE_S:g} seconds ago or earlier.",
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
    more = _columns(show)
    conditions = _conditions(state, task, queue, tag, since, late)
    parsed = words_of(words, _names_app(app, namespace), "argument", 0)
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        statuses = list(queried.jobs(**conditions, limit=limit))
        args = submissions(queried.settings, queried.names, statuses) if "args" in more else {}
    finally:
        queried.close()
    if as_json:
        output.print_json([status_json(each) | (args_json(args[each.job_id]) if args else {}) for each in statuses])
    else:
        _show_list(statuses, args, more, limit)


def _conditions(
    states: list[str] | None,
    tasks: list[str] | None,
    queues: list[str] | None,
    tags: list[str] | None,
    since: str | None,
    late: bool,
) -> JobFilter:
    import datetime as dt

    return {
        "state": states_of(states) or None,
        "task": tasks or None,
        "queue": queues or None,
        "tag": pairs_of(tags, "--tag"),
        "since": None if since is None else dt.datetime.fromtimestamp(moment_ms(since, "--since") / 1000, dt.UTC),
        "late": LATE_S if late else None,
    }


def _show_list(
    statuses: Sequence[JobStatus], args: Mapping[str, bytes | str | None], more: Sequence[str], limit: int
) -> None:
    """Print jobs as a table. ``args``: the arguments of jobs, by id. ``more``: additional columns. ``limit``: the
    maximum number of jobs that was asked for."""
    headings = ("job", "task", "queue", "state", "attempt", "submitted", "took", *more, "")
    rows = [row(each, more, args.get(each.job_id)) for each in statuses]
    output.print_table(headings, rows, optional=("queue", "took", "attempt", "submitted"), empty="no such jobs")
    if len(statuses) == limit:
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
            metavar="NAME=VALUE",
            help="Jobs that have not ended and have this task, queue, state or tag (tag.NAME=VALUE). Repeat the option for "
            "several: a job must have one of the tasks, one of the queues, one of the states and all of the tags.",
        ),
    ] = None,
    reason: Reason = None,
    by: Annotated[str | None, typer.Option("--by", help="Who cancels the jobs.", show_default="user@host")] = None,
    yes: Yes = False,
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
    parsed = words_of(words, _names_app(app, namespace), "ID", None)
    if not parsed.others and not where:
        raise Wrong("which jobs? Give their ids, or --where NAME=VALUE")
    if parsed.others and where:
        raise Wrong("give ids or --where, not both")
    conditions = _where(where or [])
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        targets, notes = _by_id(queried, parsed.others) if parsed.others else (_matching(queried, conditions), [])
        targets, notes_on_ids = _with_whole_ids(targets)
        notes += notes_on_ids
        if where and targets and not (yes or dry_run or as_json):
            typer.confirm(f"Cancel {counted(len(targets), 'job')}?", abort=True, err=True)
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
            help="Failed jobs with this task, queue, key, version, error, fingerprint, tag (tag.NAME=VALUE), or submitted "
            "since a time (since=2h). state=cancelled and state=expired choose other jobs than failed ones. Repeat the option "
            "for several: a job must have one of the values for each name, and all of the tags.",
        ),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(
            help="The queue in which the jobs run.", autocompletion=completion.queues, show_default="that of each job"
        ),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="N/s", help="How many jobs are released in a time.", show_default="no limit")
    ] = None,
    reason: Reason = None,
    by: Annotated[str | None, typer.Option("--by", help="Who redrives the jobs.", show_default="user@host")] = None,
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the jobs, and show some of them.")] = False,
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
    chosen = _redriven(where or [])
    queried = _queried_app(parsed, app, namespace, bootstrap, status_url)
    try:
        ids = [whole_id(queried, text) for text in parsed.others] or None
        which: dict[str, Any] = {"ids": ids, "where": None if ids else chosen, "queue": queue}
        preview = queried.redrive(**which, dry_run=True)
        if dry_run or not preview.matched:
            _show_preview(preview, as_json)
            return
        if not (yes or as_json or ids):
            typer.confirm(f"Redrive {counted(preview.matched, 'job')}?", abort=True, err=True)
        show_made(queried.redrive(**which, rate=rate, by=by, reason=reason), wait, as_json)
    finally:
        queried.close()


def _redriven(texts: Sequence[str]) -> JobFilter:
    """Return the filter of ``--where``. Raises `Wrong`."""
    import datetime as dt

    from jobledger.app import REDRIVEN

    several: dict[str, list[str]] = {}
    tags: list[str] = []
    since: dt.datetime | None = None
    for each in texts:
        name, value = pair_of(each, "--where")
        if name.startswith("tag.") and len(name) > len("tag."):
            tags.append(f"{name[len('tag.') :]}={value}")
        elif name in ("state", "task", "queue", "key", "version", "error", "fingerprint"):
            several.setdefault(name, []).append(value)
        elif name == "since":
            since = dt.datetime.fromtimestamp(moment_ms(value, "--where since") / 1000, dt.UTC)
        else:
            raise Wrong(
                f"--where {each!r}: write task=…, queue=…, state=…, key=…, version=…, error=…, fingerprint=…, since=… or "
                "tag.NAME=…"
            )
    for state in states_of(several.get("state", []), "--where state"):
        if state not in REDRIVEN:
            raise Wrong(f"--where state={state}: only jobs that failed, were cancelled or expired can be redriven")
    chosen: dict[str, Any] = {**several, "tag": pairs_of(tags, "--where tag") or None, "since": since}
    return {name: value for name, value in chosen.items() if value is not None}  # type: ignore[return-value]


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


def _columns(texts: Sequence[str] | None) -> list[str]:
    names = [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS:
            raise Wrong(f"--show {name!r} is not a column; the columns are {', '.join(COLUMNS)}")
    return list(dict.fromkeys(names))


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


def _where(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the conditions of ``--where`` by name; tags are ``NAME=VALUE``. Raises `Wrong`."""
    from jobledger.job import State

    conditions: dict[str, list[str]] = {"state": [], "task": [], "queue": [], "tag": []}
    for each in texts:
        name, value = pair_of(each, "--where")
        if name.startswith("tag.") and len(name) > len("tag."):
            conditions["tag"].append(f"{name[len('tag.') :]}={value}")
        elif name in ("state", "task", "queue"):
            conditions[name].append(value)
        else:
            raise Wrong(f"--where {each!r}: write task=…, queue=…, state=… or tag.NAME=…")
    pairs_of(conditions["tag"], "--where tag")
    if ended := [each for each in states_of(conditions["state"], "--where state") if State(each).ended]:
        raise Wrong(f"--where state={ended[0]}: jobs in this state have ended and cannot be cancelled")
    return conditions


def _matching(app: App, where: dict[str, list[str]]) -> list[Job]:
    """Return the jobs that have not ended and match every condition."""
    from jobledger.client.commands import Job
    from jobledger.job import State

    statuses = app.jobs(
        state=where["state"] or [each for each in State if not each.ended],
        task=where["task"] or None,
        queue=where["queue"] or None,
        tag=pairs_of(where["tag"], "--where tag"),
    )
    return [Job(each.job_id, each.run, each.task, each.queue) for each in statuses]
