"""Topics as code: what an app needs, how that differs from what the cluster has, and the steps between the two.

`desired` and `worker_groups` are pure and say what should be; `plan` reads the cluster and returns the differences as
data; `apply` carries them out. Showing a plan is the command line's business (`jobledger.cli.topics`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from jobledger import log
from jobledger.access import Need, denied
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, JobledgerError
from jobledger.names import Names, lane

REQUEST_TIMEOUT_S = 5.0
ATTEMPTS = 3
RETRY_PAUSE_S = 0.5
VISIBLE_TIMEOUT_S = 15.0

#: What a worker that died without a word costs its partitions, and how soon a rebalance step is taken. The broker's
#: own defaults are 45 s and 5 s; its minimums win over these.
SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_INTERVAL_MS = 1_000

# Compaction never touches the segment being written, so its size bounds what a restart has to read again.
COMPACTED_SEGMENT_BYTES = 64 * 1024 * 1024

_RETRIABLE = {
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NOT_CONTROLLER,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.NETWORK_EXCEPTION,
}


class Growth(StrEnum):
    """What may become of a topic's partition count once it exists."""

    GROWS = "grows"  # may be raised; keys move to other partitions
    AT_LEAST = "at-least"  # must not change, and more than asked for does no harm
    FIXED = "fixed"  # must be what is asked for


class Step(StrEnum):
    """What a plan does with one topic or group."""

    CREATE = "create"
    PARTITIONS = "add-partitions"
    CONFIG = "alter-config"
    REFUSE = "refuse"
    ADVISE = "advise"  # what only the cluster's administrators can do
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it should be. ``config`` is compared key by key; what it does not name is left to the cluster."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str] = field(default_factory=dict)
    growth: Growth = Growth.GROWS
    why_fixed: str = ""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Settings of one consumer group that the broker hands to its members (KIP-848)."""

    name: str
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan. ``config`` maps a setting to (what it is, what it shall be); ``reason`` explains a refusal.

    ``partitions`` is (what there is, what there shall be), with 0 for a topic that is not there yet.
    """

    step: Step
    kind: str  # "topic" or "group"
    name: str
    partitions: tuple[int, int] | None = None
    replication: int | None = None
    config: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The differences between the topics an app needs and those the cluster has, in the order they are applied."""

    changes: tuple[Change, ...]

    @property
    def pending(self) -> tuple[Change, ...]:
        """What `apply` would do."""
        return tuple(c for c in self.changes if c.step not in (Step.UNCHANGED, Step.REFUSE, Step.ADVISE))

    @property
    def refused(self) -> tuple[Change, ...]:
        """What will not be done, with the reasons; while there is one, `apply` does nothing."""
        return tuple(c for c in self.changes if c.step is Step.REFUSE)

    @property
    def advice(self) -> tuple[Change, ...]:
        """What should be done by others, with the reasons."""
        return tuple(c for c in self.changes if c.step is Step.ADVISE)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return {
            "changes": [asdict(c) for c in self.changes],
            "pending": len(self.pending),
            "refused": len(self.refused),
        }


class HasPartitions(Protocol):
    """What has topics of its own. ``partitions`` None means the app's default."""

    @property
    def partitions(self) -> int | None: ...


class HasLevels(HasPartitions, Protocol):
    """A queue, as far as its topics are concerned: one for each of its ``levels``."""

    @property
    def levels(self) -> Sequence[str | None]: ...


class HasTopic(HasPartitions, Protocol):
    """A class of events, as far as its topic is concerned. ``foreign``: the topic is another program's business."""

    @property
    def topic(self) -> str: ...

    @property
    def foreign(self) -> bool: ...

    @property
    def retention_days(self) -> float | None: ...


