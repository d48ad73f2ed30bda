"""The watch that ends a coordinator whose Faust lives but makes no progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable
from jobledger.kafka.topic_names import Names
from jobledger.streams.coordinator import coordinator as module
from jobledger.streams.coordinator.coordinator import Coordinator
from jobledger.streams.coordinator.faust.faust_app import Options, group_error

#: Ticks of the watch without progress after which the coordinator ends.
BOUND = 40


class Offsets(dict[int, int]):
    """Offsets of the table's restoring. The watch reads them once a tick; ``at`` gives the offset for the number of the
    tick."""

    def __init__(self, at: Callable[[int], int]) -> None:
        super().__init__()
        self.at, self.ticks = at, -1

    def values(self) -> Any:
        self.ticks += 1
        return [self.at(self.ticks)]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A function that runs the watch on an app, and returns the number of ticks until the end of the coordinator, and
    the error."""
    monkeypatch.setattr(module, "PULSE", 0.001)
    monkeypatch.setattr(module, "START_TIMEOUT", BOUND * 0.001)
    monkeypatch.setattr(module, "SEEN_LATELY", 3600.0)  # so that a pause of this process does not matter

    def run(
        at: Callable[[int], int] = lambda tick: 0,
        *,
        rebalancing: bool = True,
        in_recovery: bool = False,
        before: Callable[[Coordinator, int], None] = lambda made, tick: None,
        **options: Any,
    ) -> tuple[int, str]:
        chosen = Options(**options)
        made = Coordinator(Names("shop"), Settings(bootstrap="127.0.0.1:1"), partitions=2, options=chosen)

        def asked(tick: int) -> int:
            made._broker_seen = time.monotonic()
            before(made, tick)
            return at(tick)

        offsets = Offsets(asked)
        recovery = SimpleNamespace(in_recovery=in_recovery, active_highwaters={}, active_offsets=offsets)
        made._app = SimpleNamespace(
            rebalancing=rebalancing, consumer=SimpleNamespace(), tables=SimpleNamespace(recovery=recovery)
        )
        with pytest.raises(BrokerUnavailable) as caught:
            asyncio.run(asyncio.wait_for(made._watch_recovery(), 60))
        return offsets.ticks, str(caught.value)

    return run


@pytest.mark.parametrize("flags", [{"rebalancing": True}, {"rebalancing": False, "in_recovery": True}], ids=str)
def test_a_rebalance_or_a_restoring_that_never_ends_ends_the_coordinator(
    ended: Callable[..., tuple[int, str]], flags: dict[str, bool]
) -> None:
    """The error says what the coordinator waited for, and what to check."""
    ticks, error = ended(**flags)
    assert BOUND - 1 <= ticks <= BOUND + 1
    assert "with a rebalance of its group" in error
    assert f"rebalancing: {flags['rebalancing']}" in error
    assert "127.0.0.1:1 answers" in error


def test_progress_of_the_restoring_restarts_the_time_limit(ended: Callable[..., tuple[int, str]]) -> None:
    """A large table may take long, so only time without progress counts."""
    ticks, _ = ended(lambda tick: min(tick // (BOUND // 2), 20))
    assert ticks >= 20 * (BOUND // 2) + BOUND


def test_a_time_without_a_broker_is_not_counted(ended: Callable[..., tuple[int, str]]) -> None:
    """`Options.patience` limits the time for which the broker may be unreachable."""

    def away(made: Coordinator, tick: int) -> None:
        if tick < 5 * BOUND:
            made._broker_seen -= module.SEEN_LATELY + 1

    ticks, _ = ended(before=away)
    assert ticks >= 6 * BOUND - 1


def test_an_idle_coordinator_outside_a_rebalance_is_not_ended(ended: Callable[..., tuple[int, str]]) -> None:
    """Time outside a rebalance does not count."""

    def begin(made: Coordinator, tick: int) -> None:
        made._app.rebalancing = tick >= 5 * BOUND

    ticks, _ = ended(before=begin)
    assert ticks >= 6 * BOUND - 1


def test_a_long_session_timeout_raises_the_time_limit(
    ended: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group may wait for a silent member as long as the session timeout."""
    monkeypatch.setattr(module, "PULSE", 0.25)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    ticks, error = ended(session_timeout=45.0)
    assert ticks * 0.25 >= 35
    assert "for 35 s" in error


def test_an_ended_task_of_the_client_is_noticed_without_a_poll() -> None:
    """aiokafka raises the error only in a call for records, and nothing calls for records during a rebalance."""

    async def lost() -> None:
        raise ConnectionError("gone")

    async def run(task: asyncio.Task[None] | None, pending: Exception | None = None) -> Exception | None:
        group = SimpleNamespace(_pending_exception=pending, _coordination_task=task)
        client = SimpleNamespace(_coordinator=group)
        return group_error(SimpleNamespace(consumer=SimpleNamespace(_thread=SimpleNamespace(_consumer=client))))

    async def look() -> None:
        running = asyncio.create_task(asyncio.sleep(60))
        assert await run(running) is None
        assert isinstance(await run(running, PermissionError("no")), PermissionError)
        running.cancel()
        failed = asyncio.create_task(lost())
        await asyncio.wait([running, failed])
        assert isinstance(await run(failed), ConnectionError)
        assert "has ended" in str(await run(running))

    asyncio.run(look())
