"""The filters of the page of jobs: from a URL, to a URL, and to the status table."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.job import State
from jobledger.web.pages.filters import TEXTS, VALUE_MOST, JobFilters, parse

NOW_MS = 1_764_547_200_000
#: Values that a URL can carry.
VALUES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda text: text.strip())


@given(st.dictionaries(st.sampled_from(TEXTS), VALUES), st.lists(st.sampled_from([s.value for s in State]), max_size=4))
def test_filters_survive_the_way_through_a_url(texts: dict[str, str], states: list[str]) -> None:
    """The query of filters, parsed again, gives the same filters, whatever characters they have."""
    first = parse([*texts.items(), *(("state", each) for each in states)], NOW_MS)
    assert dict(first.texts) == texts
    assert set(first.states) == set(states)
    again = parse(parse_qsl(first.query(), keep_blank_values=True), NOW_MS)
    assert (again.texts, again.states, again.table(NOW_MS)) == (first.texts, first.states, first.table(NOW_MS))


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=600)), max_size=12))
def test_any_parameters_give_filters_or_sentences(parameters: list[tuple[str, str]]) -> None:
    """No parameter of a URL is an error, and a filter with a problem is not in force."""
    filters = parse(parameters, NOW_MS)
    assert set(filters.problems) <= set(filters.given)
    assert not set(filters.problems) & set(filters.texts)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("state", "broken", "'broken' is not a state"),
        ("tag", "tier", "write NAME=VALUE"),
        ("arg", "user.id", "write NAME=VALUE"),
        ("since", "yesterday", "'yesterday' is neither an age"),
        ("until", "2026-13-01", "'2026-13-01' is neither an age"),
        ("late", "soon", "'soon' is not a duration"),
        ("attempts_least", "0", "'0' is not a whole number from 1 up"),
        ("key", "x" * (VALUE_MOST + 1), "501 characters"),
    ],
)
def test_a_wrong_value_is_named_and_the_other_filters_stay(name: str, value: str, says: str) -> None:
    """The sentence has the value, and the filter by task is still in force."""
    filters = parse([("task", "send"), (name, value)], NOW_MS)
    assert says in filters.problems[name]
    assert filters.table(NOW_MS) == {"task": "send"}
    assert filters.given[name] == [value]


def test_times_are_ages_or_utc() -> None:
    """An age counts from now, a time without a zone is UTC, and ``late`` counts from now, too."""
    filters = parse([("since", "2h"), ("until", "2025-11-30T23:00"), ("late", "10m"), ("tag", "a=b c=d")], NOW_MS)
    assert filters.table(NOW_MS) == {
        "tag": {"a": "b c=d"},
        "since_ms": NOW_MS - 7_200_000,
        "until_ms": 1_764_543_600_000,
        "late_ms": NOW_MS - 600_000,
    }
    assert filters.names == ("tag", "since", "until", "late")


def test_two_values_of_a_tag_are_a_problem() -> None:
    """A job has one value of a tag, so the filter would find nothing."""
    filters = parse([("tag", "a=1"), ("tag", "a=2")], NOW_MS)
    assert "given as '1' and as '2'" in filters.problems["tag"]
    assert not filters.any


def test_arguments_are_filters_that_the_table_does_not_have() -> None:
    """They are in the URL and in the words, and not in the conditions for the table or for an action."""
    filters = parse([("arg", "user.id=1"), ("arg", "plan=free"), ("task", "send")], NOW_MS)
    assert filters.arguments == {"user.id": "1", "plan": "free"}
    assert filters.any
    assert filters.names == ("task", "arg")
    assert filters.table(NOW_MS) == filters.where() == {"task": "send"}
    assert parse(parse_qsl(filters.query()), NOW_MS) == filters


def test_a_query_can_be_changed() -> None:
    """A parameter is added, replaced or removed; the others stay."""
    filters = parse([("task", "a b"), ("queue", "mail")], NOW_MS)
    assert filters.query(after="x/y") == "task=a+b&queue=mail&after=x%2Fy"
    assert filters.query(queue=None) == "task=a+b"
    assert JobFilters().query() == ""
