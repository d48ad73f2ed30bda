"""``jobledger web`` and ``jobledger web-token``: the HTTP API and the dashboard as a service, and its tokens."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import logs, output
from jobledger.cli.commands import CommandGroup, Wrong, judged
from jobledger.cli.loading import load_app
from jobledger.cli.options import HOST, Bootstrap, Json, Listen, LogFormat, StatusUrl, Target, repeatable
from jobledger.errors import ConfigError, PortTaken
from jobledger.process.extras import need
from jobledger.process.logger import get_logger
from jobledger.process.signals import SignalHandlers

if TYPE_CHECKING:
    from jobledger.web import TokenFile, TrustedProxy

LOG = get_logger("jobledger.web")

#: The port, unless another one is given.
PORT = 8420
#: Seconds that open requests get to end at a stop.
GRACE_S = 10
#: Connections that wait to be accepted.
BACKLOG = 2048

Tokens = Annotated[
    Path, typer.Option("--tokens", metavar="FILE", help="The file of tokens.", dir_okay=False, show_default=False)
]

tokens_app = CommandGroup(
    name="web-token", help="Add, list and revoke the tokens of `jobledger web`.", no_args_is_help=True
)


def web(
    target: Target,
    listen: Annotated[
        Listen | None,
        typer.Option(
            parser=Listen.parse,
            metavar="[HOST:]PORT",
            help="Where to listen; on 127.0.0.1 unless a host is given. Any other address than a loopback address needs "
            "--tokens or --proxy-header.",
            show_default=f"{HOST}:{PORT}, or the next free port",
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file of tokens; see `jobledger web-token add`. Without it everybody on this machine is an admin.",
            show_default="none",
        ),
    ] = None,
    proxy_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A header in which a trusted proxy names the user.", show_default="none"),
    ] = None,
    proxy_address: Annotated[
        list[str] | None,
        repeatable("Address or network of the trusted proxy", metavar="ADDRESS", show_default=False),
    ] = None,
    proxy_role: Annotated[
        str, typer.Option(metavar="read|operate|admin", help="The role of the users that the proxy names.")
    ] = "read",
    proxy_role_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A header in which the proxy names the role.", show_default="none"),
    ] = None,
    origin: Annotated[
        list[str] | None,
        repeatable(
            "Origin, such as https://jobs.example.org, of the pages that may change something",
            metavar="ORIGIN",
            show_default="the host of the request",
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option(metavar="PATH", help="The path at which a proxy offers the service.", show_default="none")
    ] = "",
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    log_format: LogFormat = None,
) -> None:
    """Serve the HTTP API and, for browsers, the dashboard.

    Without --tokens and --proxy-header it answers only on this machine, where everybody is an admin.

    Example: jobledger web shop:app --listen 0.0.0.0:8420 --tokens tokens.json
    """
    need("jobledger web", "web")
    from jobledger.web import create_app

    with judged():
        file, proxy = _tokens(tokens), _proxy(proxy_header, proxy_address, proxy_role, proxy_role_header)
    local = file is None and proxy is None
    where = listen or Listen(HOST, free_from(PORT))
    _check_listen(where, local)
    loaded = load_app(target, bootstrap=bootstrap, status_url=status_url)
    try:
        with judged():
            api = create_app(loaded, prefix=prefix, tokens=file, proxy=proxy, local=local, origins=origin or ())
        _serve(api, where, prefix)
    finally:
        loaded.close()


def _serve(api: object, listen: Listen, prefix: str) -> None:
    """Serve until a signal arrives. Raises `PortTaken`."""
    import uvicorn

    config = uvicorn.Config(
        api,  # type: ignore[arg-type]  # an ASGI app
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the address of a trusted proxy must be its own
        timeout_graceful_shutdown=GRACE_S,
    )
    bound = _bound(listen)
    try:
        host, port = bound.getsockname()[:2]
        logs.set_up()
        server = uvicorn.Server(config)

        def on_signal(number: int, frame: object) -> None:
            server.should_exit = True

        # The handler is for a signal that arrives before uvicorn has its own. uvicorn raises the signal again when it has
        # stopped: a stop by SIGTERM is no error.
        with SignalHandlers([signal.SIGTERM], on_signal):
            LOG.info("serving http://%s%s", Listen(host, port), prefix)
            server.run(sockets=[bound])
    finally:
        bound.close()


def _bound(listen: Listen) -> socket.socket:
    """Return a socket that is bound to the address. Raises `PortTaken` and `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError(f"--listen {listen}: {exc}") from exc
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as exc:
        bound.close()
        raise PortTaken(f"--listen {listen}: {exc.strerror}; choose another port") from exc
    return bound


def free_from(port: int) -> int:
    """Return the first free port of the loopback address from ``port`` on. Raises `PortTaken`."""
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except OSError:
                continue
            return candidate
    raise PortTaken(f"no port of {HOST} from {port} on is free: name another port")


def _check_listen(listen: Listen, local: bool) -> None:
    """Raise `Wrong` if others than this machine could use the service without a login."""
    from jobledger.web.access import is_loopback

    if local and not is_loopback(listen.host):
        raise Wrong(
            f"--listen {listen} is not a loopback address, and everybody could use the service: give --tokens FILE "
            "(`jobledger web-token add NAME --role read --tokens FILE` makes it), or --proxy-header with --proxy-address"
        )


def _tokens(path: Path | None) -> TokenFile | None:
    from jobledger.web import TokenFile

    if path is None:
        return None
    file = TokenFile(path)
    file.check()
    return file


def _proxy(header: str | None, addresses: list[str] | None, role: str, role_header: str | None) -> TrustedProxy | None:
    from jobledger.web import TrustedProxy
    from jobledger.web.access import role_of

    if header is None:
        if addresses or role_header is not None:
            raise ConfigError("--proxy-address and --proxy-role-header need --proxy-header")
        return None
    return TrustedProxy(header, addresses or (), role=role_of(role), role_header=role_header)


@tokens_app.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The user's name, which the log records as the author.")],
    tokens: Tokens,
    role: Annotated[str, typer.Option(metavar="read|operate|admin", help="What the user may do.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Add a token, and print it. It is shown only now: the file has a hash of it.

    A running service accepts it at once. Example: jobledger web-token add ann --role operate --tokens tokens.json
    """
    need("jobledger web-token", "web")
    from jobledger.web import TokenFile
    from jobledger.web.access import role_of

    with judged():
        wanted = role_of(role)
    token, text = TokenFile(tokens).add(name, wanted)
    if as_json:
        output.print_json({"id": token.id, "name": token.name, "role": token.role, "token": text})
        return
    print(text)
    output.console(stderr=True).print(
        f"token {token.id} of {token.name}, role {token.role}", style="dim", markup=False, highlight=False
    )


@tokens_app.command("list")
def list_tokens(tokens: Tokens, as_json: Json = False) -> None:
    """List the tokens: their ids, users and roles."""
    need("jobledger web-token", "web")
    from jobledger.web import TokenFile

    known = TokenFile(tokens).tokens()
    if as_json:
        output.print_json(
            [{"id": each.id, "name": each.name, "role": each.role, "created_at": each.created_at} for each in known]
        )
        return
    rows: list[list[output.Cell]] = [[each.id, each.name, each.role, each.created_at] for each in known]
    output.print_table(("id", "name", "role", "created"), rows, empty="no tokens")


@tokens_app.command("revoke")
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="The token's id, from `jobledger web-token list`.")],
    tokens: Tokens,
    as_json: Json = False,
) -> None:
    """Revoke a token. A running service refuses it at once."""
    need("jobledger web-token", "web")
    from jobledger.web import TokenFile

    gone = TokenFile(tokens).revoke(token_id)
    if as_json:
        output.print_json({"id": gone.id, "name": gone.name, "revoked": True})
    else:
        output.console().print(f"token {gone.id} of {gone.name} is revoked", markup=False, highlight=False)
