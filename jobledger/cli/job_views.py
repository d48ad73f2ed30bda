"""A job as shown to people and scripts: a row of a table, fields, JSON; and details that only the log has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from jobledger.cli import output
from jobledger.cli.output import Cell, Exit
from jobledger.views.jobs import event_json, status_json
from jobledger.views.records import facts_of
from jobledger.views.values import jsonable

if TYPE_CHECKING:
    import datetime as dt

    from jobledger.app import App
    from jobledger.explain import Explanation
    from jobledger.job import JobStatus


def finish(status: JobStatus, as_json: bool) -> None:
    """Print the job's final status. Raises `typer.Exit` with exit code 5 if the job did not succeed."""
    if as_json:
        output.print_json(status_json(status))
    else:
        output.print_fields(fields(status))
    if status.state.value != "succeeded":
        raise typer.Exit(Exit.JOB_FAILED)


#: Optional columns of a list.
COLUMNS = ("tags", "args")

#: Maximum characters of tags and arguments in a list.
_CELL_MOST = 60


def row(status: JobStatus, show: Sequence[str] = (), args: bytes | str | None = None) -> list[Cell]:
    """Return a job's row in a list. ``show``: which of `COLUMNS` it has; ``args``: the job's arguments as returned by
    `jobledger.views.records.submissions`."""
    more: dict[str, Cell] = {"tags": output.shorten(_tags(status), _CELL_MOST), "args": _args(args, _CELL_MOST)}
    return [
        status.job_id,
        status.task,
        status.queue,
        output.state_cell(status.state.value),
        str(status.attempt),
        output.brief(status.submitted_at),
        "" if status.duration is None else output.duration(status.duration),
        *(more[name] for name in show),
        _note(status),
    ]


def _tags(status: JobStatus) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(status.tags.items()))


def _args(args: bytes | str | None, most: int | None = None) -> Cell:
    """Return arguments as text, of at most ``most`` characters. A str is the reason why the arguments are not known."""
    if args is None or isinstance(args, str):
        return args or "", "dim"
    text = args[: 4 * most].decode("utf-8", "backslashreplace") if most else args.decode("utf-8", "backslashreplace")
    return output.shorten(text, most) if most else text


def _note(status: JobStatus) -> Cell:
    """Return the most useful detail about a job in its state."""
    from jobledger.views.facts import progress

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


def fields(status: JobStatus, args: bytes | str | None = None) -> list[tuple[str, Cell]]:
    """Return a job as names and values. ``args``: the job's arguments as returned by `submissions`."""
    from jobledger.views.facts import progress

    shown: list[tuple[str, Cell]] = [
        ("job", status.job_id),
        ("task", status.task),
        ("queue", status.queue),
        ("state", output.state_cell(status.state.value)),
        ("attempt", f"{status.attempt}" + (f" of run {status.run}" if status.run > 1 else "")),
    ]
    if status.key is not None:
        shown.append(("key", status.key))
    if status.worker is not None:
        shown.append(("worker", status.worker + ("" if status.version is None else f", version {status.version}")))
    if status.by is not None:
        shown.append(("asked by", status.by + ("" if status.plan is None else f", plan {status.plan}")))
    if status.copy_of is not None:
        shown.append(("copy of", status.copy_of))
    if status.tags:
        shown.append(("tags", _tags(status)))
    if args is not None:
        shown.append(("arguments", _args(args)))
    if status.parent:
        shown.append(("parent", status.parent))
    for name, moment in (
        ("submitted", status.submitted_at),
        ("due", status.due_at),
        ("started", status.started_at),
        ("ended", status.ended_at),
    ):
        if moment is not None:
            shown.append((name, _moment(moment)))
    if status.duration is not None:
        shown.append(("took", output.duration(status.duration)))
    if status.progress is not None:
        shown.append(("progress", progress(status.progress.done, status.progress.total, status.progress.message)))
    if status.reason:
        shown.append(("reason", status.reason))
    if status.result is not None:
        shown.append(("result", json.dumps(jsonable(status.result), ensure_ascii=False)))
    if status.error is not None:
        shown.append(("error", (f"{status.error.type}: {status.error.message}", "red")))
        shown.append(("fingerprint", status.fingerprint or ""))
        if status.error.traceback:
            shown.append(("", (status.error.traceback.rstrip(), "dim")))
    return shown


def explanation(explained: Explanation) -> list[tuple[str, Cell]]:
    """Return an explanation as names and values: the state, each cause, and the likely start."""
    shown: list[tuple[str, Cell]] = [("job", explained.job_id), ("state", output.state_cell(explained.state))]
    for each in explained.causes:
        since = "" if each.since is None else f" ({output.relative(each.since)})"
        shown.append((each.cause.value, f"{each.detail}{since}"))
    if explained.likely_start is None:
        shown.append(("likely start", f"not known: {explained.likely_start_note}"))
    else:
        shown.append(("likely start", f"{_moment(explained.likely_start)}: {explained.likely_start_note}"))
    return shown


def _moment(moment: dt.datetime) -> str:
    return f"{output.clock(moment)} ({output.relative(moment)})"


def timeline(app: App, job: JobStatus) -> list[tuple[dict[str, Any], list[Cell]]]:
    """Return a job's events as JSON and as cells of a table. They are read from the log at the positions in the job's
    status, and are in order of their append times. Positions that cannot be read come first, with the reason."""
    from jobledger.log.reading import LogReader
    from jobledger.log.schema_lookup import decoder
    from jobledger.schemas.events import fact_name
    from jobledger.views import facts

    with LogReader(app.settings) as reader:
        records, unreadable = facts_of(job, reader, decoder(app.settings, app.names).decode)
    rows: list[tuple[dict[str, Any], list[Cell]]] = [
        (
            {"position": str(position), "error": why},
            ["-", "", ("?", "dim"), "", (str(position), "dim"), (why, "dim")],
        )
        for position, why in unreadable
    ]
    first = records[0].appended_ms if records else 0
    return rows + [
        (
            event_json(each),
            [
                output.clock(each.appended_ms * 1000),
                f"+{output.duration((each.appended_ms - first) / 1000)}",
                (fact_name(each.event.fact), facts.style(each.event.fact)),
                str(each.event.attempt),
                (str(each.position), "dim"),
                facts.describe(each.event.fact, most=300),
            ],
        )
        for each in records
    ]
