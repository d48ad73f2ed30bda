"""Reading the log with a real broker: schemas of other writers, and topics that do not exist."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, TopicMissing
from jobledger.kafka import clients, topics, topology
from jobledger.kafka.clients import admin, partitions_of
from jobledger.kafka.topic_names import Names
from jobledger.log import reading
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.schemas import codec
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka


def test_a_schema_is_found_directly_after_a_lookup_without_result(broker: str, namespace: str) -> None:
    """A lookup that found no schema does not hide a schema that is published directly after it."""
    names, settings = Names(namespace), Settings(bootstrap=broker)
    client = admin(settings)
    topics.apply(client, topics.plan(client, topology.desired(names, {}, partitions=1, replication=1)))
    lookup = SchemaLookup(settings, names)
    writer = LogWriter(settings, None)
    try:
        for version in range(20):
            text = codec.SCHEMA_TEXT.replace('"name": "trace"', f'"name": "trace{version}"', 1)
            mark = codec.fingerprint(text)
            assert lookup(mark) is None
            writer.send(
                [
                    Outgoing(names.schemas, b"no schema", f"garbage-{version}"),
                    Outgoing(names.schemas, text.encode(), mark.hex()),
                ]
            )
            assert lookup(mark) == text
            assert lookup(b"\1\2\3\4\5\6\7\x08") is None
    finally:
        writer.close()


def test_a_missing_topic_is_an_error_only_after_a_while(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not come at once, because a broker that shuts down says for a moment that its topics do not exist.
    The error comes within its time limit."""
    monkeypatch.setattr(reading, "MISSING_S", 1.0)
    began = time.monotonic()
    with LogReader(Settings(bootstrap=broker)) as reader, pytest.raises(TopicMissing, match="topics apply"):
        reader.bounds(f"{namespace}.nothing", 0, timeout=20.0)
    assert 1.0 <= time.monotonic() - began < PATIENCE * 20


def test_a_request_to_a_broker_that_leaves_the_cluster_is_repeated(
    broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librdkafka drops a broker that the cluster no longer lists, and requests to this broker fail at once. Such a
    request is repeated, but a refused request is not."""
    names, settings = Names(namespace), Settings(bootstrap=broker)
    client, asked = admin(settings), AdminClient.list_topics
    topics.apply(client, topics.plan(client, topology.desired(names, {}, partitions=2, replication=1)))
    monkeypatch.setattr(clients, "admin", lambda settings: client)
    codes: Iterator[int]

    def list_topics(self: AdminClient, *args: Any, **more: Any) -> Any:
        for code in codes:
            raise KafkaException(KafkaError(code))
        return asked(self, *args, **more)

    monkeypatch.setattr(type(client), "list_topics", list_topics, raising=False)
    codes = iter((KafkaError._DESTROY_BROKER,) * 2)
    assert partitions_of(settings, names.schemas) == 1
    codes = iter((KafkaError._FAIL,))
    with pytest.raises(BrokerUnavailable, match=names.schemas):
        partitions_of(settings, names.schemas)
    codes = iter((KafkaError._DESTROY_BROKER,) * 1000)
    with pytest.raises(BrokerUnavailable, match=names.schemas):
        partitions_of(settings, names.schemas, timeout=0.2)
    codes = iter((KafkaError._DESTROY_BROKER,) * 2)
    assert names.schemas in topics._topics(client, broker)
