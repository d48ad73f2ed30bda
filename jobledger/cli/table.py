"""``jobledger verify`` and ``jobledger rebuild``: the status table against the log, and made anew from it."""

from __future__ import annotations

from typing import Annotated

import typer

from jobledger.cli.options import Bootstrap, Json, StatusUrl, Target


def verify(
    target: Target,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Fold the whole log again and compare: exit code 0 when the status table equals it, 4 when it does not."""
    raise NotImplementedError


def rebuild(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Build the status table anew from the log, beside the live one, and swap them. No job runs again."""
    raise NotImplementedError
