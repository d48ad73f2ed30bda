"""The output and the exit codes of commands: JSON, tables, coloured states, one-line errors.

If standard output is not a terminal, text is plain: no colour, no frames, nothing cut off. This module imports only
what every command needs anyway, so that `jobledger --help` stays quick.

The text may come from a log that anybody can write to. So every value can be printed: a time outside the calendar,
unlimited nesting and bytes that are not text are shown as far as possible and marked, and no text can control the
terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TextIO

from jobledger.views import words
from jobledger.views.values import jsonable
from jobledger.views.words import HIDDEN

if TYPE_CHECKING:
    import datetime as dt

    from rich.console import Console
    from rich.text import Text

#: The formats of values that commands use through this module.
clock, duration, relative = words.clock, words.duration, words.relative
shorten, printable = words.shorten, words.printable


class Exit(IntEnum):
    """Exit codes. Scripts depend on the numbers, so they do not change."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    DIFFERS = 4
    JOB_FAILED = 5
    TIMEOUT = 6
    GAVE_UP = 70
    DENIED = 77
    INTERRUPTED = 130
    UNREAD = 141


MEANINGS: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.ERROR: "an error, which one line on standard error describes",
    Exit.USAGE: "the command line is wrong, or names something that the app does not have",
    Exit.NOT_FOUND: "`kafka status`: the embedded broker is not running; other commands: the job or the status table was not found",
    Exit.DIFFERS: (
        "`verify`, `projections verify`: the table differs from the log; `check`: this version cannot run some jobs of the log; "
        "`audit`: the log breaks a promise; `doctor`: something needs a fix"
    ),
    Exit.JOB_FAILED: "`jobs wait`, `submit --wait`: the job failed, was cancelled or expired",
    Exit.TIMEOUT: "`jobs wait`, `submit --wait`: the time of `--timeout` was over",
    Exit.GAVE_UP: "`coordinator`: it stopped at an error that it must not skip; start it again",
    Exit.DENIED: "the Kafka cluster refuses this user, or the user lacks a right",
    Exit.INTERRUPTED: "interrupted (Ctrl-C)",
    Exit.UNREAD: "the reader of standard output has closed it, as `| head` does",
}

#: Errors with their own exit code, by name: importing the classes here would slow down every start.
_CODES: Mapping[str, Exit] = {
    "JobNotFound": Exit.NOT_FOUND,
    "PlanNotFound": Exit.NOT_FOUND,
    "StoreNotFound": Exit.NOT_FOUND,
    "StatusTimeout": Exit.TIMEOUT,
    "JobFailed": Exit.JOB_FAILED,
    "JobCancelled": Exit.JOB_FAILED,
    "AccessDenied": Exit.DENIED,
    "JobExpired": Exit.JOB_FAILED,
}

#: One colour for each state, the same in every table.
STATE_STYLES: Mapping[str, str] = {
    "scheduled": "cyan",
    "queued": "blue",
    "running": "yellow",
    "retrying": "magenta",
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "dim",
    "expired": "dim",
}

#: Minimum width of a table's last column in characters, if its content is that wide.
_LAST_COLUMN = 16

#: The same characters for JSON, without the control characters below 0x20, which a JSON writer escapes itself.
_STEERING = re.compile(f"[\\x7f\\ud800-\\udfff{''.join(map(chr, HIDDEN))}]")

#: A table cell: text, or text and its style.
Cell = str | tuple[str, str]


def exit_code(error: BaseException) -> Exit:
    """Return the exit code for an error."""
    return next((_CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in _CODES), Exit.ERROR)


def console(stderr: bool = False) -> Console:
    """Return a console on standard output, or on standard error. If the stream is not a terminal, the console does not
    break lines. The console prints no control codes but its own."""
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            for each in objects:
                if isinstance(each, Text):
                    each.plain = printable(each.plain)
            super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    stream = sys.stderr if stderr else sys.stdout
    return Safe(stderr=stderr, highlight=False, soft_wrap=not stream.isatty())


