"""Downloads Apache Kafka's jars from a Maven repository, once for each user and version.

This module owns the folder ``<home>/jars/<version>``. A folder is incomplete if it has no marker file, or if the size
of a file differs from the size in the marker file. The jars of an incomplete folder are downloaded again. This module
starts no processes.
"""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from xml.etree import ElementTree

from jobledger.errors import ConfigError, KafkaStartFailed
from jobledger.kafka.embedded.defaults import KAFKA_VERSION
from jobledger.process.file_lock import locked

if TYPE_CHECKING:
    from jgo.maven import Artifact, MavenContext

GROUP, ARTIFACT = "org.apache.kafka", "kafka_2.13"
MARKER = "complete.json"
ATTEMPTS = 3
RETRY_PAUSE_S = 1.0
# With more, a public repository answers with status 429. The round trips take most of the time, not the transfer of
# bytes.
PARALLEL_DOWNLOADS = 4
HTTP_TIMEOUT_S = 30


class Progress(Protocol):
    """A callback for the progress of a start: ``step`` is ``resolve``, ``fetch``, ``format`` or ``boot``.

    ``done`` of ``total`` files are finished; ``total`` is 0 if the size of the step is not known.
    """

    def __call__(self, step: str, done: int, total: int) -> None: ...


def classpath(folder: Path, version: str = KAFKA_VERSION, progress: Progress | None = None) -> list[Path]:
    """Return every jar that a broker of ``version`` needs.

    If ``folder/version`` is incomplete, all jars are downloaded first. Concurrent callers wait until one of them has
    downloaded the jars. Raises `KafkaStartFailed` if the jars cannot be downloaded, and `ConfigError` if the extra
    ``jobledger[kafka]`` is not installed.
    """
    target = folder / version
    jars = _complete(target)
    if jars is not None:  # the usual case needs no lock
        return jars
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{version}.lock"):
        jars = _complete(target)
        if jars is None:
            jars = _fetch(target, version, progress or (lambda step, done, total: None))
    return jars


def _complete(target: Path) -> list[Path] | None:
    try:
        sizes: dict[str, int] = json.loads((target / MARKER).read_text("utf-8"))["jars"]
        jars = [target / name for name in sizes]
        if jars and all(jar.stat().st_size == sizes[jar.name] for jar in jars):
            return jars
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the folder is incomplete: its marker file is missing or damaged, or a jar is missing
    return None


def _fetch(target: Path, version: str, progress: Progress) -> list[Path]:
    try:
        import jgo  # noqa: F401
    except ImportError as missing:
        raise ConfigError(
            f"the embedded broker needs the package {missing.name!r}: install `jobledger[kafka]`, "
            "or point JOBLEDGER_BOOTSTRAP at a broker"
        ) from missing

    (target / MARKER).unlink(missing_ok=True)
    # Use a separate repository folder, not the shared one of the user's Maven. In the shared folder, Jobledger and
    # other programs would treat the file of an interrupted download as complete.
    staging = target / "repository"
    staging.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        _drop_damaged(staging)
        try:
            jars = _download(staging, version, progress)
            break
        except Exception as error:  # the resolver passes on every exception of its HTTP and XML libraries
            if attempt == ATTEMPTS:
                raise KafkaStartFailed(
                    f"Apache Kafka {version} could not be fetched ({GROUP}:{ARTIFACT}:{version}, {ATTEMPTS} attempts; "
                    f"the last ended with {type(error).__name__}: {error}). Check the network and HTTPS_PROXY, name a "
                    "mirror as `central` under [repositories] in jgo's settings file, or point JOBLEDGER_BOOTSTRAP "
                    "at a broker"
                ) from error
            time.sleep(RETRY_PAUSE_S * attempt)

    moved = []
    for jar in jars:
        destination = target / jar.name
        shutil.move(jar, destination)
        moved.append(destination)
    shutil.rmtree(staging, ignore_errors=True)
    written = target / (MARKER + ".part")
    written.write_text(json.dumps({"version": version, "jars": {p.name: p.stat().st_size for p in moved}}), "utf-8")
    written.replace(target / MARKER)
    return moved


def _download(staging: Path, version: str, progress: Progress) -> list[Path]:
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext

    progress("resolve", 0, 0)
    context = MavenContext(
        repo_cache=staging,
        remote_repos={"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories},
        timeout=HTTP_TIMEOUT_S,
    )
    root = context.create_dependency(f"{GROUP}:{ARTIFACT}:jar:{version}:compile")
    roots, transitive = context.resolver.resolve([root])
    artifacts = [d.artifact for d in (*roots, *transitive) if d.scope in ("compile", "runtime")]
    artifacts.append(_logging_binding(context, artifacts))

    progress("fetch", 0, len(artifacts))
    jars: list[Path] = []
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        try:
            for done in as_completed([pool.submit(artifact.resolve) for artifact in artifacts]):
                jars.append(done.result())
                progress("fetch", len(jars), len(artifacts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    damaged = [jar.name for jar in jars if not _whole(jar)]
    if damaged:
        raise OSError(f"damaged during the download: {', '.join(damaged)}")
    return sorted(jars)


def _logging_binding(context: MavenContext, artifacts: list[Artifact]) -> Artifact:
    # Kafka's POM does not include the binding of slf4j to log4j, which is part of Kafka's distribution. Without the
    # binding a broker logs nothing. The binding is resolved separately, in log4j's version. If it were resolved
    # together with Kafka, the managed versions of the binding's parent POM would replace Kafka's versions.
    versions = {artifact.artifactId: artifact.version for artifact in artifacts}
    binding = "log4j-slf4j-impl" if versions["slf4j-api"].startswith("1.") else "log4j-slf4j2-impl"
    return context.project("org.apache.logging.log4j", binding).at_version(versions["log4j-core"]).artifact()


def _drop_damaged(staging: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file() and not _whole(path):
            path.unlink()


def _whole(path: Path) -> bool:
    try:
        if path.suffix == ".jar":
            with zipfile.ZipFile(path) as jar:
                return jar.testzip() is None
        if path.suffix in (".pom", ".xml"):
            ElementTree.parse(path)
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError):
        return False
    return True
