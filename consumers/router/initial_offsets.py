"""Decides where the router starts in partitions without a commit, for topics that are read from their end.

The first member that reads such a topic writes the topic's number of partitions into its commits. If a partition
without a commit has a lower number, the partition existed then and no member has read it yet: the router reads it from
its end. A partition with this number or a higher one was added later: the router reads it from its beginning, because
events appended before the router noticed the partition would be lost otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from jobledger.config import Settings
from jobledger.kafka.clients import partitions_of
from jobledger.log import group_offsets
from jobledger.log.reading import LogReader


def note(partitions: int) -> str:
    """Return the metadata for every commit of such a topic: its number of partitions when it was first read."""
    return json.dumps({"began_with": partitions})


def began_with(notes: Iterable[str | None]) -> int | None:
    """Return the number of partitions that a topic had when it was first read, from the metadata of its commits.

    None: the topic has no commits. 0: no commit carries the number, so the group has read the topic from its beginning.
    """
    metadata, counts = list(notes), []
    for text in metadata:
        try:
            count = json.loads(text or "")["began_with"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(count, int):
            counts.append(count)
    return min(counts, default=0) if metadata else None


def at_the_end(settings: Settings, group: str, topic: str, assigned: Sequence[int]) -> tuple[dict[int, int], str]:
    """Return the start offsets, by partition number, of the assigned partitions that are to be read from their end; and
    the metadata for commits of this topic.

    The other partitions continue at their commit, or start at their beginning.

    Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
    """
    known = group_offsets.group_offsets(settings, group, topic)
    began = began_with(each.metadata for each in known.values())
    if began is None:
        began = partitions_of(settings, topic)
    fresh = [number for number in assigned if (topic, number) not in known and number < began]
    with LogReader(settings) as log:
        return {number: log.bounds(topic, number)[1] for number in fresh}, note(began)
