"""The table of least rights: in the docs, in the output of the command and as ACLs for a broker."""

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
            resource = f"{right.kind} `{right.name}{'*' if right.pattern == acls.PREFIXED else ''}`"
            merged.setdefault((resource, right.lost), []).append(right.operation)
        for (resource, lost), operations in merged.items():
            lines.append(f"| {role} | {', '.join(operations)} | {resource} | {f'no {lost}' if lost else ''} |")
    return "\n".join(lines)


def test_the_docs_show_the_table() -> None:
    """docs/clusters.md has the whole table. If this test fails, the printed rows belong on that page."""
    wanted = table()
    assert wanted in DOCS.read_text("utf-8"), wanted


def test_the_table_names_topics_and_groups_of_the_namespace() -> None:
    """Every topic and group of the table has a name that `Names` gives, or the beginning of such a name."""
    names = Names("shop")
    known = [
        names.jobs("q"),
        names.lifecycle,
        names.coordination,
        names.dead_letter,
        names.schemas,
        names.control,
        names.plans,
        names.workers,
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


def test_a_role_of_two_processes_has_each_right_once() -> None:
    """`streams` has the rights of both its processes. A right that one of them cannot do without is not dispensable,
    and an implied right is left out."""
    both = acls.rights("streams", "shop")
    assert len({(r.kind, r.name, r.pattern, r.operation) for r in both}) == len(both)
    by_right = {(r.kind, r.name, r.operation): r.lost for r in both}
    assert by_right["topic", "shop.coordination", "Write"] == ""
    assert ("group", "shop.coordinator", "Describe") not in by_right
    with pytest.raises(ConfigError, match="'boss' is not a role; the roles are client, worker"):
        acls.rights("boss", "shop")


def test_only_the_router_needs_rights_for_foreign_topics() -> None:
    """A router reads the foreign topics of its app's events; a worker does not."""
    assert Right("topic", "warehouse.shipped", "Read") in acls.rights("router", "shop", ["warehouse.shipped"])
    assert Right("topic", "warehouse.shipped", "Read") not in acls.rights("worker", "shop", ["warehouse.shipped"])


def test_a_right_becomes_an_acl_of_the_broker() -> None:
    """Kind, pattern and operation are translated to Kafka's values."""
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


def test_topics_acls_prints_commands_for_kafka_acls(capsys: pytest.CaptureFixture[str]) -> None:
    """With principals, one shell command for each resource is printed; without principals, the table. --json prints
    every field."""
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
    shown = json.loads(capsys.readouterr().out)
    assert {row["principal"] for row in shown} == {"User:billing"}
    assert shown[0] == {
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
def test_wrong_or_missing_principals_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command line is refused before anything is sent to a broker."""
    assert main(["topics", "acls", "examples.shop:app", *words]) == 2
    assert "ROLE=PRINCIPAL" in (error := capsys.readouterr().err) or "is not a role" in error
