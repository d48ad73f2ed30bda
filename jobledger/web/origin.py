"""Whether a request that changes something comes from the service's own page. A browser adds the user's login also to
requests that pages of other sites cause, and these requests must be refused. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

#: Methods that change nothing.
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PORTS = {"http": 80, "https": 443}


def refusal(method: str, headers: Mapping[str, str], allowed: Collection[str] = ()) -> str | None:
    """Return why a request is refused as one of another site; None if it is not refused.

    ``headers``: by lower-case names. ``allowed``: further origins of the service's own pages, such as
    ``https://jobs.example.org``: behind a proxy the header ``Host`` may differ from the address in the browser. A request without any of the
    headers that browsers send about the origin is not from a browser, and is not refused.
    """
    if method in SAFE:
        return None
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None and origin in allowed:
        return None
    if site is not None and site not in ("same-origin", "none"):
        return f"a page of another site sent this request (Sec-Fetch-Site: {site[:50]})"
    source = origin if origin is not None else headers.get("referer")
    if source is None or (origin is None and _origin(source) in allowed):
        return None
    host = headers.get("host", "")
    if (wanted := _host(source)) is None or wanted != _with_scheme(source, host):
        return (
            f"a page of {source[:200]!r} sent this request to {host[:200]!r}: name the page's own origin with --origin "
            "(create_app: origins=) if a proxy changes the header Host"
        )
    return None


def _origin(url: str) -> str:
    """Return the origin of a page's address, as the header ``Origin`` has it: the header ``Referer`` has the whole
    address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}"


def _host(url: str) -> tuple[str, int | None] | None:
    """Return host and port of a URL; None if it has none (``null``, or not a URL)."""
    try:
        parts = urlsplit(url)
        return None if parts.hostname is None else (parts.hostname, parts.port or _PORTS.get(parts.scheme))
    except ValueError:
        return None


def _with_scheme(url: str, host: str) -> tuple[str, int | None] | None:
    """Return host and port of a ``Host`` header. The port may be left out if it is the default port of the scheme of
    ``url``."""
    return _host(f"{url.partition(':')[0]}://{host}")
