"""``jobledger submit`` and ``jobledger emit``: jobs and events from the command line."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import Wrong, among, judged, pair_of, pairs_of, seconds
from jobledger.cli.job_views import finish
from jobledger.cli.options import Bootstrap, Json, StatusUrl, Target
from jobledger.cli.waiting import showing_progress
from jobledger.errors import BadArguments


def submit(
    target: Target,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", autocompletion=completion.tasks)],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help="Arguments. A value is read as JSON; if it is not JSON, or the parameter is a str, as text.",
        ),
    ] = None,
    args: Annotated[str | None, typer.Option(metavar="JSON", help="Arguments as one JSON object.")] = None,
    delay: Annotated[
        float | None, typer.Option(parser=seconds, metavar="SECONDS", help="Run the job only after this time.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A tag by which the job can be found; repeat the option for several."),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(help="A queue other than the task's.", show_default=False, autocompletion=completion.queues),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Jobs with the same key run one at a time, in order.")] = None,
    priority: Annotated[str | None, typer.Option(help="high or low, on a queue with priorities.")] = None,
    expires_in: Annotated[
        float | None, typer.Option(parser=seconds, metavar="SECONDS", help="Do not start the job after this time.")
    ] = None,
    job_id: Annotated[
        str | None,
        typer.Option(
            metavar="UUID", help="The job's id, chosen by you; a second submission with the same id is a duplicate."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the job has ended; exit code 5 if it did not succeed.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(parser=seconds, metavar="SECONDS", help="Maximum time for --wait.")
    ] = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Submit a job and wait until the log has acknowledged it.

    Example: jobledger submit shop:app send_mail to=a@example.org template=welcome --tag tenant=acme --wait
    """
    from jobledger.cli.loading import load_app

    if timeout is not None and not wait:
        raise Wrong("--timeout needs --wait")
    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    with judged():
        declared = loaded.registry.task(task)
        arguments = _arguments(declared.fn, pairs or [], args)
        bound = declared.using(
            delay=delay,
            tags=pairs_of(tag, "--tag"),
            queue=queue,
            key=key,
            priority=priority,  # type: ignore[arg-type]  # `using` checks the text
            expires_in=expires_in,
            job_id=job_id,
        )
        request = bound.job(**arguments)
    try:
        handle = loaded.client.submit(request)
        if not wait:
            if as_json:
                output.print_json(
                    {
                        "job_id": handle.job_id,
                        "position": str(handle.position),
                        "task": declared.name,
                        "queue": queue or declared.queue,
                    }
                )
            else:
                output.print_fields([("job", handle.job_id), ("position", str(handle.position))])
            return
        if not as_json:
            output.console(stderr=True).print(f"submitted {handle.job_id}, waiting until it has ended …", style="dim")
        with showing_progress(loaded, handle.job_id, quiet=as_json):
            status = handle.wait(timeout)
        finish(status, as_json)
    finally:
        loaded.close()


def emit(
    target: Target,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.", autocompletion=completion.events)],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Fields. A value is read as JSON; if it is not JSON, or the field is a str, as text.",
        ),
    ] = None,
    args: Annotated[str | None, typer.Option(metavar="JSON", help="Fields as one JSON object.")] = None,
    bootstrap: Bootstrap = None,
    as_json: Json = False,
) -> None:
    """Emit a domain event and wait until the log has acknowledged it. The event's handlers then get their jobs.

    Example: jobledger emit shop:app UserRegistered user_id=u-1 plan=free
    """
    from jobledger.cli.loading import load_app

    loaded = load_app(target, bootstrap=bootstrap)
    try:
        event_type = loaded.events[among(event, loaded.events, "event", f"app {loaded.names.namespace!r}")]
        with judged():
            value = event_type.of(_arguments(event_type.cls, pairs or [], args))
        handle = loaded.emit(value)
    finally:
        loaded.close()
    if as_json:
        output.print_json({"event_id": handle.event_id, "position": str(handle.position), "event": event})
    else:
        output.print_fields([("event", handle.event_id), ("position", str(handle.position))])


def _arguments(annotated: Any, pairs: Sequence[str], text: str | None) -> dict[str, Any]:
    """Return values by name from ``--args`` and ``NAME=VALUE``; the latter override the former. ``annotated``: the
    function or class that takes the values. Raises `BadArguments` or `Wrong`."""
    values: dict[str, Any] = {}
    if text is not None:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise BadArguments(f"--args {output.shorten(repr(text))} is not JSON: {exc}") from None
        if not isinstance(values, dict):
            raise BadArguments(f"--args {output.shorten(repr(text))} is not a JSON object; write '{{\"name\": value}}'")
    hints = _hints(annotated)
    given: set[str] = set()
    for pair in pairs:
        name, value = pair_of(pair, "argument")
        if name in given:
            raise Wrong(f"argument {name} is given twice")
        given.add(name)
        values[name] = read_value(value, hints.get(name))
    return values


def _hints(annotated: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(annotated)
    except Exception:  # noqa: BLE001  # e.g. a name that only type checkers import; values are then read as JSON
        return {}


def read_value(text: str, hint: Any = None) -> Any:
    """Convert one argument as it was typed: from JSON, except that a parameter that takes text gets the typed text.

    So ``zip=01234`` and ``to=a@example.org`` work as expected, and so does ``to='"quoted"'``.
    """
    takes = set(typing.get_args(hint)) or {hint}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if str in takes and takes <= {str, type(None)} and not isinstance(value, str):
        return None if value is None and type(None) in takes else text
    return value
