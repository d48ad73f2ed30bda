"""The command ``jobledger``: combines the commands, and is the only place that turns an error into a message and an
exit code.

Commands import heavy modules (Kafka's client, the database, Faust) only when they run, so help and completion are
quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from jobledger.cli import (
    audit,
    backfill,
    check,
    completion,
    control,
    copies,
    dev,
    doctor,
    error_groups,
    events,
    plans,
    projections,
    running,
    stdio,
    submit,
    table,
    web,
    workers,
)
from jobledger.cli.commands import CommandGroup, Wrong
from jobledger.cli.kafka import app as kafka_app
from jobledger.cli.output import MEANINGS, Exit, exit_code, print_error
from jobledger.cli.topics import app as topics_app
from jobledger.errors import JobledgerError, text_of
from jobledger.process.process_exit import bound_exit

_EPILOG = "**Exit codes**\n\n" + "\n".join(f"- **{int(code)}** {meaning}" for code, meaning in MEANINGS.items())

cli = CommandGroup(
    name="jobledger",
    help="Background jobs on the Kafka log.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RUN, ASK, OPERATE = "Run", "Submit and ask", "Operate"

_COMMANDS: tuple[tuple[str, str, Callable[..., None], str], ...] = (
    (RUN, "dev", dev.dev, "Run everything in one terminal; restart when code changes."),
    (RUN, "worker", running.worker, "Run jobs."),
    (RUN, "router", running.router, "Submit a job for each handler of each domain event."),
    (RUN, "streams", running.streams, "Run the stream processor: coordinator and materializer."),
    (RUN, "coordinator", running.coordinator, "Release delayed and retried jobs when they are due."),
    (RUN, "materializer", running.materializer, "Keep the status table up to date with the log."),
    (RUN, "web", web.web, "Serve the HTTP API and the dashboard."),
    (ASK, "submit", submit.submit, "Submit a job."),
    (ASK, "emit", submit.emit, "Emit a domain event."),
    (OPERATE, "backfill", backfill.backfill, "Run a handler for past events."),
    (OPERATE, "doctor", doctor.doctor, "Find out what is wrong, and how to fix it."),
    (OPERATE, "check", check.check, "Before a deploy: find jobs in the log that this app cannot run."),
    (OPERATE, "audit", audit.audit, "Check the log independently: report broken promises and their positions."),
    (OPERATE, "verify", table.verify, "Compare the status table with the log."),
    (OPERATE, "rebuild", table.rebuild, "Rebuild the status table from the log."),
)
_PROCESSES = frozenset(name for panel, name, *_ in _COMMANDS if panel == RUN)
#: Commands that write nothing to standard output themselves.
_SILENT = _PROCESSES - {"dev", "streams"}
for _panel, _name, _run_it, _short in _COMMANDS:
    cli.command(_name, rich_help_panel=_panel, short_help=_short)(_run_it)
# The group of `jobs`, to which `copies` has added a command.
cli.add_typer(copies.group, name="jobs", rich_help_panel=ASK)
cli.add_typer(events.app, name="events", rich_help_panel=ASK)
cli.add_typer(error_groups.app, name="errors", rich_help_panel=ASK)
cli.add_typer(plans.app, name="plans", rich_help_panel=OPERATE)
cli.add_typer(workers.app, name="workers", rich_help_panel=OPERATE)
cli.add_typer(control.queues, name="queues", rich_help_panel=OPERATE)
cli.add_typer(control.tasks, name="tasks", rich_help_panel=OPERATE)
cli.add_typer(web.tokens_app, name="web-token", rich_help_panel=OPERATE)
cli.add_typer(projections.app, name="projections", rich_help_panel=OPERATE)
cli.add_typer(kafka_app, name="kafka", rich_help_panel=OPERATE)
cli.add_typer(topics_app, name="topics", rich_help_panel=OPERATE)


def _version(wanted: bool) -> None:
    if wanted:
        from jobledger import __version__

        print(f"jobledger {__version__}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show an error's traceback.")] = False,
) -> None:
    pass


def run(argv: Sequence[str] | None = None) -> None:
    """Run one command line (``argv`` without the program's name; None: this process's arguments) and exit with its
    code."""
    words = list(sys.argv[1:] if argv is None else argv)
    supervises = any(word.startswith("--processes") for word in words)
    stdio.prepare(output=supervises or _command(words) not in _SILENT)
    completion.join_words(os.environ)
    from jobledger.streams.supervisor import obey_leash

    obey_leash()
    # Commands without logging report errors themselves; the client's own log lines would only repeat them.
    logging.getLogger("jobledger").addHandler(logging.NullHandler())
    code: int = Exit.ERROR
    try:
        code = main(words)
    finally:
        bound_exit(code)  # threads and processes that the app's code left behind must not keep this process running
    sys.exit(code)


def main(words: list[str]) -> int:
    """Run one command line in this process and return its exit code. Errors are printed; none is raised."""
    options = words[: words.index("--")] if "--" in words else words
    as_json = "--json" in options
    try:
        code = _run(words, traced="--traceback" in options, as_json=as_json)
        sys.stdout.flush()
        return code
    except stdio.OutputLost as exc:
        stdio.give_up()
        if exc.unread:
            return Exit.UNREAD
        print_error("OutputLost", f"standard output cannot be written: {exc}", as_json=as_json)
        return Exit.ERROR


def _run(words: list[str], *, traced: bool, as_json: bool) -> int:
    """Run one command line and return its exit code. Raises nothing but `OutputLost`."""
    try:
        for word in words:
            word.encode()
        code = cli(words, prog_name="jobledger", standalone_mode=False)
        return code if isinstance(code, int) else Exit.OK
    except JobledgerError as exc:
        if traced:
            _show_traceback(exc)
        print_error(type(exc).__name__, text_of(exc), as_json=as_json)
        return exit_code(exc)
    except stdio.OutputLost:
        raise
    except UnicodeEncodeError as exc:
        return _misused(Wrong(f"argument {exc.object!r} is not UTF-8 text"), as_json=as_json)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except typer.Abort:
        if not as_json:
            print(file=sys.stderr)  # ends the line with the question
        print_error("Aborted", "nothing was changed", as_json=as_json)
        return Exit.ERROR
    except _usage_error() as exc:
        if traced:
            _show_traceback(exc)
        return _misused(exc, as_json=as_json)
    except SystemExit as exc:  # raised by a library or by the app's code
        return exc.code if isinstance(exc.code, int) else Exit.OK if exc.code is None else Exit.ERROR
    except BaseException as exc:  # noqa: BLE001  # for any error a command prints one line and has an exit code
        # A process may fail after hours: then its log must show where.
        return _unexpected(exc, traced=traced or _command(words) in _PROCESSES, as_json=as_json)


def _command(words: Sequence[str]) -> str:
    """Return the name of the command, or of the group of commands, in a command line."""
    return next((word for word in words if not word.startswith("-")), "")


def _unexpected(exc: BaseException, *, traced: bool, as_json: bool) -> int:
    """Report an error that Jobledger does not raise on purpose, and return the exit code. ``traced``: print the
    traceback, too."""
    if traced:
        _show_traceback(exc)
    if isinstance(exc, OSError) and exc.filename is not None and exc.strerror:
        print_error(type(exc).__name__, f"{exc.filename}: {exc.strerror}", as_json=as_json)
        return Exit.ERROR
    what = type(exc).__name__ + (f": {message}" if (message := text_of(exc)) else "")
    hint = "" if traced else "; `jobledger --traceback …` shows the traceback"
    print_error("Unexpected", f"unexpected {what}{hint}", as_json=as_json)
    return Exit.ERROR


def _usage_error() -> type[typer.BadParameter]:
    # From version 0.20 on, typer contains its own copy of click. `typer.BadParameter` leads to the base class in both
    # cases.
    return next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _misused(exc: typer.BadParameter, *, as_json: bool) -> int:
    """Report an error in the command line, and return the exit code. For a group without a command, show the group's
    help."""
    if type(exc).__name__ == "NoArgsIsHelpError" and not as_json:
        exc.show()
        return Exit.USAGE
    ctx = exc.ctx
    hint = "" if as_json or ctx is None else f" (see {ctx.command_path} --help)"
    print_error("UsageError", " ".join(exc.format_message().split("\n")) + hint, as_json=as_json)
    return Exit.USAGE


def _show_traceback(exc: BaseException) -> None:
    import traceback

    traceback.print_exception(exc)


if __name__ == "__main__":
    run()
