"""Creating and changing topics as the app declares them, with a real broker."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from jobledger.config import Settings
from jobledger.definitions.event_types import EventType
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.kafka import clients, topics, topology
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topology import Step, TopicPlan
from tests.patience import wait_until

pytestmark = pytest.mark.kafka


@dataclass(frozen=True)
class Queue:
    partitions: int | None
    levels: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class App:
    """The attributes of an app that `ensure` uses."""

    names: Names
    queues: Mapping[str, Queue] = field(default_factory=lambda: {"default": Queue(None), "mail": Queue(6)})
    events: Mapping[str, EventType] = field(default_factory=dict)
    partitions: int = 3


@pytest.fixture
def settings(broker: str) -> Settings:
    return Settings(bootstrap=broker)


@pytest.fixture
def admin(settings: Settings) -> AdminClient:
    return clients.admin(settings)


@pytest.fixture
def app(namespace: str) -> App:
    return App(Names(namespace))


def partitions(settings: Settings, topic: str) -> int | None:
    found = clients.admin(settings).list_topics(timeout=10).topics.get(topic)
    return None if found is None else len(found.partitions)


def steps(made: TopicPlan) -> set[Step]:
    return {change.step for change in made.changes if change.kind == "topic"}


def wait_until_as_declared(app: App, settings: Settings) -> None:
    """Wait until the broker reports everything as declared. The broker answers from its own copy of the settings, which
    follows the controller's."""
    admin = clients.admin(settings)
    wait_until(lambda: not topics.plan(admin, *topology.wanted(app, 1)).pending, 10, "all being as declared")


def test_ensure_makes_every_topic_usable_at_once(settings: Settings, app: App) -> None:
    """When `ensure` returns, every declared topic exists with its partitions."""
    made = topics.ensure(app, settings)
    assert steps(made) == {Step.CREATE}
    assert partitions(settings, app.names.jobs("default")) == 3
    assert partitions(settings, app.names.jobs("mail")) == 6
    assert partitions(settings, app.names.lifecycle) == 6
    assert partitions(settings, topology.changelog(app.names)) == 3


def test_a_second_ensure_changes_nothing(settings: Settings, app: App) -> None:
    """A second `ensure` finds everything as declared."""
    topics.ensure(app, settings)
    wait_until_as_declared(app, settings)
    again = topics.ensure(app, settings)
    assert steps(again) == {Step.UNCHANGED}
    assert again.pending == ()


def test_concurrent_calls_of_ensure_all_succeed(settings: Settings, app: App) -> None:
    """Several processes that call `ensure` for the same app at the same time all succeed."""
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(topics.ensure, app, settings) for _ in range(3)]:
            assert done.result().refused == ()
    wait_until_as_declared(app, settings)
    assert topics.ensure(app, settings).pending == ()


def test_a_queue_can_grow_up_to_the_partitions_of_lifecycle(settings: Settings, app: App) -> None:
    """A queue can have more partitions as long as the lifecycle topic has as many."""
    topics.ensure(app, settings)
    topics.ensure(replace(app, queues={**app.queues, "default": Queue(5)}), settings)
    assert partitions(settings, app.names.jobs("default")) == 5


def test_a_refused_change_leaves_everything_as_it_was(settings: Settings, app: App) -> None:
    """If one step is refused, no step of the plan is done, and the error explains the refusal."""
    topics.ensure(app, settings)
    grown = replace(app, partitions=4, queues={**app.queues, "new": Queue(1)})
    with pytest.raises(ConfigError, match=f"{app.names.coordination}' has 3 partitions and the app asks for 4"):
        topics.ensure(grown, settings)
    assert partitions(settings, app.names.jobs("new")) is None


def test_a_queue_larger_than_lifecycle_is_refused(settings: Settings, app: App) -> None:
    """The facts of a work partition need a lifecycle partition with the same number."""
    topics.ensure(app, settings)
    with pytest.raises(ConfigError, match="at least as many partitions as the largest queue"):
        topics.ensure(replace(app, queues={"default": Queue(12)}), settings)


