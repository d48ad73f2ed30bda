"""Runs ``promtool``, Prometheus' program for rules and queries: the one beside the ``prometheus`` in
``JOBLEDGER_TEST_PROMETHEUS``, or the one on the PATH."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_SERVER = os.environ.get("JOBLEDGER_TEST_PROMETHEUS") or shutil.which("prometheus")
_BESIDE = Path(_SERVER).with_name("promtool") if _SERVER else None
PROMTOOL = str(_BESIDE) if _BESIDE is not None and _BESIDE.exists() else shutil.which("promtool")

#: The values of each series, one for each scrape. None: the scrape had no such series; NaN: the series is stale,
#: because its target is gone.
Series = dict[str, list[float | None]]


def told(series: Series) -> list[dict[str, str]]:
    """Return the series in promtool's notation."""
    return [
        {
            "series": name,
            "values": " ".join("_" if v is None else "stale" if math.isnan(v) else repr(v) for v in values),
        }
        for name, values in series.items()
    ]


def run(folder: Path, test: dict[str, Any]) -> tuple[bool, str]:
    """Run ``promtool test rules``. Return whether the test passed, and the output. Skips the test if there is no
    promtool."""
    if PROMTOOL is None:
        pytest.skip("no promtool: it comes with Prometheus (on Debian, the package prometheus)")
    file = folder / "test.yaml"
    file.write_text(json.dumps(test), "utf-8")
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr
