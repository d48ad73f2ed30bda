"""Taskiq on Redis streams with results in Redis. Taskiq acknowledges a job once the result is saved (its default)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers import redis
from bench.peers.port import Command, Progress, Setting, python

REQUIREMENTS = (
    "taskiq==0.13.0",
    "taskiq-redis==1.2.4",
    "redis==8.1.0",
    "hiredis==3.5.0",
    "uvloop==0.23.0",  # Taskiq's worker uses it if it is installed
    "orjson==3.13.0",
)
APP = "bench.peers.programs.taskiq_app"
QUIET = ("--log-level", "WARNING")
ORJSON = {"BENCH_ORJSON": "1"}


class TaskiqSession(redis.RedisSession):
    """Taskiq, with a running Redis server."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See `bench.peers.port.Session`."""
        return Command([python("taskiq"), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return one ``taskiq worker`` with this number of child processes."""
        argv = [python("taskiq"), "-m", "taskiq", "worker", f"{APP}:broker", *QUIET, "-w", str(processes)]
        return [Command([*argv, *setting.arguments], {**self.env, **setting.env})]

    def progress(self, jobs: int) -> Progress:
        """Count the result keys, and the records that the consumer group has not read, or has read and not
        acknowledged."""
        (flat,) = self.redis.ask("XINFO", "GROUPS", "taskiq") or [[b"lag", 0, b"pending", 0]]
        group = dict(zip(flat[::2], flat[1::2], strict=True))
        return Progress(self.keys(redis.RESULTS), (group[b"lag"] or 0) + group[b"pending"])


#: The settings that were tried, the best one first.
SETTINGS = (
    Setting("100 at once", ("--max-async-tasks", "100")),
    Setting("20 at once", ("--max-async-tasks", "20")),
    Setting("100 at once, orjson", ("--max-async-tasks", "100"), ORJSON),
    Setting("100 at once, orjson, unparsed arguments", ("--max-async-tasks", "100", "--no-parse"), ORJSON),
    Setting("20 at once, orjson, unparsed arguments", ("--max-async-tasks", "20", "--no-parse"), ORJSON),
)
NAPS = (
    Setting("500 at once, orjson, unparsed arguments", ("--max-async-tasks", "500", "--no-parse"), ORJSON),
    Setting("500 at once, 500 read at once", ("--max-async-tasks", "500"), {"BENCH_READ": "500"}),
)

PEER = redis.PythonPeer("taskiq", "Taskiq, Redis streams", REQUIREMENTS, TaskiqSession, SETTINGS, NAPS, bulk=True)
