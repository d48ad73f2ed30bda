"""The committed offsets of groups, for readers outside the groups: for worker groups the committed offset and the
takeover floor of each partition.

The format of the metadata is defined in `jobledger.log.commit_metadata`. This module reads only its first two parts,
which all versions share: ``<version><flag>.<floor in hex>.…``.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from confluent_kafka import KafkaException, TopicPartition

from jobledger.config import Settings
from jobledger.kafka.auth import Need
from jobledger.kafka.clients import admin, answer_of, committed, consumer, consumer_config, partitions_of, translate
from jobledger.kafka.topic_names import Names


class Committed(msgspec.Struct, frozen=True):
    """A partition's commit. ``offset``: the committed offset. ``floor``: the lifecycle offset from which a takeover
    reads, None if not given. ``metadata``: the commit's metadata."""

    offset: int
    floor: int | None = None
    metadata: str | None = None


def floor_of(metadata: str | None) -> int | None:
    """Return the takeover floor in a commit's metadata; None if the floor cannot be read."""
    try:
        head, floor, _ = (metadata or "").split(".", 2)
        return int(floor, 16) if head in ("1c", "1d", "2c", "2d") else None
    except ValueError:
        return None


def group_offsets(
    settings: Settings, group: str, topic: str, timeout: float = 10.0
) -> dict[tuple[str, int], Committed]:
    """Return a group's committed offsets of one topic, by (topic, partition); empty if the group has never committed.
    Raises `BrokerUnavailable`.

    The request uses a consumer of the group that does not join the group. librdkafka's admin request for the same
    offsets aborts the process (assertion ``eonce->refcnt > 0``, librdkafka issue 4605) if the broker becomes
    unavailable meanwhile.
    """
    partitions = [TopicPartition(topic, partition) for partition in range(partitions_of(settings, topic))]
    asker = consumer(consumer_config(settings, group=group))
    try:
        answers = committed(asker, partitions, settings, Need("Describe", "group", group), timeout)
    finally:
        asker.close()
    return {
        (p.topic, p.partition): Committed(p.offset, floor_of(p.metadata), p.metadata) for p in answers if p.offset >= 0
    }


def worker_commits(settings: Settings, names: Names, lanes: Iterable[str]) -> dict[tuple[str, int], Committed]:
    """Return the committed offsets of every lane's worker group, by work topic and partition."""
    commits: dict[tuple[str, int], Committed] = {}
    for lane in lanes:
        commits.update(group_offsets(settings, names.worker_group(lane), names.jobs(lane)))
    return commits


def lifecycle_groups(settings: Settings, names: Names, timeout: float = 10.0) -> list[str]:
    """Return the groups of `App.lifecycle` that the cluster knows, without deleted or expired groups.

    Raises `BrokerUnavailable`, or `NotAuthorized` if this user may not describe them.
    """
    # A cluster silently omits groups that this user may not describe. So one group is requested by name first.
    prefix = names.lifecycle_group("")
    group_offsets(settings, prefix, names.lifecycle, timeout)
    client = admin(settings)  # kept in a variable: without the client its answers are lost
    try:
        listed = answer_of(client.list_consumer_groups(request_timeout=timeout), timeout)
    except KafkaException as exc:
        raise translate(exc.args[0], settings, "listing consumer groups") from exc
    for error in listed.errors:
        raise translate(error.args[0], settings, "listing consumer groups")
    return sorted(group.group_id for group in listed.valid if group.group_id.startswith(prefix))
