"""Defines the minimal rights of each role as data, creates the commands that grant them, and checks for missing rights.

`TABLE` is the only definition: the command line, the docs and the tests read this table. Rights that Kafka implies are
left out: a user who may read a topic, write to it, delete from it or alter it may also describe it, and a user who may
alter a topic's settings may also read them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from jobledger.config import Settings
from jobledger.errors import ConfigError
from jobledger.kafka import clients
from jobledger.kafka.auth import Need, unauthorized
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.kafka")

REQUEST_TIMEOUT_S = 10.0

TOPIC, GROUP, CLUSTER = "topic", "group", "cluster"
LITERAL, PREFIXED = "literal", "prefixed"

#: All operations. If a cluster does not report a user's rights, the user counts as having all of them.
_ANY = tuple(AclOperation)


@dataclass(frozen=True, slots=True)
class Right:
    """The right to one operation on resources.

    ``name``: the resource's name, with ``<ns>`` for the namespace. If ``pattern`` is `PREFIXED`, the right is for all
    resources whose names begin with ``name``. ``lost``: what does not work without the right; empty: the role cannot
    work at all. ``when``: the case in which the role needs the right; empty: always.
    """

    kind: str
    name: str
    operation: str
    pattern: str = LITERAL
    lost: str = ""
    when: str = ""

    def covers(self, topic: str) -> bool:
        """Return whether the right applies to this topic."""
        same = topic.startswith(self.name) if self.pattern == PREFIXED else topic == self.name
        return self.kind == TOPIC and same

    def of(self, namespace: str) -> Right:
        """Return the right for one namespace."""
        return Right(
            self.kind, self.name.replace("<ns>", namespace), self.operation, self.pattern, self.lost, self.when
        )


def _topic(name: str, *operations: str, lost: str = "", when: str = "") -> list[Right]:
    pattern = PREFIXED if name.endswith(".") else LITERAL
    return [Right(TOPIC, name, operation, pattern, lost, when) for operation in operations]


def _group(name: str, operation: str, lost: str = "") -> list[Right]:
    return [Right(GROUP, name, operation, PREFIXED if name.endswith(".") else LITERAL, lost)]


_LOG = [
    *_topic("<ns>.jobs.", "Read"),
    *_topic("<ns>.lifecycle", "Read"),
    *_topic("<ns>.coordination", "Read"),
    *_topic("<ns>.dead-letter", "Read"),
    *_topic("<ns>.schemas", "Read"),
]
_LIMITS = "knowledge of the topics' size limits: batches have the client's default size"
_WATCHING = "error message if a topic setting that a promise depends on was changed"
_TRIMMING = "trimming: the log grows"

#: Exactly the rights that each role needs.
TABLE: Mapping[str, Sequence[Right]] = {
    "client": [
        *_topic("<ns>.jobs.", "Write"),
        *_topic("<ns>.coordination", "Write", lost="delays, no `cancel`", when="delayed jobs"),
        *_topic("<ns>.schemas", "Write"),
        *_topic("<ns>.schemas", "Read", lost="`emit`", when="events"),
        *_topic("<ns>.events.", "Write", lost="`emit`", when="events"),
        *_topic("<ns>.control", "Write", lost="`cancel`, `pause`, `limit`", when="control commands"),
        *_topic("<ns>.plans", "Write", lost="`redrive`, `cancel_many`", when="plans"),
        *_topic("<ns>.", "DescribeConfigs", lost=_LIMITS),
    ],
    "worker": [
        *_topic("<ns>.jobs.", "Read"),
        *_group("<ns>.worker.", "Read"),
        *_topic("<ns>.lifecycle", "Read", "Write"),
        *_topic("<ns>.coordination", "Write"),
        *_topic("<ns>.dead-letter", "Write"),
        *_topic("<ns>.schemas", "Read", "Write"),
        *_topic("<ns>.control", "Read"),
        *_topic("<ns>.workers", "Write", lost="entry in `workers list`"),
        *_topic("<ns>.", "DescribeConfigs", lost=f"{_LIMITS}; no {_WATCHING}"),
    ],
    "coordinator": [
        *_topic("<ns>.coordination", "Read", "Write"),
        *_group("<ns>.coordinator", "Read"),
        *_topic("<ns>.coordinator-schedules-changelog", "Read", "Write"),
        *_topic("<ns>.jobs.", "Write"),
        *_topic("<ns>.lifecycle", "Write"),
        *_topic("<ns>.dead-letter", "Write"),
        *_topic("<ns>.schemas", "Read", "Write"),
        *_topic("<ns>.", "DescribeConfigs", lost=f"{_LIMITS}; no {_WATCHING}"),
    ],
    "materializer": [
        *_LOG,
        *_topic("<ns>.dead-letter", "Write"),
        *_topic("<ns>.schemas", "Write"),
        *_topic("<ns>.coordination", "Write", lost="watchdog"),
        *_topic("<ns>.control", "Read", "Write", lost="removal of cancels whose jobs have ended"),
        *_topic("<ns>.plans", "Read"),
        *_topic("<ns>.plans", "Write", lost="redrives and other plans"),
        *_topic("<ns>.workers", "Read", lost="`workers list`"),
        *_topic("<ns>.workers", "Write", lost="removal of the reports of workers that are gone"),
        *_group("<ns>.worker.", "Describe", lost="commit check, no trimming"),
        *_group("<ns>.coordinator", "Describe", lost=_TRIMMING),
        *_group("<ns>.lifecycle.", "Describe", lost=_TRIMMING),
        *_topic("<ns>.jobs.", "Delete", lost=_TRIMMING),
        *_topic("<ns>.lifecycle", "Delete", lost=_TRIMMING),
        *_topic("<ns>.coordination", "Delete", lost=_TRIMMING),
        *_topic("<ns>.plans", "Delete", lost="trimming of ended plans"),
        *_topic("<ns>.", "DescribeConfigs", lost=f"{_LIMITS}; no {_WATCHING}"),
    ],
    "router": [
        *_topic("<ns>.events.", "Read"),
        *_group("<ns>.router", "Read"),
        *_topic("<ns>.jobs.", "Write"),
        *_topic("<ns>.dead-letter", "Write"),
        *_topic("<ns>.schemas", "Read", "Write"),
        *_topic("<ns>.", "DescribeConfigs", lost=_LIMITS),
    ],
    "backfill": [
        *_topic("<ns>.events.", "Read"),
        *_group("<ns>.backfill.", "Read"),
        *_topic("<ns>.jobs.", "Write"),
        *_topic("<ns>.schemas", "Read", "Write"),
        *_topic("<ns>.", "DescribeConfigs", lost=_LIMITS),
    ],
    "projection": [
        *_topic("<ns>.events.", "Read", lost="projections of events"),
        *(Right(r.kind, r.name, r.operation, r.pattern, "projections of facts") for r in _LOG[:-1]),
        *_topic("<ns>.control", "Read", lost="projections of facts"),
        *_topic("<ns>.schemas", "Read"),
    ],
    "reader": [*_LOG, *_topic("<ns>.control", "Read"), *_group("<ns>.lifecycle.", "Read")],
    "web": [
        *_LOG,
        *_topic("<ns>.control", "Read", lost="pauses, limits and cancels in `jobs explain`"),
        *_topic(
            "<ns>.plans", "Read", lost="plans in `events tail` and `jobs explain`, and no new plans in a rebuilt table"
        ),
        *_group("<ns>.worker.", "Describe", lost="check by `audit` of what workers have committed"),
        *_group("<ns>.coordinator", "Describe", lost="state of the coordinator in `jobs explain`"),
    ],
    "admin": [
        *_topic("<ns>.", "Create", "Alter", "AlterConfigs"),
        Right(
            GROUP, "<ns>.", "AlterConfigs", PREFIXED, "session timeouts for each group: a dead worker is noticed later"
        ),
        Right(
            CLUSTER, "kafka-cluster", "DescribeConfigs", LITERAL, "knowledge of the broker's limits for those timeouts"
        ),
    ],
}

#: Roles that read the topics of events, including those of other programs.
_HANDLES = ("router", "backfill", "projection")

#: Names for several roles together: `jobledger streams` runs the coordinator and the materializer under one user.
TOGETHER: Mapping[str, Sequence[str]] = {"streams": ("coordinator", "materializer")}

#: Descriptions of the roles.
WHO: Mapping[str, str] = {
    "client": "submits jobs, emits events, waits for results",
    "worker": "`jobledger worker`; also needs the client's rights if its jobs submit, emit or have a fallback",
    "coordinator": "`jobledger coordinator`, and one part of `jobledger streams`",
    "materializer": "`jobledger materializer`, and one part of `jobledger streams`",
    "router": "`jobledger router`; also needs Read on topics of other programs whose events the app handles",
    "backfill": "`jobledger backfill`",
    "projection": "`jobledger projections`",
    "reader": "`app.lifecycle(group)`, and `jobledger web`, which also needs the rights of client and web",
    "web": "`jobledger events`, `audit`, `verify`, `rebuild`, `jobs explain`; reading the status table needs no right on Kafka",
    "admin": "`jobledger topics apply`; `topics acls --apply` also needs Alter on the cluster",
}


def roles(name: str) -> Sequence[str]:
    """Return the roles that a name stands for. Raises `ConfigError` for an unknown name."""
    if name in TABLE:
        return (name,)
    if name in TOGETHER:
        return TOGETHER[name]
    raise ConfigError(f"{name!r} is not a role; the roles are {', '.join([*TABLE, *TOGETHER])}")


def rights(name: str, namespace: str, foreign: Iterable[str] = ()) -> list[Right]:
    """Return the rights of a role, or of several roles under one name, in a namespace, without duplicates.

    ``foreign``: topics of other programs whose events the app handles. Raises `ConfigError` for an unknown role.
    """
    by_resource: dict[tuple[str, str, str, str], Right] = {}
    for role in roles(name):
        for right in TABLE[role]:
            resolved = right.of(namespace)
            key = (resolved.kind, resolved.name, resolved.pattern, resolved.operation)
            # One role may be able to work without a right that another role needs. Then the entry without ``lost``
            # counts.
            if key not in by_resource or by_resource[key].lost:
                by_resource[key] = resolved
    others = foreign if name in _HANDLES else ()
    for kind, resource, pattern, operation in [*by_resource]:
        if operation == "Describe" and (kind, resource, pattern, "Read") in by_resource:
            del by_resource[kind, resource, pattern, operation]
    return [*by_resource.values(), *(Right(TOPIC, topic, "Read") for topic in sorted(others))]


def commands(principal: str, wanted: Iterable[Right], server: str) -> Iterator[str]:
    """Yield the `kafka-acls.sh` commands that grant these rights, one command for each resource."""
    by_resource: dict[tuple[str, str, str], list[str]] = {}
    for right in wanted:
        by_resource.setdefault((right.kind, right.name, right.pattern), []).append(right.operation)
    for (kind, name, pattern), operations in by_resource.items():
        words = ["kafka-acls.sh", "--bootstrap-server", server, "--command-config", "admin.properties", "--add"]
        words += ["--allow-principal", principal]
        words += [word for operation in operations for word in ("--operation", operation)]
        words += ["--cluster"] if kind == CLUSTER else [f"--{kind}", name, "--resource-pattern-type", pattern]
        yield shlex.join(words)


def _operation(right: Right) -> AclOperation:
    return AclOperation[re.sub(r"(?<!^)(?=[A-Z])", "_", right.operation).upper()]


def binding(principal: str, right: Right) -> AclBinding:
    """Return the ACL that grants the right, for Kafka's admin client."""
    kinds = {TOPIC: ResourceType.TOPIC, GROUP: ResourceType.GROUP, CLUSTER: ResourceType.BROKER}
    return AclBinding(
        kinds[right.kind],
        right.name,
        ResourcePatternType[right.pattern.upper()],
        principal,
        "*",
        _operation(right),
        AclPermissionType.ALLOW,
    )


