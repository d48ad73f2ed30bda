"""The user of a request, and what the user may do. `ROUTES` is the table of roles of the API; a route that is in no table
is refused.

The logins, in this order: a token (from a browser as the password of any name), a header of a trusted proxy, a function
of the app that mounts the API, or, for a service that only this machine can reach, this machine's user.
"""

from __future__ import annotations

import base64
import inspect
import ipaddress
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, Protocol

import anyio.to_thread
from fastapi import Depends, Request

from jobledger.client.commands import BY_MOST, who
from jobledger.errors import ConfigError, text_of
from jobledger.kafka.topic_names import check_text
from jobledger.process.logger import get_logger
from jobledger.web.origin import refusal
from jobledger.web.problems import Problem

LOG = get_logger("jobledger.web")

API = "/api/v1"


class Role(IntEnum):
    """What a user may do. Each role includes the roles before it."""

    READ = 1
    OPERATE = 2
    ADMIN = 3


def role_of(text: str) -> Role:
    """Return the role of this name. Raises `ConfigError`."""
    try:
        return Role[text.upper()]
    except KeyError:
        raise ConfigError(f"{text!r} is not a role; the roles are {', '.join(r.name.lower() for r in Role)}") from None


@dataclass(frozen=True, slots=True)
class User:
    """A user. ``name``: the log has it as the author of the user's actions. Raises `ConfigError` for a name that the log
    does not accept."""

    name: str
    role: Role

    def __post_init__(self) -> None:
        check_text("user", self.name, BY_MOST)


#: Returns the user of a request, or None if the request has none. It may be ``async``; a plain function runs in a
#: thread.
UserOf = Callable[[Request], "User | Awaitable[User | None] | None"]
#: Returns whether a user may do something that the user's role allows: ``permit(user, action, target)``. ``action``: a
#: name in `ROUTES`. ``target``: the job's id, the plan's id, or the name of the queue or task; None: the action has no
#: single target. It may be ``async``; a plain function runs in a thread.
Permit = Callable[[User, str, "str | None"], "bool | Awaitable[bool]"]


class Action(NamedTuple):
    """What a route does, and the least role for it. ``in_body``: the target is in the request's body, so the route asks
    the app's `Permit` itself."""

    name: str
    role: Role
    in_body: bool = False


#: The action of each route of the API; None: the route needs no user.
ROUTES: Mapping[str, Action | None] = {
    f"{method} {API}{path}": action
    for method, path, action in (
        ("GET", "/healthz", None),
        ("GET", "/readyz", None),
        ("GET", "/openapi.json", Action("read", Role.READ)),
        ("GET", "/me", Action("read", Role.READ)),
        ("GET", "/jobs", Action("jobs.read", Role.READ)),
        ("GET", "/jobs:count", Action("jobs.read", Role.READ)),
        ("GET", "/jobs/{job_id}", Action("jobs.read", Role.READ)),
        ("GET", "/jobs/{job_id}/timeline", Action("jobs.read", Role.READ)),
        ("GET", "/jobs/{job_id}/explain", Action("jobs.read", Role.READ)),
        ("GET", "/errors", Action("jobs.read", Role.READ)),
        ("GET", "/dead-letters", Action("jobs.read", Role.READ)),
        ("GET", "/workers", Action("workers.read", Role.READ)),
        ("GET", "/events", Action("jobs.read", Role.READ)),
        ("GET", "/plans", Action("plans.read", Role.READ)),
        ("GET", "/plans/{plan_id}", Action("plans.read", Role.READ)),
        ("GET", "/queues", Action("queues.read", Role.READ)),
        ("GET", "/tasks", Action("tasks.read", Role.READ)),
        ("POST", "/jobs", Action("jobs.submit", Role.OPERATE, in_body=True)),
        ("POST", "/jobs:batch", Action("jobs.submit", Role.OPERATE, in_body=True)),
        ("POST", "/jobs/{job_id}:cancel", Action("jobs.cancel", Role.OPERATE)),
        ("POST", "/jobs/{job_id}:redrive", Action("jobs.redrive", Role.OPERATE)),
        ("POST", "/plans", Action("plans.make", Role.OPERATE)),
        ("POST", "/plans/{plan_id}:pause", Action("plans.steer", Role.OPERATE)),
        ("POST", "/plans/{plan_id}:resume", Action("plans.steer", Role.OPERATE)),
        ("POST", "/plans/{plan_id}:abort", Action("plans.steer", Role.OPERATE)),
        ("POST", "/queues/{name}:pause", Action("queues.pause", Role.OPERATE)),
        ("POST", "/queues/{name}:resume", Action("queues.resume", Role.OPERATE)),
        ("POST", "/queues/{name}:limit", Action("queues.limit", Role.ADMIN)),
        ("POST", "/tasks/{name}:pause", Action("tasks.pause", Role.OPERATE)),
        ("POST", "/tasks/{name}:resume", Action("tasks.resume", Role.OPERATE)),
        ("POST", "/tasks/{name}:limit", Action("tasks.limit", Role.ADMIN)),
    )
}


