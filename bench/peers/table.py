"""Compares the figures of the systems: the ratios that have a target; and the table as JSON, as Markdown and on a
terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench.peers.measure import Drained, Row, Tried

OURS = "ours"
#: Targets by peer: our no-op jobs per second in one process are at least this many times the peer's.
TIMES = {"celery": 15.0, "bullmq": 1.2}
#: Names of our own rows, which are not peers.
OWN = ("ours", "ours-table")


class Verdict(msgspec.Struct, frozen=True):
    """One target: the ratio ``value`` must be at least ``target``. ``text``: the ratio's name. A ratio of 2 is twice as
    good."""

    text: str
    value: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.target


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Return the targets that can be computed from these rows; none without our own row."""
    ours = next((row.one for row in rows if row.name == OURS), None)
    if ours is None:
        return []
    found = []
    for row in rows:
        if row.one is None or row.name in OWN:
            continue
        if row.name in TIMES:
            text = f"no-op jobs/s in one process ÷ {row.title}'s"
            found.append(Verdict(text, ours.jobs_per_s / row.one.jobs_per_s, TIMES[row.name]))
        if ours.broker_cpu is not None:  # the CPU time of a broker that runs elsewhere is not known
            found.append(Verdict(f"{row.title}'s CPU per no-op job ÷ ours", row.one.cpu / ours.cpu, 1.0))
    return found


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _pair(one: Drained | None, two: Drained | None) -> str:
    return " / ".join(_rate(None if d is None else d.jobs_per_s) for d in (one, two))


def _cpu(found: Drained | None) -> str:
    if found is None:
        return "–"
    return f"{found.worker_cpu:.3f} + " + ("?" if found.broker_cpu is None else f"{found.broker_cpu:.3f}")


def _ms(row: Row) -> str:
    return "–" if row.start_p50 is None or row.start_p99 is None else f"{row.start_p50:.1f} / {row.start_p99:.1f}"


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {number}" for name, number in row.versions.items())


#: Headings of the columns, each with the function that returns a row's cell.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "system": lambda row: row.title,
    "no-op jobs/s, 1 process / 2": lambda row: _pair(row.one, row.two),
    "submit/s one by one / bulk": lambda row: f"{_rate(row.single)} / {_rate(row.bulk)}",
    "submit → start ms, p50 / p99": _ms,
    "50 ms jobs/s, ≤ 500 at once": lambda row: _rate(row.naps),
    "CPU s per 1,000 jobs, worker + broker": lambda row: _cpu(row.one),
}


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for a README, with settings and versions below it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row.title, f"not run: {row.not_run}", *[""] * (len(COLUMNS) - 2)]
        lines.append("| " + " | ".join(cells if row.not_run else [of(row) for of in COLUMNS.values()]) + " |")
    notes = [f"{r.title}: {_versions(r)}; {r.setting}; 50 ms jobs: {r.naps_setting}" for r in rows if not r.not_run]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def as_json(machine: dict[str, Any], rows: Sequence[Row], settings: Sequence[Tried] = ()) -> str:
    """Return machine, rows and targets, or the settings that were tried, as one JSON document."""
    found = {
        "machine": machine,
        "rows": msgspec.to_builtins(rows),
        "targets": [msgspec.to_builtins(each) | {"met": each.met} for each in verdicts(rows)],
        "settings": msgspec.to_builtins(settings),
    }
    return json.dumps({name: value for name, value in found.items() if value or name == "machine"}, indent=2)


def show(rows: Sequence[Row], settings: Sequence[Tried] = ()) -> None:
    """Print the same on stderr, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=150, highlight=False)
    if rows:
        table = Table(title="Job systems in turn on this machine, results kept")
        for number, heading in enumerate(COLUMNS):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(of(row) for of in COLUMNS.values()))
        console.print(table)
    for row in rows:
        told = f"not run: {row.not_run}" if row.not_run else f"{_versions(row)}; {row.setting}"
        console.print(f"{row.title}: {told}", markup=False)
    for each in verdicts(rows):
        sign = "[green]✔[/]" if each.met else "[red]✘[/]"
        console.print(f"{sign} {each.text}: {each.value:.2f}, target ≥ {each.target:g}")
    if settings:
        table = Table(title="Settings tried, one process")
        for heading in ("system", "jobs", "setting", "jobs/s", "CPU s per 1,000 jobs, worker + broker"):
            table.add_column(heading)
        for one in settings:
            table.add_row(one.name, one.task, one.setting, _rate(one.drained.jobs_per_s), _cpu(one.drained))
        console.print(table)