def check(settings: Settings, namespace: str, topics: Iterable[str]) -> None:
    """Check whether this user has the rights on these topics that the role ``settings.role`` needs.

    Raises a `NotAuthorized` that names all missing rights without which the role cannot work. Other missing rights are
    logged. Topics that do not exist are skipped. If a cluster does not report rights, no right counts as missing.
    Raises `BrokerUnavailable`.
    """
    missing, optional = [], []
    for topic, allowed in _allowed(settings, topics).items():
        for right in rights(settings.role, namespace):
            if right.covers(topic) and _operation(right) not in allowed:
                if right.lost:
                    optional.append(f"{right.operation} on topic {topic} (without it: no {right.lost})")
                else:
                    missing.append(Need(right.operation, TOPIC, topic))
    if missing:
        raise unauthorized(settings, "starting", TOPIC, *missing)
    for text in optional:
        LOG.warning("the %s continues without a right: %s", settings.role, text)


def lacking(settings: Settings, namespace: str, topics: Iterable[str]) -> dict[str, list[str]]:
    """Return for each role which of the rights on these topics this user lacks, of those without which the role cannot
    work.

    Topics that do not exist are skipped. If a cluster does not report rights, no right counts as missing. Raises
    `BrokerUnavailable`.
    """
    allowed = _allowed(settings, topics)
    return {
        role: [
            f"{right.operation} on topic {topic}"
            for topic, operations in allowed.items()
            for right in rights(role, namespace)
            if right.covers(topic) and not right.lost and _operation(right) not in operations
        ]
        for role in TABLE
    }


