"""Topics as code: `plan` compares what an app needs with what the cluster has, and `apply` makes the changes.

`jobledger.kafka.topology` defines what an app needs, and `jobledger.cli.topics` shows a plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    AlterConfigOpType,
    ClusterMetadata,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from jobledger import addresses
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, JobledgerError
from jobledger.kafka import clients, cluster
from jobledger.kafka.auth import Need, denied
from jobledger.kafka.topic_names import colliding
from jobledger.kafka.topology import (
    Change,
    DeclaresTopics,
    GroupSpec,
    Step,
    TopicPlan,
    TopicSpec,
    beside,
    compare,
    differing,
    wanted,
    within_bounds,
)
from jobledger.process import greenlets

REQUEST_TIMEOUT_S = 5.0
ATTEMPTS = 3
RETRY_PAUSE_S = 0.5
VISIBLE_TIMEOUT_S = 15.0

_RETRIABLE = {
    *clients.ASK_AGAIN,
    KafkaError._PARTIAL,  # an answer without brokers and topics
    KafkaError._TIMED_OUT,
    KafkaError._RESOLVE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NOT_CONTROLLER,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.NETWORK_EXCEPTION,
}


def plan(
    admin: AdminClient, specs: Sequence[TopicSpec], groups: Sequence[GroupSpec] = (), *, address: str = "the cluster"
) -> TopicPlan:
    """Compare ``specs`` and ``groups`` with the cluster, and return the differences. Change nothing.

    ``address``: the address that a `BrokerUnavailable` names. Raises `BrokerUnavailable` if no broker answers in three
    attempts of 5 s each; `AccessDenied` if this user lacks a right; `ConfigError` if the cluster refuses a request.
    """
    counts = _partition_counts(admin, [spec.name for spec in specs], address)
    configs = _configs(admin, ResourceType.TOPIC, [name for name, (count, _) in counts.items() if count], address)
    new = [spec.name for spec in specs if counts[spec.name][0] is None]
    collisions = colliding(new, _topics(admin, address)) if new else {}
    changes: list[Change] = []
    for spec in specs:
        count, copies = counts[spec.name]
        other = collisions.get(spec.name)
        changes += [beside(spec, other)] if other else compare(spec, count, configs.get(spec.name, {}), copies)
    if groups:
        bounds = _broker_config(admin, address)
        group_configs = _configs(admin, ResourceType.GROUP, [group.name for group in groups], address)
        for group in groups:
            changed = differing(within_bounds(group.config, bounds), group_configs.get(group.name, {}))
            step = Step.CONFIG if changed else Step.UNCHANGED
            changes.append(Change(step, "group", group.name, config=changed))
    return TopicPlan(tuple(changes))


def apply(admin: AdminClient, plan: TopicPlan, *, address: str = "the cluster") -> tuple[str, ...]:
    """Carry out a plan and wait until its topics can be used. Return notes about settings that the cluster refused.

    After an error, `plan` and `apply` may be called again. The settings of groups only make a rebalance quicker, so if
    the cluster refuses them, the result has a note and no error is raised. Raises `ConfigError` before anything is
    changed if the plan refuses a change, and also if the cluster refuses a change of a topic; then earlier changes
    stay. Raises `AccessDenied` if this user lacks a right, and `BrokerUnavailable` if no broker answers.
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
    """Return the default number of copies of each partition: three, or the number of brokers if there are fewer."""
    return max(1, min(3, len(_brokers(admin, address))))


def ensure(app: DeclaresTopics, settings: Settings, replication: int = 1) -> TopicPlan:
    """Create and alter all topics and groups that ``app`` needs, and return the plan that was carried out.

    For development, tests and demos. Raises what `plan` and `apply` raise.
    """
    address = settings.resolve_bootstrap()
    admin = clients.admin(settings)
    topic_plan = plan(admin, *wanted(app, replication), address=address)
    apply(admin, topic_plan, address=address)
    return topic_plan


