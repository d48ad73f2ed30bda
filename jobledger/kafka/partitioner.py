"""Which partition a record is written to: the choice of Kafka's default partitioner. Pure module."""

from __future__ import annotations

#: The partitioner of all writers, so that librdkafka, Java and Faust write a key to the same partition.
PARTITIONER = "murmur2_random"


def partition_of(key: bytes, count: int) -> int:
    """Return the number of the partition, of ``count`` partitions, to which a record with this key is written.

    This is Kafka's default partitioner (murmur2, Austin Appleby), as `PARTITIONER` is for a record with a key.
    """
    return (_murmur2(key) & 0x7FFF_FFFF) % count


def _murmur2(data: bytes) -> int:
    # As in Kafka's `org.apache.kafka.common.utils.Utils.murmur2`: 32 bits, seed 0x9747b28c.
    mask, m = 0xFFFF_FFFF, 0x5BD1E995
    length = len(data)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k ^= k >> 24
        h = (h * m & mask) ^ (k * m & mask)
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h ^= h >> 13
    h = h * m & mask
    return h ^ h >> 15
