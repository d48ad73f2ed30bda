"""Print ``docs/states.md``: a job's states, drawn from the table that the code itself is tested against.

``make docs`` writes the file; a test holds it to what this prints.
"""

from jobledger.job import ENDS, TRANSITIONS, diagram

HEAD = """\
# A job's states

Written by `make docs` from `TRANSITIONS` in `jobledger/job.py`: do not edit. A fact that the table does not know for a
state came late or twice and moves nothing.
"""


def page() -> str:
    """The whole file."""
    rows = [
        f"| {'-' if before is None else before} | {fact.__name__} | {after} | {note} |"
        for before, fact, after, note in TRANSITIONS
    ]
    table = "\n".join(["| before | fact | after | |", "|---|---|---|---|", *rows])
    ends = ", ".join(f"`{end}`" for end in ENDS)
    return f"{HEAD}\n```mermaid\n{diagram()}\n```\n\n{table}\n\nA run has ended in {ends}; if the log holds two ends of one run, the first of these is shown.\n"


if __name__ == "__main__":
    print(page(), end="")
