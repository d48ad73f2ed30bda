"""The table of least rights: what the docs, the command line and the brokers are told of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from jobledger.cli.main import main
from jobledger.errors import ConfigError
from jobledger.kafka import acls
from jobledger.kafka.acls import TABLE, Right
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topology import changelog

DOCS = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"


def table() -> str:
    """The table as the docs show it."""
    lines = ["| role | right | on | without it |", "|---|---|---|---|"]
    for role, wanted in TABLE.items():
        merged: dict[tuple[str, str], list[str]] = {}
        for right in wanted:
            place = f"{right.kind} `{right.name}{'*' if right.pattern == acls.PREFIXED else ''}`"
            merged.setdefault((place, right.lost), []).append(right.operation)
        for (place, lost), operations in merged.items():
            lines.append(f"| {role} | {', '.join(operations)} | {place} | {f'no {lost}' if lost else ''} |")
    return "\n".join(lines)


def test_the_docs_show_the_table() -> None:
    """Row by row; what is printed here belongs into docs/clusters.md."""
    wanted = table()
    assert wanted in DOCS.read_text("utf-8"), wanted


def test_the_names_are_those_of_the_namespace() -> None:
    """Every topic and group of the table is one that `Names` gives, or the beginning of such."""
    names = Names("shop")
    known = [
        names.jobs("q"),
        names.lifecycle,
        names.coordination,
        names.dead_letter,
        names.schemas,
        names.control,
        names.events("e"),
        changelog(names),
        names.router_group,
        names.coordinator_group,
        names.worker_group("q"),
        names.lifecycle_group("g"),
        names.backfill_group("h"),
        "kafka-cluster",
    ]
    for role in TABLE:
        for right in acls.rights(role, "shop"):
            fits = [n.startswith(right.name) if right.pattern == acls.PREFIXED else n == right.name for n in known]
            assert any(fits), right
            assert right.name.endswith(".") == (right.pattern == acls.PREFIXED)


def test_roles_together_need_each_right_once() -> None:
    """`streams` is both its halves; what one of them cannot do without is not dispensable,
    and what is implied is left out."""
    both = acls.rights("streams", "shop")
    assert len({(r.kind, r.name, r.pattern, r.operation) for r in both}) == len(both)
    by_right = {(r.kind, r.name, r.operation): r.lost for r in both}
    assert by_right["topic", "shop.coordination", "Write"] == ""
    assert ("group", "shop.coordinator", "Describe") not in by_right
    with pytest.raises(ConfigError, match="'boss' is not a role; there are client, worker"):
        acls.rights("boss", "shop")


def test_topics_of_others_are_read_by_who_handles_them() -> None:
    """A router reads the foreign topics of its app's events; a worker does not."""
    assert Right("topic", "warehouse.shipped", "Read") in acls.rights("router", "shop", ["warehouse.shipped"])
    assert Right("topic", "warehouse.shipped", "Read") not in acls.rights("worker", "shop", ["warehouse.shipped"])


def test_a_right_as_the_broker_takes_it() -> None:
    """Kind, pattern and operation have Kafka's names."""
    made = acls.binding("User:jobs", Right("topic", "shop.", "AlterConfigs", "prefixed"))
    assert (made.restype, made.name, made.resource_pattern_type) == (
        ResourceType.TOPIC,
        "shop.",
        ResourcePatternType.PREFIXED,
    )
    assert (made.principal, made.host, made.operation, made.permission_type) == (
        "User:jobs",
        "*",
        AclOperation.ALTER_CONFIGS,
        AclPermissionType.ALLOW,
    )
    cluster = acls.binding("User:ops", Right("cluster", "kafka-cluster", "DescribeConfigs"))
    assert (cluster.restype, cluster.operation) == (ResourceType.BROKER, AclOperation.DESCRIBE_CONFIGS)


def test_commands_for_kafka_acls(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a resource, ready for a shell; without principals the table; with --json all of it."""
    app, address = "examples.shop:app", ["--bootstrap", "kafka-1:9093"]
    assert main(["topics", "acls", app, *address, "--principal", "worker=User:CN=jobs,O=shop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# worker")
    assert lines[3] == (
        "kafka-acls.sh --bootstrap-server kafka-1:9093 --command-config admin.properties --add --allow-principal "
        "User:CN=jobs,O=shop --operation Read --operation Write --topic shop.lifecycle --resource-pattern-type literal"
    )
    assert main(["topics", "acls", app]) == 0
    assert re.search(r"admin +DescribeConfigs +cluster kafka-cluster", capsys.readouterr().out)
    assert main(["topics", "acls", app, "--json", "--principal", "reader=User:billing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["principal"] for row in found} == {"User:billing"}
    assert found[0] == {
        "role": "reader",
        "principal": "User:billing",
        "kind": "topic",
        "name": "shop.jobs.",
        "operation": "Read",
        "pattern": "prefixed",
        "lost": "",
        "when": "",
    }


@pytest.mark.parametrize("words", [["--principal", "worker"], ["--principal", "boss=User:x"], ["--apply", "--yes"]])
def test_principals_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is sent anywhere."""
    assert main(["topics", "acls", "examples.shop:app", *words]) == 2
    assert "ROLE=PRINCIPAL" in (said := capsys.readouterr().err) or "is not a role" in said
