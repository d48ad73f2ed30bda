"""The topics that an app needs, and the comparison with the existing topics."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, Queue, Settings
from jobledger.errors import ConfigError
from jobledger.kafka import topics
from jobledger.kafka.topic_names import Names, colliding
from jobledger.kafka.topology import (
    Change,
    Growth,
    Step,
    TopicPlan,
    TopicSpec,
    broken_promises,
    changelog,
    compare,
    desired,
    within_bounds,
    worker_groups,
)

NAMES = Names("shop")


def specs(partitions: int = 4, replication: int = 1, **queues: int) -> dict[str, TopicSpec]:
    wanted = desired(NAMES, queues or {"default": 4}, partitions=partitions, replication=replication)
    return {spec.name: spec for spec in wanted}


def test_every_topic_of_a_namespace_is_declared() -> None:
    """An app has the topics of its queues, seven shared topics and the coordinator's changelog, and no other."""
    assert set(specs(default=4, mail=2)) == {
        "shop.jobs.default",
        "shop.jobs.mail",
        "shop.lifecycle",
        "shop.coordination",
        "shop.dead-letter",
        "shop.control",
        "shop.plans",
        "shop.workers",
        "shop.schemas",
        "shop.coordinator-schedules-changelog",
    }


@pytest.mark.parametrize(("queues", "lifecycle"), [({"a": 2}, 4), ({"a": 16, "b": 8}, 16)])
def test_lifecycle_has_a_partition_for_every_work_partition(queues: dict[str, int], lifecycle: int) -> None:
    """Lifecycle has at least as many partitions as the largest queue."""
    assert specs(partitions=4, **queues)["shop.lifecycle"].partitions == lifecycle


def test_the_changelog_is_partitioned_like_coordination() -> None:
    """The coordinator's changelog has as many partitions as the topic `coordination`, and is compacted."""
    by_name = specs(partitions=6)
    changelog = by_name["shop.coordinator-schedules-changelog"]
    assert changelog.partitions == by_name["shop.coordination"].partitions == 6
    assert changelog.config["cleanup.policy"] == "compact"


def test_every_topic_uses_the_brokers_clock() -> None:
    """The timestamps of all topics are the broker's append times."""
    assert {spec.config["message.timestamp.type"] for spec in specs().values()} == {"LogAppendTime"}


def test_topics_that_the_materializer_reads_have_no_retention_limit() -> None:
    """Records of jobs, lifecycle, coordination and dead-letter are not deleted by age or size."""
    by_name = specs()
    for name in ("shop.jobs.default", "shop.lifecycle", "shop.coordination", "shop.dead-letter"):
        assert (by_name[name].config["retention.ms"], by_name[name].config["retention.bytes"]) == ("-1", "-1")
        assert by_name[name].config["cleanup.policy"] == "delete"


@pytest.mark.parametrize("name", ["shop.control", "shop.workers", "shop.schemas"])
def test_control_workers_and_schemas_have_one_compacted_partition(name: str) -> None:
    """The default number of partitions does not change this."""
    spec = specs(partitions=12)[name]
    assert (spec.partitions, spec.config["cleanup.policy"]) == (1, "compact")


@pytest.mark.parametrize(("replication", "in_sync"), [(1, "1"), (2, "1"), (3, "2")])
def test_three_copies_ask_for_two_in_sync(replication: int, in_sync: str) -> None:
    """With three copies or more, a record is acknowledged only when two copies have it."""
    assert {s.config["min.insync.replicas"] for s in specs(replication=replication).values()} == {in_sync}


@pytest.mark.parametrize(
    ("partitions", "replication", "queue", "named"),
    [(0, 1, 1, "partitions=0"), (1, 0, 1, "replication=0"), (1, 1, 0, "partitions of queue 'q'=0")],
)
def test_a_count_below_one_is_refused(partitions: int, replication: int, queue: int, named: str) -> None:
    """The error names the count."""
    with pytest.raises(ConfigError, match=named):
        desired(NAMES, {"q": queue}, partitions=partitions, replication=replication)


def test_a_missing_topic_is_created_with_all_its_settings() -> None:
    """The topic is created with the partitions and settings of its spec."""
    spec = specs()["shop.lifecycle"]
    (change,) = compare(spec, None, {})
    assert (change.step, change.partitions, change.replication) == (Step.CREATE, (0, 4), 1)
    assert {key: new for key, (_, new) in change.config.items()} == spec.config


def test_a_topic_as_declared_is_left_alone() -> None:
    """Settings that are not declared do not matter."""
    spec = specs()["shop.lifecycle"]
    (change,) = compare(spec, 4, {**spec.config, "segment.bytes": "1"})
    assert change.step is Step.UNCHANGED


def test_a_queue_grows() -> None:
    """A work topic with fewer partitions than declared gets the missing ones."""
    (change,) = compare(specs(default=8)["shop.jobs.default"], 4, specs(default=8)["shop.jobs.default"].config)
    assert (change.step, change.partitions) == (Step.PARTITIONS, (4, 8))


