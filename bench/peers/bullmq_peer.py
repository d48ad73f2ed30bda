"""BullMQ on Redis. Completed jobs are kept with their results, which is BullMQ's default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.peers import redis, tools
from bench.peers.port import HOME, Command, Progress, Session, Setting

SOURCE = Path(__file__).with_name("bullmq")
FOLDER = HOME / "bullmq"


class BullMQSession(redis.RedisSession):
    """BullMQ, with a running Redis server."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See `bench.peers.port.Session`."""
        return Command(["node", str(FOLDER / "submit.mjs"), *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return one command with Node for each worker process."""
        argv = ["node", str(FOLDER / "worker.mjs"), *setting.arguments]
        return [Command(argv, {**self.env, **setting.env})] * processes

    def progress(self, jobs: int) -> Progress:
        """Count the completed jobs, which contain their results, and the jobs that wait or that a worker holds."""
        completed = self.redis.ask("ZCARD", "bull:bench:completed")
        waiting, active = self.redis.ask("LLEN", "bull:bench:wait"), self.redis.ask("LLEN", "bull:bench:active")
        return Progress(completed, waiting + active)


class BullMQ:
    """See the module."""

    name, title, bulk = "bullmq", "BullMQ (Node) + Redis", True
    #: The settings that were tried, the best one first.
    settings = (
        Setting("100 at once", ("100",)),
        Setting("10 at once", ("10",)),
        Setting("50 at once", ("50",)),
        Setting("300 at once", ("300",)),
    )
    naps = (Setting("500 at once", ("500",)),)

    def install(self) -> Mapping[str, str]:
        """Install Node's packages in a folder of their own, and Redis. Return names and versions."""
        return {**tools.node("bullmq", SOURCE), "Redis": tools.redis_version(tools.redis_server())}

    @contextlib.contextmanager
    def session(self, folder: Path) -> Iterator[Session]:
        """See `bench.peers.port.Peer`."""
        with redis.serve(tools.redis_server(), folder) as (server, connection):
            yield BullMQSession(server, connection)


PEER = BullMQ()
