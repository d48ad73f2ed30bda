"""Requests to a cluster that do not concern a topic."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from jobledger.kafka import cluster
from jobledger.kafka.embedded.ports import free_port
from tests.empty_cluster import empty_cluster
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

#: Code of a child process, because librdkafka may abort the process.
CHILD = """
import sys
from jobledger import Settings
from jobledger.kafka import clients
from jobledger.kafka import outage
from jobledger.kafka.auth import check_connection
from jobledger.kafka.topics import default_replication

def origin():
    from jobledger.streams.coordinator.faust.faust_app import origin_of
    return origin_of(settings, "t")

settings = Settings(bootstrap=sys.argv[1])
outage.ANSWER_S = 60.0
try:
    print({expression})
except Exception as exc:
    print(type(exc).__name__, exc)
"""


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("check_connection(settings, 60.0)", "None"),
        ("outage._answers(settings)", "True"),
        # 1 if this request got the server's first answer
        (
            "default_replication(clients.admin(settings))",
            ("1", "BrokerUnavailable no broker answered at the cluster (could not"),
        ),
        ("origin()", "TopicMissing asking for the id of t"),
    ],
)
def test_a_broker_that_lists_no_brokers_aborts_no_process(expression: str, expected: str | tuple[str, ...]) -> None:
    """A broker that was frozen gives such an answer until it is back in its cluster. `describe_cluster` would abort the
    process."""
    with empty_cluster() as address:
        code = CHILD.replace("{expression}", expression)
        command, limit = [sys.executable, "-c", code, address], 100 * PATIENCE
        child = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(expected)


def test_no_module_calls_describe_cluster() -> None:
    """`jobledger.kafka.cluster` explains why, and has a replacement."""
    modules = [path for part in ("jobledger", "consumers", "streams") for path in (ROOT / part).rglob("*.py")]
    assert len(modules) > 50
    assert [str(path) for path in modules if "describe_cluster(" in path.read_text()] == []


def test_a_broker_that_is_away_does_not_answer() -> None:
    """The wait ends at the time limit, or earlier if the callback raises an exception."""
    client = AdminClient({"bootstrap.servers": f"127.0.0.1:{free_port()}", "log_level": 0})
    assert not cluster.answers(client, 0.3)

    def refuse() -> None:
        raise PermissionError

    began = time.monotonic()
    with pytest.raises(PermissionError):
        cluster.answers(client, 60.0, refuse)
    assert time.monotonic() - began < 30
