"""Renders templates to answers, with the headers of every page.

Every text is shown as text: Jinja2 escapes it, and the characters that control a terminal or the direction of writing
become visible (`printable`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from jinja2_fragments import render_block
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from jobledger import __version__
from jobledger.process.wording import counted
from jobledger.views.values import jsonable
from jobledger.views.words import duration, printable, relative
from jobledger.web.pages.assets import assets
from jobledger.web.pages.services import PageServices, may, role_name

#: A page may load only files of this server. Inline scripts and styles, and other sites, are not allowed.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "HX-Request",
}

#: The pages of the navigation: path, name.
NAVIGATION = (
    ("/", "Overview"),
    ("/jobs", "Jobs"),
    ("/errors", "Errors"),
    ("/queues", "Queues"),
    ("/workers", "Workers"),
    ("/dead-letters", "Dead letters"),
    ("/plans", "Plans"),
)

#: Largest number of characters of a value (arguments, a result) on a page.
VALUE_MOST = 50_000


def _finalized(value: Any) -> Any:
    """Return the value of a template's expression as it is shown. Markup of templates is not changed; every other text is made
    printable."""
    if value is None:
        return ""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@lru_cache(1)
def environment() -> Environment:
    """Return the templates."""
    made = Environment(
        loader=PackageLoader("jobledger.web.pages"),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=number,
        rate=rate,
        duration=duration,
        counted=counted,
        ago=ago,
        bytes=size,
        utc=utc,
        json=json_text,
        short=short,
    )
    made.globals.update(asset=lambda name: assets()[name].name, states=STATES, version=__version__)
    return made


#: The states with a sign for each, so that a state can be recognised without its colour.
STATES: Mapping[str, str] = {
    "scheduled": "◷",
    "queued": "▤",
    "running": "▶",
    "retrying": "↻",
    "succeeded": "✓",
    "failed": "✕",
    "cancelled": "⊘",
    "expired": "∅",
}


def number(value: float) -> str:
    """Format a whole number with thin spaces between groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")


def rate(value: float) -> str:
    """Format a number per second."""
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}" if value < 100 else number(value)


def size(value: int) -> str:
    """Format a number of bytes."""
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):  # noqa: B007  # used after the loop
        if amount < 1024:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def moment(value: dt.datetime | int | None) -> dt.datetime | None:
    """Return a moment (aware, or milliseconds since the epoch) in UTC; None if it is outside the calendar."""
    if value is None or isinstance(value, dt.datetime):
        return None if value is None else value.astimezone(dt.UTC)
    try:
        return dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=value)
    except OverflowError:
        return None


def utc(value: dt.datetime | int | None, form: str = "full") -> str:
    """Format a moment in UTC. ``form``: ``full`` (with milliseconds), ``second``, or ``iso`` for an attribute."""
    when = moment(value)
    if when is None:
        return f"outside the calendar ({value} ms)" if isinstance(value, int) else ""
    if form == "iso":
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    text = when.strftime("%Y-%m-%d %H:%M:%S")
    return text if form == "second" else f"{text}.{when.microsecond // 1000:03d}"


def ago(value: dt.datetime | int | None) -> str:
    """Format a moment relative to now: ``12.0 s ago``, ``in 3 min``; an empty text if there is none."""
    when = moment(value)
    return "" if when is None else relative(when)


def json_text(value: Any) -> str:
    """Format a value as `whole_json` does, with at most `VALUE_MOST` characters."""
    text = whole_json(value)
    return text if len(text) <= VALUE_MOST else text[:VALUE_MOST] + f"\n… {len(text) - VALUE_MOST:,} characters more"


def whole_json(value: Any) -> str:
    """Format a value as JSON with indents. Characters that a page would replace, such as those that control the direction
    of writing, are written as escapes: the text can be copied, or sent back by a form, and is still the same value."""
    text = json.dumps(jsonable(value), ensure_ascii=False, indent=2)
    if printable(text) == text:
        return text
    return "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text)


def short(text: str, most: int = 120) -> str:
    """Return a text on one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def base_of(request: Request, services: PageServices) -> str:
    """Return the beginning of the path of every page. If this app is mounted in another one, or has a prefix,
    ``root_path`` is set."""
    return str(request.scope.get("root_path") or services.prefix)


def job_path(job_id: str) -> str:
    """Return the path of a job's page. An id that would change the path of a URL is a parameter instead."""
    if "/" in job_id or "\\" in job_id or job_id.strip(".") == "":
        return "/job?" + urlencode({"id": job_id})
    return "/jobs/" + quote(job_id, safe="")


class Renderer:
    """Renders the answers of one app's pages."""

    def __init__(self, services: PageServices) -> None:
        self._services = services

    def page(self, request: Request, template: str, status: int = 200, **shown: Any) -> Response:
        """Return a page, or for a request of htmx only the part of the page that changes (the block ``live``)."""
        context = {**self.common(request), "status": status, **shown}
        if is_fragment(request):
            text = render_block(environment(), template, "live", context)
        else:
            text = environment().get_template(template).render(context)
        return Response(text, status, headers=dict(HEADERS), media_type="text/html")

    def unchanged(self, request: Request, key: object) -> tuple[str, Response | None]:
        """Return a digest of ``key``, on which the part that changes depends; and the answer 204, if htmx asks for this
        part and has it already (parameter ``seen``)."""
        digest = hashlib.sha256(repr(key).encode("utf-8", "replace")).hexdigest()[:16]
        if is_fragment(request) and request.query_params.get("seen") == digest:
            return digest, Response(status_code=204, headers=dict(HEADERS))
        return digest, None

    def common(self, request: Request) -> dict[str, Any]:
        """Return the variables of every template."""
        services = self._services
        user = services.user(request)
        base = base_of(request, services)
        path = request.url.path
        return {
            "base": base,
            "path": path.removeprefix(base),
            "query": urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "seen"]),
            "navigation": NAVIGATION,
            "namespace": services.app.names.namespace,
            "events_url": base + services.events_url,
            "user": user,
            "role": role_name(user),
            "may_operate": may(user, "operate"),
            "may_limit": may(user, "admin"),
            "now": dt.datetime.now(dt.UTC),
            "job_path": job_path,
            "seen": "",
        }


def is_fragment(request: Request) -> bool:
    """Return whether htmx asks for the part of a page that changes."""
    return request.headers.get("HX-Request") == "true"
