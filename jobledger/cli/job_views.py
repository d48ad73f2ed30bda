"""A job as shown to people and scripts: a row of a table, fields, JSON; and details that only the log has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from jobledger.cli import output
from jobledger.cli.output import Cell, Exit
from jobledger.errors import text_of

if TYPE_CHECKING:
    import datetime as dt

    from jobledger.app import App
    from jobledger.explain import Explanation
    from jobledger.job import JobStatus
    from jobledger.log.reading import LogReader
    from jobledger.schemas.events import JobEvent

#: Seconds that the broker has to answer if a job can also be shown without the broker's data.
ANSWER_S = 3.0


def status_json(status: JobStatus) -> dict[str, Any]:
    """Convert a status to JSON builtins; positions become text."""
    shown: dict[str, Any] = output.jsonable(status)
    shown["positions"] = [str(p) for p in status.positions]
    return shown


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
    `submissions`."""
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


def args_json(args: bytes | str | None) -> dict[str, Any]:
    """Return arguments for JSON output, or the reason why they are not known."""
    if args is None or isinstance(args, str):
        return {"args": None, "args_error": args}
    return {"args": output.jsonable(args)}


def _note(status: JobStatus) -> Cell:
    """Return the most useful detail about a job in its state."""
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


def fields(status: JobStatus, args: bytes | str | None = None) -> list[tuple[str, Cell]]:
    """Return a job as names and values. ``args``: the job's arguments as returned by `submissions`."""
    from jobledger.cli.facts import progress

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
        shown.append(("result", json.dumps(output.jsonable(status.result), ensure_ascii=False)))
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


#: How many of a job's first records, and of its last ones, are searched for its arguments.
_LOOKS = 2


def submissions(app: App, statuses: Iterable[JobStatus]) -> dict[str, bytes | str]:
    """Return each job's arguments by job id, or the reason why they are not known. The status table does not have the
    arguments, so they are read from the log at the positions of the submissions."""
    from jobledger.errors import JobledgerError
    from jobledger.kafka.auth import check_connection
    from jobledger.log.reading import LogReader
    from jobledger.log.schema_lookup import decoder

    args: dict[str, bytes | str] = {}
    jobs = list(statuses)
    if not jobs:
        return args
    try:
        check_connection(app.settings, ANSWER_S)
        decode = decoder(app.settings, app.names).decode
        with LogReader(app.settings) as reader:
            for job in jobs:
                args[job.job_id] = _submitted(app, job, reader, decode)
    except JobledgerError as exc:
        why = f"not known: {text_of(exc)}"
        return {job.job_id: args.get(job.job_id, why) for job in jobs}
    return args


def _submitted(app: App, job: JobStatus, reader: LogReader, decode: Callable[[bytes | None], JobEvent]) -> bytes | str:
    from jobledger.errors import RegistryNeeded, SchemaError
    from jobledger.log import reading

    names = app.names
    # Only submissions and releases contain the arguments, and these records are on these topics.
    candidates = [p for p in job.positions if p.topic == names.coordination or names.lane_of(p.topic) is not None]
    why = "not known: the status table has no position of the submission"
    for position in dict.fromkeys((*candidates[:_LOOKS], *candidates[-_LOOKS:])):
        message = reader.at(position)
        if message is None:
            why = f"not known: {position} was trimmed from the log"
            continue
        try:
            event = reading.recorded(message, decode).event
        except (SchemaError, RegistryNeeded) as exc:
            why = f"not known: {position}: {text_of(exc)}"
            continue
        spec = getattr(event.fact, "spec", None)
        if spec is not None and event.job_id == job.job_id:
            return spec.args  # type: ignore[no-any-return]  # the args of a JobSpec
        why = f"not known: {position} holds another record: the topic was recreated"
    return why


def timeline(app: App, job: JobStatus) -> list[tuple[dict[str, Any], list[Cell]]]:
    """Return a job's events as JSON and as cells of a table. They are read from the log at the positions in the job's
    status, and are in order of their append times. Positions that cannot be read come first, with the reason."""
    from jobledger.cli import facts
    from jobledger.errors import RegistryNeeded, SchemaError
    from jobledger.log import reading
    from jobledger.log.schema_lookup import decoder
    from jobledger.schemas.events import Recorded, fact_name
    from jobledger.streams.status.store.rows import key_text

    decode = decoder(app.settings, app.names).decode
    records: list[Recorded] = []
    unreadable: list[tuple[dict[str, Any], list[Cell]]] = []
    with reading.LogReader(app.settings) as reader:
        for position in job.positions:
            message = reader.at(position)
            try:
                if message is None:
                    raise SchemaError("no longer in the log")
                recorded = reading.recorded(message, decode)
                if key_text(recorded.event.job_id) != key_text(job.job_id):
                    raise SchemaError("this position holds another job's record: the topic was recreated")
                records.append(recorded)
            except (SchemaError, RegistryNeeded) as exc:
                gone: list[Cell] = ["-", "", ("?", "dim"), "", (str(position), "dim"), (str(exc), "dim")]
                unreadable.append(({"position": str(position), "error": str(exc)}, gone))
    records.sort(key=lambda r: (r.appended_ms, r.event.run, r.event.release, r.position))
    first = records[0].appended_ms if records else 0
    return unreadable + [
        (
            facts.event_json(each),
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
