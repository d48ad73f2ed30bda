"""What the command line prints and how it ends: exit codes, JSON, tables, states in colour, one line for an error.

Where nobody looks (standard output is no terminal) text is plain: no colour, no frames, nothing cut off. Imports only
what every command needs anyway, so that `jobledger --help` stays quick.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime as dt

    from rich.console import Console
    from rich.text import Text


class Exit(IntEnum):
    """How a command ends. The numbers are a promise: scripts test them."""

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


MEANINGS: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.ERROR: "an error, said in one line on standard error",
    Exit.USAGE: "the command line is wrong",
    Exit.NOT_FOUND: "not running, or not found",
    Exit.DIFFERS: "`verify`, `projections verify`: the table differs from the log; `check`: jobs in it could not be run",
    Exit.JOB_FAILED: "`jobs wait`, `submit --wait`: the job did not end well",
    Exit.TIMEOUT: "not within the time that was given",
    Exit.GAVE_UP: "`coordinator`: it gave up and said why; start it again",
    Exit.DENIED: "the Kafka cluster does not let this user in, or do what it takes",
    Exit.INTERRUPTED: "interrupted (Ctrl-C)",
}

#: Errors with an exit code of their own, by name: importing the classes here would cost every start.
_CODES: Mapping[str, Exit] = {
    "JobNotFound": Exit.NOT_FOUND,
    "StoreNotFound": Exit.NOT_FOUND,
    "StatusTimeout": Exit.TIMEOUT,
    "JobFailed": Exit.JOB_FAILED,
    "JobCancelled": Exit.JOB_FAILED,
    "AccessDenied": Exit.DENIED,
    "JobExpired": Exit.JOB_FAILED,
}

#: One colour a state, the same in every table.
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

#: Characters that the last column of a table gets at least, if it has so many.
_LAST_COLUMN = 16

#: A cell: text, or text and its style.
Cell = str | tuple[str, str]


def exit_code(error: BaseException) -> Exit:
    """The exit code that an error ends a command with."""
    return next((_CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in _CODES), Exit.ERROR)


def console(stderr: bool = False) -> Console:
    """A console on standard output (or error) that never breaks lines where nobody looks."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=not stream.isatty())


def looked_at() -> bool:
    """Whether standard output is a terminal (or asked to be treated as one by ``FORCE_COLOR``)."""
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def jsonable(value: Any) -> Any:
    """``value`` as JSON builtins: structs as objects, bytes as the JSON they hold, enums as their value."""
    import msgspec

    def unknown(other: Any) -> Any:
        return str(other)

    return msgspec.to_builtins(_opened(value), enc_hook=unknown, str_keys=True)


def _opened(value: Any) -> Any:
    """Bytes that are JSON (arguments, results) become what they say: base64 helps nobody who reads it."""
    import msgspec

    if isinstance(value, bytes):
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value.decode("utf-8", "backslashreplace")
    if isinstance(value, msgspec.Struct):
        return {name: _opened(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {key: _opened(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_opened(each) for each in value]
    return value


def print_json(value: Any) -> None:
    """One JSON value on one line of standard output, flushed: a reader at the other end of a pipe sees it at once."""
    print(json.dumps(jsonable(value), ensure_ascii=False), flush=True)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    optional: Sequence[str] = (),
    empty: str = "nothing found",
) -> None:
    """A table: ruled and coloured for a terminal, else columns of plain text under a heading.

    In a terminal only the last column is broken into lines; if the others leave it no room, ``optional`` columns go,
    the first named first. Plain text has all of them.
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
    # Wider than the terminal rather than cut: what cannot be read cannot be copied either.
    out.width = max(out.width, _width(columns, rows, shown))
    out.print(table, crop=False)


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[Cell]], optional: Sequence[str], width: int) -> list[int]:
    """The indices of the columns that are shown in ``width`` characters."""
    shown = list(range(len(columns)))
    for name in optional:
        if _width(columns, rows, shown) <= width:
            break
        shown.remove(columns.index(name))
    return shown


def _width(columns: Sequence[str], rows: Sequence[Sequence[Cell]], shown: Sequence[int]) -> int:
    """What the table needs: all of each column but the last, and of that one enough to be worth it."""
    widths = [max(len(columns[i]), *(len(_plain(row[i])) for row in rows)) for i in shown]
    return sum(widths[:-1]) + min(widths[-1], _LAST_COLUMN) + 2 * len(shown)


def print_fields(fields: Sequence[tuple[str, Cell]]) -> None:
    """Names and values, one a line."""
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
    """A cell as rich text; what it says is never read as markup."""
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else Text(cell[0], style=cell[1])


def _plain(cell: Cell) -> str:
    text = cell if isinstance(cell, str) else cell[0]
    return text.replace("\n", " ").replace("\t", " ")


def state_cell(state: str) -> Cell:
    """A state in its colour."""
    return state, STATE_STYLES.get(state, "")


def duration(seconds: float) -> str:
    """A span of time as people say it: ``340 ms``, ``12.4 s``, ``3 min 20 s``, ``2 h 5 min``, ``4 d 3 h``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return _two(whole, 60, "min", 1, "s")
    if whole < 48 * 3600:
        return _two(whole, 3600, "h", 60, "min")
    return _two(whole, 86400, "d", 3600, "h")


def _two(seconds: int, big: int, big_name: str, small: int, small_name: str) -> str:
    first, rest = divmod(seconds, big)
    second = rest // small
    return f"{first} {big_name}" + (f" {second} {small_name}" if second else "")


def relative(moment: dt.datetime | int | None, now_us: int | None = None) -> str:
    """A moment (aware, or microseconds since the epoch) as seen from now: ``12.0 s ago``,
    ``in 3 min``, ``-`` for None."""
    if moment is None:
        return "-"
    seconds = (time.time_ns() // 1000 if now_us is None else now_us) / 1e6 - _seconds(moment)
    if abs(seconds) < 0.0005:
        return "now"
    return f"{duration(seconds)} ago" if seconds > 0 else f"in {duration(-seconds)}"


def brief(moment: dt.datetime | int | None, now_us: int | None = None) -> str:
    """As `relative` with one unit: ``12 s ago``, ``10 min ago``."""
    text = relative(moment, now_us)
    words, ago = text.removesuffix(" ago").removeprefix("in ").split(" "), text.endswith(" ago")
    if len(words) < 2:
        return text
    number = words[0].partition(".")[0] if words[1] == "s" else words[0]
    return f"{number} {words[1]} ago" if ago else f"in {number} {words[1]}"


def clock(moment: dt.datetime | int | None) -> str:
    """A moment as local date and time with milliseconds; ``-`` for None."""
    if moment is None:
        return "-"
    import datetime as dt

    return dt.datetime.fromtimestamp(_seconds(moment)).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _seconds(moment: dt.datetime | int) -> float:
    return moment / 1e6 if isinstance(moment, int) else moment.timestamp()


def shorten(text: str, most: int = 60) -> str:
    """``text`` on one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def print_error(kind: str, message: str, *, as_json: bool) -> None:
    """An error, on standard error: one line for people, or ``{"error": {"type", "message"}}``."""
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False), file=sys.stderr)
        return
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
