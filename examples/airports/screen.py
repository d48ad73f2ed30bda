"""Shows the demo: its steps, the live bar, and the report at the end. This module decides nothing.

On a terminal the bar is updated in place. Elsewhere (a pipe, CI) a plain line is printed every few seconds.
"""

from __future__ import annotations

import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from examples.airports.report import QUANTILES, Check, Latency, Spent

WIDTH = 96
#: Seconds between two lines if the output is not a terminal.
PLAIN_EVERY_S = 2.0
#: Seconds over which the shown rate is computed.
RATE_OVER_S = 3.0

#: The states with their colours, in the order of the bar: first jobs that have ended, then jobs that have not.
STATES = {
    "succeeded": "green",
    "failed": "red",
    "running": "yellow",
    "retrying": "magenta",
    "queued": "blue",
}


class Bar:
    """A bar of coloured parts. ``parts``: amounts with their styles; ``total``: the amount of the whole bar."""

    def __init__(self, parts: Sequence[tuple[float, str]], total: float, width: int) -> None:
        self.parts, self.total, self.width = parts, max(total, 1e-9), width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for (_, style), cells in zip(self.parts, self.cells(), strict=True):
            yield Segment("█" * cells, Style.parse(style))
        yield Segment("█" * (self.width - sum(self.cells())), Style.parse("grey15"))

    def cells(self) -> list[int]:
        """Return the length of each part in characters. Each part that is not 0 is visible, however small its share
        is."""
        cells = [max(1, round(value / self.total * self.width)) if value else 0 for value, _ in self.parts]
        whole = min(self.width, round(sum(value for value, _ in self.parts) / self.total * self.width))
        whole = max(whole, sum(map(bool, cells)))
        while any(cells) and sum(cells) != whole:  # the longest part compensates for rounding and for tiny parts
            cells[cells.index(max(cells))] += 1 if sum(cells) < whole else -1
        return cells


