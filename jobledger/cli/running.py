"""``jobledger worker|streams|coordinator|materializer``: the processes that run until they are told to stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import logs, output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, StatusUrl, Target

if TYPE_CHECKING:
    from rich.text import Text

    from jobledger.streams.supervisor import Child

#: The colour of each part's name before its lines.
PART_STYLES = {
    "worker": "green",
    "coordinator": "magenta",
    "materializer": "blue",
    "kafka": "yellow",
    "dev": "bold cyan",
    "supervisor": "bold cyan",
}

MetricsPort = Annotated[
    int | None,
    typer.Option(metavar="PORT", min=0, max=65535, help="Serve Prometheus metrics on 127.0.0.1.", show_default="no"),
]


def command(*words: str) -> tuple[str, ...]:
    """The argument list that runs ``jobledger`` with ``words`` in a process of its own, by this same Python."""
    return (sys.executable, "-m", "jobledger", *words)


def stream_children(target: str, passed: Sequence[str]) -> list[Child]:
    """The two halves of the stream processor."""
    from jobledger.streams.supervisor import Child

    return [Child(name, command(name, target, *passed)) for name in ("coordinator", "materializer")]


def passed_on(bootstrap: str | None, status_url: str | None) -> list[str]:
    """Options as they are handed to a child."""
    words: list[str] = []
    if bootstrap is not None:
        words += ["--bootstrap", bootstrap]
    if status_url is not None:
        words += ["--status-url", status_url]
    return words


class Prefixed:
    """Prints a child's line under its name; every name as wide as the widest."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max(map(len, names))
        self._console = output.console()
        self._coloured = output.looked_at()

    def __call__(self, name: str, line: str) -> None:
        from rich.text import Text

        said: Text = Text.from_ansi(line) if self._coloured else Text(line)
        head = Text(name.ljust(self._width), style=PART_STYLES.get(name, ""))
        self._console.print(Text.assemble(head, (" │ ", "dim"), said), soft_wrap=True)
