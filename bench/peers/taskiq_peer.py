"""Taskiq on Redis streams with results in Redis; it acknowledges once the result is saved (its default)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers import redis
from bench.peers.port import Command, Progress, Setting, python

REQUIREMENTS = (
    "taskiq==0.13.0",
    "taskiq-redis==1.2.4",
    "redis==8.1.0",
    "hiredis==3.5.0",
    "uvloop==0.23.0",  # its worker takes it if it is there
    "orjson==3.13.0",
)
APP = "bench.peers.programs.taskiq_app"
QUIET = ("--log-level", "WARNING")
ORJSON = {"BENCH_ORJSON": "1"}


class TaskiqSession(redis.RedisSession):
    """Taskiq with its Redis running."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See the port."""
        return Command([python("taskiq"), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """One ``taskiq worker`` with as many children."""
        argv = [python("taskiq"), "-m", "taskiq", "worker", f"{APP}:broker", *QUIET, "-w", str(processes)]
        return [Command([*argv, *setting.arguments], {**self.env, **setting.env})]

    def progress(self, jobs: int) -> Progress:
        """Result keys; what the consumer group has not read, and what it has and did not acknowledge."""
        (flat,) = self.redis.ask("XINFO", "GROUPS", "taskiq") or [[b"lag", 0, b"pending", 0]]
        group = dict(zip(flat[::2], flat[1::2], strict=True))
        return Progress(self.keys(redis.RESULTS), (group[b"lag"] or 0) + group[b"pending"])


#: The best first. Tried:
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
