"""``jobledger doctor``: finds out what is wrong, and says how to fix it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import output
from jobledger.cli.commands import words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import AppOption, AppWord, Bootstrap, Json, Namespace, StatusUrl, timespan
from jobledger.cli.output import Cell, Exit
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobledger.doctor import Check


def doctor(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    timeout: Annotated[float, timespan("How long all checks together may take.")] = 60.0,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Examine this machine, the settings, the broker, the topics, the processes and the status table. Exit code 4 if
    something needs a fix; the fix is shown.

    Nothing is changed. To compare the clocks, the schema of events is written to the topic of schemas, as each process
    does at its start.

    Example: jobledger doctor shop:app
    """
    from jobledger.doctor import Check, examine, examine_machine
    from jobledger.errors import ConfigError, text_of

    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    try:
        examined = find_app(parsed.target or app, namespace, bootstrap, status_url)
    except ConfigError as exc:
        checks = examine_machine(time_most=timeout)
        if all(check.ok for check in checks):  # an unknown setting is a reason of its own
            checks.append(Check("app", False, text_of(exc), "Correct the app as the detail says."))
    else:
        try:
            checks = examine(examined, time_most=timeout)
        finally:
            examined.close()
    if as_json:
        output.print_json({"checks": checks})
    else:
        _show(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(Exit.DIFFERS)


def _show(checks: Sequence[Check]) -> None:
    rows: list[list[Cell]] = [
        [check.name, ("ok", "green") if check.ok else ("to fix", "bold red"), check.detail] for check in checks
    ]
    output.print_table(("check", "", "detail"), rows)
    to_fix = [check for check in checks if not check.ok]
    first: dict[str | None, str] = {}
    for check in to_fix:  # checks that were not made have the fix of the check that failed
        first.setdefault(check.fix, check.name)
    print()
    for fix, name in first.items():
        output.console().print(f"{name}: {fix}", markup=False, highlight=False)
    verdict = f"to fix: {len(to_fix)} of {counted(len(checks), 'check')}" if to_fix else "nothing needs a fix"
    output.console(stderr=True).print(verdict, style="bold red" if to_fix else "bold green")
