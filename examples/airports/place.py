"""The folder of one run of the demo: which run may use the folder, what the folder contains, and how every process
finds it. This module starts nothing."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobledger.kafka import embedded
from jobledger.kafka.embedded.defaults import default_home

#: File in each folder of the demo. The file is locked while a run uses the folder.
MARK = ".jobledger-demo"
#: Files and folders that a run creates in its folder, and that a run may therefore remove.
OURS = ("airports.db", "airports.db-shm", "airports.db-wal", "jars", "kafka", "log", "status")


class DemoFailed(Exception):
    """The demo cannot continue. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """The folder to which a run writes, ``home``. ``jars``: the folder of Kafka's jars, shared by all homes of the
    user."""

    home: Path
    namespace: str
    jars: Path

    @property
    def database(self) -> Path:
        """The import's own database."""
        return self.home / "airports.db"

    @property
    def logs(self) -> Path:
        """The folder with the output of the processes."""
        return self.home / "log"

    def environ(self, bootstrap: str) -> dict[str, str]:
        """Return the settings of every process of the run, except the third party's address."""
        return {
            "JOBLEDGER_HOME": str(self.home),
            "JOBLEDGER_BOOTSTRAP": bootstrap,
            "JOBLEDGER_STATUS_URL": "",  # the run's own table, whatever the caller has set
            "AIRPORTS_NAMESPACE": self.namespace,
            "AIRPORTS_DATABASE": str(self.database),
        }


@contextmanager
def claimed(home: Path, namespace: str) -> Iterator[Place]:
    """Lock the folder ``home`` for one run, and remove what an earlier run left there. Unlock the folder after the
    block.

    Raises `DemoFailed` if the folder contains anything else, or if another run uses it.
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
        embedded.stop(home)  # a user may have started the broker to inspect the last run
        for path in (home / name for name in OURS):
            if path.is_dir() and not path.is_symlink() and path != jars:
                shutil.rmtree(path)
            elif path.is_symlink() or path.is_file():
                path.unlink()
        if jars != home / "jars":
            # So that `jobledger kafka start` finds in this home the jars that were fetched for every home.
            jars.mkdir(parents=True, exist_ok=True)
            (home / "jars").symlink_to(jars)
        yield Place(home, namespace, jars)
