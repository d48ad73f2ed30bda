"""Finds free ports of the loopback address, and the process that uses a port."""

from __future__ import annotations

import errno
import random
import socket

from jobledger.errors import ConfigError, PortTaken
from jobledger.kafka.embedded.defaults import HOST
from jobledger.process.extras import missing

try:
    import psutil
except ImportError as exc:
    raise missing("kafka", exc) from exc

# These ports are below the range that systems use for outgoing connections. While a broker with a port in that range is
# stopped, another program, or a Jobledger client that connects to itself, could get the broker's port.
FREE_PORTS = range(20_000, 30_000)


def answers(port: int) -> bool:
    """Return whether a process accepts connections on ``port``."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def bindable(port: int) -> bool:
    """Return whether a broker could listen on ``port``; False if the port is in use.

    Raises `ConfigError` if the port cannot be used for another reason, such as a missing permission.
    """
    with socket.socket() as probe:
        # The broker sets this option, too. With it, closed connections of the last run (TIME_WAIT) do not block the
        # port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError(f"port {port} of {HOST} cannot be used: {error.strerror}; choose another port") from error
    return True


def check_free(port: int) -> None:
    """Raise `PortTaken` if ``port`` is not free.

    The message names the process that uses the port, if the system shows this process to the user.
    """
    if bindable(port) and not answers(port):
        return
    raise PortTaken(
        f"port {port} of {HOST} is held by {_holder(port)}: stop it, choose another port with `--port` (0: a free "
        f"port), or use the broker there with JOBLEDGER_BOOTSTRAP={HOST}:{port} if it is a Kafka broker"
    )


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({' '.join(process.cmdline())[:120] or process.name()})"
    except (psutil.Error, OSError):
        pass  # some systems do not show other users' sockets
    return "another process (this user may not see which)"


def free_port(avoid: int = 0) -> int:
    """Return a free port other than ``avoid``. Raises `PortTaken` if none of 200 random ports is free."""
    for port in random.sample(FREE_PORTS, 200):
        if port != avoid and bindable(port) and not answers(port):
            return port
    raise PortTaken(
        f"no free port was found between {FREE_PORTS.start} and {FREE_PORTS.stop - 1}: choose one with `--port`"
    )
