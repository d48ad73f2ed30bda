"""Install this checkout with what its tests need into the environment of the Python that runs this file.

All at once where that works. Where a package cannot be had (no build for this machine, a registry that
lacks it), the others are still installed: tests decide by what they find, so they can run with less.
Without those in `NEEDED` none can.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"hypothesis", "import-linter", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "types-psutil"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "5"]


def install(*what: str) -> bool:
    """Whether pip could."""
    return subprocess.run([*PIP, "install", *what], cwd=ROOT, check=False).returncode == 0


def flat(extras: dict[str, list[str]], name: str) -> list[str]:
    """The requirements of an extra, with the extras it refers to written out."""
    found: list[str] = []
    for requirement in extras[name]:
        own = re.fullmatch(r"jobledger\[(\w+)\]", requirement)
        found += flat(extras, own.group(1)) if own else [requirement]
    return found


def main() -> int:
    """Exit code 0 if tests can run."""
    print("installing jobledger[dev] …", flush=True)
    if install("--editable", ".[dev]"):
        return 0
    print("not all of it could be installed at once: trying one by one", flush=True)
    if not install("--editable", "."):
        print("jobledger itself could not be installed: is there a network to a package registry?", file=sys.stderr)
        return 1
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    missing = [requirement for requirement in flat(extras, "dev") if not install(requirement)]
    for requirement in missing:
        print(f"not installed: {requirement}", file=sys.stderr)
    names = {re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0] for requirement in missing}
    if names & NEEDED:
        print(f"without {', '.join(sorted(names & NEEDED))} nothing can be tested", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
