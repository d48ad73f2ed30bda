"""When a worker collects garbage, and whose code it is that runs: pure rules."""

from __future__ import annotations

import asyncio
import sys

from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.isolation.garbage import GROWN, GROWN_IDLE, Garbage, due, resident
from jobledger.definitions.functions import runs_inside

MIB = 1 << 20


def test_garbage_is_collected_by_the_memory_it_takes() -> None:
    """A process that grew by 64 MiB since the last collection, or by an eighth if that is more, collects; an idle one does
    so after 8 MiB."""
    assert not due(100 * MIB + GROWN - 1, 100 * MIB, idle=False)
    assert due(100 * MIB + GROWN, 100 * MIB, idle=False)
    assert not due(8_900 * MIB, 8_000 * MIB, idle=False)
    assert due(9_000 * MIB, 8_000 * MIB, idle=False)
    assert due(100 * MIB + GROWN_IDLE, 100 * MIB, idle=True)
    assert not due(100 * MIB + GROWN_IDLE - 1, 100 * MIB, idle=True)


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=60))
def test_garbage_never_grows_beyond_its_bound(steps: list[tuple[int, bool]]) -> None:
    """Whatever is allocated between two looks, after a look less than the bound is left since the last collection; memory
    that is rightly in use causes no collection without growth."""
    rightly = garbage = collected = 0

    def free() -> None:
        nonlocal garbage, collected
        garbage, collected = 0, collected + 1

    watched = Garbage(lambda: (100 + rightly + garbage) * MIB, free, lambda: 0.0)
    for size, is_garbage in steps:
        rightly, garbage = rightly + size * (not is_garbage), garbage + size * is_garbage
        watched.look(idle=False)
        assert garbage * MIB < max(GROWN, (100 + rightly) * MIB // 8)
        before = collected
        watched.look(idle=False)
        assert collected == before


def test_collections_take_a_tenth_of_the_time_at_most() -> None:
    """Jobs that take and free much memory in turn, beside a large heap of which each collection takes a quarter of a second:
    the event loop is not held up for more than a tenth of the time."""
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


def test_growth_does_not_wait_for_the_next_collections_time() -> None:
    """Collections that take a second each, on a busy machine, and jobs that leave 100 MiB in cycles between two looks: what is
    in use stays bounded."""
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


def test_the_memory_in_use_is_known() -> None:
    """A Python process takes more than a MiB, and what it allocates counts."""
    before = resident()
    held = b"x" * (64 * MIB)
    assert resident() - before > 32 * MIB
    assert before > MIB
    assert len(held) == 64 * MIB


def test_code_of_a_job_is_told_from_the_code_around_it() -> None:
    """A frame is the job's if it runs what the job's function runs, called by the executor; the executor's own code, what
    that calls besides, and code elsewhere are not."""
    found: dict[str, bool] = {}

    def note(name: str) -> None:  # while the frame runs, as the handler of a signal does it
        found[name] = runs_inside(sys._getframe(1), executor.__code__, job)

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
    assert found == {
        "the executor": False,
        "what the executor calls besides": False,
        "job": True,
        "what the job calls": True,
        "function elsewhere": False,
        "what the function elsewhere calls": False,
    }
    assert not runs_inside(None, executor.__code__, job)
