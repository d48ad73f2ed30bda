"""Determines the topics and groups that an app needs, and how the existing ones differ from them. Pure.

`jobledger.kafka.topics` reads the cluster and carries out a `TopicPlan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from jobledger.errors import ConfigError
from jobledger.kafka.topic_names import Names, lane
from jobledger.process.wording import counted

#: Milliseconds after which a worker that died without leaving the group loses its partitions; and milliseconds between
#: two heartbeats, through which members learn of each step of a rebalance. The broker's defaults are 45 s and 5 s.
#: Values outside the broker's limits are changed to those limits.
SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_INTERVAL_MS = 1_000

# Compaction skips the segment that is being written, so the size of a segment limits how much a restart must read
# again.
COMPACTED_SEGMENT_BYTES = 64 * 1024 * 1024


#: The broker's clock is used for delays, expiries and leases.
_CLOCK = {"message.timestamp.type": "LogAppendTime"}
#: Records are deleted with DeleteRecords, after every reader has read them, never by age or size.
_KEPT = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
_COMPACTED = {"cleanup.policy": "compact"}
_WHY = {
    "message.timestamp.type": "delays, retries and expiries are measured with the broker's clock",
    "cleanup.policy": "with another value the broker removes records that are still needed",
    "retention.ms": "the broker deletes records that were not read yet, or are still needed",
    "retention.bytes": "the broker deletes records that were not read yet, or are still needed",
}


class Growth(StrEnum):
    """How a topic's partition count may change once the topic exists."""

    GROWS = "grows"  # may be raised; keys move to other partitions
    AT_LEAST = "at-least"  # must not change; more partitions than declared are accepted
    FIXED = "fixed"  # must be the declared count


class Step(StrEnum):
    """The action of a plan for one topic or group."""

    CREATE = "create"
    PARTITIONS = "add-partitions"
    CONFIG = "alter-config"
    REFUSE = "refuse"
    ADVISE = "advise"  # a change that only the cluster's administrators can make
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """The required state of a topic. ``config`` is compared key by key; other settings are not changed."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str] = field(default_factory=dict)
    growth: Growth = Growth.GROWS
    why_fixed: str = ""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Settings of one consumer group that the broker gives to its members (KIP-848)."""

    name: str
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a plan, for one topic or group.

    ``partitions``: (current count, new count); the current count is 0 for a topic that does not exist yet.
    ``replication``: copies of each partition: those of a new topic or, in an advice, the existing ones. ``config``:
    maps a setting to (current value, new value). ``reason``: explains a refusal or an advice.
    """

    step: Step
    kind: str  # "topic" or "group"
    name: str
    partitions: tuple[int, int] | None = None
    replication: int | None = None
    config: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """The differences between the topics and groups that an app needs and those that the cluster has.

    ``changes``: first those of topics, then those of groups. `jobledger.kafka.topics.apply` applies them in another
    order: new topics, added partitions, settings of topics, settings of groups.
    """

    changes: tuple[Change, ...]

    @property
    def pending(self) -> tuple[Change, ...]:
        """The changes that `apply` would make."""
        return tuple(c for c in self.changes if c.step not in (Step.UNCHANGED, Step.REFUSE, Step.ADVISE))

    @property
    def refused(self) -> tuple[Change, ...]:
        """The refused changes, with their reasons. If there is a refused change, `apply` changes nothing."""
        return tuple(c for c in self.changes if c.step is Step.REFUSE)

    @property
    def advice(self) -> tuple[Change, ...]:
        """The changes that the operator should make with other tools, with the reasons."""
        return tuple(c for c in self.changes if c.step is Step.ADVISE)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "changes": [asdict(c) for c in self.changes],
            "pending": len(self.pending),
            "refused": len(self.refused),
        }


class HasPartitions(Protocol):
    """An object with topics of its own. ``partitions``: of each topic; None means the app's default."""

    @property
    def partitions(self) -> int | None: ...


