"""Fixtures of the tests of processes and faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.defaults import START_TIMEOUT_S
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    """Yield a broker for one module, because some modules stop and start it."""
    with EmbeddedKafka(timeout=PATIENCE * START_TIMEOUT_S) as broker:
        yield broker
