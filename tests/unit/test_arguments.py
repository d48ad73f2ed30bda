"""Jobs chosen by their arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.job import JobStatus, State
from jobledger.views.arguments import choose, has, wanted_of

ARGS: dict[str, Any] = {
    "user": {"id": 1, "name": "Ann", "vip": True, "referrer": None},
    "lines": [{"sku": "a", "n": 2}, {"sku": "b", "n": 3}],
    "sizes": [640, 1280],
    "a.b": {"c.d": "x"},
    "price": 1.5,
    "big": 2**70,
}


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("user.id", "1", True),
        ("user.id", "01", False),
        ("user.name", "Ann", True),
        ("user.name", '"Ann"', False),
        ("user.vip", "true", True),
        ("user.referrer", "null", True),
        ("lines.sku", "b", True),
        ("lines.n", "4", False),
        ("sizes", "1280", True),
        ("a.b.c.d", "x", True),
        ("price", "1.5", True),
        ("big", str(2**70), True),
        ("user", "", False),
        ("nobody", "1", False),
        ("user.id.more", "1", False),
    ],
)
def test_a_value_is_found_at_its_path(path: str, value: str, found: bool) -> None:
    """Texts are compared as they are, other values as JSON, and the elements of a list one by one."""
    assert has(ARGS, {path: value}) is found


def test_all_wanted_arguments_must_be_there() -> None:
    """One of them is not enough."""
    assert has(ARGS, {"user.id": "1", "price": "1.5"})
    assert not has(ARGS, {"user.id": "1", "price": "2"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
)


@given(JSON, st.text(max_size=5), st.text(max_size=5))
def test_any_arguments_can_be_compared(args: Any, path: str, value: str) -> None:
    """No value of another writer is an error."""
    assert has(args, {path: value}) in (True, False)


def job(number: int) -> JobStatus:
    return JobStatus(f"j{number}", "send", "mail", State.QUEUED, 1, 1, 1)


def test_a_page_has_the_first_jobs_that_match() -> None:
    """It says how many jobs were compared, and how many have arguments that are not known."""
    jobs = [job(number) for number in range(6)]
    arguments: dict[str, bytes | str] = {each.job_id: json.dumps({"n": n % 2}).encode() for n, each in enumerate(jobs)}
    arguments["j1"] = "not known: trimmed"
    chosen = choose(jobs, arguments, {"n": "1"}, 1)
    assert ([each.job_id for each in chosen.jobs], chosen.compared, chosen.unknown) == (["j3"], 4, 1)
    chosen = choose(jobs, arguments, {"n": "1"}, 5)
    assert ([each.job_id for each in chosen.jobs], chosen.compared, chosen.unknown) == (["j3", "j5"], 6, 1)
    assert choose(jobs, arguments, {"n": "1"}, 5, lambda status, args: {"n": "hidden"}).jobs == []


def test_a_condition_has_a_path_and_a_value() -> None:
    """Without one of them it is refused."""
    assert wanted_of("user.id=a=b") == ("user.id", "a=b")
    for text in ("user.id", "=1"):
        with pytest.raises(ValueError, match="not of the form NAME=VALUE"):
            wanted_of(text)
