"""The partition that a key decides."""

from __future__ import annotations

from aiokafka.partitioner import murmur2
from hypothesis import given
from hypothesis import strategies as st

from jobledger.kafka.partitioner import partition_of


@given(st.binary(max_size=50), st.integers(1, 1_000))
def test_the_partition_of_a_key_is_that_of_kafkas_producers(key: bytes, count: int) -> None:
    """The computation is compared with aiokafka's, which is taken from Kafka's Java client."""
    assert partition_of(key, count) == (murmur2(key) & 0x7FFFFFFF) % count
