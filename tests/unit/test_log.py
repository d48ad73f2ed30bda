"""Requests to Kafka: with an answer, with an error, or without both."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from confluent_kafka import KafkaError, KafkaException

from jobledger.kafka import clients


def test_a_request_without_an_answer_raises_kafkas_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the client's own timeout may come late, so `answer_of` raises the same error. An answer is
    returned, and an error of the client is raised."""
    monkeypatch.setattr(clients, "ANSWER_MARGIN_S", 0.0)
    silent: Future[int] = Future()
    with pytest.raises(KafkaException) as caught:
        clients.answer_of(silent, 0.01)
    assert caught.value.args[0].code() == KafkaError._TIMED_OUT
    answered: Future[int] = Future()
    answered.set_result(7)
    assert clients.answer_of(answered, 0.01) == 7
    refused: Future[int] = Future()
    refused.set_exception(KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)))
    with pytest.raises(KafkaException, match="TOPIC_AUTHORIZATION_FAILED"):
        clients.answer_of(refused, 0.01)
