"""A second opinion: reads the raw topics of a namespace, folds them its own naive way, and audits them.

Imports nothing of Jobledger: it frames and decodes the records by hand from the schema file, keeps every fact of every
job in a list, sorts, and looks. Slow and simple on purpose. Run as a script it compares the log with a SQLite status
table and says what differs; exit code 1 then, 2 if the log itself breaks a promise.

    python tests/acceptance/independent.py --bootstrap 127.0.0.1:9092 --namespace shop --status status.db --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: the other parts lie beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.acceptance.audit import Audit, Execution, Window, audit, read_executions
from tests.acceptance.fold import ENDED, Difference, Final, compare, fold, table
from tests.acceptance.rawlog import Log, Record, Schemas, fingerprint, life_of, read, show

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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--status", help="the SQLite file of the status table")
    parser.add_argument("--executions", help="the side log of a chaos app")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    log = read(given.bootstrap, given.namespace)
    executions = read_executions(given.executions) if given.executions else []
    folded = fold(log.records)
    found = audit(log, executions=executions)
    differences = compare(folded, table(given.status)) if given.status else []
    states = Counter(f.state for f in folded.values())
    if given.json:
        report = {
            "records": len(log.records),
            "jobs": len(folded),
            "states": states,
            "equal": not differences,
            "differences": [d._asdict() for d in differences[:100]],
            "audit": asdict(found),
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"{len(log.records)} records, {len(folded)} jobs: {dict(states)}")
        print(found)
        for each in differences[:20]:
            print(f"{each.job_id} {each.field}: log {each.log!r}, table {each.table!r}")
    return 1 if differences else 0 if found.good else 2


if __name__ == "__main__":
    sys.exit(main())
