"""``jobledger queues|tasks list|pause|resume|limit``: control commands for queues and tasks on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import CommandGroup, among, judged, words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import AppOption, AppWord, Bootstrap, By, Json, Namespace, Reason, StatusUrl
from jobledger.cli.output import Cell
from jobledger.cli.queue_depths import DEPTHS, depth_cells, depth_json, depths_of, is_open
from jobledger.definitions.policy import Limits
from jobledger.definitions.queues import Queue
from jobledger.process.wording import counted
from jobledger.views.control import queue_json, task_json

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.client.commands import Kind, Standing

Named = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:APP] NAME",
        help="The name; put the app before it, unless an option names the app.",
        autocompletion=completion.ordered,
        show_default=False,
    ),
]


class Known(NamedTuple):
    """An app, or a namespace without an app, and its queues or tasks. ``things``: each queue by its name, or each
    task's queue by the task's name; ``limits``: the limits in the code, by the same names."""

    app: App
    kind: Kind
    things: dict[str, Queue]
    limits: dict[str, Limits]

    @property
    def where(self) -> str:
        """The owner of these names, for errors."""
        return f"app {self.app.names.namespace!r}" if self.app.tasks else f"namespace {self.app.names.namespace!r}"


def _commands_for(kind: Kind) -> typer.Typer:
    """Create the commands for one kind. The commands for queues and for tasks do the same."""
    group = CommandGroup(
        name=f"{kind}s", help=f"Pause, resume and limit {kind}s; list the commands in force.", no_args_is_help=True
    )
    _add_list(group, kind)
    _add_pause_and_resume(group, kind)
    _add_limit(group, kind)
    return group


def _add_list(group: CommandGroup, kind: Kind) -> None:
    @group.command("list", help=f"List the app's {kind}s, their limits, and the commands in force.")
    def list_them(
        words: AppWord = None,
        app: AppOption = None,
        namespace: Namespace = None,
        bootstrap: Bootstrap = None,
        status_url: StatusUrl = None,
        as_json: Json = False,
    ) -> None:
        target = words_of(words, app is not None or namespace is not None, "argument", 0).target
        with _opened(kind, target or app, namespace, bootstrap, status_url) as known:
            standing = {each.name: each for each in known.app.commands.standing() if each.kind == kind}
            depths, note = depths_of(known.app) if kind == "queue" else ({}, None)
        # A name may be known only from the commands in force, or from jobs: of a queue that the app no longer has.
        rows = [
            _row(known, name, standing.get(name)) | (depth_json(depths.get(name), note) if kind == "queue" else {})
            for name in sorted({*known.things, *standing, *(name for name, depth in depths.items() if is_open(depth))})
        ]
        if as_json:
            output.print_json(rows)
        else:
            _show_list(kind, rows)
        if note is not None:
            output.console(stderr=True).print(note, style="yellow", markup=False)


def _add_pause_and_resume(group: CommandGroup, kind: Kind) -> None:
    @group.command(
        "pause", help=f"Start no more jobs of a {kind}, on any worker, until it is resumed; running jobs continue."
    )
    def pause(
        words: Named = None,
        app: AppOption = None,
        namespace: Namespace = None,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        status_url: StatusUrl = None,
        as_json: Json = False,
    ) -> None:
        with _control_target(kind, words, app, namespace, bootstrap, status_url) as (known, name):
            known.app.commands.pause(kind, name, reason, by)
        _say(as_json, {kind: name, "paused": True}, f"{kind} {name} is paused")

    @group.command("resume", help=f"Resume a paused {kind}.")
    def resume(
        words: Named = None,
        app: AppOption = None,
        namespace: Namespace = None,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        status_url: StatusUrl = None,
        as_json: Json = False,
    ) -> None:
        with _control_target(kind, words, app, namespace, bootstrap, status_url) as (known, name):
            known.app.commands.resume(kind, name, reason, by)
        _say(as_json, {kind: name, "paused": False}, f"{kind} {name} is resumed")


def _add_limit(group: CommandGroup, kind: Kind) -> None:
    @group.command(
        "limit",
        help=f"Limit a {kind} for all workers together, instead of the limits in the code; without --rate and --concurrency "
        "the limits in the code apply again.",
    )
    def limit(
        words: Named = None,
        app: AppOption = None,
        namespace: Namespace = None,
        rate: Annotated[
            str | None, typer.Option(metavar="RATE", help="Maximum rate of starts: 100/s, 30/min, 1000/h or 5/d.")
        ] = None,
        concurrency: Annotated[int | None, typer.Option(min=1, help="Maximum number of jobs running at once.")] = None,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        status_url: StatusUrl = None,
        as_json: Json = False,
    ) -> None:
        from jobledger.definitions.queues import check_shares

        with judged():
            limits = Limits.of(_number(rate), concurrency, kind)
        with _control_target(kind, words, app, namespace, bootstrap, status_url) as (known, name):
            with judged():
                check_shares(f"{kind} {name!r}", known.things[name], limits, known.app.partitions)
            known.app.commands.limit(kind, name, limits or None, reason, by)
        _say(
            as_json,
            {kind: name, "rate": limits.rate, "concurrency": limits.concurrency},
            f"{kind} {name}: {_described(limits)}",
        )


def _show_list(kind: Kind, rows: Sequence[dict[str, Any]]) -> None:
    table: list[list[Cell]] = [
        [
            row[kind],
            *([row["queue"]] if kind == "task" else ["" if row["partitions"] is None else str(row["partitions"])]),
            *(depth_cells(row) if kind == "queue" else ()),
            (f"paused {row['paused']}", "magenta") if row["paused"] else ("not paused", "green"),
            "" if row["rate"] is None else f"{row['rate']:g}/s",
            "" if row["concurrency"] is None else str(row["concurrency"]),
            (f"limited {row['limited']}", "magenta") if row["limited"] else "",
        ]
        for row in rows
    ]
    second = "queue" if kind == "task" else "partitions"
    depths = DEPTHS if kind == "queue" else ()
    headings = (kind, second, *depths, "state", "rate", "concurrency", "")
    output.print_table(headings, table, optional=(second,), empty="none")


def _described(limits: Limits) -> str:
    parts = [
        *([f"{counted(limits.rate, 'start')} a second"] if limits.rate else []),
        *([f"{counted(limits.concurrency, 'job')} at once"] if limits.concurrency else []),
    ]
    return " and ".join(parts) or "limits as in the code"


def _number(rate: str | None) -> str | float | None:
    try:
        return None if rate is None else float(rate)
    except ValueError:
        return rate


@contextmanager
def _opened(
    kind: Kind, target: str | None, namespace: str | None, bootstrap: str | None, status_url: str | None
) -> Iterator[Known]:
    """Yield the app and its queues or tasks, and close the app after the block. For a namespace without an app, these
    are the queues or tasks that the broker and the status table know."""
    app = find_app(target, namespace, bootstrap, status_url)
    try:
        if target is None:
            yield Known(app, kind, _seen(app, kind), {})
        elif kind == "queue":
            yield Known(app, kind, dict(app.queues), {name: queue.limits for name, queue in app.queues.items()})
        else:
            queues = {name: app.queues[task.queue] for name, task in app.tasks.items()}
            yield Known(app, kind, queues, {name: task.policy.limits for name, task in app.tasks.items()})
    finally:
        app.close()


@contextmanager
def _control_target(
    kind: Kind,
    words: list[str] | None,
    app: str | None,
    namespace: str | None,
    bootstrap: str | None,
    status_url: str | None,
) -> Iterator[tuple[Known, str]]:
    """Yield what `_opened` yields, and the name from the command line. Raises `Wrong` if that is not a known name."""
    parsed = words_of(words, app is not None or namespace is not None, "NAME", 1)
    with _opened(kind, parsed.target or app, namespace, bootstrap, status_url) as known:
        yield known, among(parsed.others[0], known.things, kind, known.where)


def _seen(app: App, kind: Kind) -> dict[str, Queue]:
    """Return the queues that have topics; or the tasks of the jobs in the status table, each with the queue of one of
    these jobs."""
    from confluent_kafka import KafkaException

    from jobledger.errors import StoreNotFound
    from jobledger.kafka import clients
    from jobledger.kafka.auth import check_connection

    check_connection(app.settings)
    try:
        topics = clients.admin(app.settings).list_topics(timeout=10.0).topics
    except KafkaException as exc:
        raise clients.translate(exc.args[0], app.settings, "asking for topics") from exc
    levels: dict[str, list[int]] = {}
    for topic, metadata in topics.items():
        if (name := app.names.queue_of(topic)) is not None:
            levels.setdefault(name, []).append(len(metadata.partitions))
    queues = {name: Queue(name, max(counts), len(counts) > 1) for name, counts in levels.items()}
    if kind == "queue":
        return queues
    try:
        counts = app.status_table().counts()
    except StoreNotFound:
        return {}
    return {each.task: queues.get(each.queue) or Queue(each.queue) for each in counts}


def _row(known: Known, name: str, standing: Standing | None) -> dict[str, Any]:
    limits, thing = known.limits.get(name, Limits()), known.things.get(name)
    if known.kind == "queue":
        return queue_json(name, thing, known.app.partitions, limits, standing)
    return task_json(name, None if thing is None else thing.name, limits, standing)


def _say(as_json: bool, plain: dict[str, Any], text: str) -> None:
    if as_json:
        output.print_json(plain)
    else:
        output.console().print(text, markup=False)


queues = _commands_for("queue")
tasks = _commands_for("task")
