"""The list of tests whose outcome depends on time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import timing

ROOT = Path(__file__).resolve().parents[2]


def test_the_list_of_timing_names_existing_tests() -> None:
    """Each row names a test of a file, and at least fifty runs, which all passed. No test is listed twice."""
    listed = timing.rows()
    assert len(listed) == timing.LIST.read_text("utf-8").count("\n| `tests/")
    assert len({row.test for row in listed}) == len(listed) > 0
    for row in listed:
        file, _, name = row.test.partition("::")
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), row.test
        assert row.depends
        if row.passed != "not yet":
            passed = re.fullmatch(r"(\d+) of (\d+), \d{4}-\d\d-\d\d", row.passed)
            assert passed, row
            assert int(passed[1]) == int(passed[2]) >= 50, row


def test_each_test_has_one_tier(request: pytest.FixtureRequest) -> None:
    """`make test` leaves out the tests with the mark `extended`, and `make test-all` runs only those."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r'^test:.*\n\t.*-m "not extended"', makefile, re.MULTILINE)
    assert re.search(r"^test-all:.*\n\t.*-m extended", makefile, re.MULTILINE)
    assert any(line.startswith("extended:") for line in request.config.getini("markers"))
