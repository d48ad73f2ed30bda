"""Write ``docs/states.md`` and ``docs/states.svg``: a job's states, from the table that the code itself is tested against.

``make docs`` runs this; a test holds both files to what is written here.
"""

import sys
from collections import defaultdict
from pathlib import Path

from jobledger.job import ENDS, TRANSITIONS
from jobledger.schemas.events import fact_name

HEAD = """\
# A job's states

Written by `make docs` from `TRANSITIONS` in `jobledger/job.py`: do not edit.
The table lists the steps of a job whose facts are read once and in order.
Neither the order in which facts are read nor copies of facts change the result.

![The states of a job and the facts that lead from one to another](states.svg)
"""

#: Where the states are that a job may leave: the centre of the box, in pixels.
CENTRES = {"scheduled": (395, 60), "queued": (150, 210), "running": (640, 210), "retrying": (395, 365)}
WIDTH, HEIGHT = 132, 46  # of a box
END_X, END_Y, END_STEP, END_WIDTH, END_HEIGHT = 810, 44, 92, 275, 62
#: The path of each step, where its text begins, and how the text is aligned. A new step needs an entry.
STEPS = {
    ("", "queued"): ("M10 210 H81", 10, 180, "start"),
    ("", "scheduled"): ("M180 60 H326", 182, 36, "start"),
    ("scheduled", "queued"): ("M328 76 C260 100 200 140 172 185", 222, 118, "end"),
    ("queued", "scheduled"): ("M212 186 C240 150 290 115 350 85", 292, 145, "start"),
    ("queued", "queued"): ("M118 233 C100 285 160 285 142 236", 112, 290, "middle"),
    ("queued", "running"): ("M216 203 H571", 395, 195, "middle"),
    ("running", "queued"): ("M574 219 H219", 395, 237, "middle"),
    ("running", "running"): ("M670 233 C680 285 730 270 696 236", 712, 284, "start"),
    ("running", "retrying"): ("M574 232 C545 280 505 315 452 340", 500, 305, "end"),
    ("retrying", "running"): ("M461 366 C540 350 610 300 638 236", 592, 330, "start"),
    ("retrying", "queued"): ("M329 352 C270 335 200 290 172 236", 226, 318, "end"),
    ("running", "scheduled"): ("M574 186 C545 145 500 115 440 85", 506, 134, "end"),
    ("scheduled", "running"): ("M461 74 C540 95 600 140 628 184", 578, 96, "start"),
}


def page() -> str:
    """Return the page."""
    rows = [
        f"| {'-' if before is None else before} | {fact_name(fact)} | {after} | {note} |"
        for before, fact, after, note in TRANSITIONS
    ]
    table = "\n".join(["| before | fact | after | |", "|---|---|---|---|", *rows])
    ends = ", ".join(f"`{end}`" for end in ENDS)
    return (
        f"{HEAD}\n{table}\n\nA run ([reference.md](reference.md#events)) ends in one of the states {ends}.\n"
        "If the log holds several outcomes of one run, the status table shows the one whose state comes first in this list.\n"
        "This is a precedence: the order of the outcomes in the log makes no difference.\n\n"
        "A redrive starts the next run of a job that has failed, was cancelled or has expired.\n"
        "The next run goes through the same states, from the start.\n"
    )


def words(x: float, y: float, lines: list[str], anchor: str = "middle", *, bold: bool = False) -> str:
    """Return text of one or more lines."""
    weight = ' font-weight="bold"' if bold else ""
    spans = "".join(f'<tspan x="{x:g}" dy="{0 if n == 0 else 15}">{line}</tspan>' for n, line in enumerate(lines))
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{spans}</text>'


def box(x: float, y: float, width: float, height: float, colours: str) -> str:
    """Return a box by its upper left corner."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" {colours}/>'


def figure() -> str:
    """Return the figure."""
    steps: dict[tuple[str, str], list[str]] = defaultdict(list)
    ends: dict[str, list[str]] = defaultdict(list)
    facts: dict[str, str] = {}
    for before, fact, after, note in TRANSITIONS:
        if after in ENDS:
            ends[after].append(str(before))
            facts[after] = fact_name(fact)
        else:
            steps["" if before is None else str(before), str(after)].append(fact_name(fact))
            if note:
                steps["" if before is None else str(before), str(after)].append(f"({note})")
    parts = [box(0.5, 0.5, 1099, 419, 'fill="#ffffff" stroke="#d0d7de"')]
    for step, lines in steps.items():
        path, x, y, anchor = STEPS[step]
        parts.append(f'<path d="{path}" fill="none" stroke="#424a53" stroke-width="1.5" marker-end="url(#arrow)"/>')
        parts.append(words(x, y, lines, anchor))
    for state, (x, y) in CENTRES.items():
        parts.append(box(x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, 'fill="#ddf4ff" stroke="#0550ae"'))
        parts.append(words(x, y + 5, [state], bold=True))
    parts.append(words(END_X, END_Y - 14, ["outcomes, and the states that they may follow"], "start"))
    for n, end in enumerate(map(str, ENDS)):
        y = END_Y + n * END_STEP
        parts.append(box(END_X, y, END_WIDTH, END_HEIGHT, 'fill="#f6f8fa" stroke="#57606a"'))
        parts.append(words(END_X + 12, y + 24, [f"{end}"], "start", bold=True))
        parts.append(words(END_X + END_WIDTH - 12, y + 24, [facts[end]], "end"))
        parts.append(words(END_X + 12, y + 46, ["after " + ", ".join(ends[end])], "start"))
    return "\n".join(
        [
            (
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1100 420" font-family="sans-serif" font-size="12" '
                'fill="#1f2328">'
            ),
            "<title>The states of a job</title>",
            (
                '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
                'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="#424a53"/></marker></defs>'
            ),
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "states.md").write_text(page(), "utf-8")
    (folder / "states.svg").write_text(figure(), "utf-8")
