"""The options of a copy of a job with changed arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict


class CopyOptions(TypedDict, total=False):
    """What a copy has that differs from the original, and who asked for the copy; see `App.copy`."""

    args: Mapping[str, Any] | None
    without: str | Iterable[str]
    queue: str | None
    tags: Mapping[str, str] | None
    key: str | None
    priority: Literal["high", "normal", "low"] | None
    by: str | None
    reason: str | None
