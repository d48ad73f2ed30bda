"""Runs PgBouncer in front of a PostgreSQL server, for tests: the program in ``JOBLEDGER_TEST_PGBOUNCER``, or the one on
the PATH."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from jobledger.kafka.embedded.ports import free_port
from tests.patience import PATIENCE
from tests.postgres import CONNECT_TIMEOUT_S, unprivileged

ENVIRONMENT = "JOBLEDGER_TEST_PGBOUNCER"
PROGRAM = os.environ.get(ENVIRONMENT) or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
START_TIMEOUT_S = 30 * PATIENCE

_CONFIGURATION = """\
[databases]
* = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
default_pool_size = {size}
"""


@contextmanager
def pgbouncer(url: str, *, pool_mode: str, size: int) -> Iterator[str]:
    """Yield the URL of a database behind PgBouncer, which uses ``size`` connections for all its clients. Skips the test
    if there is no PgBouncer."""
    if PROGRAM is None:
        pytest.skip(f"no PgBouncer: {ENVIRONMENT} is not set, and there is none on the PATH")
    server = sqlalchemy.make_url(url)
    words = {"host": server.host, "port": server.port, "user": server.username, "password": server.password}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="jobledger-pgbouncer-") as folder:
        file, log = Path(folder) / "pgbouncer.ini", Path(folder) / "log"
        line = " ".join(f"{name}={value}" for name, value in words.items() if value is not None)
        file.write_text(_CONFIGURATION.format(server=line, port=port, pool_mode=pool_mode, size=size), "utf-8")
        # PgBouncer refuses to run as root. It changes to this user itself after it has read its file.
        user = [] if os.geteuid() else ["--user", unprivileged()]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [PROGRAM, *user, file], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            found = sqlalchemy.make_url(url).set(host="127.0.0.1", port=port, username="anybody", password=None)
            behind = found.render_as_string(hide_password=False)
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    psycopg.connect(behind, connect_timeout=CONNECT_TIMEOUT_S).close()
                    break
                except psycopg.OperationalError as exc:
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"PgBouncer does not start: {exc}; {log.read_text('utf-8', 'replace')[-1500:]}")
                time.sleep(0.05)
            yield behind
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
