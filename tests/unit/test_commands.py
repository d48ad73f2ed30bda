"""Control commands without a broker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from jobledger.client import commands
from jobledger.client.commands import Commands
from jobledger.config import Settings
from jobledger.definitions.policy import Limits
from jobledger.errors import NotAnEvent, RegistryUnavailable
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.schemas import codec


class Topic:
    """The control topic: the writer and the reader of `Commands`."""

    def __init__(self) -> None:
        self.records: list[tuple[object, bytes | None]] = []

    def send(self, records: list[Outgoing]) -> None:
        self.records += [(record.key, record.value) for record in records]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def read(self, *place: object, **options: object) -> list[Any]:
        where = {"topic": lambda: "shop.control", "partition": lambda: 0, "offset": lambda: 0}
        at = {"timestamp": lambda: (2, 1_000)}
        return [
            SimpleNamespace(key=lambda k=key: k, value=lambda v=value: v, **where, **at) for key, value in self.records
        ]


@pytest.mark.parametrize("error", [NotAnEvent("no event"), RegistryUnavailable("the Schema Registry does not answer")])
def test_a_command_whose_schema_cannot_be_looked_up_is_not_left_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the error, the list would show a paused queue as open. A record that is not an event, and a null value, are
    left out."""
    topic = Topic()
    monkeypatch.setattr(commands, "LogReader", lambda settings: topic)
    orders = Commands(Settings(), Names("shop"), lambda: cast(Any, topic))
    orders.pause("queue", "mail", "lunch", "ann")
    topic.records += [("other", None), (None, b"?")]
    assert [(each.kind, each.name) for each in orders.standing()] == [("queue", "mail")]

    def decode(value: bytes | None) -> Any:
        if value == b"?":
            raise error
        return codec.decode(value)

    monkeypatch.setattr(commands, "decoder", lambda settings, names: SimpleNamespace(decode=decode))
    if isinstance(error, NotAnEvent):
        assert len(orders.standing()) == 1
    else:
        with pytest.raises(RegistryUnavailable):
            orders.standing()


def test_a_pause_and_a_limit_are_in_force_until_a_null_value_under_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list shows what the workers hold: they drop a command at the null value under its key."""
    topic = Topic()
    monkeypatch.setattr(commands, "LogReader", lambda settings: topic)
    orders = Commands(Settings(), Names("shop"), lambda: cast(Any, topic))
    orders.pause("queue", "mail", "lunch", "ann")
    orders.limit("queue", "mail", Limits(5.0, None), None, "ann")
    topic.records.append((topic.records[0][0], None))
    (standing,) = orders.standing()
    assert standing.paused is None
    assert standing.limits == Limits(5.0, None)
    topic.records.append((topic.records[1][0], None))
    assert orders.standing() == []
    orders.pause("queue", "mail", None, "bob")
    assert [each.paused for each in orders.standing()] == ["by bob"]
