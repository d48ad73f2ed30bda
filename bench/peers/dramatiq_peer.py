"""Dramatiq with Redis as broker and the Results middleware on Redis. Dramatiq acknowledges a job after it has run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.peers import redis
from bench.peers.port import Command, Progress, Setting, python

REQUIREMENTS = ("dramatiq[redis]==2.2.1", "redis==8.1.0", "hiredis==3.5.0", "gevent==26.9.0")
APP = "bench.peers.programs.dramatiq_app"


class DramatiqSession(redis.RedisSession):
    """Dramatiq, with a running Redis server."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See `bench.peers.port.Session`."""
        return Command([python("dramatiq"), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return one ``dramatiq`` with this number of child processes. A setting's first argument is the program."""
        program, *arguments = setting.arguments
        argv = [str(Path(python("dramatiq")).with_name(program)), APP, "-p", str(processes), *arguments]
        return [Command(argv, {**self.env, **setting.env})]

    def progress(self, jobs: int) -> Progress:
        """Count the result keys, and the messages that were not acknowledged."""
        return Progress(self.keys(redis.RESULTS), self.redis.ask("HLEN", "dramatiq:default.msgs"))


#: The settings that were tried, the best one first.
SETTINGS = (
    Setting("gevent, 100 at once", ("dramatiq-gevent", "-t", "100")),
    Setting("gevent, 20 at once, prefetch 500", ("dramatiq-gevent", "-t", "20"), {"dramatiq_queue_prefetch": "500"}),
    Setting("2 threads, prefetch 100", ("dramatiq", "-t", "2"), {"dramatiq_queue_prefetch": "100"}),
    Setting("8 threads", ("dramatiq", "-t", "8")),
)
NAPS = (
    Setting("gevent, 500 at once", ("dramatiq-gevent", "-t", "500")),
    Setting("500 threads", ("dramatiq", "-t", "500")),
)

PEER = redis.PythonPeer("dramatiq", "Dramatiq + Redis", REQUIREMENTS, DramatiqSession, SETTINGS, NAPS)
