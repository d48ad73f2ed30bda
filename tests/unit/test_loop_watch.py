"""Pure rules: when a worker collects garbage, and whether the running code is a job's."""

from __future__ import annotations

import asyncio
import sys

from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.isolation.garbage import GROWN, GROWN_IDLE, Garbage, due, resident
from jobledger.definitions.functions import runs_inside

MIB = 1 << 20


def test_garbage_is_collected_after_a_growth_of_memory() -> None:
    """The growth since the last collection must be 64 MiB, or an eighth if that is more. If the process is idle, 8 MiB
    are enough."""
    assert not due(100 * MIB + GROWN - 1, 100 * MIB, idle=False)
    assert due(100 * MIB + GROWN, 100 * MIB, idle=False)
    assert not due(8_900 * MIB, 8_000 * MIB, idle=False)
    assert due(9_000 * MIB, 8_000 * MIB, idle=False)
    assert due(100 * MIB + GROWN_IDLE, 100 * MIB, idle=True)
    assert not due(100 * MIB + GROWN_IDLE - 1, 100 * MIB, idle=True)


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=60))
def test_garbage_never_grows_beyond_its_bound(steps: list[tuple[int, bool]]) -> None:
    """For any allocations between two checks, the garbage after a check is below the bound. Memory that is really in
    use causes no collection without growth."""
    in_use = garbage = collected = 0

    def free() -> None:
        nonlocal garbage, collected
        garbage, collected = 0, collected + 1

    watched = Garbage(lambda: (100 + in_use + garbage) * MIB, free, lambda: 0.0)
    for size, is_garbage in steps:
        in_use, garbage = in_use + size * (not is_garbage), garbage + size * is_garbage
        watched.look(idle=False)
        assert garbage * MIB < max(GROWN, (100 + in_use) * MIB // 8)
        before = collected
        watched.look(idle=False)
        assert collected == before


def test_collections_take_a_tenth_of_the_time_at_most() -> None:
    """Jobs allocate and free much memory in turn, beside a large heap for which each collection takes a quarter of a
    second. The collections block the event loop for at most a tenth of the time."""
    now = spent = 0.0
    looks = 0

    def collect() -> None:
        nonlocal now, spent
        now, spent = now + 0.25, spent + 0.25

    watched = Garbage(lambda: (1_000 + 200 * (looks % 2)) * MIB, collect, lambda: now)
    while now < 60:
        now, looks = now + 0.1, looks + 1
        watched.look(idle=False)
    assert 2 < spent <= now / 10
    assert watched.collections == spent / 0.25


def test_a_large_growth_is_collected_at_once() -> None:
    """On a busy machine each collection takes a second, and jobs leave 100 MiB of garbage between two checks. The
    memory in use is bounded."""
    now, used, most = 0.0, 100, 0

    def collect() -> None:
        nonlocal now, used
        now, used = now + 1.0, 100

    watched = Garbage(lambda: used * MIB, collect, lambda: now)
    for _ in range(300):
        now, used = now + 0.1, used + 100
        most = max(most, used)
        watched.look(idle=False)
    assert most <= 100 + 256 + 100


def test_the_memory_of_the_process_is_measured() -> None:
    """A Python process uses more than 1 MiB, and an allocation is added."""
    before = resident()
    held = b"x" * (64 * MIB)
    assert resident() - before > 32 * MIB
    assert before > MIB
    assert len(held) == 64 * MIB


def test_code_of_a_job_is_distinguished_from_the_code_around_it() -> None:
    """A frame belongs to the job if it runs the job's function or code that this function calls, and the executor
    called the function. The executor's own code, its other calls, and a call of the function elsewhere do not belong to
    the job."""
    noted: dict[str, bool] = {}

    def note(name: str) -> None:  # looks at the running frame, as a signal handler does
        noted[name] = runs_inside(sys._getframe(1), executor.__code__, job)

    async def deeper(name: str) -> None:
        await asyncio.sleep(0)
        note(name)

    async def job(name: str = "job") -> None:
        note(name)
        await deeper(f"what the {name} calls")

    def helper() -> None:
        note("what the executor calls besides")

    async def executor() -> None:
        note("the executor")
        helper()
        await job()

    async def main() -> None:
        await executor()
        await job("function elsewhere")

    asyncio.run(main())
    assert noted == {
        "the executor": False,
        "what the executor calls besides": False,
        "job": True,
        "what the job calls": True,
        "function elsewhere": False,
        "what the function elsewhere calls": False,
    }
    assert not runs_inside(None, executor.__code__, job)
