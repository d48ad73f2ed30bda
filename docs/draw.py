"""Print ``docs/states.md``: a job's states, drawn from the table that the code itself is tested against.

``make docs`` writes the file; a test holds it to what this prints.
"""

from jobledger.job import ENDS, TRANSITIONS, diagram

HEAD = """\
# A job's states

Written by `make docs` from `TRANSITIONS` in `jobledger/job.py`: do not edit. The table lists
the steps of a job whose facts are read once and in order. A fact that is read late or twice does not change the state.
"""


def page() -> str:
    """The whole file."""
    rows = [
        f"| {'-' if before is None else before} | {fact.__name__} | {after} | {note} |"
        for before, fact, after, note in TRANSITIONS
    ]
    table = "\n".join(["| before | fact | after | |", "|---|---|---|---|", *rows])
    ends = ", ".join(f"`{end}`" for end in ENDS)
    return f"{HEAD}\n```mermaid\n{diagram()}\n```\n\n{table}\n\nA run ([reference.md](reference.md#events)) ends in one of the states {ends}. If the log holds several outcomes of one run, the status table shows the one whose state comes first in this list. This is a precedence: the order of the outcomes in the log makes no difference.\n"


if __name__ == "__main__":
    print(page(), end="")
