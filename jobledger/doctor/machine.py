"""Checks of this machine: Python, packages, extras, settings of the environment, disks, the embedded broker."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from jobledger.config import Settings
from jobledger.doctor.checks import Finding, Subject
from jobledger.errors import ConfigError, StoreError, text_of
from jobledger.kafka.embedded.defaults import default_home
from jobledger.process.extras import PACKAGES, installed
from jobledger.streams.status.store import scratch

#: The least supported version of Python.
LEAST_PYTHON = (3, 11)
#: Packages whose versions are shown.
_SHOWN = ("jobledger", "confluent-kafka", "fastavro", "msgspec", "sqlalchemy")
#: Bytes that must be free on a disk: less is used up within minutes by a busy namespace.
LEAST_FREE = 1 << 30
_GIB = 1 << 30


def python(subject: Subject | None) -> Finding:
    """Check the version of Python."""
    shown = f"Python {platform.python_version()} ({platform.python_implementation()}) on {platform.system()}"
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Finding(f"{shown}; Jobledger needs {least} or later", f"Install Python {least} or later.")
    return Finding(shown)


def packages(subject: Subject | None) -> Finding:
    """Check whether the packages that Jobledger requires are installed, in the versions that it requires."""
    versions = {name: _version(name) for name in _SHOWN}
    wrong = _unmet()
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    if wrong:
        return Finding(f"{shown}; {', '.join(wrong)}", "Run `pip install --upgrade jobledger`.")
    return Finding(shown)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet() -> list[str]:
    """Return the requirements of the base install that are not met. Empty if this is not known, because Jobledger is not
    installed as a package, or because the package that compares versions is missing."""
    try:
        from packaging.requirements import Requirement

        required = [Requirement(text) for text in metadata.requires("jobledger") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    wrong = []
    for each in required:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        version = _version(each.name)
        if version is None:
            wrong.append(f"{each.name} is not installed")
        elif not each.specifier.contains(version, prereleases=True):
            wrong.append(f"{each.name} {version} is not {each.specifier}")
    return wrong


def settings(subject: Subject | None) -> Finding:
    """Check the settings of the environment: unknown names and invalid values."""
    try:
        read = Settings.from_env()
    except ConfigError as exc:
        return Finding(text_of(exc), "Correct or unset the environment variable that the detail names.")
    used = [
        f"broker {read.bootstrap or 'embedded'}",
        f"status table {'in ' + str(read.home / 'status') if read.status_url is None else 'by JOBLEDGER_STATUS_URL'}",
        *([f"{len(read.kafka)} of JOBLEDGER_KAFKA__*"] if read.kafka else []),
        *(["a schema registry"] if read.schema_registry else []),
        *([f"version {read.version}"] if read.version else []),
    ]
    return Finding(", ".join(used))


def extras(subject: Subject) -> Finding:
    """Check whether the extras that the settings need are installed."""
    present = [extra for extra, needed in PACKAGES.items() if all(map(installed, needed))]
    needs = {
        "kafka": subject.settings.bootstrap is None,
        "postgres": (subject.settings.status_url or "").startswith("postgresql"),
        "registry": subject.settings.schema_registry is not None,
    }
    lacking = [extra for extra, needed in needs.items() if needed and extra not in present]
    shown = f"installed: {', '.join(present) or 'none'}"
    if lacking:
        return Finding(
            f"{shown}; the settings need {', '.join(lacking)}", f"Run `pip install 'jobledger[{','.join(lacking)}]'`."
        )
    return Finding(shown)


def disk(subject: Subject) -> Finding:
    """Check the free space of the folders that grow: of a SQLite table, the coordinator's rows, the embedded broker."""
    home = subject.settings.home
    folders = {"coordinator": home / "coordinator" / subject.names.namespace}
    if (table := _table_folder(subject)) is not None:
        folders["status table"] = table
    if subject.settings.bootstrap is None:
        folders["embedded broker"] = home
    shown, full = [], []
    for what, folder in folders.items():
        usage = shutil.disk_usage(_existing(folder))
        text = f"{what}: {usage.free / _GIB:.1f} GiB of {usage.total / _GIB:.1f} GiB free at {folder}"
        shown.append(text)
        if usage.free < LEAST_FREE:
            full.append(what)
    if full:
        fix = (
            f"Make room on the disk of the {' and the '.join(full)}, or move it: JOBLEDGER_HOME and JOBLEDGER_STATUS_URL "
            "name the folders."
        )
        return Finding("; ".join(shown), fix)
    return Finding("; ".join(shown))


def _table_folder(subject: Subject) -> Path | None:
    url = subject.settings.status_url
    if url is None:
        return subject.settings.home / "status"
    try:
        return scratch(url)
    except (ConfigError, StoreError):  # the check of the table reports this
        return None


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest folder above it that exists."""
    return next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))


def embedded_broker(subject: Subject) -> Finding:
    """Check whether the embedded broker runs, if the settings name no other broker."""
    if subject.settings.bootstrap is not None:
        return Finding("not used: JOBLEDGER_BOOTSTRAP or --bootstrap names another broker")
    if not installed("psutil"):
        return Finding("not installed", "Set JOBLEDGER_BOOTSTRAP, or run `pip install 'jobledger[kafka]'`.")
    from jobledger.kafka import embedded

    home = subject.settings.home
    status = embedded.status(home)
    if not status.running:
        return Finding(f"not running; its data folder is {status.data}", "Run `jobledger kafka start`.")
    other = "" if home == default_home() else f", home {home}"
    return Finding(f"Kafka {status.version} at {status.bootstrap}, data in {status.data}{other}")
