"""Values as text for people, in a terminal or on a page. Imports only what every command needs.

The text may come from a log that anybody can write to. So the characters that control a terminal, or that change the
direction of writing, are replaced by visible ones, and a time outside the calendar is shown as a number.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datetime as dt

#: Codes of characters that control a terminal: control characters, line ends except ``\\n``, changes of the writing
#: direction.
HIDDEN = (*range(0x80, 0xA0), 0x2028, 0x2029, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys((*HIDDEN, *range(0xD800, 0xE000)), 0xFFFD),
}
_LINE_PICTURES = {0x09: 0x2409, 0x0A: 0x240A}


def printable(text: str) -> str:
    """Return ``text`` with every character that controls the terminal replaced. ASCII control characters become their
    pictures (``␛``). All others become ``�``, also changes of the writing direction and halves of surrogate pairs.
    Newlines and tabs stay."""
    return text.translate(_PICTURES)


def one_line(text: str) -> str:
    """Return ``text`` as `printable` does, and with the pictures of newlines and tabs: for a line of a log, which a text
    from outside must not end."""
    return printable(text).translate(_LINE_PICTURES)


def duration(seconds: float) -> str:
    """Format a duration as people write it: ``340 ms``, ``12.4 s``, ``3 min 20 s``, ``2 h 5 min``, ``4 d 3 h``."""
    if seconds < 0:
        return "-" + duration(-seconds)
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
    """Format a moment (aware, or microseconds since the epoch) relative to now: ``12.0 s ago``, ``in 3 min``; ``-`` for
    None."""
    if moment is None:
        return "-"
    seconds = (time.time_ns() // 1000 if now_us is None else now_us) / 1e6 - _seconds(moment)
    if abs(seconds) < 0.0005:
        return "now"
    return f"{duration(seconds)} ago" if seconds > 0 else f"in {duration(-seconds)}"


def clock(moment: dt.datetime | int | None) -> str:
    """Format a moment (aware, or microseconds since the epoch) as local date and time with milliseconds; ``-`` for
    None."""
    if moment is None:
        return "-"
    import datetime as dt

    try:
        # Local time is computed only here, because it may not exist near the ends of the calendar.
        at = dt.datetime.fromtimestamp(_seconds(moment)).astimezone()
    except (ValueError, OverflowError, OSError):
        return f"outside the calendar ({moment} µs)" if isinstance(moment, int) else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    return at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _seconds(moment: dt.datetime | int) -> float:
    return moment / 1e6 if isinstance(moment, int) else moment.timestamp()


def shorten(text: str, most: int = 60) -> str:
    """Return ``text`` on one line of at most ``most`` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"