class Tokens(Protocol):
    """The method of a file of tokens that this module uses."""

    def user_of(self, text: str) -> User | None: ...


class TrustedProxy:
    """A proxy that has authenticated the user, and names the user in a header.

    ``header``: the name of the header. ``addresses``: the proxy's addresses or networks (``10.0.0.0/24``); from any
    other address the header is ignored. ``role``: the role of the users. ``role_header``: a header in which the proxy
    names the role instead. The proxy must remove both headers from the requests that it receives. Raises
    `ConfigError`.
    """

    def __init__(
        self, header: str, addresses: Collection[str], *, role: Role = Role.READ, role_header: str | None = None
    ) -> None:
        if not addresses:
            raise ConfigError(
                f"the header {header!r} names the user: also give the addresses of the proxy that sets it, because "
                "anybody else could set it, too"
            )
        self.header, self.role, self.role_header = header.lower(), role, role_header and role_header.lower()
        self._networks = [_network(each) for each in addresses]

    def user(self, request: Request) -> User | None:
        """Return the user that the proxy names; None if the request is not from the proxy, or names no user."""
        names = request.headers.getlist(self.header)
        if not names or not self._trusts(request):
            return None
        if len(names) > 1:
            raise Problem(401, f"the request has the header {self.header} {len(names)} times")
        role = self.role
        try:
            if self.role_header is not None and (text := request.headers.get(self.role_header)) is not None:
                role = role_of(text.strip())
            return User(_text(names[0].strip()), role)
        except ConfigError as exc:
            raise Problem(401, f"the proxy's headers name no user: {text_of(exc)}") from None

    def _trusts(self, request: Request) -> bool:
        try:
            address = ipaddress.ip_address("" if request.client is None else request.client.host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


@dataclass(frozen=True)
class Access:
    """The logins, and the rules. ``local``: only this machine can reach the service, so its user needs no token.
    ``origins``: see `jobledger.web.origin.refusal`."""

    tokens: Tokens | None = None
    proxy: TrustedProxy | None = None
    user: UserOf | None = None
    permit: Permit | None = None
    local: bool = False
    origins: Collection[str] = ()


class Guard:
    """Finds the user of each request, and decides whether the user may make it. ``routes``: tables like `ROUTES`."""

    def __init__(self, access: Access, *routes: Mapping[str, Action | None]) -> None:
        if access.tokens is None and access.proxy is None and access.user is None and not access.local:
            raise ConfigError(
                "create_app() must know who asks: give user=, a function that returns the User of a request, tokens= or "
                "proxy="
            )
        self._access = access
        self._routes = {key: action for table in routes for key, action in table.items()}
        self._me = User(who(), Role.ADMIN)

    @property
    def asks_for_tokens(self) -> bool:
        """Whether users may log in with a token."""
        return self._access.tokens is not None

    def action(self, method: str, path: str) -> Action | None:
        """Return the action of a route; None if it needs no user. Raises `KeyError` for a route without a rule."""
        return self._routes[f"{'GET' if method == 'HEAD' else method} {path}"]

    async def admit(self, request: Request) -> User:
        """Return the user of a request that is allowed. Raises `Problem`."""
        route = request.scope["route"]
        try:
            action = self.action(request.method, route.path)
        except KeyError:
            raise Problem(403, f"nobody may use {route.path}: it is in no table of roles") from None
        if action is None:
            return User("anybody", Role.READ)
        user, bearer = await self._who(request)
        if user.role < action.role:
            raise Problem(
                403,
                f"{user.name} has the role {user.role.name.lower()}, but {action.name} needs the role "
                f"{action.role.name.lower()}",
            )
        if not bearer and (why := refusal(request.method, request.headers, self._access.origins)) is not None:
            raise Problem(403, why, title="Request of another site")
        if not action.in_body:
            await self.permit(user, action.name, next(iter(request.path_params.values()), None))
        return user

    async def permit(self, user: User, action: str, target: str | None) -> None:
        """Ask the app whether a user may do this. Raises `Problem` if not."""
        if self._access.permit is not None and not await _called(self._access.permit, user, action, target):
            what = action if target is None else f"{action} of {target}"
            raise Problem(403, f"{user.name} is not permitted {what}")

    async def _who(self, request: Request) -> tuple[User, bool]:
        """Return the user, and whether the request has a bearer token: no browser adds such a token by itself."""
        access, user = self._access, None
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        if access.tokens is not None and scheme.lower() in ("bearer", "basic"):
            basic = scheme.lower() == "basic"
            try:
                user = access.tokens.user_of(_password(text) if basic else text.strip())
            except ConfigError as exc:
                LOG.error("%s", text_of(exc))
                raise Problem(503, "the service cannot read its file of tokens", headers={"Retry-After": "30"}) from exc
            if user is None:
                raise _unknown("the token is not known, or was revoked")
            # A browser adds a password also to requests that other sites cause.
            return user, not basic
        if access.proxy is not None:
            user = access.proxy.user(request)
        if user is None and access.user is not None:
            user = await _called(access.user, request)
        if user is None and access.local:
            _check_host(request)
            user = self._me
        if user is None:
            raise _unknown(
                "give a token: Authorization: Bearer …" if access.tokens is not None else "nobody is logged in"
            )
        return user, False


def _password(text: str) -> str:
    """Return the password of the scheme ``Basic``: browsers ask for a token in this form. Empty if it cannot be read."""
    try:
        return base64.b64decode(text.strip(), validate=True).decode().partition(":")[2].strip()
    except ValueError:
        return ""


async def admitted(request: Request) -> User:
    """Return the user of an allowed request: the dependency of every route. Raises `Problem`."""
    guard: Guard = request.app.state.guard
    return await guard.admit(request)


#: The parameter of a route that needs to know its user.
Caller = Annotated[User, Depends(admitted)]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on this host. A name other than ``localhost`` is
    not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_host(request: Request) -> None:
    """Refuse a request whose header ``Host`` is not a loopback name. The name of another site can resolve to this
    machine (DNS rebinding), and a browser then treats this service as a part of that site."""
    host = request.headers.get("host", "")
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name.lower()):
        raise Problem(
            421,
            f"this service answers without a token only as localhost, not as {host[:200]!r}: use its address, or start it "
            "with --tokens",
        )


def _unknown(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="jobledger"'})


async def _called(function: Callable[..., Any], *args: object) -> Any:
    """Call a function of the app: on the loop if it is ``async``, else in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    answer = await anyio.to_thread.run_sync(lambda: function(*args))
    return await answer if inspect.isawaitable(answer) else answer


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as exc:
        raise ConfigError(f"{text!r} is not the address or network of a proxy: {exc}") from None


def _text(header: str) -> str:
    """Return a header as UTF-8: servers decode headers as Latin-1."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        raise ConfigError(f"{header!r} is not UTF-8") from None
