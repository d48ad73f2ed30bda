"""Shows URLs of status databases without their passwords. Opens no connections."""

from __future__ import annotations

import sqlalchemy
from sqlalchemy.exc import ArgumentError

#: Parameters of a URL's query that must not be shown.
_SECRETS = ("password", "sslpassword", "passfile")


def shown(url: str) -> str:
    """Return ``url`` for logs, reports and errors, without a password in any part of it."""
    scheme = url.partition(":")[0]
    if scheme == "sqlite":
        return url
    try:
        parsed = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):  # the text where the port should be may be part of an unquoted password
        return f"{scheme[:20]}://…" if "://" in url else scheme[:20]
    return parsed.difference_update_query(_SECRETS).render_as_string(hide_password=True)
