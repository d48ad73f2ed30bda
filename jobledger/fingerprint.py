"""Groups errors of the same kind. Pure module."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from jobledger.schemas.events import ErrorInfo

#: Hexadecimal digits of a fingerprint.
DIGITS = 16

_FRAME = re.compile(r'^ *File "(?:[^"]*[/\\])?([^"/\\]+)", line \d+, in (.+)$', re.MULTILINE)
#: What differs between two errors of the same kind: quoted texts, hexadecimal numbers and ids, numbers.
_VARIABLE = re.compile(
    r"""'[^']*'|"[^"]*"|\b0x[0-9a-fA-F]+\b|\b[0-9a-fA-F]{8}(?:-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}\b|\d+"""
)


@lru_cache(128)
def fingerprint(error: ErrorInfo) -> str:
    """Return the same text for errors of the same kind: `DIGITS` hexadecimal digits.

    Two errors are of the same kind if they have the same type and were raised along the same functions of the same
    files. Line numbers do not count, because they change with each version of the code. If the error has no traceback,
    its message counts, without quoted texts, ids and numbers.
    """
    frames = _FRAME.findall(error.traceback or "")
    where = [f"{file}:{function}" for file, function in frames] or [_VARIABLE.sub("*", error.message)]
    return hashlib.sha256("\n".join([error.type, *where]).encode("utf-8", "replace")).hexdigest()[:DIGITS]
