"""When a consumer without partitions asks its group coordinator whether it answers, and what it reports."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from jobledger.kafka import coordinator_probe
from jobledger.kafka.coordinator_probe import ASK_EVERY_S, SILENT_S, WARN_EVERY_S, CoordinatorProbe

LOG = logging.getLogger("probe")


class GroupCoordinator:
    """Answers `committed` like a consumer's client: with an offset, an error, or an exception."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.error: KafkaError | None = None
        self.raises = False
        self.now = 1_000.0

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        self.asked.append(self.now)
        if self.raises and self.error is not None:
            raise KafkaException(self.error)
        answer = TopicPartition(partitions[0].topic, partitions[0].partition)
        if self.error is not None:
            answer = _Failed(self.error)  # type: ignore[assignment]
        return [answer]


class _Failed:
    def __init__(self, error: KafkaError) -> None:
        self.error = error


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> GroupCoordinator:
    there = GroupCoordinator()
    monkeypatch.setattr(coordinator_probe, "time", SimpleNamespace(monotonic=lambda: there.now))
    return there


def probe_of(coordinator: GroupCoordinator) -> CoordinatorProbe:
    return CoordinatorProbe(coordinator, "app.worker", "app.jobs", LOG, "lane mail")  # type: ignore[arg-type]


def run(coordinator: GroupCoordinator, probe: CoordinatorProbe, seconds: float, owns: bool = False) -> None:
    """Check twice a second for ``seconds``."""
    until = coordinator.now + seconds
    while coordinator.now < until:
        probe.check(owns)
        coordinator.now += 0.5


def test_a_consumer_that_owns_partitions_does_not_ask(coordinator: GroupCoordinator) -> None:
    run(coordinator, probe_of(coordinator), 10 * SILENT_S, owns=True)
    assert coordinator.asked == []


def test_a_consumer_without_partitions_is_well_while_its_coordinator_answers(
    coordinator: GroupCoordinator, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks every fifteen seconds."""
    probe = probe_of(coordinator)
    run(coordinator, probe, 10 * SILENT_S)
    assert (len(coordinator.asked), probe.problem, caplog.records) == (19, None, [])


@pytest.mark.parametrize("raises", [False, True])
def test_a_group_coordinator_that_does_not_answer_is_a_problem_after_thirty_seconds(
    coordinator: GroupCoordinator, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """The problem names the group, the time and the error. It is logged once a minute."""
    probe = probe_of(coordinator)
    coordinator.error, coordinator.raises = KafkaError(KafkaError.NOT_COORDINATOR), raises
    run(coordinator, probe, SILENT_S)
    assert (probe.problem, caplog.records) == (None, [])
    run(coordinator, probe, ASK_EVERY_S)
    assert probe.problem is not None
    assert "app.worker has not answered for 30 s (Broker: Not coordinator)" in probe.problem
    assert "lane mail: the group coordinator of app.worker" in caplog.text
    run(coordinator, probe, 3 * WARN_EVERY_S)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 4


@pytest.mark.parametrize("owns", [False, True])
def test_the_problem_ends_with_an_answer_or_with_partitions(
    coordinator: GroupCoordinator, caplog: pytest.LogCaptureFixture, owns: bool
) -> None:
    """The end is logged once."""
    caplog.set_level(logging.INFO)
    probe = probe_of(coordinator)
    coordinator.error = KafkaError(KafkaError.NOT_COORDINATOR)
    run(coordinator, probe, 2 * SILENT_S)
    before = probe.problem
    if not owns:
        coordinator.error = None
    run(coordinator, probe, ASK_EVERY_S + 1, owns)
    assert (before is not None, probe.problem) == (True, None)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        "lane mail: the group coordinator of app.worker answers again"
    ]


def test_one_answer_among_errors_starts_the_thirty_seconds_again(coordinator: GroupCoordinator) -> None:
    probe = probe_of(coordinator)
    coordinator.error = KafkaError(KafkaError.REQUEST_TIMED_OUT)
    run(coordinator, probe, SILENT_S - 1)
    coordinator.error = None
    run(coordinator, probe, ASK_EVERY_S)
    coordinator.error = KafkaError(KafkaError.REQUEST_TIMED_OUT)
    run(coordinator, probe, SILENT_S - ASK_EVERY_S)
    assert probe.problem is None
