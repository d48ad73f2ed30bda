"""The values in docs/wire.md and docs/reference.md: people write programs from these pages alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastavro.schema import to_parsing_canonical_form

from jobledger.schemas import codec
from jobledger.streams.status.store.tables import metadata

ROOT = Path(__file__).parents[2]
WIRE = (ROOT / "docs" / "wire.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")


def crc_64_avro(data: bytes) -> int:
    """Compute the fingerprint by the steps of the page."""
    empty = 0xC15D213AA4D7A795
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (empty & -(byte & 1))
        table.append(byte)
    crc = empty
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc


def test_the_page_has_the_fingerprint_that_the_codec_writes() -> None:
    """The page has it as bytes of a record's head, as a key, and as a number. The steps of the page compute the same
    number."""
    section = WIRE.partition("### The fingerprint")[2].partition("\n### ")[0]
    assert f"`{codec.FINGERPRINT.hex()}`" in section
    assert f"`{(codec.MAGIC + codec.FINGERPRINT).hex(' ')}`" in section
    number = int.from_bytes(codec.FINGERPRINT, "little")
    assert f"`{number:#x}`" in section
    form = to_parsing_canonical_form(json.loads(codec.SCHEMA_TEXT))
    assert crc_64_avro(form.encode()) == number
    shown = re.search(r"canonical form begins with \| `([^`]+)`", section)
    assert shown is not None
    assert form.startswith(shown[1])


def test_every_column_of_the_status_table_is_described() -> None:
    """The page has exactly the columns of each table."""
    section = REFERENCE.partition("### Columns")[2].partition("\n### ")[0]
    for table in metadata.sorted_tables:
        rows = re.search(rf"^`{table.name}`[,:].*?\n\n((?:\|.*\n)+)", section, re.MULTILINE)
        assert rows is not None, table.name
        head, _, *rest = rows[1].splitlines()
        described = [name for row in rest for name in re.findall(r"`(\w+)`", row.split("|")[1])]
        if table.name == "meta":  # the page lists its rows, because their keys are the schema
            described = re.findall(r"`(\w+)` \(", head)
        assert described == [column.name for column in table.columns], table.name
