"""How long tests wait for facts."""

from __future__ import annotations

from collections.abc import Callable

from jobledger.log import reading

#: The deadlines in the tests are long enough for an idle machine, with some reserve. Tests multiply them by this
#: number, because the machine may be slow or busy. A successful wait ends as soon as the fact exists.
PATIENCE = 4.0


def wait_until(check: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll ``check`` until it is true. Raises `StatusTimeout`, which names ``what``, after ``timeout`` seconds times
    `PATIENCE`."""
    reading.wait_until(check, PATIENCE * timeout, what)
