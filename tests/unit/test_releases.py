"""The memory of releases: it knows the latest releases, and its size is bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.state.dedup import ReleaseMemory, release_key


@given(st.lists(st.integers(1, 2**64 - 1), max_size=400), st.integers(1, 60))
def test_the_latest_releases_are_known_and_the_memory_is_bounded(keys: list[int], capacity: int) -> None:
    """A release is new once. It is known until at least ``capacity`` other releases were added, and at most twice as
    many are kept."""
    memory = ReleaseMemory(capacity)
    order: list[int] = []  # distinct keys, in the order in which they were added
    for key in keys:
        known = key in memory
        assert memory.add(key) != known
        if not known:
            order.append(key)
        assert all(k in memory for k in order[-capacity:])
        assert len(memory) < 2 * capacity + 1


def test_the_memory_of_releases_loses_nothing_when_it_grows() -> None:
    """All releases up to the capacity are known."""
    memory = ReleaseMemory(5_000)
    keys = [release_key(f"job-{n}", 1, 1) for n in range(5_000)]
    assert all(memory.add(k) for k in keys)
    assert not any(memory.add(k) for k in keys)


def test_runs_and_releases_of_one_job_are_different() -> None:
    """A job's next release and next run are not taken for the first one."""
    keys = {release_key("j", run, release) for run in (1, 2) for release in (1, 2, 3)}
    assert len(keys) == 6
    assert 0 not in keys
