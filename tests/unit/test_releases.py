"""The memory of releases: what it was told lately it knows, and it never grows past its bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.state.dedup import ReleaseMemory, release_key


@given(st.lists(st.integers(1, 2**64 - 1), max_size=400), st.integers(1, 60))
def test_the_latest_are_remembered_and_no_more_than_twice_as_many(keys: list[int], capacity: int) -> None:
    """A release is new once, known for at least ``capacity`` distinct others, and forgotten after twice as many."""
    memory = ReleaseMemory(capacity)
    order: list[int] = []  # distinct, as they were added
    for key in keys:
        known = key in memory
        assert memory.add(key) != known
        if not known:
            order.append(key)
        assert all(k in memory for k in order[-capacity:])
        assert len(memory) < 2 * capacity + 1


def test_it_grows_in_place_and_keeps_everything() -> None:
    """Growing tables lose nothing."""
    memory = ReleaseMemory(5_000)
    keys = [release_key(f"job-{n}", 1, 1) for n in range(5_000)]
    assert all(memory.add(k) for k in keys)
    assert not any(memory.add(k) for k in keys)


def test_runs_and_releases_of_one_job_are_different() -> None:
    """A job's next release and its redrive are not taken for the first."""
    keys = {release_key("j", run, release) for run in (1, 2) for release in (1, 2, 3)}
    assert len(keys) == 6
    assert 0 not in keys
