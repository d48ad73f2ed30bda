"""``jobledger submit`` and ``jobledger emit``: jobs and events from the command line."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import Wrong, among, judged, pair_of, pairs_of
from jobledger.cli.job_views import finish
from jobledger.cli.options import Bootstrap, Json, StatusUrl, Target, repeatable, timespan
from jobledger.cli.waiting import showing_progress
from jobledger.errors import BadArguments

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.definitions.handles import JobHandle
    from jobledger.definitions.task import JobRequest


def _pairs(what: str, name: str, each: str) -> Any:
    """Return an argument for values by name, which may be repeated. ``what``: the values, in its help. ``name``: what
    stands for a name, in its help. ``each``: the thing that takes a value."""
    text = f"{what}. A value is read as JSON; if it is not JSON, or the {each} is a str, as text."
    return typer.Argument(metavar=f"[{name}=VALUE]...", help=text)


def submit(
    target: Target,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", autocompletion=completion.tasks)],
    pairs: Annotated[list[str] | None, _pairs("Arguments", "NAME", "parameter")] = None,
    args: Annotated[str | None, typer.Option(metavar="JSON", help="Arguments as one JSON object.")] = None,
    delay: Annotated[float | None, timespan("Run the job only after this time.")] = None,
    tag: Annotated[
        list[str] | None,
        repeatable("A tag by which the job can be found", metavar="NAME=VALUE", show_default=True),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(help="A queue other than the task's.", show_default=False, autocompletion=completion.queues),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Jobs with the same key run one at a time, in order.")] = None,
    priority: Annotated[str | None, typer.Option(help="high or low, on a queue with priorities.")] = None,
    expires_in: Annotated[float | None, timespan("Do not start the job after this time.")] = None,
    job_id: Annotated[
        str | None,
        typer.Option(
            metavar="UUID", help="The job's id, chosen by you; a second submission with the same id is a duplicate."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the job has ended; exit code 5 if it did not succeed.")
    ] = False,
    timeout: Annotated[float | None, timespan("Maximum time for --wait.")] = None,
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
        arguments = arguments_of(declared.fn, pairs or [], args)
        options: dict[str, Any] = {"delay": delay, "queue": queue, "key": key, "priority": priority}
        options |= {"tags": pairs_of(tag, "--tag"), "expires_in": expires_in, "job_id": job_id}
        request = declared.using(**options).job(**arguments)
    try:
        handle = loaded.client.submit(request)
        if wait:
            _wait(loaded, handle, timeout, as_json)
        else:
            _show(handle, request, as_json)
    finally:
        loaded.close()


def _show(handle: JobHandle[Any], request: JobRequest[Any], as_json: bool) -> None:
    job_id, position = handle.job_id, str(handle.position)
    if as_json:
        output.print_json({"job_id": job_id, "position": position, "task": request.task.name, "queue": request.queue})
    else:
        output.print_fields([("job", job_id), ("position", position)])


def _wait(app: App, handle: JobHandle[Any], timeout: float | None, as_json: bool) -> None:
    """Wait until the job has ended, and print its status. Raises `typer.Exit` if the job did not succeed."""
    if not as_json:
        output.console(stderr=True).print(f"submitted {handle.job_id}, waiting until it has ended …", style="dim")
    with showing_progress(app, handle.job_id, quiet=as_json):
        status = handle.wait(timeout)
    finish(status, as_json)


def emit(
    target: Target,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.", autocompletion=completion.events)],
    pairs: Annotated[list[str] | None, _pairs("Fields", "FIELD", "field")] = None,
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
            value = event_type.of(arguments_of(event_type.cls, pairs or [], args))
        handle = loaded.emit(value)
    finally:
        loaded.close()
    if as_json:
        output.print_json({"event_id": handle.event_id, "position": str(handle.position), "event": event})
    else:
        output.print_fields([("event", handle.event_id), ("position", str(handle.position))])


def arguments_of(annotated: Any, pairs: Sequence[str], text: str | None) -> dict[str, Any]:
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
