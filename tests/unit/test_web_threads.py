"""The threads of the HTTP API's blocking calls: how many run at a time."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from jobledger.web.problems import Problem
from jobledger.web.services import Threads
from tests.patience import wait_until


class Calls:
    """Calls that block until the test lets them end."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.running = self.most = self.begun = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
        self.end.wait(60)
        with self._lock:
            self.running -= 1
        return 7


def test_calls_that_nobody_waits_for_still_count() -> None:
    """After their timeouts, no further calls begin until the first ones end. Then the threads serve callers again."""
    calls = Calls()
    threads = Threads(2, 0.2, "the table")

    async def run() -> None:
        rounds = 0
        while rounds < 3 or calls.begun < 2:  # on a busy machine a thread may begin too late for its caller
            found = await asyncio.gather(*(threads.run(calls) for _ in range(4)), return_exceptions=True)
            assert [type(each) for each in found] == [Problem] * 4
            rounds += 1
        assert (calls.running, calls.begun, calls.most) == (2, 2, 2)
        calls.end.set()
        threads._seconds = 60.0
        assert await asyncio.gather(*(threads.run(calls) for _ in range(4))) == [7] * 4
        assert calls.most <= 2

    asyncio.run(run())
    wait_until(lambda: calls.running == 0, 10, "the end of the calls")


def test_a_failed_call_and_a_caller_that_leaves_free_their_place() -> None:
    """Whether the caller leaves while it waits for a place, or before the thread has begun."""
    threads = Threads(1, 60.0, "the table")

    def fails() -> None:
        raise ValueError("no")

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await threads.run(fails)
        for _ in range(3):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await threads.run(lambda: 1)
        calls = Calls()
        first = asyncio.create_task(threads.run(calls))
        waiting = asyncio.create_task(threads.run(calls))
        while not calls.begun:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        calls.end.set()
        assert await first == 7
        assert await threads.run(lambda: 2) == 2
        assert calls.begun == 1

    asyncio.run(run())
