"""Shell completion: states, queues, tasks, namespaces, jobs and other names of an app.

Completion must never disturb the user's shell: after any error it offers nothing and prints nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING

import typer

from jobledger.cli.loading import find_app

if TYPE_CHECKING:
    from jobledger.app import App

#: Maximum number of jobs offered at once.
JOBS_MOST = 30

Completer = Callable[[typer.Context, str], list[str]]


def join_words(environ: MutableMapping[str, str]) -> None:
    """Rejoin words that bash splits: for bash, ``shop:app`` is three words, and so is ``--state=failed``."""
    if not {"COMP_WORDS", "COMP_CWORD"} <= environ.keys():
        return
    words: list[str] = []
    cursor, cursor_word, open_ = int(environ["COMP_CWORD"]), 0, False
    for number, word in enumerate(environ["COMP_WORDS"].split("\n")):
        sign = bool(word) and set(word) <= {":", "="}
        if words and (sign or open_):
            words[-1] += word
        else:
            words.append(word)
        open_ = sign
        if number == cursor:
            cursor_word = len(words) - 1
    environ["COMP_WORDS"], environ["COMP_CWORD"] = "\n".join(words), str(cursor_word)


def _completer(find: Callable[[typer.Context, str], Iterable[str]]) -> Completer:
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        # Text that an app's module prints would appear among the choices.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                return sorted(each for each in find(ctx, incomplete) if each.startswith(incomplete))
            except BaseException:  # noqa: BLE001  # an app's module may raise anything
                return []

    return complete


def _app(ctx: typer.Context) -> App:
    """Return the app that the earlier words of the command line name."""
    given = ctx.params
    words = given.get("words") or [None]
    target = given.get("target") or given.get("app") or (words[0] if words[0] and ":" in words[0] else None)
    return find_app(target, given.get("namespace"), status_url=given.get("status_url"))


def _queues(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    app = _app(ctx)
    return app.queues if app.tasks else {each.queue for each in app.status_table().counts()}


def _tasks(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    app = _app(ctx)
    return app.tasks or {each.task for each in app.status_table().counts()}


def _ordered(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Return the names of queues for the commands of ``queues``, or of tasks for those of ``tasks``."""
    return _queues(ctx, incomplete) if getattr(ctx.parent, "info_name", "") == "queues" else _tasks(ctx, incomplete)


def _states(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from jobledger.job import State

    return [each.value for each in State]


def _namespaces(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from jobledger.config import Settings
    from jobledger.streams.status.store import namespaces_in

    return namespaces_in(Settings.from_env().home / "status")


def _jobs(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    table = _app(ctx).status_table()
    if incomplete:
        return table.ids(incomplete, JOBS_MOST)  # type: ignore[no-any-return]  # `App.status_table` is untyped
    return [each.job_id for each in table.jobs(limit=JOBS_MOST)]


queues, tasks, ordered = map(_completer, (_queues, _tasks, _ordered))
states, namespaces, jobs = map(_completer, (_states, _namespaces, _jobs))
events = _completer(lambda ctx, incomplete: _app(ctx).events)
handlers = _completer(
    lambda ctx, incomplete: [each.task.name for several in _app(ctx).registry.handlers.values() for each in several]
)
projections = _completer(lambda ctx, incomplete: _app(ctx).registry.projections)
