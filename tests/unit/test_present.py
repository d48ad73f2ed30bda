"""The clock of the maintenance: no limit is later than the broker's time. No broker: the tests acknowledge the records
themselves."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_LOG_APPEND_TIME, KafkaError
from hypothesis import given
from hypothesis import strategies as st

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.streams.maintenance import maintenance as maintenance_module
from jobledger.streams.maintenance import table_rows
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.maintenance.present import present_ms

NAMES = Names("shop")
YEAR_MS = 365 * 24 * 3600 * 1000


class Writer:
    """A writer whose records are acknowledged with given reports: (kind of the time, time in ms, offset)."""

    def __init__(self, *reports: tuple[int, int, int | None] | KafkaError | None) -> None:
        self.reports, self.sent = list(reports), list[Outgoing]()
        self.settings, self.event = SimpleNamespace(submit_timeout=-5.0, bootstrap="127.0.0.1:1"), threading.Event

    def ensure_schema(self) -> None:
        pass

    def post(self, record: Outgoing, on_delivery: Any) -> None:
        self.sent.append(record)
        report = self.reports.pop(0)
        if isinstance(report, tuple):
            on_delivery(None, SimpleNamespace(timestamp=lambda: report[:2], offset=lambda: report[2]))
        elif report is not None:
            on_delivery(report, None)

    def wait(self, done: threading.Event, timeout: float) -> bool:
        return done.wait(max(0.0, timeout))

    def failed(self, error: KafkaError, what: str, *needs: object) -> Exception:
        return BrokerUnavailable(f"{what}: {error.str()}")


def present(writer: Writer) -> int:
    """Return the time that the maintenance would use."""
    return present_ms(cast(Any, writer), NAMES)


@given(st.integers(-YEAR_MS, YEAR_MS))
def test_the_time_is_never_later_than_the_brokers_or_this_machines(ahead_ms: int) -> None:
    """By whatever time the clocks differ."""
    here = int(time.time() * 1000)
    broker = here + ahead_ms
    found = present(Writer((TIMESTAMP_LOG_APPEND_TIME, broker, 7)))
    assert min(here, broker) - 1 <= found <= min(int(time.time() * 1000), broker + 60_000)


def test_the_record_has_no_value_and_is_sent_again_without_a_time() -> None:
    """The report about a record that was sent twice has no offset. A topic without append times has no broker's time,
    and then this machine's clock is used."""
    lost = (TIMESTAMP_LOG_APPEND_TIME, 5, None)
    writer = Writer(lost, (TIMESTAMP_LOG_APPEND_TIME, 1_000, 3))
    assert 1_000 <= present(writer) < 61_000
    assert writer.sent == [Outgoing("shop.schemas", None, "clock")] * 2
    before = int(time.time() * 1000)
    assert present(Writer(*[(TIMESTAMP_CREATE_TIME, 5, 3)] * 3)) >= before


def test_without_an_acknowledgement_there_is_no_time() -> None:
    """The round of the maintenance fails, and removes nothing."""
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        present(Writer(None))
    with pytest.raises(BrokerUnavailable, match=r"writing to shop\.schemas"):
        present(Writer(KafkaError(KafkaError._MSG_TIMED_OUT)))


def test_rows_workers_and_records_are_removed_by_the_brokers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock is years ahead of the broker's here."""
    now_ms, asked = 1_000_000_000_000, dict[str, int]()
    monkeypatch.setattr(maintenance_module, "present_ms", lambda writer, names: now_ms)
    monkeypatch.setattr(maintenance_module, "LogWriter", lambda settings, names: SimpleNamespace(close=lambda: None))

    def order(*args: Any) -> None:
        asked["rows"] = args[4]

    class Table:
        def workers(self, limit: int, *, before_ms: int) -> list[object]:
            asked["workers"] = before_ms
            return [object()] if before_ms > now_ms else []

        def offsets(self) -> dict[tuple[str, int], int]:
            return {}

    monkeypatch.setattr(table_rows, "order", order)
    cadence = Cadence(table_retention={"failed": 3600.0}, gone_after=600.0, retention=86_400.0)
    made = Maintenance(
        *(NAMES, Settings(bootstrap="127.0.0.1:1"), [], cast(Any, Table())),
        cadence=cadence,
        remover=cast(Any, SimpleNamespace(busy=False)),
    )
    monkeypatch.setattr("jobledger.log.group_offsets.worker_commits", lambda *args: {})
    monkeypatch.setattr("jobledger.log.group_offsets.group_offsets", lambda *args: {})

    def aged(cutoff_ms: int) -> tuple[dict[object, int], dict[object, int]]:
        asked["trim"] = cutoff_ms
        return {}, {}

    monkeypatch.setattr(made, "_aged", aged)
    assert not made.remove_rows()
    assert made.remove_workers() == 0
    assert made.trim() == {}
    assert asked == {"rows": now_ms, "workers": now_ms - 600_000, "trim": now_ms - 86_400_000}
    made.close()
