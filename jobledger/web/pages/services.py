"""The interface between the pages and the application that serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from jobledger.app import App

#: The roles, each with the rights of those before it.
ROLES = ("read", "operate", "admin")


class User(Protocol):
    """The person, or the program, that sent a request. ``role``: one of `ROLES`, or a member of an enum with these
    names."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> Any: ...


@dataclass(frozen=True)
class PageServices:
    """The services of the pages.

    ``app``: the app whose jobs are shown. ``prefix``: the beginning of the path of every page, without a slash at its
    end. ``user``: returns the user of a request. ``require``: raises an HTTP error 403 unless this user has at least
    this role. ``permit``: raises an HTTP error 403 if the user may not do an action (``jobs.cancel``) with a target: a
    job's id, a plan's id, or the name of a queue or task; None: the action has no single target. ``redact``: replaces
    data that must not be shown in the arguments or the result (JSON builtins) of a job of this task; None: everything may
    be shown. ``show_arguments``: whether arguments and results are shown by default; False: only when a person asks for
    them. ``events_url``: the path of the event stream, below ``prefix``.
    """

    app: App
    prefix: str
    user: Callable[[Request], User]
    require: Callable[[Request, str], None]
    permit: Callable[[Request, str, str | None], None] | None = None
    redact: Callable[[str, Any], Any] | None = None
    show_arguments: bool = True
    events_url: str = "/api/v1/events"


def role_name(user: User) -> str:
    """Return the role of a user as one of `ROLES`; an unknown role counts as the first one."""
    name = str(getattr(user.role, "name", user.role)).lower()
    return name if name in ROLES else ROLES[0]


def may(user: User, role: str) -> bool:
    """Return whether a user has at least this role."""
    return ROLES.index(role_name(user)) >= ROLES.index(role)