class HasLevels(HasPartitions, Protocol):
    """A queue. It has a topic for each of its ``levels``: for each priority, or one for None."""

    @property
    def levels(self) -> Sequence[str | None]: ...


class HasTopic(HasPartitions, Protocol):
    """An event class with its topic.

    ``foreign``: the topic belongs to another program. ``retention_days``: days for which the topic keeps a record;
    None: without limit.
    """

    @property
    def topic(self) -> str: ...

    @property
    def foreign(self) -> bool: ...

    @property
    def retention_days(self) -> float | None: ...


class DeclaresTopics(Protocol):
    """The attributes of an app that determine its topics."""

    @property
    def names(self) -> Names: ...

    @property
    def queues(self) -> Mapping[str, HasLevels]: ...

    @property
    def events(self) -> Mapping[str, HasTopic]: ...

    @property
    def partitions(self) -> int: ...


def desired(
    names: Names,
    queues: Mapping[str, int],
    *,
    partitions: int,
    replication: int,
    events: Iterable[HasTopic] = (),
) -> list[TopicSpec]:
    """Return every topic that a namespace needs. Pure.

    ``queues``: the partition count of each work topic, by lane. ``events``: the classes of domain events; topics of
    other programs are left out. ``partitions``: the partition count of coordination, dead-letter and the coordinator's
    changelog, the minimum for lifecycle, and the default for topics of events. ``replication``: copies of each
    partition; with three or more, at least two copies must have a record before the record is acknowledged. Raises
    `ConfigError` for a count below 1.
    """
    for what, count in [("partitions", partitions), ("replication", replication), *_named(queues)]:
        if count < 1:
            raise ConfigError(f"{what}={count} is too small: a topic has at least 1")
    base = {**_CLOCK, "min.insync.replicas": _min_insync(replication)}
    kept = {**base, **_KEPT}
    compacted = {**base, **_COMPACTED, "segment.bytes": str(COMPACTED_SEGMENT_BYTES)}
    return [
        *(TopicSpec(names.jobs(queue), count, replication, kept) for queue, count in sorted(queues.items())),
        *_of_events(events, partitions, replication, kept),
        *_of_facts(names, partitions, max([partitions, *queues.values()]), replication, kept),
        *_of_state(names, partitions, replication, compacted),
    ]


def _of_events(
    events: Iterable[HasTopic], partitions: int, replication: int, kept: Mapping[str, str]
) -> Iterator[TopicSpec]:
    """Yield the topics of domain events."""
    for event in sorted((e for e in events if not e.foreign), key=lambda e: e.topic):
        days = event.retention_days
        retention = {} if days is None else {"retention.ms": str(round(days * 86_400_000))}
        yield TopicSpec(event.topic, event.partitions or partitions, replication, {**kept, **retention})


def _of_facts(
    names: Names, partitions: int, lifecycle: int, replication: int, kept: Mapping[str, str]
) -> Iterator[TopicSpec]:
    """Yield lifecycle, coordination, dead-letter and plans. ``lifecycle``: the minimum for lifecycle."""
    yield TopicSpec(
        names.lifecycle,
        lifecycle,
        replication,
        kept,
        Growth.AT_LEAST,
        "a job's facts are in the partition with the number of its work record's partition, so lifecycle needs at least as "
        "many partitions as the largest queue, and its count is fixed when it is created",
    )
    yield TopicSpec(
        names.coordination,
        partitions,
        replication,
        kept,
        Growth.FIXED,
        "the coordinator's rows are in the partition of their key, and with another count a key would "
        "be in another partition than its row",
    )
    yield TopicSpec(names.dead_letter, partitions, replication, kept)
    yield TopicSpec(names.plans, 1, replication, kept, Growth.FIXED, "this topic is read as one sequence")


