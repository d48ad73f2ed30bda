"""What worker groups have committed, as others see it: the base and the takeover floor of each partition.

The format of the metadata is `jobledger.consumers.offsets`'s; here only its first two parts are read, which every version
of it keeps: ``<version><flag>.<floor in hex>.…``.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
from confluent_kafka.admin import AdminClient

from jobledger.config import Settings
from jobledger.log import admin, translate
from jobledger.names import Names


class Committed(msgspec.Struct, frozen=True):
    """A partition's committed offset. ``floor``: the lifecycle offset a takeover reads from, None if it says none."""

    base: int
    floor: int | None = None


def floor_of(metadata: str | None) -> int | None:
    """The takeover floor in a commit's metadata; None if it cannot be read."""
    try:
        head, floor, _ = (metadata or "").split(".", 2)
        return int(floor, 16) if head in ("1c", "1d") else None
    except ValueError:
        return None


def group_offsets(
    client: AdminClient, settings: Settings, group: str, timeout: float = 10.0
) -> dict[tuple[str, int], Committed]:
    """A group's commits by (topic, partition); empty if it never committed. Raises `BrokerUnavailable`."""
    request = [ConsumerGroupTopicPartitions(group)]
    try:
        found = client.list_consumer_group_offsets(request, request_timeout=timeout)[group].result(timeout=timeout * 2)
    except KafkaException as exc:
        raise translate(exc.args[0], settings, f"asking for the offsets of group {group}") from exc
    return {
        (p.topic, p.partition): Committed(p.offset, floor_of(p.metadata))
        for p in found.topic_partitions or ()
        if p.offset >= 0
    }


def worker_commits(settings: Settings, names: Names, queues: Iterable[str]) -> dict[tuple[str, int], Committed]:
    """The commits of every queue's worker group, by work topic and partition."""
    client = admin(settings)
    found: dict[tuple[str, int], Committed] = {}
    for queue in queues:
        topic = names.jobs(queue)
        offsets = group_offsets(client, settings, names.worker_group(queue))
        found.update({place: c for place, c in offsets.items() if place[0] == topic})
    return found
