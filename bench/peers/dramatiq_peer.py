"""Dramatiq with Redis as broker and the Results middleware on Redis; it acknowledges after a job has run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.peers import redis
from bench.peers.port import Command, Progress, Setting, python

REQUIREMENTS = ("dramatiq[redis]==2.2.1", "redis==8.1.0", "hiredis==3.5.0", "gevent==26.9.0")
APP = "bench.peers.programs.dramatiq_app"


class DramatiqSession(redis.RedisSession):
    """Dramatiq with its Redis running."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See the port."""
        return Command([python("dramatiq"), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """One ``dramatiq`` with as many children; a setting's first word is the program."""
        program, *arguments = setting.arguments
        argv = [str(Path(python("dramatiq")).with_name(program)), APP, "-p", str(processes), *arguments]
        return [Command(argv, {**self.env, **setting.env})]

    def progress(self, jobs: int) -> Progress:
        """Result keys; messages that were not acknowledged."""
        return Progress(self.keys(redis.RESULTS), self.redis.ask("HLEN", "dramatiq:default.msgs"))


#: The best first. Tried:
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