def test_a_queue_does_not_shrink() -> None:
    """A work topic with more partitions than declared is refused, because Kafka cannot remove partitions."""
    spec = specs(default=2)["shop.jobs.default"]
    (change,) = compare(spec, 4, spec.config)
    assert change.step is Step.REFUSE
    assert "has 4 partitions and the app asks for 2: Kafka cannot remove partitions" in change.reason


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("shop.coordination", 2),
        ("shop.coordination", 8),
        ("shop.lifecycle", 2),
        ("shop.coordinator-schedules-changelog", 8),
        ("shop.control", 2),
    ],
)
def test_a_partition_count_on_which_state_depends_is_not_changed(name: str, there: int) -> None:
    """The reason of the refusal has the topic, the count and a remedy."""
    spec = specs()[name]
    (change,) = compare(spec, there, spec.config)
    assert change.step is Step.REFUSE
    assert f"{name!r} has {there} partitions" in change.reason
    assert "new namespace" in change.reason


def test_more_lifecycle_partitions_than_needed_do_no_harm() -> None:
    """The lifecycle topic may have more partitions than the queues need, for example after a queue was removed."""
    spec = specs()["shop.lifecycle"]
    assert spec.growth is Growth.AT_LEAST
    assert [c.step for c in compare(spec, 16, spec.config)] == [Step.UNCHANGED]


def test_only_settings_that_differ_are_altered() -> None:
    """The plan has the old and the new value."""
    spec = specs()["shop.lifecycle"]
    (change,) = compare(spec, 4, {**spec.config, "retention.ms": "604800000"})
    assert (change.step, dict(change.config)) == (Step.CONFIG, {"retention.ms": ("604800000", "-1")})


def test_a_plan_can_be_written_as_json() -> None:
    """The JSON has all steps and their counts."""
    changes = [c for spec in specs().values() for c in compare(spec, None, {})]
    made = TopicPlan(tuple(changes))
    read = json.loads(json.dumps(made.as_dict()))
    assert (read["pending"], read["refused"], len(read["changes"])) == (9, 0, 9)
    assert read["changes"][0]["step"] == "create"


def test_every_queue_has_its_group_settings() -> None:
    """Each queue's worker group gets a session timeout and a heartbeat."""
    groups = worker_groups(NAMES, ["mail", "default"])
    assert [group.name for group in groups] == ["shop.worker.default", "shop.worker.mail"]
    assert all(set(g.config) == {"consumer.session.timeout.ms", "consumer.heartbeat.interval.ms"} for g in groups)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, "6000"),
        ({"group.consumer.min.session.timeout.ms": "45000"}, "45000"),
        ({"group.consumer.max.session.timeout.ms": "5000"}, "5000"),
        ({"group.consumer.min.session.timeout.ms": None}, "6000"),
    ],
)
def test_group_settings_stay_within_the_brokers_bounds(bounds: dict[str, str | None], expected: str) -> None:
    """If the broker's bounds are known, a setting outside them is changed to the bound."""
    fitted = within_bounds({"consumer.session.timeout.ms": "6000"}, bounds)
    assert fitted == {"consumer.session.timeout.ms": expected}


@pytest.mark.parametrize(
    ("copies", "asked", "insync", "advised"), [(1, 3, "1", True), (3, 3, "2", False), (3, 2, "2", False)]
)
def test_the_needed_acknowledgements_depend_on_the_existing_copies(
    copies: int, asked: int, insync: str, advised: bool
) -> None:
    """If a topic has one copy and the app asks for three, writes are not stopped, and the plan has advice. If the topic
    has three copies, nothing is changed, also while a broker is away."""
    spec = specs(replication=asked)["shop.lifecycle"]
    there = {**spec.config, "min.insync.replicas": insync}
    (change,) = compare(spec, spec.partitions, there, copies)
    assert change.step is (Step.ADVISE if advised else Step.UNCHANGED)
    if advised:
        assert "1 of 3 copies" in change.reason
        assert "kafka-reassign-partitions" in change.reason
    plan = TopicPlan((change,))
    assert (plan.pending, plan.refused) == ((), ())
    assert len(plan.advice) == advised