def _of_state(names: Names, partitions: int, replication: int, compacted: Mapping[str, str]) -> Iterator[TopicSpec]:
    """Yield control, workers, schemas and the coordinator's changelog.

    Control, workers and schemas have one partition each: a tombstone must be in the partition of its record, and every
    process that uses control or schemas reads the topic to its end at its start.
    """
    for topic in (names.control, names.workers):
        yield TopicSpec(
            topic,
            1,
            replication,
            compacted,
            Growth.FIXED,
            "a tombstone must be in the partition of the record that it removes",
        )
    yield TopicSpec(names.schemas, 1, replication, compacted, Growth.FIXED, "this topic is read as one sequence")
    yield TopicSpec(
        changelog(names),
        partitions,
        replication,
        compacted,
        Growth.FIXED,
        "Faust assigns a partition of this topic together with the partition of coordination of the same number",
    )


def _min_insync(copies: int) -> str:
    return "2" if copies >= 3 else "1"


def changelog(names: Names) -> str:
    """Return the name that Faust gives the changelog of the coordinator's table of schedules."""
    return f"{names.coordinator_group}-schedules-changelog"


def broken_promises(names: Names, current: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    """Return messages about topic settings that break a promise. ``current``: the current settings, by topic. Pure.

    Only the settings that promises depend on are checked, and not those of topics of events. A setting that is not
    known is skipped.
    """
    compacted = (names.control, names.schemas, changelog(names))
    kept = (names.lifecycle, names.coordination, names.dead_letter, names.plans)
    messages: list[str] = []
    for topic, settings in sorted(current.items()):
        if topic in compacted:
            wanted = {**_CLOCK, **_COMPACTED}
        elif topic in kept or names.queue_of(topic) is not None:
            wanted = {**_CLOCK, **_KEPT}
        else:
            continue
        messages += [
            f"topic {topic} has {key}={settings[key]} and needs {value}: {_WHY[key]}. "
            "`jobledger topics apply MODULE:APP` sets it"
            for key, value in wanted.items()
            if settings.get(key) not in (None, value)
        ]
    return messages


def lifecycle_too_small(topic: str, partitions: int, lifecycle: str, there: int) -> str:
    """Return a message that says why some partitions of a work topic cannot be served, and what to do. Pure.

    ``partitions``: the partition count of the work topic ``topic``. ``there``: that of the topic ``lifecycle``.
    """
    return (
        f"{topic} has {counted(partitions, 'partition')} and {lifecycle} only {there}: the facts of a job are written to the "
        f"lifecycle partition with the number of its work record's partition. Raise the count of {lifecycle} with "
        f"`kafka-topics.sh --alter --topic {lifecycle} "
        f"--partitions {partitions}` and start the workers again; partitions of {topic} cannot be removed"
    )


def worker_groups(names: Names, queues: Iterable[str], *, routed: bool = False) -> list[GroupSpec]:
    """Return the settings of each worker group and, if ``routed``, of the router's group. Pure.

    ``queues``: the lanes, each of which has a worker group.
    """
    config = {
        "consumer.session.timeout.ms": str(SESSION_TIMEOUT_MS),
        "consumer.heartbeat.interval.ms": str(HEARTBEAT_INTERVAL_MS),
    }
    groups = [names.worker_group(queue) for queue in sorted(queues)]
    return [GroupSpec(name, config) for name in [*groups, *([names.router_group] if routed else [])]]


def wanted(app: DeclaresTopics, replication: int) -> tuple[list[TopicSpec], list[GroupSpec]]:
    """Return every topic and every group with settings that an app needs. Pure."""
    queues = queue_partitions(app)
    events = list(app.events.values())
    specs = desired(app.names, queues, partitions=app.partitions, replication=replication, events=events)
    return specs, worker_groups(app.names, queues, routed=bool(events))


def compare(
    spec: TopicSpec, partitions: int | None, config: Mapping[str, str | None], copies: int | None = None
) -> list[Change]:
    """Return how one topic differs from its spec. Pure.

    ``partitions``: the existing partition count; None: the topic does not exist. ``copies``: the number of copies of
    the topic's partition with the fewest copies; None: not known.
    """
    if partitions is None:
        return [
            Change(
                Step.CREATE,
                "topic",
                spec.name,
                partitions=(0, spec.partitions),
                replication=spec.replication,
                config={key: (None, value) for key, value in spec.config.items()},
            )
        ]
    changes: list[Change] = []
    counts = (partitions, spec.partitions)
    if partitions < spec.partitions:
        if spec.growth is Growth.GROWS:
            changes.append(Change(Step.PARTITIONS, "topic", spec.name, partitions=counts))
        else:
            changes.append(_refusal(spec, counts, spec.why_fixed))
    elif partitions > spec.partitions:
        if spec.growth is Growth.GROWS:
            changes.append(_refusal(spec, counts, "Kafka cannot remove partitions"))
        elif spec.growth is Growth.FIXED:
            changes.append(_refusal(spec, counts, spec.why_fixed))
    wanted_config = dict(spec.config)
    if copies is not None:
        # This setting follows from the existing copies, not from the declared ones. If two copies must have a record
        # and only one copy exists, every write fails. And if `apply` runs while one of three brokers is unavailable, it
        # must not lower the value.
        wanted_config["min.insync.replicas"] = _min_insync(copies)
    if copies is not None and copies < spec.replication:
        changes.append(
            Change(
                Step.ADVISE,
                "topic",
                spec.name,
                replication=copies,
                reason=f"topic {spec.name!r} has {copies} of {spec.replication} copies: if a broker is lost "
                "permanently, "
                "records are lost too. Raise the number with kafka-reassign-partitions.sh, or your vendor's tool, and apply again; or use "
                f"--replication {copies}",
            )
        )
    changed = differing(wanted_config, config)
    if changed:
        changes.append(Change(Step.CONFIG, "topic", spec.name, config=changed))
    return changes or [Change(Step.UNCHANGED, "topic", spec.name, partitions=(partitions, partitions))]


def beside(spec: TopicSpec, other: str) -> Change:
    """Return the refusal of a topic that Kafka does not allow together with the existing topic ``other``. Pure."""
    reason = (
        f"topic {spec.name!r} collides with {other!r}, which exists: Kafka's metrics do not distinguish '.' and '_', "
        "so Kafka refuses two topics whose names differ only in these. Choose another namespace, queue or event name"
    )
    return Change(Step.REFUSE, "topic", spec.name, partitions=(0, spec.partitions), reason=reason)


def queue_partitions(app: DeclaresTopics) -> dict[str, int]:
    """Return the partition count of each work topic, by lane (a queue, or one priority of a queue). Pure."""
    return {
        lane(name, level): queue.partitions or app.partitions
        for name, queue in app.queues.items()
        for level in queue.levels
    }


def within_bounds(config: Mapping[str, str], broker: Mapping[str, str | None]) -> dict[str, str]:
    """Return group settings, changed to the limits ``group.consumer.min.*`` and ``max.*`` of the broker. Pure."""
    fitted: dict[str, str] = {}
    for key, value in config.items():
        number, setting = int(value), key.removeprefix("consumer.")
        least, most = broker.get(f"group.consumer.min.{setting}"), broker.get(f"group.consumer.max.{setting}")
        if least is not None:
            number = max(number, int(least))
        if most is not None:
            number = min(number, int(most))
        fitted[key] = str(number)
    return fitted


def _named(queues: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(f"partitions of queue {queue!r}", count) for queue, count in queues.items()]


def _refusal(spec: TopicSpec, counts: tuple[int, int], why: str) -> Change:
    current, declared = counts
    reason = (
        f"topic {spec.name!r} has {counted(current, 'partition')} and the app asks for {declared}: {why}. Declare the existing "
        "count, "
        "or use a new namespace (for a work topic: a new queue), and wait until the jobs of the old one have ended."
    )
    return Change(Step.REFUSE, "topic", spec.name, partitions=counts, reason=reason)


def differing(wanted: Mapping[str, str], current: Mapping[str, str | None]) -> dict[str, tuple[str | None, str]]:
    return {key: (current.get(key), value) for key, value in wanted.items() if current.get(key) != value}
