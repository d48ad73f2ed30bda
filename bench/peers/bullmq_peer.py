"""BullMQ on Redis; completed jobs stay, with what they returned (its default)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.peers import redis, tools
from bench.peers.port import HOME, Command, Progress, Session, Setting

SOURCE = Path(__file__).with_name("bullmq")
FOLDER = HOME / "bullmq"


class BullMQSession(redis.RedisSession):
    """BullMQ with its Redis running."""

    def submit(self, arguments: Sequence[str]) -> Command:
        """See the port."""
        return Command(["node", str(FOLDER / "submit.mjs"), *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """A Node process each."""
        argv = ["node", str(FOLDER / "worker.mjs"), *setting.arguments]
        return [Command(argv, {**self.env, **setting.env})] * processes

    def progress(self, jobs: int) -> Progress:
        """Completed jobs, which hold their results; those that wait or are held by a worker."""
        completed = self.redis.ask("ZCARD", "bull:bench:completed")
        waiting, active = self.redis.ask("LLEN", "bull:bench:wait"), self.redis.ask("LLEN", "bull:bench:active")
        return Progress(completed, waiting + active)


class BullMQ:
    """See the module."""

    name, title, bulk = "bullmq", "BullMQ (Node) + Redis", True
    #: The best first. Tried:
    settings = (
        Setting("100 at once", ("100",)),
        Setting("10 at once", ("10",)),
        Setting("50 at once", ("50",)),
        Setting("300 at once", ("300",)),
    )
    naps = (Setting("500 at once", ("500",)),)

    def install(self) -> Mapping[str, str]:
        """Node's packages in a folder of their own, and Redis."""
        return {**tools.node("bullmq", SOURCE), "Redis": tools.redis_version(tools.redis_server())}

    @contextlib.contextmanager
    def session(self, folder: Path) -> Iterator[Session]:
        """See the port."""
        with redis.serve(tools.redis_server(), folder) as (server, connection):
            yield BullMQSession(server, connection)


PEER = BullMQ()
