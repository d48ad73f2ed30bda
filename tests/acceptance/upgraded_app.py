"""The chaos app, run by a later version of Jobledger: one that knows the fact ``JobUnlocked``.

The later version does not exist yet, so this module makes it: to it the new fact means what `JobDue` means. Only the
decoder's table is touched; everything else is the code as it is.
"""

from __future__ import annotations

from jobledger.schemas import codec, events
from tests.acceptance.chaos_app import app

codec._FACTS["jobledger.JobUnlocked"] = events.JobDue

__all__ = ["app"]