def _partition_counts(
    admin: AdminClient, names: Sequence[str], address: str
) -> dict[str, tuple[int | None, int | None]]:
    """Return for each topic its partition count, and the number of copies of its partition with the fewest copies.

    Both are None for a topic that is missing.
    """
    counts: dict[str, tuple[int | None, int | None]] = {}
    answers = _request(lambda pending: _describe(admin, pending), names, "describe topics", address)
    for name, answer in answers.items():
        if not isinstance(answer, KafkaException):
            counts[name] = len(answer.partitions), min(len(p.replicas) for p in answer.partitions)
        elif _code(answer) == KafkaError.UNKNOWN_TOPIC_OR_PART:
            counts[name] = None, None
        else:
            raise _refused_by_cluster(answer, f"describe topic {name}", "Alter", name)
    return counts


def _count(admin: AdminClient, name: str, address: str) -> int | None:
    """Return a topic's partition count; None if the topic is missing."""
    return _partition_counts(admin, [name], address)[name][0]


def _topics(admin: AdminClient, address: str) -> list[str]:
    """Return the names of all topics that this user may see."""
    return sorted(_metadata(lambda: admin.list_topics(timeout=REQUEST_TIMEOUT_S), "list topics", address).topics)


def _metadata(ask: Callable[[], ClusterMetadata], what: str, address: str) -> ClusterMetadata:
    """Return the result of ``ask`` from a broker that is in its cluster. Retry as often as `_request` does."""
    last = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(RETRY_PAUSE_S)
        try:
            metadata = ask()
        except KafkaException as error:
            if _code(error) not in _RETRIABLE:
                raise _refused_by_cluster(error, what, "Describe") from error
            last = error.args[0].str()
        else:
            if metadata.brokers:
                return metadata
            last = "the broker that answered has not joined its cluster"
    raise _unavailable(what, last, address)


def _describe(admin: AdminClient, names: Sequence[str]) -> Mapping[str, Future[Any]]:
    return admin.describe_topics(TopicCollection(list(names)), request_timeout=REQUEST_TIMEOUT_S)


def _configs(
    admin: AdminClient, kind: ResourceType, names: Sequence[str], address: str
) -> dict[str, dict[str, str | None]]:
    def send(pending: Sequence[str]) -> Mapping[str, Future[Any]]:
        resources = [ConfigResource(kind, name) for name in pending]
        futures = admin.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
        return {resource.name: future for resource, future in futures.items()}

    configs: dict[str, dict[str, str | None]] = {}
    for name, answer in _request(send, names, "read settings", address).items():
        if not isinstance(answer, KafkaException):
            configs[name] = {key: entry.value for key, entry in answer.items()}
        elif kind is ResourceType.TOPIC:
            raise _refused_by_cluster(answer, f"read the settings of topic {name}", "AlterConfigs", name)
        # This user may not be allowed to read the settings of a group or a broker. Then the settings count as unknown.
    return configs


def _brokers(admin: AdminClient, address: str) -> list[str]:
    """Return the ids of the cluster's brokers."""
    metadata = _metadata(lambda: cluster.describe(admin, REQUEST_TIMEOUT_S), "describe the cluster", address)
    return [str(number) for number in metadata.brokers]


def _broker_config(admin: AdminClient, address: str) -> dict[str, str | None]:
    one = _brokers(admin, address)[0]
    return _configs(admin, ResourceType.BROKER, [one], address).get(one, {})