class DeclaresTopics(Protocol):
    """An app, as far as its topics are concerned."""

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
    """Every topic that a namespace needs: pure.

    ``queues``: partitions of each queue's work topic. ``events``: whose own topics are needed. ``partitions``: of coordination, dead-letter and the
    coordinator's changelog, and the least that lifecycle gets. ``replication``: copies of each partition; from three
    on, two must have a record before it is acknowledged. Raises `ConfigError` for a count below 1.
    """
    for what, count in [("partitions", partitions), ("replication", replication), *_named(queues)]:
        if count < 1:
            raise ConfigError(f"{what}={count} is too small: a topic has at least 1")
    base = {
        "message.timestamp.type": "LogAppendTime",  # one clock for delays, expiries and leases
        "min.insync.replicas": _min_insync(replication),
    }
    # Trimmed by DeleteRecords once every reader is past a record, never by age or size.
    kept = {**base, "cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    compacted = {**base, "cleanup.policy": "compact", "segment.bytes": str(COMPACTED_SEGMENT_BYTES)}
    specs = [TopicSpec(names.jobs(queue), count, replication, kept) for queue, count in sorted(queues.items())]
    for event in sorted((e for e in events if not e.foreign), key=lambda e: e.topic):
        days = event.retention_days
        retention = {} if days is None else {"retention.ms": str(round(days * 86_400_000))}
        specs.append(TopicSpec(event.topic, event.partitions or partitions, replication, {**kept, **retention}))
    specs += [
        TopicSpec(
            names.lifecycle,
            max([partitions, *queues.values()]),
            replication,
            kept,
            Growth.AT_LEAST,
            "a job's facts lie in the partition that carries its work record's number, so lifecycle needs at least as "
            "many partitions as the largest queue, and its count is settled when it is created",
        ),
        TopicSpec(
            names.coordination,
            partitions,
            replication,
            kept,
            Growth.FIXED,
            "schedules, locks and batches live in the partition of their key, and with another count every key would "
            "move away from its own state",
        ),
        TopicSpec(names.dead_letter, partitions, replication, kept),
        # One partition each: read to the end by every process at its start, and a tombstone must meet its record.
        TopicSpec(names.control, 1, replication, compacted, Growth.FIXED, "a tombstone must meet its record"),
        TopicSpec(names.schemas, 1, replication, compacted, Growth.FIXED, "it is read as one sequence"),
        TopicSpec(
            changelog(names),
            partitions,
            replication,
            compacted,
            Growth.FIXED,
            "Faust pairs its partitions with those of coordination, number by number",
        ),
    ]
    return specs


def _min_insync(copies: int) -> str:
    return "2" if copies >= 3 else "1"


def changelog(names: Names) -> str:
    """The changelog of the coordinator's table of schedules, under the name that Faust gives it."""
    return f"{names.coordinator_group}-schedules-changelog"


def worker_groups(names: Names, queues: Iterable[str], *, routed: bool = False) -> list[GroupSpec]:
    """The settings of every queue's worker group, and of the router's if there is one: pure."""
    config = {
        "consumer.session.timeout.ms": str(SESSION_TIMEOUT_MS),
        "consumer.heartbeat.interval.ms": str(HEARTBEAT_INTERVAL_MS),
    }
    groups = [names.worker_group(queue) for queue in sorted(queues)]
    return [GroupSpec(name, config) for name in [*groups, *([names.router_group] if routed else [])]]


def wanted(app: DeclaresTopics, replication: int) -> tuple[list[TopicSpec], list[GroupSpec]]:
    """Every topic and group that an app needs: pure."""
    queues = queue_partitions(app)
    events = list(app.events.values())
    specs = desired(app.names, queues, partitions=app.partitions, replication=replication, events=events)
    return specs, worker_groups(app.names, queues, routed=bool(events))


def compare(
    spec: TopicSpec, partitions: int | None, config: Mapping[str, str | None], copies: int | None = None
) -> list[Change]:
    """How one topic differs from its spec: pure. ``partitions`` None means that there is no such topic; ``copies``: of the
    partition that has fewest, None if that is not known."""
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
            changes.append(_refusal(spec, counts, "Kafka cannot take partitions away"))
        elif spec.growth is Growth.FIXED:
            changes.append(_refusal(spec, counts, spec.why_fixed))
    wanted_config = dict(spec.config)
    if copies is not None:
        # By the copies that there are: two that must acknowledge, of one, would stop every write; and an apply while one of
        # three brokers is away must not lower it.
        wanted_config["min.insync.replicas"] = _min_insync(copies)
    if copies is not None and copies < spec.replication:
        changes.append(
            Change(
                Step.ADVISE,
                "topic",
                spec.name,
                replication=copies,
                reason=f"topic {spec.name!r} has {copies} of {spec.replication} copies: with a broker that is lost for good, "
                "records are. Raise it with kafka-reassign-partitions.sh, or your vendor's way, and apply again; or say "
                f"--replication {copies}",
            )
        )
    differing = _differing(wanted_config, config)
    if differing:
        changes.append(Change(Step.CONFIG, "topic", spec.name, config=differing))
    return changes or [Change(Step.UNCHANGED, "topic", spec.name, partitions=(partitions, partitions))]


def plan(
    admin: AdminClient, specs: Sequence[TopicSpec], groups: Sequence[GroupSpec] = (), *, address: str = "the cluster"
) -> Plan:
    """Compare ``specs`` and ``groups`` with the cluster; nothing is changed.

    ``address`` is what `BrokerUnavailable` names when nobody answers within three attempts of 5 s each.
    """
    counts = _partition_counts(admin, [spec.name for spec in specs], address)
    configs = _configs(admin, ResourceType.TOPIC, [name for name, (count, _) in counts.items() if count], address)
    changes: list[Change] = []
    for spec in specs:
        count, copies = counts[spec.name]
        changes += compare(spec, count, configs.get(spec.name, {}), copies)
    if groups:
        bounds = _broker_config(admin, address)
        found = _configs(admin, ResourceType.GROUP, [group.name for group in groups], address)
        for group in groups:
            differing = _differing(within_bounds(group.config, bounds), found.get(group.name, {}))
            step = Step.CONFIG if differing else Step.UNCHANGED
            changes.append(Change(step, "group", group.name, config=differing))
    return Plan(tuple(changes))


def apply(admin: AdminClient, plan: Plan, *, address: str = "the cluster") -> tuple[str, ...]:
    """Carry a plan out and wait until its topics can be used; return notes on what the cluster would not accept.

    May be repeated. Settings of groups only make a rebalance quicker, so a cluster that forbids them is noted, not an
    error. Raises `ConfigError` before anything is changed if the plan refuses something, or if the cluster refuses a
    topic; `AccessDenied` if this user may not; `BrokerUnavailable` if nobody answers.
    """
    if plan.refused:
        raise ConfigError("nothing was changed. " + " ".join(change.reason for change in plan.refused))
    for step in (Step.CREATE, Step.PARTITIONS, Step.CONFIG):
        _apply_topics(admin, step, [c for c in plan.pending if c.kind == "topic" and c.step is step], address)
    notes = _apply_groups(admin, [c for c in plan.pending if c.kind == "group"], address)
    expected = {c.name: c.partitions[1] for c in plan.pending if c.kind == "topic" and c.partitions is not None}
    if expected:
        _await_visible(admin, expected, address)
    return notes


def default_replication(admin: AdminClient, *, address: str = "the cluster") -> int:
    """Three copies, or as many as there are brokers if there are fewer."""
    return max(1, min(3, len(_brokers(admin, address))))


def ensure(app: DeclaresTopics, settings: Settings, replication: int = 1) -> Plan:
    """Create and alter whatever ``app`` needs, without asking, and return what was done.

    For development, tests and demos. Raises what `plan` and `apply` raise.
    """
    address = settings.resolve_bootstrap()
    admin = log.admin(settings)
    made = plan(admin, *wanted(app, replication), address=address)
    apply(admin, made, address=address)
    return made


def queue_partitions(app: DeclaresTopics) -> dict[str, int]:
    """The partitions of each work topic, by queue, or by queue and priority: pure."""
    return {
        lane(name, level): queue.partitions or app.partitions
        for name, queue in app.queues.items()
        for level in queue.levels
    }


def within_bounds(config: Mapping[str, str], broker: Mapping[str, str | None]) -> dict[str, str]:
    """Group settings, moved into what the broker allows (``group.consumer.min.*`` and ``max.*``): pure."""
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
    there, wanted = counts
    reason = (
        f"topic {spec.name!r} has {there} partitions and the app asks for {wanted}: {why}. Declare what is there, "
        "or begin a new namespace (a new queue, for a queue's topic) and let the old one drain."
    )
    return Change(Step.REFUSE, "topic", spec.name, partitions=counts, reason=reason)


def _differing(wanted: Mapping[str, str], found: Mapping[str, str | None]) -> dict[str, tuple[str | None, str]]:
    return {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}


def _partition_counts(
    admin: AdminClient, names: Sequence[str], address: str
) -> dict[str, tuple[int | None, int | None]]:
    """Partitions of each topic, and copies of the partition that has fewest; None for a topic that is not there."""
    counts: dict[str, tuple[int | None, int | None]] = {}
    answers = _request(lambda left: _describe(admin, left), names, "describe topics", address)
    for name, answer in answers.items():
        if not isinstance(answer, KafkaException):
            counts[name] = len(answer.partitions), min(len(p.replicas) for p in answer.partitions)
        elif _code(answer) == KafkaError.UNKNOWN_TOPIC_OR_PART:
            counts[name] = None, None
        else:
            raise _refused_by_cluster(answer, f"describe topic {name}", "Alter", name)
    return counts


def _describe(admin: AdminClient, names: Sequence[str]) -> Mapping[str, Future[Any]]:
    return admin.describe_topics(TopicCollection(list(names)), request_timeout=REQUEST_TIMEOUT_S)


def _configs(
    admin: AdminClient, kind: ResourceType, names: Sequence[str], address: str
) -> dict[str, dict[str, str | None]]:
    def send(left: Sequence[str]) -> Mapping[str, Future[Any]]:
        resources = [ConfigResource(kind, name) for name in left]
        asked = admin.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
        return {resource.name: future for resource, future in asked.items()}

    found: dict[str, dict[str, str | None]] = {}
    for name, answer in _request(send, names, "read settings", address).items():
        if not isinstance(answer, KafkaException):
            found[name] = {key: entry.value for key, entry in answer.items()}
        elif kind is ResourceType.TOPIC:
            raise _refused_by_cluster(answer, f"read the settings of topic {name}", "AlterConfigs", name)
        # A group's or broker's settings may be hidden from this user; then they count as unknown.
    return found


def _brokers(admin: AdminClient, address: str) -> list[str]:
    """The ids of the cluster's brokers."""
    what = "describe the cluster"
    answers = _request(lambda _: {"": admin.describe_cluster(request_timeout=REQUEST_TIMEOUT_S)}, [""], what, address)
    answer = answers[""]
    if isinstance(answer, KafkaException):
        raise _refused_by_cluster(answer, what)
    return [str(node.id) for node in answer.nodes]


def _broker_config(admin: AdminClient, address: str) -> dict[str, str | None]:
    one = _brokers(admin, address)[0]
    return _configs(admin, ResourceType.BROKER, [one], address).get(one, {})


def _apply_topics(admin: AdminClient, step: Step, changes: Sequence[Change], address: str) -> None:
    by_name = {change.name: change for change in changes}

    def send(left: Sequence[str]) -> Mapping[str, Future[Any]]:
        todo = [by_name[name] for name in left]
        if step is Step.CREATE:
            return admin.create_topics([_new_topic(c) for c in todo], request_timeout=REQUEST_TIMEOUT_S)
        if step is Step.PARTITIONS:
            grown = [NewPartitions(c.name, c.partitions[1]) for c in todo if c.partitions is not None]
            return admin.create_partitions(grown, request_timeout=REQUEST_TIMEOUT_S)
        return _alter(admin, ResourceType.TOPIC, todo)

    what = step.value.replace("-", " ")
    for name, answer in _request(send, list(by_name), what, address).items():
        if not isinstance(answer, KafkaException):
            continue
        # Made by somebody else since the plan, or by an attempt of ours whose answer was lost.
        if step is Step.CREATE and _code(answer) == KafkaError.TOPIC_ALREADY_EXISTS:
            continue
        raise _refused_by_cluster(answer, f"{what} of topic {name}", _OPERATIONS[step], name)


def _new_topic(change: Change) -> NewTopic:
    assert change.partitions is not None
    assert change.replication is not None
    return NewTopic(
        change.name,
        num_partitions=change.partitions[1],
        replication_factor=change.replication,
        config={key: value for key, (_, value) in change.config.items()},
    )


def _apply_groups(admin: AdminClient, changes: Sequence[Change], address: str) -> tuple[str, ...]:
    by_name = {change.name: change for change in changes}

    def send(left: Sequence[str]) -> Mapping[str, Future[Any]]:
        return _alter(admin, ResourceType.GROUP, [by_name[name] for name in left])

    notes = []
    for name, answer in _request(send, list(by_name), "alter groups", address).items():
        if isinstance(answer, KafkaException):
            wanted = ", ".join(f"{key}={value}" for key, (_, value) in by_name[name].config.items())
            notes.append(
                f"group {name} keeps the broker's timeouts, {wanted} was not accepted ({answer.args[0].str()}): "
                "a worker that dies without a word costs the broker's session timeout"
            )
    return tuple(notes)


def _alter(admin: AdminClient, kind: ResourceType, changes: Sequence[Change]) -> Mapping[str, Future[Any]]:
    resources = [
        ConfigResource(
            kind,
            change.name,
            incremental_configs=[
                ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
                for key, (_, value) in change.config.items()
            ],
        )
        for change in changes
    ]
    asked = admin.incremental_alter_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
    return {resource.name: future for resource, future in asked.items()}


def _await_visible(admin: AdminClient, expected: Mapping[str, int], address: str) -> None:
    """Wait until the broker that answers knows every partition and its leader: creations are acknowledged earlier."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    missing = dict(expected)
    while True:
        for name, answer in _request(lambda left: _describe(admin, left), list(missing), "describe", address).items():
            if isinstance(answer, KafkaException):
                continue  # not there yet
            if len(answer.partitions) >= missing[name] and all(p.leader is not None for p in answer.partitions):
                del missing[name]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise BrokerUnavailable(
                f"{address} took {', '.join(sorted(missing))} but has no leader for every partition after "
                f"{VISIBLE_TIMEOUT_S:g} s: look at the brokers' state, then run `jobledger topics apply` again"
            )
        time.sleep(0.02)


def _request(
    send: Callable[[Sequence[str]], Mapping[str, Future[Any]]], keys: Sequence[str], what: str, address: str
) -> dict[str, Any]:
    """The answer for each key, or the `KafkaException` that is final for it.

    Transient failures are asked again, alone; what is left after three attempts raises `BrokerUnavailable`.
    """
    answers: dict[str, Any] = {}
    left = list(keys)
    last = ""
    for attempt in range(ATTEMPTS):
        if not left:
            return answers
        if attempt:
            time.sleep(RETRY_PAUSE_S)
        again = []
        for key, future in send(left).items():
            try:
                answers[key] = future.result(2 * REQUEST_TIMEOUT_S)
            except TimeoutError:
                last = "no answer"
                again.append(key)
            except KafkaException as error:
                if _code(error) in _RETRIABLE:
                    last = error.args[0].str()
                    again.append(key)
                else:
                    answers[key] = error
        left = again
    if left:
        raise BrokerUnavailable(
            f"no broker answered at {address} (could not {what}: {last}): check JOBLEDGER_BOOTSTRAP or --bootstrap, "
            "or start the embedded broker with `jobledger kafka start`"
        )
    return answers


def _code(error: KafkaException) -> int:
    code: int = error.args[0].code()
    return code


#: The right on a topic that a step takes.
_OPERATIONS = {Step.CREATE: "Create", Step.PARTITIONS: "Alter", Step.CONFIG: "AlterConfigs"}


def _refused_by_cluster(error: KafkaException, what: str, operation: str = "", topic: str = "") -> JobledgerError:
    refused = denied(error.args[0], Settings(role="admin"), what, Need(operation, "topic", topic))
    if refused is not None:
        return refused
    return ConfigError(f"the cluster refused to {what}: {error.args[0].str()} ({error.args[0].name()})")
