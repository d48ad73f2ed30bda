"""The takeover's reader: ranges of partitions, again and again on one connection."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.consumers.takeover import Takeover
from jobledger.kafka import topics, topology
from jobledger.log import admin
from jobledger.names import Names
from jobledger.writer import LogWriter, Outgoing

pytestmark = pytest.mark.kafka


def test_a_partition_is_read_again_on_the_connection_that_read_it_to_an_end_before(broker: str, namespace: str) -> None:
    """Ranges of the same partitions can be read one after the other: what an earlier one stopped at is not left out."""
    names, settings = Names(namespace), Settings(bootstrap=broker)
    wanted = topology.desired(names, {"mail": 2}, partitions=2, replication=1)
    client = admin(settings)
    topics.apply(client, topics.plan(client, wanted))
    writer = LogWriter(settings, None)
    writer.send(Outgoing(names.jobs("mail"), b"x", None, p) for p in (0, 1) for _ in range(20))
    writer.close()
    nothing = cast(Any, None)
    takeover = Takeover(settings, names, nothing, nothing, ready=nothing, fail=nothing)
    began = time.monotonic()
    try:
        for ranges in ({0: (0, 7), 1: (3, 20)}, {0: (0, 20), 1: (0, 1)}, {1: (5, 20)}, {0: (7, 8)}):
            seen: dict[int, list[int]] = {}

            def take(message: Message, seen: dict[int, list[int]] = seen) -> None:
                seen.setdefault(message.partition() or 0, []).append(message.offset() or 0)

            takeover._read_ranges({(names.jobs("mail"), p): r for p, r in ranges.items()}, take)
            assert seen == {p: list(range(*r)) for p, r in ranges.items()}
    finally:
        takeover._drop_reader()
    assert time.monotonic() - began < 20, "a range was waited for until something else moved it"
