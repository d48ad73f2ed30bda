"""Options that several commands share, worded once; and finding the namespace they mean."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from jobledger.cli import completion
from jobledger.cli.commands import Wrong, judged

if TYPE_CHECKING:
    from jobledger.app import App

Target = Annotated[
    str, typer.Argument(metavar="MODULE:APP", help="The app, e.g. shop.jobs:app or path/to/file.py:app.")
]
Bootstrap = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Kafka's address; wins over JOBLEDGER_BOOTSTRAP.",
        show_default="settings, else embedded",
    ),
]
StatusUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Status table, sqlite:///PATH or postgresql://USER@HOST/DB; wins over JOBLEDGER_STATUS_URL.",
        show_default="settings",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
AppOption = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:APP", help="The app, if it is not the first word.", show_default=False),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Or its namespace alone, without importing the app.",
        autocompletion=completion.namespaces,
        show_default="the only one on this machine",
    ),
]

Queues = Annotated[
    list[str] | None,
    typer.Option(
        "--queue",
        help="Only jobs of this queue; repeat it for several.",
        show_default="all",
        autocompletion=completion.queues,
    ),
]
#: Which times an option takes that is read with `commands.moment_ms`.
TIMES = "ISO 8601, UTC unless it says otherwise, or an age such as 90s, 2h, 3d."

#: Where metrics are served unless a host is given.
HOST = "127.0.0.1"


class Listen(NamedTuple):
    """Where metrics are served; port 0: a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """``PORT`` on the loopback address, or ``HOST:PORT``. Raises `typer.BadParameter`."""
        host, _, port = text.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise typer.BadParameter(f"{text!r}: write a port, 0 to 65535 (0: a free one), or HOST:PORT")
        return cls(host.strip("[]") or HOST, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def following(self, count: int) -> Listen:
        """The same host, ``count`` ports on; a free port stays one."""
        return self._replace(port=self.port + count if self.port else 0)


Metrics = Annotated[
    Listen | None,
    typer.Option(
        "--metrics-port",
        parser=Listen.parse,
        metavar="[HOST:]PORT",
        help="Serve Prometheus metrics; on 127.0.0.1 unless a host is given, e.g. 0.0.0.0:9100.",
        show_default="no",
    ),
]


def _log_format(text: str) -> str:
    if text not in ("text", "json"):
        raise typer.BadParameter(f"{text!r}: text or json")
    os.environ["JOBLEDGER_LOG_FORMAT"] = text  # for the processes that this one starts, too
    return text


LogFormat = Annotated[
    str | None,
    typer.Option(
        "--log-format",
        parser=_log_format,
        metavar="text|json",
        help="One line of text or one JSON object a message; wins over JOBLEDGER_LOG_FORMAT.",
        show_default="text",
    ),
]


def place(
    target: str | None, namespace: str | None, bootstrap: str | None = None, status_url: str | None = None
) -> App:
    """The app to ask: loaded from ``MODULE:APP`` or ``--app``, or an empty one for ``--namespace``, or the only local
    status table's. Raises `Wrong` if both or neither name one.
    """
    from jobledger.app import App
    from jobledger.cli.loading import load_app
    from jobledger.config import Settings
    from jobledger.names import check_name
    from jobledger.streams.store import namespaces_in

    if target is not None and namespace is not None:
        raise Wrong(f"{target} and --namespace {namespace} name the jobs twice: give one of them")
    if target is not None:
        return load_app(target, bootstrap=bootstrap, status_url=status_url)
    settings = Settings.from_env().with_bootstrap(bootstrap).with_status_url(status_url)
    if namespace is None:
        here = namespaces_in(settings.home / "status") if settings.status_url is None else []
        if len(here) != 1:
            known = f" (on this machine: {', '.join(here)})" if here else ""
            raise Wrong(f"whose jobs? Give MODULE:APP, --app MODULE:APP or --namespace NAME{known}")
        namespace = here[0]
    with judged("--namespace"):
        check_name("namespace", namespace)
    return App(namespace, settings=settings)