class Rate:
    """Ended jobs a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, now: float, ended: int) -> None:
        """Record that ``ended`` jobs have ended at ``now`` (seconds of any monotonic clock)."""
        self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_OVER_S:
            self._seen.popleft()

    @property
    def value(self) -> float:
        """Jobs per second; 0 before the second update."""
        if not self._seen:
            return 0.0
        (then, before), (now, ended) = self._seen[0], self._seen[-1]
        return (ended - before) / (now - then) if now > then else 0.0


class Progress:
    """The live bar of ``total`` jobs; a context manager."""

    def __init__(self, screen: Screen, total: int) -> None:
        self._screen, self._total = screen, total
        self._rate = Rate()
        self._counts: Mapping[str, int] = {}
        self._began = time.monotonic()
        self._printed = float("-inf")
        self._live = Live(console=screen.console, auto_refresh=False) if screen.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()
        else:
            self._screen.console.print(self._line(), soft_wrap=True)
        self._screen.record(self._picture())

    @property
    def ended(self) -> int:
        """The number of jobs that have ended."""
        return self._counts.get("succeeded", 0) + self._counts.get("failed", 0)

    def show(self, counts: Mapping[str, int]) -> None:
        """Show the numbers of jobs by state."""
        self._counts = counts
        now = time.monotonic()
        self._rate.update(now, self.ended)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
        elif now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            self._screen.console.print(self._line(), soft_wrap=True)

    def _speed(self) -> str:
        rate, left = self._rate.value, self._total - self.ended
        if not left:
            seconds = time.monotonic() - self._began
            return f"{self._total / seconds:,.0f} jobs/s over {seconds:.1f} s"
        if time.monotonic() - self._began < RATE_OVER_S or not rate:
            return f"{rate:,.0f} jobs/s"  # too early to say how long it will take
        return f"{rate:,.0f} jobs/s, {left / rate:.0f} s left"

    def _picture(self) -> Group:
        width = self._screen.width - 3
        legend = Text("  ")
        for state, colour in STATES.items():
            legend.append("● ", colour).append(f"{state} ").append(f"{self._counts.get(state, 0):,}", "bold")
            legend.append("   ")
        head = Table.grid(expand=False, padding=(0, 1))
        head.add_column(width=width // 2)
        head.add_column(width=width // 2, justify="right")
        head.add_row(
            Text.assemble("  ", (f"{self.ended:,}", "bold"), f" of {self._total:,} jobs have ended "),
            Text(self._speed(), "dim"),
        )
        parts = [(float(self._counts.get(state, 0)), colour) for state, colour in STATES.items() if state != "queued"]
        return Group("", head, Padding(Bar(parts, self._total, width - 2), (0, 0, 0, 2)), Text(), legend, "")

    def _line(self) -> str:
        shown = " · ".join(f"{state} {self._counts.get(state, 0):,}" for state in STATES)
        return f"  {self.ended / max(self._total, 1):4.0%}  {shown} · {self._speed()}"


class Screen:
    """Prints what the demo shows. ``picture``: also record this, so that it can be saved."""

    def __init__(self, *, picture: bool) -> None:
        self.console = Console(highlight=False)
        self.width = min(WIDTH, self.console.width) if self.console.is_terminal else WIDTH
        self.console.width = self.width
        # A separate console, because otherwise every update of a live bar would be recorded.
        self._recorder = (
            Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, highlight=False)
            if picture
            else None
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print and record, with the parameters of `rich.console.Console.print`."""
        self.console.print(*objects, **options)
        self.record(*objects, **options)

    def record(self, *objects: Any, **options: Any) -> None:
        """Record for the picture what the terminal has already shown."""
        if self._recorder is not None:
            self._recorder.print(*objects, **options)

    def title(self, text: str) -> None:
        """Print the first line."""
        self.print()
        self.print(Text(f"  {text}", "bold"))
        self.print()

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Show a step while the block runs. Then print the step's line with the time that the step took, and a mark for
        success or failure."""
        step = Step(name)
        began = time.monotonic()
        try:
            with self.console.status(Text(f"{name} …")) as spinner:
                step.spinner = spinner.update
                yield step
        except BaseException:
            self._step("✗", "red", step, time.monotonic() - began)
            raise
        self._step("✓", "green", step, time.monotonic() - began)

    def done(self, name: str, result: str, seconds: float) -> None:
        """Print the line of a step that has ended."""
        step = Step(name)
        step.result = result
        self._step("✓", "green", step, seconds)

    def _step(self, mark: str, colour: str, step: Step, seconds: float) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=3, justify="right")
        line.add_column(width=14)
        line.add_column(width=self.width - 30)
        line.add_column(width=7, justify="right")
        line.add_row(Text(mark, colour), Text(step.name, "bold"), step.result, Text(f"{seconds:.1f} s", "dim"))
        self.print(line)

    def heading(self, text: str) -> None:
        """Print a heading above a part of the report."""
        self.print()
        self.print(Padding(Rule(Text(text, "bold"), align="left", style="grey37"), (0, 3, 0, 2)))

    def checks(self, checks: Sequence[Check]) -> None:
        """Print what must be true, with the figures."""
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=3, justify="right")
        table.add_column(ratio=1)
        table.add_column(justify="right")
        for check in checks:
            mark = Text("✓", "green") if check.holds else Text("✗", "bold red")
            table.add_row(mark, check.claim, Text(check.shown, "bold" if check.holds else "bold red"))
        self.print(Padding(table, (0, 3, 0, 0)))

    def rejects(self, found: Mapping[str, int], examples: Mapping[str, str]) -> None:
        """Print how many jobs were rejected for each reason, with one row as an example."""
        table = _table("rejected because of", "rows", "for example")
        for kind, count in found.items():
            table.add_row(kind, f"{count:,}", Text(examples.get(kind, ""), "dim", overflow="ellipsis", no_wrap=True))
        table.add_row("together", Text(f"{sum(found.values()):,}", "bold"), "")
        self.print(Padding(table, (0, 3)))

    def latencies(self, found: Sequence[Latency]) -> None:
        """Print percentiles."""
        table = _table("milliseconds", *("max" if q == 1 else f"p{q * 100:g}" for q in QUANTILES))
        for column in table.columns[1:]:
            column.justify, column.min_width = "right", 8
        for each in found:
            table.add_row(each.name, *(f"{value:,.0f}" for value in each.values))
        self.print(Padding(table, (0, 3)))

    def spent(self, spent: Spent, jobs: int) -> None:
        """Print how the time of all jobs was spent."""
        parts = {
            "waiting in the queue": (spent.waiting, "blue"),
            "running": (spent.running, "yellow"),
            "backing off before a retry": (spent.backing_off, "magenta"),
        }
        self.print()
        self.print(Padding(Bar([*parts.values()], spent.total, self.width - 8), (0, 4)))
        legend = Table.grid(padding=(0, 1))
        legend.add_column(min_width=30)
        legend.add_column(justify="right", min_width=7)
        legend.add_column(justify="right", min_width=20)
        for name, (value, colour) in parts.items():
            legend.add_row(
                Text.assemble(("● ", colour), name),
                Text(f"{value / spent.total:.1%}", "bold"),
                Text(f"{value / max(jobs, 1):,.0f} ms a job", "dim"),
            )
        self.print(Padding(legend, (0, 4)))

    def verdict(self, text: str, more: str, *, good: bool) -> None:
        """Print the result of the run."""
        self.print()
        self.print(Text.assemble(("  " + text, "bold green" if good else "bold red"), more))

    def note(self, text: str) -> None:
        """Print a text that explains the figures above."""
        self.print(Padding(Text(text, "dim"), (1, 4, 0, 4)))

    def commands(self, groups: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Print commands with which a user can look further, each group under its purpose. Commands are never wrapped,
        so that they can be copied."""
        for why, commands in groups:
            self.print(Text(f"    # {why}", "dim"))
            for command in commands:
                self.print(Text(f"    {command}"), soft_wrap=True)
        self.print()

    def save(self, path: Path, title: str) -> None:
        """Write everything printed so far to ``path``, as an SVG picture that loads no other files."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self._recorder is not None, "made without picture=True"
        svg = self._recorder.export_svg(title=title)
        path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


class Step:
    """One step; ``result`` is shown when it is done."""

    def __init__(self, name: str) -> None:
        self.name, self.result = name, ""
        self.spinner: Callable[[Text], None] | None = None

    def doing(self, what: str) -> None:
        """Show what the step is doing now."""
        if self.spinner is not None:
            self.spinner(Text(f"{self.name}: {what} …"))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, header_style="dim", show_edge=False)
    table.add_column(columns[0], min_width=24)
    table.add_column(columns[1], justify="right")
    for name in columns[2:]:
        table.add_column(name)
    return table
