"""What ends a coordinator whose Faust is alive and does nothing."""

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
from jobledger.streams.coordinator.faust.faust_app import Options, stuck

#: Ticks of the watch without progress after which the coordinator ends.
BOUND = 40


class Offsets(dict[int, int]):
    """How far the table is read: once a tick, ``at`` says it for the number of the tick."""

    def __init__(self, at: Callable[[int], int]) -> None:
        super().__init__()
        self.at, self.ticks = at, -1

    def values(self) -> Any:
        self.ticks += 1
        return [self.at(self.ticks)]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the watch on an app: after how many ticks it ended the coordinator, and with what words."""
    monkeypatch.setattr(module, "PULSE", 0.001)
    monkeypatch.setattr(module, "START_TIMEOUT", BOUND * 0.001)
    monkeypatch.setattr(module, "SEEN_LATELY", 3600.0)  # however long this process is paused between two lines

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
        with pytest.raises(BrokerUnavailable) as found:
            asyncio.run(asyncio.wait_for(made._watch_recovery(), 60))
        return offsets.ticks, str(found.value)

    return run


@pytest.mark.parametrize("flags", [{"rebalancing": True}, {"rebalancing": False, "in_recovery": True}], ids=str)
def test_a_rebalance_or_a_restoring_that_never_ends_ends_the_coordinator(
    ended: Callable[..., tuple[int, str]], flags: dict[str, bool]
) -> None:
    """The error says what waited, and where to look."""
    ticks, said = ended(**flags)
    assert BOUND - 1 <= ticks <= BOUND + 1
    assert "with a rebalance of its group" in said
    assert f"rebalancing: {flags['rebalancing']}" in said
    assert "127.0.0.1:1 answers" in said


def test_each_bit_of_progress_gives_it_the_whole_time_again(ended: Callable[..., tuple[int, str]]) -> None:
    """A large table may take long: only a time in which nothing is read is counted."""
    ticks, _ = ended(lambda tick: min(tick // (BOUND // 2), 20))
    assert ticks >= 20 * (BOUND // 2) + BOUND


def test_a_time_without_a_broker_is_not_counted(ended: Callable[..., tuple[int, str]]) -> None:
    """How long the broker may be away is a matter of `Options.patience`."""

    def away(made: Coordinator, tick: int) -> None:
        if tick < 5 * BOUND:
            made._broker_seen -= module.SEEN_LATELY + 1

    ticks, _ = ended(before=away)
    assert ticks >= 6 * BOUND - 1


def test_a_coordinator_that_is_not_in_a_rebalance_may_be_idle_for_ever(ended: Callable[..., tuple[int, str]]) -> None:
    """Nothing is counted while it may act."""

    def begin(made: Coordinator, tick: int) -> None:
        made._app.rebalancing = tick >= 5 * BOUND

    ticks, _ = ended(before=begin)
    assert ticks >= 6 * BOUND - 1


def test_a_group_that_waits_long_for_silent_members_is_given_that_time(
    ended: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a long session, a join of the group may last as long."""
    monkeypatch.setattr(module, "PULSE", 0.25)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    ticks, said = ended(session_timeout=45.0)
    assert ticks * 0.25 >= 35
    assert "for 35 s" in said


def test_the_clients_tasks_that_ended_are_found_though_nothing_polls() -> None:
    """aiokafka says so only to whoever asks for records, and nobody does while partitions are moving."""

    async def lost() -> None:
        raise ConnectionError("gone")

    async def run(task: asyncio.Task[None] | None, pending: Exception | None = None) -> Exception | None:
        group = SimpleNamespace(_pending_exception=pending, _coordination_task=task)
        client = SimpleNamespace(_coordinator=group)
        return stuck(SimpleNamespace(consumer=SimpleNamespace(_thread=SimpleNamespace(_consumer=client))))

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