def _apply_topics(admin: AdminClient, step: Step, changes: Sequence[Change], address: str) -> None:
    by_name = {change.name: change for change in changes}

    def send(pending: Sequence[str]) -> Mapping[str, Future[Any]]:
        todo = [by_name[name] for name in pending]
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
        # Another process has made the change since the plan was made, or an earlier attempt whose answer was lost.
        if step is Step.CREATE and _code(answer) == KafkaError.TOPIC_ALREADY_EXISTS:
            continue
        if step is Step.PARTITIONS and _code(answer) == KafkaError.INVALID_PARTITIONS:
            change = by_name[name]
            if change.partitions is not None and _count(admin, name, address) == change.partitions[1]:
                continue
        raise _refused_by_cluster(answer, f"carry out '{what}' for topic {name}", _OPERATIONS[step], name)


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

    def send(pending: Sequence[str]) -> Mapping[str, Future[Any]]:
        return _alter(admin, ResourceType.GROUP, [by_name[name] for name in pending])

    notes = []
    for name, answer in _request(send, list(by_name), "alter groups", address).items():
        if isinstance(answer, KafkaException):
            wanted = ", ".join(f"{key}={value}" for key, (_, value) in by_name[name].config.items())
            notes.append(
                f"group {name} keeps the broker's timeouts, because the cluster refused {wanted} "
                f"({answer.args[0].str()}): "
                "a worker that dies without leaving the group is noticed only after the broker's session timeout"
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
    futures = admin.incremental_alter_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
    return {resource.name: future for resource, future in futures.items()}


def _await_visible(admin: AdminClient, expected: Mapping[str, int], address: str) -> None:
    """Wait until the broker that answers knows every partition and its leader.

    A broker acknowledges the creation of a topic earlier. Raises `BrokerUnavailable` after `VISIBLE_TIMEOUT_S`.
    """
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    missing = dict(expected)
    while True:
        for name, answer in _request(
            lambda pending: _describe(admin, pending), list(missing), "describe", address
        ).items():
            if isinstance(answer, KafkaException):
                continue  # not visible yet
            if len(answer.partitions) >= missing[name] and all(p.leader is not None for p in answer.partitions):
                del missing[name]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise BrokerUnavailable(
                f"{address} accepted {', '.join(sorted(missing))}, but some partitions have no leader after "
                f"{VISIBLE_TIMEOUT_S:g} s: check the brokers' state, then run `jobledger topics apply` again"
            )
        time.sleep(0.02)


def _request(
    send: Callable[[Sequence[str]], Mapping[str, Future[Any]]], keys: Sequence[str], what: str, address: str
) -> dict[str, Any]:
    """Return for each key the answer, or the `KafkaException` that a retry would not change.

    After a transient error, only the keys with that error are sent again. Raises `BrokerUnavailable` after three
    attempts.
    """
    answers: dict[str, Any] = {}
    pending = list(keys)
    last = ""
    for attempt in range(ATTEMPTS):
        if not pending:
            return answers
        if attempt:
            time.sleep(RETRY_PAUSE_S)
        again = []
        for key, future in send(pending).items():
            try:
                answers[key] = greenlets.outcome(future, 2 * REQUEST_TIMEOUT_S)
            except TimeoutError:
                last = "no answer"
                again.append(key)
            except KafkaException as error:
                if _code(error) in _RETRIABLE:
                    last = error.args[0].str()
                    again.append(key)
                else:
                    answers[key] = error
        pending = again
    if pending:
        raise _unavailable(what, last, address)
    return answers


def _unavailable(what: str, last: str, address: str) -> BrokerUnavailable:
    last = addresses.unresolved(address) or last
    return BrokerUnavailable(
        f"no broker answered at {address} (could not {what}: {last}): check JOBLEDGER_BOOTSTRAP or --bootstrap, "
        "or start the embedded broker with `jobledger kafka start`"
    )


def _code(error: KafkaException) -> int:
    code: int = error.args[0].code()
    return code


#: The right on a topic that a step needs.
_OPERATIONS = {Step.CREATE: "Create", Step.PARTITIONS: "Alter", Step.CONFIG: "AlterConfigs"}


def _refused_by_cluster(error: KafkaException, what: str, operation: str = "", topic: str = "") -> JobledgerError:
    refused = denied(error.args[0], Settings(role="admin"), what, Need(operation, "topic", topic))
    if refused is not None:
        return refused
    return ConfigError(f"the cluster refused to {what}: {error.args[0].str()} ({error.args[0].name()})")
