"""The chaos app in a later version of Jobledger, which knows the fact ``JobUnlocked``.

The later version does not exist yet, so this module imitates it: there the new fact has the meaning of `JobDue`. Only
the table of the decoder is changed.
"""

from __future__ import annotations

from jobledger.schemas import codec, events
from tests.acceptance.chaos_app import app

codec._FACTS["jobledger.JobUnlocked"] = events.JobDue

__all__ = ["app"]
