"""Control commands without a broker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from jobledger.client import commands
from jobledger.client.commands import Commands
from jobledger.config import Settings
from jobledger.errors import NotAnEvent, RegistryUnavailable
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.schemas import codec


class Topic:
    """The control topic: the writer and the reader of `Commands`."""

    def __init__(self) -> None:
        self.values: list[bytes | None] = []

    def send(self, records: list[Outgoing]) -> None:
        self.values += [record.value for record in records]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def read(self, *place: object) -> list[Any]:
        return [SimpleNamespace(value=lambda value=value: value) for value in self.values]


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
    topic.values += [None, b"?"]
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
