"""The static files: their addresses, which change with their content, and their answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

#: The media types of the files that are served; no other file is.
TYPES: Mapping[str, str] = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
#: The files, by the names with which templates ask for them.
FILES: Mapping[str, str] = {
    "pages.css": "pages.css",
    "pages.js": "pages.js",
    "theme.js": "theme.js",
    "chart.js": "chart.js",
    "icon.svg": "icon.svg",
    "htmx.js": "vendor/htmx/htmx.min.js",
    "uplot.js": "vendor/uplot/uPlot.iife.min.js",
    "uplot.css": "vendor/uplot/uPlot.min.css",
}


@dataclass(frozen=True)
class Asset:
    """A static file. ``name``: with a digest of the content, so that a browser may keep the file for ever."""

    name: str
    type: str
    content: bytes


@lru_cache(1)
def assets() -> Mapping[str, Asset]:
    """Return every static file by the name in `FILES`."""
    folder = resources.files("jobledger.web.pages") / "static"
    found: dict[str, Asset] = {}
    for name, path in FILES.items():
        content = folder.joinpath(*path.split("/")).read_bytes()
        stem, _, ending = name.rpartition(".")
        digest = hashlib.sha256(content).hexdigest()[:16]
        found[name] = Asset(f"{stem}.{digest}.{ending}", TYPES[ending], content)
    return found


@lru_cache(1)
def by_address() -> Mapping[str, Asset]:
    """Return every static file by its name with the digest."""
    return {asset.name: asset for asset in assets().values()}
