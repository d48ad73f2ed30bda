"""The folder of one running coordinator: its local copy of the rows, its lock, and its member id in the group."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from jobledger.errors import ConfigError
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.coordinator")


@dataclass(slots=True)
class InstanceDir:
    """The folder of one running coordinator.

    ``durable``: whether rows are kept in the folder. ``lock``: file descriptor of the folder's lock. ``instance``: the
    coordinator's static group member id; None without a durable folder. With this id a restarted coordinator rejoins
    the group at once, and does not wait until the dead member's session expires.
    """

    folder: Path
    durable: bool
    instance: str | None
    lock: int | None

    def release(self) -> None:
        """Release the lock, so that another coordinator can use the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def keep_for(self, origin: str) -> None:
        """Delete the rows of a durable folder unless they were restored from the log that ``origin`` names."""
        mark = self.folder / "origin"
        if self.durable and (not mark.exists() or mark.read_text("utf-8") != origin):
            self.clear()
            mark.write_text(origin, "utf-8")

    def clear(self) -> None:
        """Delete the rows. The next start restores them from the changelog."""
        (self.folder / "origin").unlink(missing_ok=True)
        for version in self.folder.glob("v*"):
            shutil.rmtree(version, ignore_errors=True)


def lock_instance_dir(root: Path, namespace: str) -> InstanceDir:
    """Lock and return the first folder under ``root`` that no running coordinator has locked.

    If ``root`` cannot be written, return an `InstanceDir` that is not durable: rows are then kept in memory. Raises
    `ConfigError` if all 1,000 folders are locked.
    """
    if not is_writable(root):
        LOG.warning("%s cannot be written: rows are kept in memory, and each restart reads the whole changelog", root)
        return InstanceDir(root, False, None, None)
    for number in range(1000):
        folder = root / str(number)
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        member = folder / "member"
        if not member.exists():
            member.write_text(f"{namespace}-{socket.gethostname()}-{uuid.uuid4().hex[:12]}", "utf-8")
        return InstanceDir(folder, True, member.read_text("utf-8"), lock)
    raise ConfigError(f"1,000 coordinators run with rows under {root}: give this one a data folder of its own")


def is_writable(folder: Path) -> bool:
    """Return whether rows can be kept under ``folder``. Create the folder if it is missing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows contain arguments of jobs
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True
