"""A second check for the fault tests: the product's own audit, over a whole log in memory.

`jobledger.audit` shares no code with the fold, the codec or the worker. `tests.acceptance.audit` adds what a test knows
besides the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from jobledger.audit.records import Record, Schemas, fingerprint, show
from jobledger.audit.table import ENDED, Difference, Final, StatusFile, differences, final
from tests.acceptance.audit import Audit, Execution, Window, audit, read_executions
from tests.acceptance.rawlog import Log, life_of, read

__all__ = [
    "ENDED",
    "Audit",
    "Difference",
    "Execution",
    "Final",
    "Log",
    "Record",
    "Schemas",
    "Window",
    "audit",
    "compare",
    "fingerprint",
    "fold",
    "life_of",
    "read",
    "read_executions",
    "show",
    "table",
]


def fold(records: Iterable[Record]) -> dict[str, Final]:
    """Return the last state of every job."""
    lives: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.fact is not None and record.head["job_id"]:
            lives[record.head["job_id"]].append(record)
    return {job: last for job, life in lives.items() if (last := final(life)) is not None}


def table(path: str | Path) -> dict[str, Final]:
    """Return the status table in the same form, read with SQL only."""
    kept = StatusFile(Path(path))
    try:
        return {row.job_id: row.final for row in kept.rows()}
    finally:
        kept.close()


def compare(folded: Mapping[str, Final], kept: Mapping[str, Final]) -> list[Difference]:
    """Return the differences between the two."""
    return [d for job in sorted({*folded, *kept}) for d in differences(job, folded.get(job), kept.get(job))]
