"""The fork server's program, ``python -m jobledger.cli.fork_server_program``. Only a worker starts this program, people never do.
See `jobledger.consumers.isolation.fork_server`.

The arguments are the app, and the number of the control socket's descriptor. Standard input, read up to its end, is
JSON with ``bootstrap``, ``status_url`` and ``path``, the worker's ``sys.path``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

from jobledger.cli import logs
from jobledger.cli.loading import load_app
from jobledger.errors import JobledgerError
from jobledger.process.process_exit import bound_exit


def main(target: str, descriptor: str) -> None:
    """Import the app, then fork child processes until the worker closes the socket."""
    options = json.loads(sys.stdin.buffer.read())
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # a job that reads standard input gets the end of file at once
    sys.path[:] = [*options["path"], *(entry for entry in sys.path if entry not in options["path"])]
    from jobledger.consumers.isolation import fork_server

    fork_server.IMPORTING = True
    try:
        app = load_app(target, bootstrap=options["bootstrap"], status_url=options["status_url"])
    except JobledgerError as exc:  # the worker reports this text
        sys.exit(str(exc))
    logs.set_up()
    # These errors mean that the worker has ended, and then no child process is needed.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        fork_server.ForkServer(app.registry, socket.socket(fileno=int(descriptor))).serve()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        bound_exit(1 if isinstance(sys.exc_info()[1], BaseException) else 0)