def test_a_changed_setting_is_restored(settings: Settings, admin: AdminClient, app: App) -> None:
    """A setting that was changed by hand is in the plan and is restored."""
    topics.ensure(app, settings)
    wait_until_as_declared(app, settings)
    short = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, app.names.lifecycle, incremental_configs=[short])
    admin.incremental_alter_configs([resource])[resource].result(10)
    seen: list[topology.Change] = []

    def put_back() -> bool:
        seen.extend(topics.ensure(app, settings).pending)
        return bool(seen)

    wait_until(put_back, 10, "the changed setting is seen")
    (change,) = seen
    assert (change.name, dict(change.config)) == (app.names.lifecycle, {"retention.ms": ("1000", "-1")})


def test_groups_get_their_timeouts(
    settings: Settings, admin: AdminClient, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker group of each queue has the declared session timeout and heartbeat on the broker."""
    monkeypatch.setattr(topology, "SESSION_TIMEOUT_MS", 7_000)
    monkeypatch.setattr(topology, "HEARTBEAT_INTERVAL_MS", 1_500)
    made = topics.ensure(app, settings)
    assert {c.name for c in made.pending if c.kind == "group"} == {app.names.worker_group(q) for q in app.queues}
    resource = ConfigResource(ResourceType.GROUP, app.names.worker_group("mail"))

    def timeouts() -> tuple[str | None, str | None]:
        found = admin.describe_configs([resource])[resource].result(10)
        return found["consumer.session.timeout.ms"].value, found["consumer.heartbeat.interval.ms"].value

    wait_until(lambda: timeouts() == ("7000", "1500"), 10, "the group's timeouts are seen")


def test_a_group_setting_that_is_refused_is_a_note(admin: AdminClient, app: App) -> None:
    """If the cluster refuses a group's settings, a note says so, and the other steps continue."""
    refused = topology.Change(
        Step.CONFIG, "group", app.names.worker_group("default"), config={"consumer.session.timeout.ms": (None, "1")}
    )
    (note,) = topics.apply(admin, TopicPlan((refused,)))
    assert app.names.worker_group("default") in note
    assert "consumer.session.timeout.ms=1" in note


def test_an_unreachable_broker_is_named_in_the_error(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no broker answers, a limited number of attempts ends in an error that names the address."""
    monkeypatch.setattr(topics, "REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(topics, "RETRY_PAUSE_S", 0.0)
    with pytest.raises(BrokerUnavailable, match=r"no broker answered at 127\.0\.0\.1:1 "):
        topics.ensure(app, Settings(bootstrap="127.0.0.1:1"))


def test_the_default_number_of_copies_depends_on_the_cluster(admin: AdminClient) -> None:
    """By default, topics have as many copies as the cluster has brokers, but at most three."""
    brokers = len(admin.list_topics(timeout=10).brokers)
    assert topics.default_replication(admin) == min(3, brokers)


def test_a_namespace_whose_topics_collide_with_another_namespace_is_refused(settings: Settings, app: App) -> None:
    """The namespace `a_jobs` collides with the namespace `a` that has a queue `lifecycle`. The plan names both topics,
    and no topic of the second namespace is created."""
    name = app.names.namespace
    first = replace(app, queues={"lifecycle": Queue(1)})
    topics.ensure(first, settings)
    second = App(Names(f"{name}_jobs"))
    made = topics.plan(clients.admin(settings), *topology.wanted(second, 1))
    assert [change.name for change in made.refused] == [f"{name}_jobs.lifecycle"]
    with pytest.raises(ConfigError, match=rf"'{name}_jobs\.lifecycle' collides with '{name}\.jobs\.lifecycle'"):
        topics.ensure(second, settings)
    assert partitions(settings, second.names.coordination) is None
    wait_until_as_declared(first, settings)
    assert topics.ensure(first, settings).pending == ()
