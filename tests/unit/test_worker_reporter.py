"""The thread that sends a worker's reports, with a producer that does what no real broker does on demand."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError

from jobledger import Settings
from jobledger.consumers.worker import reporter as module
from jobledger.consumers.worker.reporter import WorkerReporter
from jobledger.schemas.events import WorkerReported
from tests.patience import wait_until

REPORT = WorkerReported("h", 1, None, "0.1", 0, [], 0, [], 0, 1, 0, [], None, 0)
TOPIC = "shop.workers"


class Producer:
    """Takes records, and answers each as ``answer`` says; None: never."""

    def __init__(self, answer: Callable[[], KafkaError | None] | None) -> None:
        self.answer, self.closed = answer, False
        self.values: list[bytes | None] = []
        self._callbacks: list[Callable[[KafkaError | None, Any], None]] = []

    def produce(self, topic: str, value: bytes | None, key: str, partition: int, on_delivery: Any) -> None:
        assert (topic, key, partition) == (TOPIC, "h:1", 0)
        self.values.append(value)
        self._callbacks.append(on_delivery)

    def poll(self, timeout: float) -> None:
        time.sleep(0.005)
        while self.answer is not None and self._callbacks:
            self._callbacks.pop(0)(self.answer(), None)

    def purge(self) -> None:
        self._callbacks.clear()

    def flush(self, timeout: float) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("REPORT_EVERY_S", 0.01), ("AGAIN_S", 0.01), ("REPORT_TIMEOUT_S", 0.02), ("FAREWELL_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)


def reporter(
    monkeypatch: pytest.MonkeyPatch, producer: Producer, report: Callable[[], WorkerReported] = lambda: REPORT
) -> WorkerReporter:
    """Return a thread that uses this producer."""
    made = WorkerReporter(Settings(bootstrap="127.0.0.1:1"), TOPIC, "h:1", "worker@h:1", report, lambda _, value: value)
    monkeypatch.setattr(made, "_connected", lambda: producer)
    return made


def ended(thread: WorkerReporter, *, farewell: bool) -> None:
    thread.finish(farewell=farewell)
    wait_until(lambda: not thread.is_alive(), 5, "the end of the thread")


@pytest.mark.parametrize("farewell", [True, False])
def test_reports_end_with_a_tombstone(monkeypatch: pytest.MonkeyPatch, farewell: bool) -> None:
    """A worker that ends because of an error leaves its last report."""
    producer = Producer(lambda: None)
    thread = reporter(monkeypatch, producer)
    thread.start()
    wait_until(lambda: len(producer.values) > 2, 5, "three reports")
    ended(thread, farewell=farewell)
    assert [value is None for value in producer.values].count(True) == (1 if farewell else 0)
    assert (producer.values[-1] is None) is farewell
    assert producer.closed


def test_only_one_report_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing piles up while no broker answers, and the end is not delayed."""
    built: list[int] = []

    def report() -> WorkerReported:
        built.append(1)
        return REPORT

    producer = Producer(None)
    thread = reporter(monkeypatch, producer, report)
    thread.start()
    wait_until(lambda: bool(producer.values), 5, "the report")
    time.sleep(0.2)
    assert len(producer.values) == len(built) == 1
    ended(thread, farewell=True)
    assert producer.values[1:] == [None]


@pytest.mark.parametrize("broken", ["refused", "raises"])
def test_a_problem_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """The thread tries again, and says when the reports arrive again."""
    caplog.set_level(logging.INFO, "jobledger.worker")
    tries: list[int] = []

    def mended() -> bool:
        tries.append(1)
        return len(tries) > 3

    def answer() -> KafkaError | None:
        return None if broken == "raises" or mended() else KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)

    def report() -> WorkerReported:
        if broken == "raises" and not mended():
            raise ValueError("no report")
        return REPORT

    thread = reporter(monkeypatch, Producer(answer), report)
    thread.start()
    wait_until(lambda: "arrive again" in caplog.text, 5, "the message about the end of the problem")
    ended(thread, farewell=True)
    texts = [record.getMessage() for record in caplog.records if "workers list" in record.getMessage()]
    assert len(texts) == 1
    assert ("Write on topic shop.workers" if broken == "refused" else "ValueError: no report") in texts[0]
