"""Celery with Redis as broker and result backend; jobs are acknowledged after they have run."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers import redis
from bench.peers.port import Command, Progress, Setting, python

REQUIREMENTS = ("celery[redis]==5.7.0", "redis==8.1.0", "hiredis==3.5.0", "gevent==26.9.0")
APP = "bench.peers.programs.celery_app"
QUIET = ("--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat")


class CelerySession(redis.RedisSession):
    """Celery, with a running Redis server."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See `bench.peers.port.Session`."""
        return Command([python("celery"), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return a ``celery worker`` for each process."""
        argv = [python("celery"), "-m", "celery", "-A", APP, "worker", *QUIET, *setting.arguments]
        return [Command([*argv, "-n", f"w{n}@bench"], {**self.env, **setting.env}) for n in range(processes)]

    def progress(self, jobs: int) -> Progress:
        """Count the result keys, and the jobs that wait in the list or were delivered and not acknowledged."""
        waiting, delivered = self.redis.ask("LLEN", "celery"), self.redis.ask("HLEN", "unacked")
        return Progress(self.keys(redis.RESULTS), waiting + delivered)


#: The settings that were tried, the best one first.
SETTINGS = (
    Setting("threads, 1 at once, prefetch 100", ("-P", "threads", "-c", "1"), {"BENCH_PREFETCH": "100"}),
    Setting("threads, 10 at once, prefetch 10 each", ("-P", "threads", "-c", "10"), {"BENCH_PREFETCH": "10"}),
    Setting("solo, prefetch 100", ("-P", "solo"), {"BENCH_PREFETCH": "100"}),
    Setting("gevent, 100 at once", ("-P", "gevent", "-c", "100")),
    Setting("prefork, 1 child, prefetch 100", ("-P", "prefork", "-c", "1"), {"BENCH_PREFETCH": "100"}),
)
NAPS = (
    Setting("threads, 500 at once, prefetch 1 each", ("-P", "threads", "-c", "500"), {"BENCH_PREFETCH": "1"}),
    Setting("gevent, 500 at once, prefetch 1 each", ("-P", "gevent", "-c", "500"), {"BENCH_PREFETCH": "1"}),
)

PEER = redis.PythonPeer("celery", "Celery + Redis", REQUIREMENTS, CelerySession, SETTINGS, NAPS)
