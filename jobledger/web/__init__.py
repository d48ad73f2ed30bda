"""The HTTP API and the dashboard, as an ASGI app: jobs, plans, queues and tasks over HTTP, and a stream of events.

This package owns the users and roles of HTTP, and the form of requests and answers. It reads the status table and the
log, and changes something only through the app: the package writes no records itself, and does not use the command
line.
"""

from __future__ import annotations

from jobledger.process.extras import missing

try:
    import fastapi as _fastapi
    import jinja2_fragments as _pages
    import sse_starlette as _sse
except ImportError as exc:
    raise missing("web", exc) from exc

from jobledger.web.access import Permit, Role, TrustedProxy, User, UserOf
from jobledger.web.application import create_app
from jobledger.web.dashboard import Dashboard
from jobledger.web.tokens import TokenFile

__all__ = ["Dashboard", "Permit", "Role", "TokenFile", "TrustedProxy", "User", "UserOf", "create_app"]

del _fastapi, _pages, _sse
