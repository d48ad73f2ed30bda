"""The autoscaling recipes, over what a real worker told Prometheus (tests/recorded): up
when a burst comes, down after it.

The queries are taken from the recipes themselves and run by Prometheus' own promtool; what an HPA makes
of them is its documented rule (ceil of value / target, bounds, the highest of all metrics, the
stabilisation window), written out here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples/kubernetes"
_SERVER = os.environ.get("JOBLEDGER_TEST_PROMETHEUS") or shutil.which("prometheus")
_BESIDE = Path(_SERVER).with_name("promtool") if _SERVER else None
PROMTOOL = str(_BESIDE) if _BESIDE is not None and _BESIDE.exists() else shutil.which("promtool")

RECORDED: dict[str, Any] = json.loads((ROOT / "tests/recorded/autoscaling.json").read_text("utf-8"))
STEP = RECORDED["interval_s"]
END = STEP * (max(map(len, RECORDED["series"].values())) - 1)


def recipe(name: str) -> list[dict[str, Any]]:
    """The documents of a recipe."""
    found: list[dict[str, Any]] = list(yaml.safe_load_all((RECIPES / name).read_text("utf-8")))
    return found


def adapter_queries() -> dict[str, str]:
    """prometheus-adapter's queries by metric."""
    rules = yaml.safe_load(recipe("hpa.yaml")[1]["data"]["config.yaml"])["externalRules"]
    return {rule["name"]["as"]: rule["metricsQuery"] for rule in rules}


def keda_query() -> str:
    """The query of KEDA's Prometheus trigger."""
    (found,) = [t for t in recipe("keda.yaml")[0]["spec"]["triggers"] if t["type"] == "prometheus"]
    query: str = found["metadata"]["query"]
    return query


def evaluated(tmp_path: Path, query: str, series: dict[str, list[float | None]]) -> list[float]:
    """What the query gives at each scrape of the series."""
    if PROMTOOL is None:
        pytest.skip("no promtool: it comes with Prometheus (on Debian, the package prometheus)")
    at = range(0, END + 1, STEP)
    test = {
        "rule_files": [],
        "evaluation_interval": f"{STEP}s",
        "tests": [
            {
                "interval": f"{STEP}s",
                "input_series": [
                    {"series": name, "values": " ".join("_" if v is None else repr(v) for v in values)}
                    for name, values in series.items()
                ],
                # Nothing is expected: promtool tells what it got instead.
                "promql_expr_test": [{"expr": query, "eval_time": f"{t}s", "exp_samples": []} for t in at],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps(test), "utf-8")
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    got: dict[int, float] = {}
    time_s = -1
    for line in (done.stdout + done.stderr).splitlines():
        if "time:" in line and "expr:" in line:
            time_s = _seconds(line.rsplit("time:", 1)[1].strip(" ,"))
        elif line.strip().startswith("got:"):
            text = line.split("got:", 1)[1].strip()
            got[time_s] = float(text.rsplit(" ", 1)[1].strip('"')) if text != "nil" else math.nan
    assert got, (done.stdout + done.stderr)[-3000:]
    return [got.get(t, math.nan) for t in at]  # where the query gives nothing, promtool has nothing to tell


def _seconds(text: str) -> int:
    """Prometheus' way of writing durations, as far as it is met here."""
    total, digits = 0, ""
    for char in text:
        if char.isdigit():
            digits += char
        else:
            total += int(digits or 0) * {"m": 60, "s": 1, "h": 3600}[char]
            digits = ""
    return total


def replicas(wanted: Callable[[int, int], int], least: int, most: int, window_s: int) -> list[int]:
    """What an HPA sets, scrape by scrape: down only to the highest that was wanted within the window, one at a time."""
    now, said, history = least, [], []
    for number in range(END // STEP + 1):
        want = min(most, max(least, wanted(number, now)))
        history.append(want)
        if want > now:
            now = min(want, now * 2)
        else:
            now = max(now - 1, max(history[-(window_s // STEP) - 1 :])) if want < now else now
        said.append(now)
    return said


def test_both_recipes_ask_the_same() -> None:
    """The wait is one query, and the bounds and targets of KEDA's recipe and of the HPA's are the same."""
    assert keda_query() == adapter_queries()["jobledger_mail_wait_p95"]
    keda, hpa = recipe("keda.yaml")[0]["spec"], recipe("hpa.yaml")[0]["spec"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    kafka, prometheus = (trigger["metadata"] for trigger in keda["triggers"])
    assert (kafka["lagThreshold"], prometheus["threshold"]) == ("400", "10")
    assert hpa["metrics"][0]["external"]["target"] == {"type": "AverageValue", "averageValue": "400"}
    assert hpa["metrics"][1]["external"]["target"] == {"type": "Value", "value": "10"}


def test_up_with_the_burst_and_down_after_it(tmp_path: Path, say: Callable[[str], None]) -> None:
    """Recorded: one worker, 3,000 jobs at once. Both figures ask for more workers within two scrapes of what they
    measure, never for more than there are partitions, and for one again when the backlog is gone."""
    queries = adapter_queries()
    lag = [value or 0.0 for value in evaluated(tmp_path, queries["jobledger_mail_lag"], RECORDED["series"])]
    assert math.isnan(lag[0]), "the worker had no partition yet"
    lag[0] = 0.0
    wait = evaluated(tmp_path, queries["jobledger_mail_wait_p95"], RECORDED["series"])
    burst = RECORDED["burst_at_s"] // STEP
    assert (max(lag[:burst]), max(wait[:burst])) == (0, 0)
    assert max(lag) > 2_000
    assert max(wait) > 20
    by_lag = [math.ceil(value / 400) for value in lag]
    assert max(by_lag[burst + 1 : burst + 4]) >= 6
    first = next(n for n, value in enumerate(wait) if value > 10)
    assert first > burst
    assert (lag[-1], wait[-1]) == (0, 0)
    gone = next(n for n in range(lag.index(max(lag)), len(lag)) if lag[n] == 0)

    def wanted(number: int, now: int) -> int:
        value = wait[number]
        return max(by_lag[number], math.ceil(now * value / 10))

    said = replicas(wanted, 1, 6, window_s=60)
    assert set(said[:burst]) == {1}
    assert max(said) == 6
    assert said[burst + 4] >= 4
    assert said[gone] > 1, "not down before the window is over"
    assert said[-1] < 6, "down after it"
    say(
        f"autoscaling, recorded: lag {max(lag):.0f}, wait p95 {max(wait):.0f} s; workers {said[0]} → {max(said)} "
        f"→ {said[-1]}, the wait asks for more {(first - burst) * STEP} s after the burst"
    )


def test_a_paused_queue_asks_for_no_worker(tmp_path: Path) -> None:
    """Nothing runs while it is paused, however many workers there are."""
    paused = {
        name: [1.0 if 'kind="queue"' in name and "paused" in name else v for v in values]
        for name, values in RECORDED["series"].items()
    }
    assert set(evaluated(tmp_path, keda_query(), paused)) == {0.0}


def test_nothing_at_all_is_nothing(tmp_path: Path) -> None:
    """Before the first worker has been scraped the query says 0, not nothing: KEDA would take that for an error."""
    assert set(evaluated(tmp_path, keda_query(), {"up": [1.0] * (END // STEP + 1)})) == {0.0}
