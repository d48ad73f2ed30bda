"""Installs what the peers need, separate from everything else: Python packages, Node packages, Redis.

Everything is installed under `HOME`. Only Debian's own programs (Redis, Node) are installed for the machine, by root,
if they are missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peers.port import HOME, NotRun, child_env, python

NODE_AT_LEAST = 18


def venv(name: str, requirements: Sequence[str]) -> dict[str, str]:
    """Create a virtual environment with these requirements; recreate it if they have changed. Return names and versions
    of the requirements. Raises `NotRun`."""
    folder, stamp = HOME / name, HOME / name / "requirements.json"
    if not stamp.exists() or json.loads(stamp.read_text("utf-8")) != list(requirements):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], "a virtual environment (on Debian: the package python3-venv)")
        pip = [python(name), "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "5", "install"]
        _run([*pip, *requirements], f"{' '.join(requirements)} from a Python package registry")
        stamp.write_text(json.dumps(list(requirements)), "utf-8")
    return pinned(requirements)


def pinned(requirements: Sequence[str]) -> dict[str, str]:
    """Return the names and versions of ``name[extra]==version`` requirements. Raises `ValueError` for other text."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+!-]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} names no version: write name==version")
        found[match[1]] = match[2]
    return found


def node(name: str, source: Path) -> dict[str, str]:
    """Copy the programs of ``source`` to ``HOME / name``, and install their pinned packages there. Return names and
    versions. Raises `NotRun`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        _debian(["nodejs", "npm"], f"Node {NODE_AT_LEAST} or newer with npm")
    version = _run(["node", "--version"], "Node").strip().removeprefix("v")
    if int(version.partition(".")[0]) < NODE_AT_LEAST:
        raise NotRun(f"Node {version} is too old: put Node {NODE_AT_LEAST} or newer on the PATH")
    folder, stamp = HOME / name, HOME / name / ".installed"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (source / "package.json").read_text("utf-8")
    for each in (*source.glob("*.mjs"), source / "package.json"):
        shutil.copy(each, folder)
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
        _run(npm, "Node packages from a registry", folder)
        stamp.write_text(wanted, "utf-8")
    return {**json.loads(wanted)["dependencies"], "node": version}


def redis_server() -> str:
    """Return the path of a program that is a Redis server. If the program is missing and this is root on Debian,
    install it. Raises `NotRun`."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is not None:
        return found
    # Debian's package redis-server would start a service. The package redis-tools has the same program, and the name by
    # which the program is called decides what it does.
    if shutil.which("redis-check-rdb") is None:
        _debian(["redis-tools"], "a Redis server (redis-server on the PATH)")
    link = HOME / "bin" / "redis-server"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(shutil.which("redis-check-rdb") or "redis-check-rdb")
    return str(link)


def redis_version(server: str) -> str:
    """Return the version that a Redis server reports."""
    said = _run([server, "--version"], "Redis")
    match = re.search(r"v=([\d.]+)", said)
    return match[1] if match else said.strip()


def _debian(packages: Sequence[str], what: str) -> None:
    way_out = f"needs {what}: install it, or run this as root where apt-get can"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise NotRun(way_out)
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], what, env=env, check=False)
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], what, env=env)


def _run(
    argv: Sequence[str], what: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
) -> str:
    """Run a command and return its output. Raises `NotRun`, which says that ``what`` is needed, and why the command
    failed."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=child_env(env or {}, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as error:
        raise NotRun(f"needs {what}: {argv[0]} could not be started ({error})") from error
    if check and done.returncode:
        last = " ".join(done.stdout.strip().splitlines()[-3:])[-300:]
        raise NotRun(f"needs {what}: `{' '.join(argv[:6])} …` ended with {done.returncode}: {last}")
    return done.stdout