def _allowed(settings: Settings, topics: Iterable[str]) -> dict[str, Container[AclOperation]]:
    """Return the operations that this user may do with each topic that exists. Raises `BrokerUnavailable`."""
    client = clients.admin(settings)  # keep the client: a garbage-collected one never completes its futures
    answers = client.describe_topics(
        TopicCollection(sorted(set(topics))), include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S
    )
    allowed: dict[str, Container[AclOperation]] = {}
    for topic, future in answers.items():
        try:
            allowed[topic] = clients.answer_of(future, REQUEST_TIMEOUT_S).authorized_operations or _ANY
        except KafkaException as exc:
            if exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                continue
            if exc.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise clients.translate(exc.args[0], settings, f"asking for the rights on {topic}") from exc
            allowed[topic] = ()
    return allowed


def grant(admin: AdminClient, settings: Settings, bindings: Sequence[AclBinding]) -> None:
    """Create ACLs; existing ACLs are kept.

    Raises `AccessDenied`, `BrokerUnavailable`, and `ConfigError` for a cluster without ACLs.
    """
    if not bindings:
        return
    for future in admin.create_acls(list(bindings), request_timeout=REQUEST_TIMEOUT_S).values():
        try:
            clients.answer_of(future, REQUEST_TIMEOUT_S)
        except KafkaException as exc:
            error = exc.args[0]
            if error.name() == "SECURITY_DISABLED":
                raise ConfigError(
                    "this cluster cannot store ACLs: set authorizer.class.name on its brokers, or leave out --apply"
                ) from exc
            alter = Need("Alter", CLUSTER, "kafka-cluster")
            raise clients.translate(error, settings, "creating ACLs", alter) from exc
