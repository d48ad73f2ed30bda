"""Checks of the processes that read the log: whether they run, and how far behind they are.

A group's state comes from the list of groups. The request that describes one group, with its members, is not used:
librdkafka may abort the process if the broker goes away meanwhile (see `jobledger.log.group_offsets`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka import ConsumerGroupState, KafkaException

from jobledger.doctor.checks import REQUEST_S, Finding, Subject
from jobledger.kafka import clients
from jobledger.log.group_offsets import Committed, group_offsets
from jobledger.log.reading import LogReader
from jobledger.process.wording import counted

#: Seconds within which a process that is behind must make progress, and seconds between two measurements. The
#: coordinator commits each second.
PROGRESS_S, LOOK_S = 12.0, 0.5
#: The states of a group without members.
_EMPTY = (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD)

#: A number for each (topic, partition).
Offsets = Mapping[tuple[str, int], int]


def workers(subject: Subject) -> Finding:
    """Check whether each lane with jobs has a worker."""
    states = group_states(subject)
    shown, idle = [], []
    for lane in lanes(subject):
        group, topic = subject.names.worker_group(lane), subject.names.jobs(lane)
        behind = sum(_behind(subject, topic, group_offsets(subject.settings, group, topic, REQUEST_S)).values())
        serves = is_served(states.get(group))
        state = states[group].name.lower() if serves else "no worker"
        shown.append(f"{lane}: {state}, {counted(behind, 'record')} not done")
        if behind and not serves:
            idle.append(lane)
    detail = "; ".join(shown) or "the namespace has no work topics"
    if idle:
        queues = " ".join(f"--queue {queue}" for queue in dict.fromkeys(lane.partition(".")[0] for lane in idle))
        return Finding(detail, f"Start `jobledger worker MODULE:APP {queues}`.")
    return Finding(detail)


def coordinator(subject: Subject) -> Finding:
    """Check whether a coordinator runs, and makes progress if it is behind."""
    group, topic = subject.names.coordinator_group, subject.names.coordination
    state = group_states(subject).get(group)

    def behind() -> Offsets:
        return _behind(subject, topic, group_offsets(subject.settings, group, topic, REQUEST_S))

    if not is_served(state):
        number = sum(behind().values())
        return Finding(
            f"no coordinator runs; {counted(number, 'record')} of {topic} not processed",
            "Start `jobledger streams MODULE:APP`.",
        )
    number, moves = progress(behind)
    shown = f"{state.name.lower() if state else ''}; {counted(number, 'record')} of {topic} not processed"
    if not moves:
        return Finding(
            f"{shown}, and no progress for {PROGRESS_S:g} s",
            "Look at the log of `jobledger streams`, and restart it.",
        )
    return Finding(shown)


def lanes(subject: Subject) -> list[str]:
    """Return the lanes of the app; for a namespace without an app those that have topics. Raises `BrokerUnavailable`."""
    if subject.lanes:
        return sorted(subject.lanes)
    try:
        topics = clients.admin(subject.settings).list_topics(timeout=REQUEST_S).topics
    except KafkaException as exc:
        raise clients.translate(exc.args[0], subject.settings, "asking for topics") from exc
    return sorted(lane for topic in topics if (lane := subject.names.lane_of(topic)) is not None)


def group_states(subject: Subject) -> dict[str, ConsumerGroupState]:
    """Return the state of each group of the namespace that this user may see. Raises `BrokerUnavailable`."""
    client = clients.admin(subject.settings)  # kept in a variable: without the client its answers are lost
    try:
        listed = clients.answer_of(client.list_consumer_groups(request_timeout=REQUEST_S), REQUEST_S)
    except KafkaException as exc:
        raise clients.translate(exc.args[0], subject.settings, "listing consumer groups") from exc
    prefix = f"{subject.names.namespace}."
    return {group.group_id: group.state for group in listed.valid if group.group_id.startswith(prefix)}


def is_served(state: Any) -> bool:
    """Return whether a group with this state has members. A state that the client does not know counts as served."""
    return state is not None and state not in _EMPTY


def bounds(subject: Subject, topics: Iterable[str]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the first offset and the end of each partition of these topics. Raises `BrokerUnavailable`,
    `TopicMissing`."""
    settings = subject.settings
    with LogReader(settings) as reader:
        return {
            (topic, number): reader.bounds(topic, number, REQUEST_S)
            for topic in topics
            for number in range(clients.partitions_of(settings, topic, REQUEST_S))
        }


def behind_of(known: Mapping[tuple[str, int], tuple[int, int]], reached: Offsets) -> Offsets:
    """Return the number of records of each partition at or above the offset that was reached. Pure. ``known``: the first
    offset and the end of each partition; without an offset in ``reached`` all records count."""
    return {partition: max(0, end - max(low, reached.get(partition, low))) for partition, (low, end) in known.items()}


def _behind(subject: Subject, topic: str, commits: Mapping[tuple[str, int], Committed]) -> Offsets:
    """Return the number of records of each partition that a group has not committed."""
    return behind_of(bounds(subject, [topic]), {partition: commit.offset for partition, commit in commits.items()})


def progress(behind: Callable[[], Offsets]) -> tuple[int, bool]:
    """Return how many records a process is behind, and whether it makes progress: within `PROGRESS_S` seconds it is
    up to date once, or has fewer records left in a partition."""
    first = behind()
    deadline = time.monotonic() + PROGRESS_S
    now = first
    while any(now.values()):
        if any(now[partition] < number for partition, number in first.items()):
            return sum(now.values()), True
        if time.monotonic() >= deadline:
            return sum(now.values()), False
        time.sleep(LOOK_S)
        now = behind()
    return 0, True