def looked_at() -> bool:
    """Return whether standard output is a terminal (or is to be treated as one because of ``FORCE_COLOR``)."""
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def json_text(value: Any, stream: TextIO | None = None) -> str:
    """Return ``value`` as JSON on one line. Characters that control terminals, or that ``stream`` (None: standard
    output) cannot encode, are written as ``\\u…``."""
    encoding = (getattr(stream or sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    text = json.dumps(jsonable(value), ensure_ascii=encoding != "utf8")
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on one line of standard output, and flush it, so that the reader of a pipe sees it at
    once."""
    print(json_text(value), flush=True)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    optional: Sequence[str] = (),
    empty: str = "nothing found",
) -> None:
    """Print a table: with rules and colours on a terminal, else columns of plain text under a heading.

    On a terminal only the last column is wrapped. If the other columns leave too little space for the last one,
    ``optional`` columns are left out, in the order in which they are given. Plain text has all columns. ``empty``: the
    text on standard error if there are no rows.
    """
    if not rows:
        console(stderr=True).print(empty, style="dim", markup=False)
        return
    if not looked_at():
        lines = [list(columns), *[[_plain(cell) for cell in row] for row in rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.table import Table

    out = console()
    shown = _fitting(columns, rows, optional, out.width)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for index in shown:
        table.add_column(columns[index], no_wrap=index != shown[-1], overflow="fold")
    for row in rows:
        table.add_row(*[styled(row[index]) for index in shown])
    # The table may be wider than the terminal: text that is cut off could be neither read nor copied.
    out.width = max(out.width, _width(columns, rows, shown))
    out.print(table, crop=False)


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[Cell]], optional: Sequence[str], width: int) -> list[int]:
    """Return the indexes of the columns that fit in ``width`` characters."""
    shown = list(range(len(columns)))
    for name in optional:
        if _width(columns, rows, shown) <= width:
            break
        shown.remove(columns.index(name))
    return shown


def _width(columns: Sequence[str], rows: Sequence[Sequence[Cell]], shown: Sequence[int]) -> int:
    """Return the width in characters that the table needs: the last column at its minimum, all others in full."""
    widths = [max(len(columns[i]), *(len(_plain(row[i])) for row in rows)) for i in shown]
    return sum(widths[:-1]) + min(widths[-1], _LAST_COLUMN) + 2 * len(shown)


def print_fields(fields: Sequence[tuple[str, Cell]]) -> None:
    """Print names and values, one pair per line."""
    width = max((len(name) for name, _ in fields), default=0)
    out = console()
    from rich.text import Text

    for name, cell in fields:
        text = styled(cell)
        lines = text.split("\n", allow_blank=True) if text.plain else [text]
        for index, line in enumerate(lines):
            head = (name if index == 0 else "").ljust(width)
            out.print(Text.assemble((head, "dim"), "  ", line), soft_wrap=True)


def styled(cell: Cell) -> Text:
    """Return a cell as rich text; its text is never interpreted as markup."""
    from rich.text import Text

    return Text(printable(cell)) if isinstance(cell, str) else Text(printable(cell[0]), style=cell[1])


def _plain(cell: Cell) -> str:
    text = cell if isinstance(cell, str) else cell[0]
    return printable(text.replace("\n", " ").replace("\t", " "))


def state_cell(state: str) -> Cell:
    """Return a cell with a state in its colour."""
    return state, STATE_STYLES.get(state, "")


def brief(moment: dt.datetime | int | None, now_us: int | None = None) -> str:
    """Format a moment as `relative` does, but with one unit only: ``12 s ago``, ``10 min ago``."""
    text = relative(moment, now_us)
    words, ago = text.removesuffix(" ago").removeprefix("in ").split(" "), text.endswith(" ago")
    if len(words) < 2:
        return text
    number = words[0].partition(".")[0] if words[1] == "s" else words[0]
    return f"{number} {words[1]} ago" if ago else f"in {number} {words[1]}"


def print_error(kind: str, message: str, *, as_json: bool) -> None:
    """Print an error on standard error: one line for people, or ``{"error": {"type", "message"}}``."""
    if as_json:
        print(json_text({"error": {"type": kind, "message": message}}, sys.stderr), file=sys.stderr)
        return
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("error: ", "bold red"), " ".join(message.split("\n"))), soft_wrap=True)
