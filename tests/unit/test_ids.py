"""Ids of derived records: the ids that are in logs today stay the same, and every text has one defined id."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.schemas.ids import derived_id

JOB = "0197a3f0-1c2d-7e4f-8a5b-6c7d8e9f0a1b"
numbers = st.integers(0, 2**31 - 1)
purposes = st.sampled_from(["due", "decided", "overdue", "request", "leased", "dead-letter", "too-large", "crashed"])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def of_workers(job_id: str, *parts: object) -> str:
    """The function of the worker before there was one for all parts."""
    try:
        space = uuid.UUID(job_id)
    except ValueError:
        space = uuid.uuid5(uuid.NAMESPACE_OID, job_id)
    return str(uuid.uuid5(space, "/".join(map(str, parts))))


def of_coordinators(job_id: str, run: int, release: int, what: str) -> str:
    """The function of the coordinator before there was one for all parts."""
    try:
        space = bytes.fromhex(job_id.replace("-", ""))
    except ValueError:
        space = b""
    if len(space) != 16:
        space = uuid.uuid5(uuid.NAMESPACE_OID, job_id).bytes
    digest = bytearray(hashlib.sha1(space + b"%d/%d/%s" % (run, release, what.encode())).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


@given(st.uuids(), numbers, numbers, purposes)
def test_the_ids_of_canonical_job_ids_are_those_of_both_earlier_functions(
    job: uuid.UUID, run: int, release: int, what: str
) -> None:
    """Every job id that Jobledger makes or accepts is the canonical text of a UUID."""
    made = derived_id(str(job), run, release, what)
    assert made == of_workers(str(job), run, release, what) == of_coordinators(str(job), run, release, what)
    assert made == str(uuid.uuid5(job, f"{run}/{release}/{what}"))


@given(st.uuids(), numbers, text, numbers, numbers)
def test_other_names_are_those_of_the_earlier_functions(
    job: uuid.UUID, run: int, topic: str, partition: int, offset: int
) -> None:
    """The job of ``fallback=``, and rejected records of workers and of the coordinator."""
    assert derived_id(str(job), run, "fallback") == of_workers(str(job), run, "fallback")
    assert derived_id("record", topic, partition, offset) == of_workers("record", topic, partition, offset)
    assert derived_id(topic, partition, offset, "rejected") == of_coordinators(topic, partition, offset, "rejected")


@given(text, numbers, numbers, purposes)
def test_each_text_has_one_id(job: str, run: int, release: int, what: str) -> None:
    """The id is a canonical UUID v5. Where both earlier functions agreed, it is the same."""
    made = derived_id(job, run, release, what)
    parsed = uuid.UUID(made)
    assert (str(parsed), parsed.version, parsed.variant) == (made, 5, uuid.RFC_4122)
    earlier = of_workers(job, run, release, what)
    if earlier == of_coordinators(job, run, release, what):
        assert made == earlier


@pytest.mark.parametrize(
    "job",
    [JOB.upper(), JOB.replace("-", ""), f"-{JOB}-", "-".join(JOB.replace("-", ""))],
    ids=["upper case", "no hyphens", "outer hyphens", "many hyphens"],
)
def test_32_hexadecimal_digits_with_any_hyphens_are_a_uuid(job: str) -> None:
    """The spelling does not matter, as before in both functions."""
    assert derived_id(job, 1, 2, "due") == derived_id(JOB, 1, 2, "due") == of_workers(job, 1, 2, "due")


@pytest.mark.parametrize(
    "job",
    [
        f"urn:uuid:{JOB}",
        f"{{{JOB}}}",
        f" {JOB}",
        JOB.replace("-", " "),
        JOB.replace("-", "_"),
        "0x" + JOB.replace("-", "")[2:],
        "٣" * 32,
        JOB[:-1],
        JOB + "0",
        "",
        "order-17",
    ],
)
def test_any_other_job_id_is_a_text(job: str) -> None:
    """Its namespace is the UUID v5 of the text in the OID namespace, as docs/wire.md says."""
    space = uuid.uuid5(uuid.NAMESPACE_OID, job)
    assert derived_id(job, 1, 2, "due") == str(uuid.uuid5(space, "1/2/due"))
