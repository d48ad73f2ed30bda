"""The program ``python -m jobledger.cli.nursery``: started by a worker, never by people. See
`jobledger.consumers.isolation.fork_server`.

Arguments: the app, and the number of the control socket's descriptor. Standard input, up to its end: JSON with
``bootstrap``, ``status_url`` and ``path``, the worker's ``sys.path``.
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
    """Import the app and serve the worker."""
    told = json.loads(sys.stdin.buffer.read())
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # jobs that read their standard input find its end
    sys.path[:] = [*told["path"], *(entry for entry in sys.path if entry not in told["path"])]
    from jobledger.consumers.isolation import fork_server

    fork_server.IMPORTING = True
    try:
        app = load_app(target, bootstrap=told["bootstrap"], status_url=told["status_url"])
    except JobledgerError as exc:  # the worker passes it on
        sys.exit(str(exc))
    logs.set_up()
    # A worker that is gone needs no children.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        fork_server.ForkServer(app.registry, socket.socket(fileno=int(descriptor))).serve()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        bound_exit(1 if isinstance(sys.exc_info()[1], BaseException) else 0)
