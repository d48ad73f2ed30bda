"""``jobledger jobs copy``: a new job with the arguments of another one, some of them changed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import Wrong, judged, pairs_of, words_of
from jobledger.cli.jobs import OneJob, whole_id
from jobledger.cli.jobs import app as jobs_group
from jobledger.cli.loading import load_app
from jobledger.cli.options import AppOption, Bootstrap, By, Json, Reason, StatusUrl, repeatable
from jobledger.cli.submit import arguments_of

#: The group of `jobs`, with the command of this module.
group = jobs_group


@group.command("copy")
def copy(
    words: OneJob = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=JSON",
            help="A changed argument, read as for `jobledger submit`; repeat the option for several.",
            show_default=False,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        repeatable("An argument that the copy does not have", metavar="NAME", show_default=False),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(help="The copy's queue.", show_default="the job's", autocompletion=completion.queues),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The copy's ordering key.", show_default="as the task derives it, or the job's")
    ] = None,
    priority: Annotated[
        str | None, typer.Option(help="high, normal or low, on a queue with priorities.", show_default="the job's")
    ] = None,
    tag: Annotated[
        list[str] | None,
        repeatable("A tag of the copy, instead of the job's tags", metavar="NAME=VALUE", show_default="the job's"),
    ] = None,
    reason: Reason = None,
    by: By = None,
    app: AppOption = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Submit a new job with the arguments of another one, some of them changed. The other job is not changed.

    The arguments are checked as in a submission, so the command needs the app. `jobs show` of the new job names the job
    of which it is a copy.

    Example: jobledger jobs copy shop:app 0198f2c4-51 --set to=a@example.org --reason "wrong address"
    """
    from jobledger.client import copies

    parsed = words_of(words, app is not None, "ID", 1)
    target = parsed.target or app
    if target is None:
        raise Wrong("which app? Give MODULE:APP or --app MODULE:APP: the arguments are checked against the app's task")
    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    try:
        table, job_id = loaded.status_table(), whole_id(loaded, parsed.others[0])
        original = copies.original(loaded.settings, loaded.names, table, job_id)
        with judged():
            task = loaded.registry.task(original[0].task)
            options: dict[str, Any] = {"queue": queue, "key": key, "priority": priority, "by": by, "reason": reason}
            options |= {"args": arguments_of(task.fn, changes or [], None), "without": without or []}
            options |= {"tags": pairs_of(tag, "--tag") if tag else None}
            request = copies.copy_of(original, loaded.registry.task, **options)
        handle = loaded.client.submit(request)
    finally:
        loaded.close()
    if as_json:
        shown = {"job_id": handle.job_id, "position": str(handle.position), "copy_of": original[0].job_id}
        output.print_json({**shown, "task": task.name, "queue": request.queue})
    else:
        output.print_fields(
            [("job", handle.job_id), ("copy of", original[0].job_id), ("position", str(handle.position))]
        )
