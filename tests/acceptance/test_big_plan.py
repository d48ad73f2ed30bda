"""A redrive of very many jobs, while the caller, the stream processor and the broker are killed in turn.

``PLAN_JOBS`` sets the number of jobs, of which 85 % are redriven; 118,000 for a plan of about 100,000 jobs.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobledger.kafka.embedded import EmbeddedKafka
from tests.acceptance import independent, plan_app
from tests.acceptance.fleet import ROOT, Fleet
from tests.acceptance.promises import Promise

pytestmark = [pytest.mark.kafka, pytest.mark.extended, pytest.mark.timeout(0)]

TARGET = "tests/acceptance/plan_app.py:app"
JOBS = int(os.environ.get("PLAN_JOBS", "20000"))
#: Jobs that a worker runs at once: so many may run again after a fault of the broker.
CONCURRENCY = 50
OUTAGE_S = 3.0
#: Seconds for 1,000 jobs in each phase, with a wide margin.
A_THOUSAND_S = 15.0


def rows(fleet: Fleet, query: str) -> list[tuple[object, ...]]:
    """Return the rows of a query on the status table; none while the table does not exist."""
    try:
        connection = sqlite3.connect(f"file:{fleet.status}?mode=ro", uri=True, timeout=5.0)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return []


def states(fleet: Fleet) -> dict[tuple[object, ...], int]:
    """Return the number of jobs in each run, state and class of error."""
    found = rows(fleet, "SELECT run, state, error_type, count(*) FROM jobs GROUP BY run, state, error_type")
    return {tuple(row[:3]): int(str(row[3])) for row in found}


def progress(fleet: Fleet) -> tuple[str, int]:
    """Return the state of the only plan, and the number of jobs in the parts that were carried out."""
    for state, done in rows(fleet, "SELECT state, done + skipped + failed FROM plans"):
        return str(state), int(str(done))
    return "", 0


@contextmanager
def caller(fleet: Fleet, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command beside the test. It is killed at the end of the block, if it still runs."""
    with (fleet.folder / "caller.log").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobledger", *words], cwd=ROOT, env=fleet.environ, stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_each_job_of_a_big_plan_runs_exactly_once_more(
    kafka: EmbeddedKafka, tmp_path: Path, namespace: str, say: Callable[[str], None]
) -> None:
    """The caller is killed when the list is written; then the materializer, which carries the plan out, the coordinator,
    and the broker. Each job that failed with the error of the filter has exactly one second run, which succeeds, and no
    other job has one. The plan's counts are right, and `audit` and `verify` find no fault."""
    began, limit = time.monotonic(), 60.0 + JOBS / 1_000 * A_THOUSAND_S
    down = sum(plan_app.fate(number) is plan_app.Down for number in range(JOBS))
    with Fleet(tmp_path, kafka.bootstrap, namespace, target=TARGET) as fleet:
        code, _, errors = fleet.run("topics", "apply", TARGET, "--yes")
        assert code == 0, errors
        fleet.start("worker", "--concurrency", str(CONCURRENCY))
        coordinator, materializer = fleet.start("coordinator"), fleet.start("materializer")
        submit = [sys.executable, "-m", "tests.acceptance.plan_app", str(JOBS)]
        subprocess.run(submit, cwd=ROOT, env=fleet.environ, check=True, timeout=limit)
        fleet.until(lambda: sum(n for key, n in states(fleet).items() if key[1] in independent.ENDED) == JOBS, limit,
            "the end of the first runs")  # fmt: skip
        error = next(str(key[2]) for key, n in states(fleet).items() if n == down and str(key[2]).endswith("Down"))
        fleet.executions.with_name("mended").touch()

        made = time.monotonic()
        with caller(fleet, "jobs", "redrive", TARGET, "--where", f"error={error}", "--yes", "--wait", "--by", "ann"):
            fleet.until(lambda: progress(fleet)[0] in ("running", "done"), limit, "the list of the plan")
        for share, fault in enumerate(("materializer", "coordinator", "broker", "materializer"), 1):
            goal = down * share // 6
            fleet.until(lambda goal=goal: progress(fleet)[1] >= goal, limit, f"{goal} jobs of the plan")  # type: ignore[misc]  # mypy cannot infer the type of this lambda
            if fault == "broker":
                kafka.kill()
                fleet.outage(kafka, OUTAGE_S)
            else:
                fleet.kill(materializer if fault == "materializer" else coordinator)
                fleet.tend()
        fleet.until(lambda: progress(fleet)[0] == "done", limit, "the end of the plan")
        carried_out = time.monotonic() - made
        fleet.until(lambda: states(fleet).get((2, "succeeded", None), 0) == down, limit, "the end of the second runs")

        ((matched, done, skipped, not_possible),) = rows(fleet, "SELECT matched, done, skipped, failed FROM plans")
        assert (matched, done, skipped, not_possible) == (down, down, 0, 0)
        assert sum(n for (run, *_), n in states(fleet).items() if run == 1) == JOBS - down
        log = independent.read(fleet.bootstrap, fleet.namespace)
        submitted = {r.head["event_id"] for r in log.records if r.fact == "JobSubmitted" and r.head["run"] == 2}
        assert len(submitted) == down, "the submissions of the second runs"
        executions = independent.read_executions(fleet.executions)
        runs = Counter(each.job_id for each in executions if each.run == 2)
        again = sum(runs.values()) - len(runs)
        assert len(runs) == down
        assert again <= CONCURRENCY, f"{again} runs of code were repeated; only those that the broker's end hit may be"
        audit = independent.audit(log, (), fleet.windows, executions)
        assert not audit.counts, audit.violations
        code, report, errors = fleet.run("verify", TARGET, timeout=limit)
        Promise.STATUS_CONVERGES.hold(code == 0 and report["equal"] is True, f"verify: {report} {errors[-2000:]}")
        code, report, errors = fleet.run("audit", TARGET, "--finished", timeout=limit)
        assert code == (4 if audit.product else 0), (code, report, errors[-2000:])
        say(
            f"big plan: {down} of {JOBS} jobs redriven in {carried_out:.0f} s with faults "
            f"({dict(fleet.did)}), {again} runs of code repeated, {time.monotonic() - began:.0f} s in all"
        )
