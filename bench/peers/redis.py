"""Starts a Redis server for one peer, without persistence and on a free port of 127.0.0.1. Contains enough of Redis's
protocol to read its counts.

Without persistence, a Redis server that dies loses every job. So the figures are Redis's best case.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers import tools
from bench.peers.port import Command, NotRun, Session, Setting
from bench.peers.processes import Family, running
from jobledger.kafka.embedded.ports import free_port

HOST = "127.0.0.1"
START_S = 20.0
#: Numbers of the databases: jobs are in one and results in the other, if the system can separate them.
JOBS, RESULTS = 0, 1


class Redis:
    """A connection to a Redis server; `ask` sends one command and returns its reply."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket = socket.create_connection((HOST, port), timeout=30)
        self._file = self._socket.makefile("rb")
        self._database = JOBS

    def ask(self, *words: str, database: int = JOBS) -> Any:
        """Send one command and return the reply: an int, bytes, None or a list of these. Raises `RuntimeError` for
        Redis's own errors."""
        if database != self._database:
            self._exchange("SELECT", str(database))
            self._database = database
        return self._exchange(*words)

    def _exchange(self, *words: str) -> Any:
        encoded = [word.encode() for word in words]
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)]
        self._socket.sendall(b"".join(parts))
        return self._reply()

    def _reply(self) -> Any:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError(f"the Redis server on port {self.port} has closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self._reply() for _ in range(int(rest))]
        return rest

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


class RedisSession:
    """The common part of the sessions of all peers on Redis."""

    def __init__(self, server: Family, redis: Redis) -> None:
        self.server, self.redis = server, redis
        self.url = f"redis://{HOST}:{redis.port}"

    @property
    def brokers(self) -> Sequence[int]:
        """The Redis server's process."""
        return self.server.pids

    def fresh(self) -> None:
        """Delete everything on the Redis server."""
        self.redis.ask("FLUSHALL")

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with the addresses of Redis, for the peers' programs."""
        return {"BENCH_JOBS": f"{self.url}/{JOBS}", "BENCH_RESULTS": f"{self.url}/{RESULTS}"}

    def keys(self, database: int) -> int:
        """Return the number of keys in a database."""
        return int(self.redis.ask("DBSIZE", database=database))


@contextlib.contextmanager
def serve(program: str, folder: Path) -> Iterator[tuple[Family, Redis]]:
    """Run a server with its data in ``folder`` until the block ends. Yield the server and a connection to it. Raises
    `NotRun`."""
    port = free_port()
    argv = [program, "--bind", HOST, "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no"]
    with running([Command(argv)], folder, "redis") as family:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                redis = Redis(port)
                break
            family.check()
            if time.monotonic() > deadline:
                raise NotRun(f"the Redis server did not answer on {HOST}:{port} within {START_S:g} s")
            time.sleep(0.02)
        try:
            yield family, redis
        finally:
            redis.close()


class PythonPeer:
    """A job system in Python on Redis. The system's own module gives the parameters; this class installs the system and
    starts its Redis server."""

    def __init__(
        self,
        name: str,
        title: str,
        requirements: Sequence[str],
        session: Callable[[Family, Redis], Session],
        settings: Sequence[Setting],
        naps: Sequence[Setting],
        bulk: bool = False,
    ) -> None:
        self.name, self.title, self.bulk = name, title, bulk
        self.settings, self.naps = settings, naps
        self._requirements, self._session = requirements, session

    def install(self) -> Mapping[str, str]:
        """Install the system in an environment of its own, and Redis. Return names and versions."""
        versions = tools.venv(self.name, self._requirements)
        return {**versions, "Redis": tools.redis_version(tools.redis_server())}

    @contextlib.contextmanager
    def session(self, folder: Path) -> Iterator[Session]:
        """See `bench.peers.port.Peer`."""
        with serve(tools.redis_server(), folder) as (server, connection):
            yield self._session(server, connection)
