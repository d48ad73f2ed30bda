"""How long tests wait for facts."""

from __future__ import annotations

from collections.abc import Callable

from jobledger.log import reading

#: Deadlines are written for a machine that has nothing else to do, with some slack; tests wait so many times as long, because
#: the machine may be slow or busy. A wait that ends well ends as soon as the fact is there.
PATIENCE = 4.0


def wait_until(check: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll ``check`` until it is true; `StatusTimeout` naming ``what`` after ``timeout`` seconds, times `PATIENCE`."""
    reading.wait_until(check, PATIENCE * timeout, what)
