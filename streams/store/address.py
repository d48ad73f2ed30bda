"""URLs of status databases as they may be shown: with everything but their passwords. Opens nothing."""

from __future__ import annotations

import sqlalchemy
from sqlalchemy.exc import ArgumentError

#: What a URL's query may carry that nobody else should read.
_SECRETS = ("password", "sslpassword", "passfile")


def shown(url: str) -> str:
    """``url`` for logs, reports and errors: no password, wherever in it that stands."""
    scheme = url.partition(":")[0]
    if scheme == "sqlite":
        return url
    try:
        parsed = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):  # what stands where the port should may be a password with an unquoted sign
        return f"{scheme[:20]}://…" if "://" in url else scheme[:20]
    return parsed.difference_update_query(_SECRETS).render_as_string(hide_password=True)
