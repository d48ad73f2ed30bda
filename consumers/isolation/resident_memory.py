"""Reads from ``/proc`` how much memory a process uses."""

from __future__ import annotations

import os

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_memory(process: int | str) -> int:
    """Return the resident memory of a process, in bytes. ``process``: its id, or ``self``. Raises `OSError` where the
    system has no ``/proc``, or if the process has ended."""
    with open(f"/proc/{process}/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * _PAGE
