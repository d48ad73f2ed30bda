"""Writes a cache of the Java classes that a broker loads. With it a broker starts in half the time.

The cache is written once per version of Kafka and of Java, into the folder of the jars: a broker is started for this
purpose, and Java writes the cache when this broker is stopped (JEP 514). Java ignores a cache that does not fit its
version or the jars, so a wrong one costs time only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from jobledger.errors import KafkaStartFailed
from jobledger.kafka import broker
from jobledger.kafka.defaults import HEAP_MB, START_TIMEOUT_S
from jobledger.kafka.jars import Progress, locked
from jobledger.kafka.ports import free_port
from jobledger.logger import get_logger

LOG = get_logger("jobledger.kafka")

#: Seconds that Java may take to write the cache; a machine with two CPUs needs six.
WRITE_S = 120.0


def ensure_cache(classpath: list[Path], version: str, progress: Progress) -> None:
    """Write the cache of these jars unless there is one. Concurrent callers wait for the one that writes.

    If Java does not write it, an empty file is left in its place, so that later starts do not try again.
    """
    cache = broker.class_cache(classpath)
    if cache.exists():
        return
    try:
        with locked(cache.with_suffix(".lock")):
            if not cache.exists():
                progress("train", 0, 0)
                _write(cache, classpath, version)
    except OSError as error:  # a folder that this user may only read
        LOG.debug("no class cache could be written: %s", error)


def _write(cache: Path, classpath: list[Path], version: str) -> None:
    part = cache.with_suffix(".part")
    part.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="jobledger-kafka-") as folder:
        files = broker.Files.of(Path(folder))
        files.root.mkdir()
        options = (f"-XX:AOTCacheOutput={part}",)
        wanted = broker.Launch(classpath, free_port(), files.data, HEAP_MB, version, {}, options=options)
        try:
            broker.launch(files, wanted, detach=False, timeout=START_TIMEOUT_S, report=lambda step, done, total: None)
            started = broker.running(files)
            if started is not None:
                broker.end(started.process.pid, WRITE_S)
        except KafkaStartFailed as error:
            LOG.debug("the broker that was to write %s did not start: %s", cache, error)
    if not part.exists():
        LOG.warning("Java wrote no class cache: brokers start without one. To try again, remove %s", cache)
        part.touch()
    part.replace(cache)