def test_changed_settings_that_break_a_promise_are_reported() -> None:
    """For each of the namespace's own topics, the report has the changed setting, its value, the right value and the
    command. Other settings, foreign topics and unknown values are not reported."""
    names = Names("shop")
    made = desired(names, {"mail": 2}, partitions=2, replication=1)
    right: dict[str, dict[str, str | None]] = {spec.name: dict(spec.config) for spec in made}
    assert broken_promises(names, right) == []
    others: dict[str, dict[str, str | None]] = {
        "theirs": {"message.timestamp.type": "CreateTime"},
        names.lifecycle: {"message.timestamp.type": None, "segment.bytes": "1"},
    }
    assert broken_promises(names, others) == []
    changed = {
        names.coordination: ("message.timestamp.type", "CreateTime", "LogAppendTime"),
        names.jobs("mail"): ("retention.ms", "604800000", "-1"),
        names.lifecycle: ("cleanup.policy", "compact", "delete"),
        names.dead_letter: ("retention.bytes", "1000", "-1"),
        names.control: ("cleanup.policy", "compact,delete", "compact"),
        changelog(names): ("cleanup.policy", "delete", "compact"),
    }
    for topic, (setting, value, wanted) in changed.items():
        (broken,) = broken_promises(names, {**right, topic: {**right[topic], setting: value}})
        assert broken.startswith(f"topic {topic} has {setting}={value} and needs {wanted}: ")
        assert "`jobledger topics apply MODULE:APP`" in broken


@pytest.mark.parametrize(
    ("first", "second"),
    [(Queue("mail", priorities=True), Queue("mail_high")), (Queue("mail_low"), Queue("mail", priorities=True))],
)
def test_queues_whose_topics_collide_are_refused_at_load(first: Queue, second: Queue) -> None:
    """Kafka allows no topic `shop.jobs.mail_high` beside `shop.jobs.mail.high`. The error has both names, before the
    app runs."""
    app = App("shop", settings=Settings(), queues=[first, second])
    with pytest.raises(
        ConfigError, match=r"'shop\.jobs\.mail[._](high|low)' and 'shop\.jobs\.mail[._](high|low)' collide"
    ):
        app.check()
    App("shop", settings=Settings(), queues=[first]).check()


def test_a_foreign_event_topic_that_collides_is_refused_at_load() -> None:
    """The foreign name differs from a name of the app only in a dot."""
    app = App("shop", settings=Settings())

    @app.event(topic="shop_lifecycle", format="json")
    class Happened:
        what: str

    with pytest.raises(ConfigError, match=r"'shop_lifecycle' and 'shop\.lifecycle' collide"):
        app.check()


@given(st.lists(st.text("ab._-", min_size=1, max_size=4)), st.lists(st.text("ab._-", min_size=1, max_size=4)))
def test_names_collide_if_they_differ_in_dots_and_underscores_only(wanted: list[str], others: list[str]) -> None:
    """An existing name does not collide with itself. Any other two names with the same metric name collide."""
    collisions = colliding(wanted, others)
    same = {
        name: {n for n in (*wanted, *others) if n != name and n.replace(".", "_") == name.replace(".", "_")}
        for name in wanted
    }
    assert all(other in same[name] for name, other in collisions.items())
    for name, partners in same.items():
        assert (
            not partners
            or name in collisions
            or any(collisions.get(other) == name for other in partners)
            or name in others
        )


def test_the_standing_topics_are_those_that_are_made() -> None:
    """`Names.standing` and the table of topics have the same names, except work topics and the changelog."""
    names = Names("shop")
    made = {spec.name for spec in desired(names, {"mail": 2}, partitions=2, replication=1)}
    assert set(names.standing) == made - {names.jobs("mail"), changelog(names)}


class Growing:
    """An admin client that adds partitions, but whose first answer is lost, so that the request is sent twice."""

    def __init__(self, count: int, after: int) -> None:
        self.count, self._after, self.asked = count, after, 0

    def create_partitions(self, grown: list[Any], request_timeout: float) -> dict[str, Future[Any]]:
        self.asked += 1
        lost = self.asked == 1
        self.count = self._after
        answer: Future[Any] = Future()
        code = KafkaError.REQUEST_TIMED_OUT if lost else KafkaError.INVALID_PARTITIONS
        answer.set_exception(KafkaException(KafkaError(code, "Topic already has 6 partition(s).")))
        return {"shop.jobs.mail": answer}

    def describe_topics(self, names: object, request_timeout: float) -> dict[str, Future[Any]]:
        answer: Future[Any] = Future()
        answer.set_result(SimpleNamespace(partitions=[SimpleNamespace(replicas=[1], leader=1)] * self.count))
        return {"shop.jobs.mail": answer}


@pytest.mark.parametrize(("after", "made"), [(6, True), (7, False)])
def test_partitions_that_were_added_already_are_no_refusal(
    monkeypatch: pytest.MonkeyPatch, after: int, made: bool
) -> None:
    """By an earlier attempt whose answer was lost, or by another process. Another number than planned is refused."""
    monkeypatch.setattr(topics, "RETRY_PAUSE_S", 0.0)
    admin = Growing(3, after)
    plan = TopicPlan((Change(Step.PARTITIONS, "topic", "shop.jobs.mail", (3, 6)),))
    if made:
        assert topics.apply(cast(AdminClient, admin), plan) == ()
    else:
        with pytest.raises(ConfigError, match="the cluster refused"):
            topics.apply(cast(AdminClient, admin), plan)
    assert admin.asked == 2
