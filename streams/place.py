"""The folder of one running coordinator: its local copy of the rows, its lock, and its name in the group."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from jobledger.errors import ConfigError
from jobledger.logger import get_logger

LOG = get_logger("jobledger.coordinator")


@dataclass(slots=True)
class Place:
    """The folder of one running coordinator. ``instance``: its static group member id, so that a restart rejoins at
    once instead of waiting for the dead member's session; None without a durable folder."""

    folder: Path
    durable: bool
    instance: str | None
    lock: int | None

    def release(self) -> None:
        """Let another coordinator have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def keep_for(self, origin: str) -> None:
        """Throw the rows away unless they were restored from the log that ``origin`` names."""
        mark = self.folder / "origin"
        if self.durable and (not mark.exists() or mark.read_text("utf-8") != origin):
            self.clear()
            mark.write_text(origin, "utf-8")

    def clear(self) -> None:
        """Throw the rows away: they are restored from the changelog."""
        (self.folder / "origin").unlink(missing_ok=True)
        for version in self.folder.glob("v*"):
            shutil.rmtree(version, ignore_errors=True)


def take_place(root: Path, namespace: str) -> Place:
    """The first folder under ``root`` that no running coordinator holds; in memory if none can be written."""
    if not is_writable(root):
        LOG.warning("%s cannot be written: rows are kept in memory, a restart replays the whole changelog", root)
        return Place(root, False, None, None)
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
        return Place(folder, True, member.read_text("utf-8"), lock)
    raise ConfigError(f"1,000 coordinators run with rows under {root}: give this one a data folder of its own")


def is_writable(folder: Path) -> bool:
    """Whether rows can be kept under ``folder``, which is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows hold jobs' arguments
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True
