"""What the tests of processes and faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobledger.kafka.embedded import EmbeddedKafka


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    """A broker of each module's own: some stop and start it."""
    with EmbeddedKafka() as broker:
        yield broker
