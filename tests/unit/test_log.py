"""Talking to Kafka: what has an answer, an error, or neither."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from confluent_kafka import KafkaError, KafkaException

from jobledger.kafka import clients


def test_an_admin_client_that_answers_nothing_has_timed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine even a client's own timeout may come late: that is a timeout of Kafka's all the same, and what an
    answer or an error of the client says is passed on."""
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
