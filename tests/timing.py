"""Runs the tests of ``tests/timing.md`` many times beside two busy loops, and writes into that list how often each
passed.

    .venv/bin/python -m tests.timing 50            # each test of the list fifty times
    .venv/bin/python -m tests.timing 50 dispatch   # only the tests whose id contains this text

The module is both the program and the pytest plugin that the program uses. Four tests run at a time, so the machine is
busier than with the loops alone.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("timing.md")
BUSY_LOOPS = 2
#: The loop ends when the process that started it is gone, for whatever reason.
BUSY_LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
#: Environment variables of pytest's processes: how often each test is run, and the file for the results.
TIMES, RESULTS = "TIMING_TIMES", "TIMING_RESULTS"
ROW = re.compile(r"^\| `(?P<test>[^`]+)` \| (?P<depends>[^|]+) \| (?P<passed>[^|]+) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One test of the list: its id without parameters, which part of its outcome depends on time, and how often it
    passed."""

    test: str
    depends: str
    passed: str

    def __str__(self) -> str:
        return f"| `{self.test}` | {self.depends} | {self.passed} |"


def rows() -> list[Row]:
    """Read the list."""
    found = ROW.finditer(LIST.read_text("utf-8"))
    return [Row(each["test"], each["depends"].strip(), each["passed"].strip()) for each in found]


def main(times: int, text: str = "") -> int:
    """Run the tests whose id contains ``text``, each ``times`` times. Return pytest's exit code."""
    chosen = [row for row in rows() if text in row.test]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environ = {**os.environ, TIMES: str(times), RESULTS: str(results)}
        loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(BUSY_LOOPS)]
        try:
            words = ["-p", "tests.timing", "--numprocesses", "4", "--quiet", "-m", "", *(row.test for row in chosen)]
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environ, check=False
            ).returncode
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        counts: dict[str, dict[str, int]] = json.loads(results.read_text("utf-8")) if results.exists() else {}
    today = datetime.datetime.now(datetime.UTC).date()
    said = LIST.read_text("utf-8")
    for row in chosen:
        count = counts.get(row.test)
        if count is not None:
            passed, failed = count.get("passed", 0), count.get("failed", 0)
            said = said.replace(str(row), str(replace(row, passed=f"{passed} of {passed + failed}, {today}")))
    LIST.write_text(said, "utf-8")
    return code


# -- the plugin -------------------------------------------------------------------------------------------------------

_outcomes: dict[str, Counter[str]] = {}


@pytest.fixture
def nth_time(request: pytest.FixtureRequest) -> int:
    """Return the number of this run of the test."""
    number: int = request.param
    return number


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test as often as the environment says."""
    metafunc.fixturenames.append("nth_time")
    metafunc.parametrize("nth_time", range(int(os.environ[TIMES])), indirect=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count each run once: as failed at its first failure, else as passed at its end."""
    counted = _outcomes.setdefault(report.nodeid.partition("[")[0], Counter())
    if report.failed:
        counted["failed"] += 1
    elif report.when == "call" and report.passed:
        counted["passed"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results in the main process, which receives all reports."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ[RESULTS]).write_text(json.dumps(_outcomes), "utf-8")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
