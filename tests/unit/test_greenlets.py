"""Calls of Kafka's clients under gevent's monkey patches. They run in a child process, without a broker."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed")

CALLS = """
from gevent import monkey
monkey.patch_all()
import gevent
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from jobledger.process.greenlets import GREEN

def ask():
    client = GREEN[AdminClient]({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    try:
        client.list_topics(timeout=0.1)
    except KafkaException as error:
        print("raised", error.args[0].name())

gevent.joinall([gevent.spawn(ask) for _ in range(3)])
"""


ANSWERS = """
from gevent import monkey
monkey.patch_all()
import sys
from concurrent.futures import Future
from confluent_kafka import KafkaError, KafkaException
from jobledger.process import greenlets
from jobledger.kafka import clients

sys.setswitchinterval(1e-6)
for _ in range(300):
    futures = [Future() for _ in range(20)]
    greenlets.start_thread(lambda futures=futures: [each.set_result(n) for n, each in enumerate(futures)], "answers")
    assert [clients.answer_of(each, 60.0) for each in futures] == list(range(20))
print("all answered")
refused = Future()
refused.set_exception(KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)))
try:
    clients.answer_of(refused, 60.0)
except KafkaException:
    print("refused")
clients.ANSWER_MARGIN_S = 0.0
try:
    clients.answer_of(Future(), 0.1)
except KafkaException as error:
    print("late" if error.args[0].code() == KafkaError._TIMED_OUT else error)
"""


def run(code: str) -> list[str]:
    """Run ``code`` in a process that must succeed; return the lines that it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_an_exception_of_a_client_is_raised_to_its_caller_and_not_printed() -> None:
    """The call of the client runs in gevent's pool of threads."""
    assert run(CALLS) == ["raised _TRANSPORT"] * 3


def test_an_answer_of_a_native_thread_reaches_a_greenlet() -> None:
    """The answer also arrives if the thread is interrupted while it answers, and the process has nothing else to do."""
    assert run(ANSWERS) == ["all answered", "refused", "late"]
