"""Options that several commands share, with one text each."""

from __future__ import annotations

import os
from typing import Annotated, Any, NamedTuple

import typer

from jobledger.cli import completion
from jobledger.cli.commands import seconds


def repeatable(text: str, **options: Any) -> Any:
    """Return an option that may be repeated. ``text``: its help; that it may be repeated is added. ``options``: as for
    `typer.Option`."""
    return typer.Option(help=f"{text}; repeat the option for several.", **{"show_default": "any", **options})


def timespan(text: str, **options: Any) -> Any:
    """Return an option that takes a number of seconds. ``text``: its help. ``options``: as for `typer.Option`."""
    return typer.Option(parser=seconds, metavar="SECONDS", help=text, **options)


#: The times that an option accepts, if `commands.moment_ms` parses it.
TIMES = "ISO 8601 (UTC if without a zone), or an age such as 90s, 2h, 3d."


def moment(text: str, *names: str, **options: Any) -> Any:
    """Return an option that takes a time, as text for `commands.moment_ms`. ``text``: its help, without the format.
    ``names``, ``options``: as for `typer.Option`."""
    return typer.Option(*names, metavar="TIME", help=f"{text}: {TIMES}", **options)


Target = Annotated[
    str, typer.Argument(metavar="MODULE:APP", help="The app, e.g. shop.jobs:app or path/to/file.py:app.")
]
Bootstrap = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Kafka's address; overrides JOBLEDGER_BOOTSTRAP.",
        show_default="settings, else the embedded broker",
    ),
]
StatusUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Status table, sqlite:///PATH or postgresql://USER@HOST/DB; overrides JOBLEDGER_STATUS_URL.",
        show_default="settings",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Reason = Annotated[str | None, typer.Option("--reason", "-r", help="The reason, kept in the log.", show_default=False)]
By = Annotated[str | None, typer.Option("--by", help="Who gives the command.", show_default="user@host")]
AppWord = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODULE:APP]", help="The app, unless an option names it.", show_default=False),
]
AppOption = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:APP", help="The app, if it is not the first argument.", show_default=False),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The app's namespace instead of the app; nothing is imported.",
        autocompletion=completion.namespaces,
        show_default="the only one on this machine",
    ),
]

Queues = Annotated[
    list[str] | None, repeatable("Only jobs of this queue", show_default="all", autocompletion=completion.queues)
]
#: Default host for metrics.
HOST = "127.0.0.1"


class Listen(NamedTuple):
    """Address for metrics; port 0: a free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Parse ``PORT``, on the loopback address, or ``HOST:PORT``. Raises `typer.BadParameter`."""
        host, _, port = text.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise typer.BadParameter(f"{text!r}: write a port, 0 to 65535 (0: a free one), or HOST:PORT")
        return cls(host.strip("[]") or HOST, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def following(self, count: int) -> Listen:
        """Return the same host with the port ``count`` higher; port 0 stays 0."""
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
        raise typer.BadParameter(f"{text!r} is not text or json")
    os.environ["JOBLEDGER_LOG_FORMAT"] = text  # applies to child processes, too
    return text


LogFormat = Annotated[
    str | None,
    typer.Option(
        "--log-format",
        parser=_log_format,
        metavar="text|json",
        help="One line of text, or one JSON object, per message; overrides JOBLEDGER_LOG_FORMAT.",
        show_default="text",
    ),
]
