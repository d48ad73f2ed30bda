"""``jobledger submit`` and ``jobledger jobs list|show|wait|cancel``: the client, from the command line."""

from __future__ import annotations

import json
import typing
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import output
from jobledger.cli.options import AppOption, Bootstrap, Json, Namespace, StatusUrl, Target, place
from jobledger.cli.output import Cell, Exit
from jobledger.errors import BadArguments, ConfigError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator

    from jobledger.app import App
    from jobledger.job import JobStatus
    from jobledger.orders import Job
    from jobledger.schemas.events import Position

app = typer.Typer(name="jobs", help="Ask the status table about jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


def submit(
    target: Target,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...", help="Arguments. A value is JSON; what is not JSON, or meant for a str, is text."
        ),
    ] = None,
    args: Annotated[str | None, typer.Option(metavar="JSON", help="Arguments as one JSON object.")] = None,
    delay: Annotated[float | None, typer.Option(metavar="SECONDS", help="Run it only after this time.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="To find it by; may be repeated.")] = None,
    queue: Annotated[str | None, typer.Option(help="Another queue than the task's.", show_default=False)] = None,
    key: Annotated[str | None, typer.Option(help="Jobs of one key run one at a time, in order.")] = None,
    priority: Annotated[str | None, typer.Option(help="high or low, on a queue with priorities.")] = None,
    expires_in: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Do not start it any more after this time.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for its end; exit code 5 if it does not end well.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long --wait waits at most.")] = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Submit a job; done once the log has acknowledged it.

    Example: jobledger submit shop:app send_mail to=a@example.org retries=3 --tag tenant=acme --wait
    """
    from jobledger.cli.loading import load_app

    if timeout is not None and not wait:
        raise typer.BadParameter("nothing is waited for without --wait", param_hint="--timeout")
    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    found = loaded.registry.task(task)
    arguments = _arguments(found.fn, pairs or [], args)
    bound = found.using(
        delay=delay,
        tags=dict(_split(each, "--tag") for each in tag or []),
        queue=queue,
        key=key,
        priority=priority,  # type: ignore[arg-type]  # judged there
        expires_in=expires_in,
    )
    try:
        handle = bound.submit(**arguments)
        if not wait:
            if as_json:
                output.print_json(
                    {
                        "job_id": handle.job_id,
                        "position": str(handle.position),
                        "task": found.name,
                        "queue": queue or found.queue,
                    }
                )
            else:
                output.print_fields([("job", handle.job_id), ("log", str(handle.position))])
            return
        if not as_json:
            output.console(stderr=True).print(f"submitted {handle.job_id}, waiting for its end …", style="dim")
        _finish(handle.wait(timeout), as_json)
    finally:
        loaded.close()


def emit(
    target: Target,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.")],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...", help="Fields. A value is JSON; what is not JSON, or meant for a str, is text."
        ),
    ] = None,
    args: Annotated[str | None, typer.Option(metavar="JSON", help="Fields as one JSON object.")] = None,
    bootstrap: Bootstrap = None,
    as_json: Json = False,
) -> None:
    """Emit a domain event; done once the log has acknowledged it. What follows is its handlers' business.

    Example: jobledger emit shop:app UserRegistered user_id=u-1 plan=free
    """
    from jobledger.cli.loading import load_app

    loaded = load_app(target, bootstrap=bootstrap)
    try:
        found = loaded.registry.events.get(event)
        if found is None:
            raise ConfigError(f"no event is called {event!r}: there are {sorted(loaded.registry.events)}")
        made = found.of(_arguments(found.cls, pairs or [], args))
        handle = loaded.emit(made)
    finally:
        loaded.close()
    if as_json:
        output.print_json({"event_id": handle.event_id, "position": str(handle.position), "event": event})
    else:
        output.print_fields([("event", handle.event_id), ("log", str(handle.position))])


@app.command("list")
def list_jobs(
    app: AppOption = None,
    namespace: Namespace = None,
    state: Annotated[str | None, typer.Option(help="scheduled, queued, running, …", show_default="any")] = None,
    task: Annotated[str | None, typer.Option(help="Of this task.", show_default="any")] = None,
    queue: Annotated[str | None, typer.Option(help="Of this queue.", show_default="any")] = None,
    tag: Annotated[str | None, typer.Option(metavar="NAME=VALUE", help="With this tag.", show_default="any")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 50,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    asked = place(app, namespace, status_url=status_url)
    wanted = None if tag is None else _split(tag, "--tag")
    try:
        found = list(asked.jobs(state=_state(state), task=task, queue=queue, tag=wanted, limit=limit))
    finally:
        asked.close()
    if as_json:
        output.print_json([status_json(each) for each in found])
        return
    columns = ("job", "task", "queue", "state", "try", "submitted", "took", "")
    output.print_table(
        columns, [_row(each) for each in found], optional=("queue", "took", "try", "submitted"), empty="no such jobs"
    )
    if len(found) == limit:
        output.console(stderr=True).print(f"the newest {limit}; more with --limit", style="dim")


@app.command("show")
def show(
    job_id: JobId,
    app: AppOption = None,
    namespace: Namespace = None,
    timeline: Annotated[bool, typer.Option("--timeline", "-t", help="Every event of it, from the log.")] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Show one job; exit code 3 if the status table does not know it."""
    asked = place(app, namespace, bootstrap, status_url)
    try:
        status = asked.job(job_id)
        steps = _timeline(asked, status.positions) if timeline else None
    finally:
        asked.close()
    if as_json:
        shown = status_json(status)
        if steps is not None:
            shown["timeline"] = [step_json for step_json, _ in steps]
        output.print_json(shown)
        return
    output.print_fields(_fields(status))
    if steps is not None:
        print()
        columns = ("appended", "after", "event", "try", "position", "")
        output.print_table(columns, [row for _, row in steps], optional=("position", "after"))


@app.command("wait")
def wait(
    job_id: JobId,
    app: AppOption = None,
    namespace: Namespace = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Give up after this time (exit code 6).", show_default="never"),
    ] = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Wait for a job's end: exit code 0 if it ended well, 5 if not, 3 if it is unknown, 6 if it takes too long."""
    asked = place(app, namespace, status_url=status_url)
    try:
        status = asked.client.wait(job_id, timeout=timeout)
    finally:
        asked.close()
    _finish(status, as_json)


@app.command("cancel")
def cancel(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Jobs by their ids.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="All that have not ended with this task, queue, state or tag (tag.NAME=VALUE); repeat it to narrow.",
        ),
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", "-r", help="Why, for those who ask later.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="Who wants it.", show_default="user@host")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which.")] = False,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Cancel jobs, durably: what waits is not started, what runs is told to end, what has ended stays what it is.

    An id that the status table does not know is taken if it is a UUID: the job may be younger than the table.

    Example: jobledger jobs cancel --app shop:app --where task=send_mail --where tag.tenant=acme --reason "wrong list"
    """
    from jobledger.orders import Job

    if not job_ids and not where:
        raise ConfigError("which jobs? Give their ids, or --where NAME=VALUE")
    if job_ids and where:
        raise ConfigError("give ids or --where, not both")
    asked = place(app, namespace, bootstrap, status_url)
    notes: list[str] = []
    try:
        if job_ids:
            found, notes = _by_id(asked, job_ids)
        else:
            found = [Job(s.job_id, s.run, s.task, s.queue) for s in _open_jobs(asked, where or [])]
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
            f"asked {_jobs(len(found))} to end" if found else "no job is left to be asked", markup=False
        )


def _by_id(asked: App, job_ids: Sequence[str]) -> tuple[list[Job], list[str]]:
    """The jobs of these ids that may yet end, as the status table knows them, and what is to be said of the others.

    Raises `ConfigError` for what is no id of a job, before anything is cancelled.
    """
    from jobledger.errors import JobNotFound, StoreError
    from jobledger.orders import Job

    found: list[Job] = []
    notes: list[str] = []
    try:
        table = asked.status_table()
    except StoreError as exc:
        notes.append(f"nobody can be asked whether these jobs are there: {exc}")
        table = None
    for job_id in dict.fromkeys(job_ids):
        try:
            status: JobStatus | None = None if table is None else table.job(job_id)
        except JobNotFound:
            status = None
        if status is not None:
            if status.state.ended:
                notes.append(f"{job_id} has ended: {status.state.value}")
            else:
                found.append(Job(job_id, status.run, status.task, status.queue))
            continue
        try:
            uuid.UUID(job_id)
        except ValueError:
            known = "" if table is None else ", and the status table knows none that is called so"
            raise ConfigError(f"{job_id!r} is no job's id: those are UUIDs{known}") from None
        if table is not None:
            notes.append(f"the status table does not know {job_id}: it can be cancelled only if it was just submitted")
        found.append(Job(job_id))
    return found, notes


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _open_jobs(asked: App, where: Sequence[str]) -> Iterator[JobStatus]:
    """Jobs that have not ended and match everything."""
    from jobledger.job import State

    state: str | None = None
    task: str | None = None
    queue: str | None = None
    tag: tuple[str, str] | None = None
    for each in where:
        name, value = _split(each, "--where")
        if name == "state":
            state = _state(value)
        elif name == "task":
            task = value
        elif name == "queue":
            queue = value
        elif name.startswith("tag.") and tag is None and len(name) > 4:
            tag = (name[4:], value)
        else:
            raise ConfigError(f"--where {each!r}: write task=…, queue=…, state=… or, once, tag.NAME=…")
    states = [s for s in State if not s.ended] if state is None else [State(state)]
    if any(s.ended for s in states):
        raise ConfigError(f"--where state={state}: those jobs have ended")
    for one in states:
        yield from asked.jobs(state=one.value, task=task, queue=queue, tag=tag)


# -- arguments -------------------------------------------------------------------------------------------------------


def _arguments(annotated: Any, pairs: Sequence[str], text: str | None) -> dict[str, Any]:
    """Values by name from ``--args`` and ``NAME=VALUE``; the latter win. ``annotated``: the
    function or class they are for."""
    found: dict[str, Any] = {}
    if text is not None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise BadArguments(f"--args {output.shorten(repr(text))} is no JSON: {exc}") from None
        if not isinstance(found, dict):
            raise BadArguments(f"--args {output.shorten(repr(text))} is no JSON object; write '{{\"name\": value}}'")
    hints = typing.get_type_hints(annotated)
    for pair in pairs:
        name, value = _split(pair, "argument")
        found[name] = read_value(value, hints.get(name))
    return found


def read_value(text: str, hint: Any = None) -> Any:
    """One argument as it was typed: JSON, except that a parameter that takes text gets text and not what it looks like.

    So ``zip=01234`` and ``to=a@example.org`` mean what they say, and ``to='"quoted"'`` works, too.
    """
    takes = set(typing.get_args(hint)) or {hint}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if str in takes and takes <= {str, type(None)} and not isinstance(value, str):
        return None if value is None and type(None) in takes else text
    return value


def _split(pair: str, what: str) -> tuple[str, str]:
    name, found, value = pair.partition("=")
    if not found or not name:
        raise ConfigError(f"{what} {pair!r} is not of the form NAME=VALUE")
    return name, value


def _state(text: str | None) -> str | None:
    from jobledger.job import State

    if text is not None and text not in list(State):
        raise ConfigError(f"--state {text!r} is no state; there are {', '.join(State)}")
    return text


# -- output ----------------------------------------------------------------------------------------------------------


def status_json(status: JobStatus) -> dict[str, Any]:
    """A status as JSON builtins; positions as text."""
    shown: dict[str, Any] = output.jsonable(status)
    shown["positions"] = [str(p) for p in status.positions]
    return shown


def _finish(status: JobStatus, as_json: bool) -> None:
    """Print a job's end, and end the command with what it means."""
    if as_json:
        output.print_json(status_json(status))
    else:
        output.print_fields(_fields(status))
    if status.state.value != "succeeded":
        raise typer.Exit(Exit.JOB_FAILED)


def _row(status: JobStatus) -> list[Cell]:
    return [
        status.job_id,
        status.task,
        status.queue,
        output.state_cell(status.state.value),
        str(status.attempt),
        output.brief(status.submitted_at),
        "" if status.duration is None else output.duration(status.duration),
        _note(status),
    ]


def _note(status: JobStatus) -> Cell:
    """What is most worth knowing about a job in its state."""
    from jobledger.cli.facts import progress

    state = status.state.value
    if state in ("scheduled", "retrying") and status.due_at is not None:
        why = f", after {status.error.type.rpartition('.')[2]}" if status.error is not None else ""
        return f"due {output.relative(status.due_at)}{why}", "dim"
    if state == "running" and status.progress is not None:
        return output.shorten(progress(status.progress.done, status.progress.total, status.progress.message), 40), ""
    if state == "failed" and status.error is not None:
        return output.shorten(f"{status.error.type.rpartition('.')[2]}: {status.error.message}"), "red"
    if status.reason:
        return output.shorten(status.reason), "dim"
    return ""


def _fields(status: JobStatus) -> list[tuple[str, Cell]]:
    from jobledger.cli.facts import progress

    fields: list[tuple[str, Cell]] = [
        ("job", status.job_id),
        ("task", status.task),
        ("queue", status.queue),
        ("state", output.state_cell(status.state.value)),
        ("try", f"{status.attempt}" + (f" of run {status.run}" if status.run > 1 else "")),
    ]
    if status.tags:
        fields.append(("tags", " ".join(f"{k}={v}" for k, v in sorted(status.tags.items()))))
    if status.parent:
        fields.append(("parent", status.parent))
    for name, moment in (
        ("submitted", status.submitted_at),
        ("due", status.due_at),
        ("started", status.started_at),
        ("ended", status.ended_at),
    ):
        if moment is not None:
            fields.append((name, _moment(moment)))
    if status.duration is not None:
        fields.append(("took", output.duration(status.duration)))
    if status.progress is not None:
        fields.append(("progress", progress(status.progress.done, status.progress.total, status.progress.message)))
    if status.reason:
        fields.append(("reason", status.reason))
    if status.result is not None:
        fields.append(("result", json.dumps(output.jsonable(status.result), ensure_ascii=False)))
    if status.error is not None:
        fields.append(("error", (f"{status.error.type}: {status.error.message}", "red")))
        if status.error.traceback:
            fields.append(("", (status.error.traceback.rstrip(), "dim")))
    return fields


def _moment(moment: dt.datetime) -> str:
    return f"{output.clock(moment)} ({output.relative(moment)})"


def _timeline(asked: App, positions: Sequence[Position]) -> list[tuple[dict[str, Any], list[Cell]]]:
    """A job's events read from the log where the status says they stand, in order of their append times."""
    from jobledger import log
    from jobledger.cli import facts
    from jobledger.errors import RegistryNeeded, SchemaError
    from jobledger.schemas.events import Recorded

    decode = log.decoder(asked.settings, asked.names).decode
    found: list[Recorded] = []
    lost: list[tuple[dict[str, Any], list[Cell]]] = []
    with log.LogReader(asked.settings) as reader:
        for position in positions:
            message = reader.at(position)
            try:
                if message is None:
                    raise SchemaError("no longer in the log")
                found.append(log.recorded(message, decode))
            except (SchemaError, RegistryNeeded) as exc:
                gone: list[Cell] = ["-", "", ("?", "dim"), "", (str(position), "dim"), (str(exc), "dim")]
                lost.append(({"position": str(position), "error": str(exc)}, gone))
    found.sort(key=lambda r: (r.appended_ms, r.event.run, r.event.release, r.position))
    first = found[0].appended_ms if found else 0
    return lost + [
        (
            facts.event_json(each),
            [
                output.clock(each.appended_ms * 1000),
                f"+{output.duration((each.appended_ms - first) / 1000)}",
                (facts.kind(each.event.fact), facts.style(each.event.fact)),
                str(each.event.attempt),
                (str(each.position), "dim"),
                facts.describe(each.event.fact, most=300),
            ],
        )
        for each in found
    ]
