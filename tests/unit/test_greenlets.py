"""Calls of Kafka's clients under gevent's monkey patches, in a process of their own; no broker is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALLS = """
from gevent import monkey
monkey.patch_all()
import gevent
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from jobledger.greenlets import GREEN

def ask():
    client = GREEN[AdminClient]({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    try:
        client.list_topics(timeout=0.1)
    except KafkaException as error:
        print("raised", error.args[0].name())

gevent.joinall([gevent.spawn(ask) for _ in range(3)])
"""


def test_an_exception_of_a_client_reaches_its_caller_and_nothing_else() -> None:
    """What a client's call raises in gevent's pool of threads is raised to its caller, and not printed as well."""
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["raised _TRANSPORT"] * 3
    assert done.stderr == ""
    assert done.returncode == 0
