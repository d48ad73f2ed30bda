"""Request bodies and answers as JSON, with integers that stay exact.

JavaScript reads numbers as floats, so an integer beyond ±(2⁵³ - 1) would change. By default such an integer is written as
text; a client that reads integers exactly asks for numbers. The integers of requests are read exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import Query, Request
from starlette.responses import Response

from jobledger.web.problems import Problem

T = TypeVar("T")

#: The largest integer such that it and all smaller ones are exact in JavaScript.
SAFE_MOST = 2**53 - 1
#: Largest body of a request about one job, plan, queue or task, in bytes.
SMALL_BODY = 64 * 1024

Integers = Annotated[
    Literal["string", "number"],
    Query(
        description=f"How integers beyond ±{SAFE_MOST} are written: as text, so that JavaScript does not change them, or as "
        "numbers."
    ),
]

_LONG = re.compile(rb"[0-9]{16}")


def answer(
    value: Any, integers: str = "string", *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return JSON builtins as a response. ``integers``: ``string`` or ``number``, see `Integers`."""
    body = encoded(value, integers)
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def encoded(value: Any, integers: str = "string") -> bytes:
    """Return JSON builtins as JSON."""
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:  # a half of a surrogate pair, in a record of another writer
        body = json.dumps(value).encode()
    if integers == "string" and _LONG.search(body) is not None:
        value = msgspec.json.decode(body)
        body = msgspec.json.encode(_exact(value))
    return body


def _exact(value: Any) -> Any:
    """Return JSON builtins with text for each integer beyond `SAFE_MOST`."""
    if isinstance(value, int):
        return value if -SAFE_MOST <= value <= SAFE_MOST else str(value)
    if isinstance(value, dict):
        return {key: _exact(each) for key, each in value.items()}
    return [_exact(each) for each in value] if isinstance(value, list) else value


async def body_of(request: Request, most: int) -> bytes:
    """Return a request's body. Raises `Problem` for a body of more than ``most`` bytes, or one that is not JSON by its
    content type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, f"the body must be JSON: Content-Type is {kind[:100]!r}, not application/json")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_as(kind: type[T], body: bytes) -> T:
    """Return a body as a value of this type. Raises a `Problem` that says which part is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise Problem(422, f"the body does not fit: {exc}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise Problem(400, f"the body is not JSON: {exc}") from None


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body has more than {most:,} bytes, the most that this route accepts")
