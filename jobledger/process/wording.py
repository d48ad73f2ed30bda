"""Words of messages that depend on a number."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """Format a number with its noun, in the plural unless the number is 1: ``1 job``, ``1,200 jobs``."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"
