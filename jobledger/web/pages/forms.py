"""The fields of a form that was sent, within limits of their size and number."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.requests import Request

from jobledger.web.pages.problem_pages import refused

#: Largest number of bytes of a form, and of its fields. Arguments of a copy are in a form.
BYTES_MOST, FIELDS_MOST = 2_000_000, 20
#: Fields in which people write; ids and names are used as they are.
STRIPPED = ("reason", "rate", "concurrency")


async def fields_of(request: Request) -> Mapping[str, str]:
    """Return the fields of a form (``application/x-www-form-urlencoded``), without empty ones; of several values of a
    field the last one. Raises an HTTP error 400 or 413."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise refused(f"the request has the type {kind[:100]!r}, and not that of a form")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BYTES_MOST:
            raise refused(f"the form has more than {BYTES_MOST:,} bytes", 413)
    try:
        pairs = parse_qsl(body.decode("utf-8"), max_num_fields=FIELDS_MOST, errors="strict")
    except ValueError as exc:
        raise refused(f"the form cannot be read: {exc}") from exc
    return {name: value.strip() if name in STRIPPED else value for name, value in pairs if value.strip()}
