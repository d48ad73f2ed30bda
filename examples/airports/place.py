"""The folder of one run of the demo: who may use it, what it holds and how every process finds it. Starts nothing."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobledger.kafka import embedded
from jobledger.kafka.embedded.defaults import default_home

#: Lies in a folder that is the demo's, and is locked while a run uses it.
MARK = ".jobledger-demo"
#: What a run makes in its folder, and may therefore remove.
OURS = ("airports.db", "airports.db-shm", "airports.db-wal", "jars", "kafka", "log", "status")


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run keeps what it writes. ``jars``: the folder of Kafka's jars, shared by all homes of the user."""

    home: Path
    namespace: str
    jars: Path

    @property
    def database(self) -> Path:
        """The import's own database."""
        return self.home / "airports.db"

    @property
    def logs(self) -> Path:
        """What the processes print."""
        return self.home / "log"

    def environ(self, bootstrap: str) -> dict[str, str]:
        """The settings of every process of the run, but for the third party's address."""
        return {
            "JOBLEDGER_HOME": str(self.home),
            "JOBLEDGER_BOOTSTRAP": bootstrap,
            "JOBLEDGER_STATUS_URL": "",  # of this run, whatever the caller's own is
            "AIRPORTS_NAMESPACE": self.namespace,
            "AIRPORTS_DATABASE": str(self.database),
        }


@contextmanager
def claimed(home: Path, namespace: str) -> Iterator[Place]:
    """Take the folder ``home`` for one run, emptied of what an earlier run left there.

    Raises `DemoFailed` if it holds anything else, or if another run has it.
    """
    home = home.expanduser().absolute()
    jars = (default_home() / "jars").absolute()
    home.mkdir(parents=True, exist_ok=True)
    if not (home / MARK).exists() and any(home.iterdir()):
        raise DemoFailed(f"{home} holds something that is not this demo's: give --home another folder")
    with (home / MARK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed(f"another demo runs in {home}: wait for it, or give --home another folder") from None
        embedded.stop(home)  # somebody may have been looking at the last run
        for path in (home / name for name in OURS):
            if path.is_dir() and not path.is_symlink() and path != jars:
                shutil.rmtree(path)
            elif path.is_symlink() or path.is_file():
                path.unlink()
        if jars != home / "jars":
            # So that `jobledger kafka start` finds here what was fetched for every home.
            jars.mkdir(parents=True, exist_ok=True)
            (home / "jars").symlink_to(jars)
        yield Place(home, namespace, jars)
