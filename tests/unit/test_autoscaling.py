"""The autoscaling recipes, over what a real worker told Prometheus (tests/recorded): up
when a burst comes, down after it.

The queries are taken from the recipes themselves and run by Prometheus' own promtool; what an HPA makes
of them is its documented rule (ceil of value / target, bounds, the highest of all metrics, the
stabilisation window), written out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import promtool

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples/kubernetes"

RECORDED: dict[str, Any] = json.loads((ROOT / "tests/recorded/autoscaling.json").read_text("utf-8"))
STEP = RECORDED["interval_s"]
#: Seconds for which an idle worker goes on telling what it told last, so that all may be taken down that was put up.
IDLE_S = 700
SERIES: promtool.Series = {
    name: [*values, *[values[-1]] * (IDLE_S // STEP)] for name, values in RECORDED["series"].items()
}
END = STEP * (max(map(len, SERIES.values())) - 1)


def recipe(name: str) -> list[dict[str, Any]]:
    """The documents of a recipe."""
    found: list[dict[str, Any]] = list(yaml.safe_load_all((RECIPES / name).read_text("utf-8")))
    return found


def adapter_queries() -> dict[str, str]:
    """prometheus-adapter's queries by metric."""
    rules = yaml.safe_load(recipe("hpa.yaml")[1]["data"]["config.yaml"])["externalRules"]
    return {rule["name"]["as"]: rule["metricsQuery"] for rule in rules}


def keda_triggers() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """KEDA's triggers: what wakes, the lag, the wait."""
    kafka, lag, wait = recipe("keda.yaml")[0]["spec"]["triggers"]
    assert [each["type"] for each in (kafka, lag, wait)] == ["kafka", "prometheus", "prometheus"]
    return kafka, lag, wait


def keda_queries() -> dict[str, str]:
    """KEDA's queries, by the names that prometheus-adapter's have."""
    _, lag, wait = keda_triggers()
    return {"jobledger_mail_lag": lag["metadata"]["query"], "jobledger_mail_wait_p95": wait["metadata"]["query"]}


def evaluated(tmp_path: Path, query: str, series: promtool.Series) -> list[float]:
    """What the query gives at each scrape of the series."""
    at = range(0, END + 1, STEP)
    test = {
        "rule_files": [],
        "evaluation_interval": f"{STEP}s",
        "tests": [
            {
                "interval": f"{STEP}s",
                "input_series": promtool.told(series),
                # Nothing is expected: promtool tells what it got instead.
                "promql_expr_test": [{"expr": query, "eval_time": f"{t}s", "exp_samples": []} for t in at],
            }
        ],
    }
    _, said = promtool.run(tmp_path, test)
    got: dict[int, float] = {}
    time_s = -1
    for line in said.splitlines():
        if "time:" in line and "expr:" in line:
            time_s = _seconds(line.rsplit("time:", 1)[1].strip(" ,"))
        elif line.strip().startswith("got:"):
            text = line.split("got:", 1)[1].strip()
            got[time_s] = float(text.rsplit(" ", 1)[1].strip('"')) if text != "nil" else math.nan
    assert got, said[-3000:]
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


def replicas(wanted: Callable[[int, int], int], spec: dict[str, Any]) -> list[int]:
    """What an HPA sets, scrape by scrape: down only to the highest that was wanted within the window, and up and down
    by no more than its policies allow since their period began. ``spec``: the HPA's."""
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    (doubling,), (leaving,) = up["policies"], down["policies"]
    assert (up["stabilizationWindowSeconds"], doubling["type"], leaving["type"]) == (0, "Percent", "Pods")
    window, said, history = down["stabilizationWindowSeconds"] // STEP, [spec["minReplicas"]], []
    for number in range(END // STEP + 1):
        now = said[-1]
        history.append(min(spec["maxReplicas"], max(spec["minReplicas"], wanted(number, now))))
        want = history[-1] if history[-1] > now else min(now, max(history[-window - 1 :]))
        most = said[max(0, number - doubling["periodSeconds"] // STEP)] * (100 + doubling["value"]) // 100
        least = said[max(0, number - leaving["periodSeconds"] // STEP)] - leaving["value"]
        said.append(max(min(want, max(now, most)), min(now, least)))
    return said[1:]


def test_both_recipes_ask_the_same() -> None:
    """Both queries, and the bounds and targets, are the same in KEDA's recipe and in the HPA's."""
    assert keda_queries() == adapter_queries()
    keda, hpa = recipe("keda.yaml")[0]["spec"], recipe("hpa.yaml")[0]["spec"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    _, lag, wait = keda_triggers()
    assert (lag.get("metricType"), lag["metadata"]["threshold"]) == (None, "400"), "AverageValue is the default"
    assert (wait["metricType"], wait["metadata"]["threshold"]) == ("Value", "10")
    assert hpa["metrics"][0]["external"]["target"] == {"type": "AverageValue", "averageValue": "400"}
    assert hpa["metrics"][1]["external"]["target"] == {"type": "Value", "value": "10"}


def test_up_with_the_burst_and_down_after_it(tmp_path: Path, say: Callable[[str], None]) -> None:
    """Recorded: one worker, 3,000 jobs at once. Both figures ask for more workers within two scrapes of what they
    measure, never for more than there are partitions, and for one again when the backlog is gone."""
    queries = adapter_queries()
    lag = evaluated(tmp_path, queries["jobledger_mail_lag"], SERIES)
    assert math.isnan(lag[0]), "the worker had no partition yet: unknown is not 0"
    lag[0] = 0.0
    whole = [
        sum(v or 0.0 for name, row in SERIES.items() if "_lag{" in name for v in (row[n],)) for n in range(len(lag))
    ]
    assert lag == whole
    wait = evaluated(tmp_path, queries["jobledger_mail_wait_p95"], SERIES)
    burst = RECORDED["burst_at_s"] // STEP
    assert (max(lag[:burst]), max(wait[:burst])) == (0, 0)
    assert max(lag) > 2_000
    assert max(wait) > 20
    by_lag = [math.ceil(value / 400) for value in lag]
    assert max(by_lag[burst + 1 : burst + 4]) >= 6
    first = next(n for n, value in enumerate(wait) if value > 10)
    assert first > burst
    assert (lag[-1], wait[-1]) == (0, 0)

    def wanted(number: int, now: int) -> int:
        return max(by_lag[number], math.ceil(now * wait[number] / 10))

    spec = recipe("hpa.yaml")[0]["spec"]
    said = replicas(wanted, spec)
    assert set(said[:burst]) == {1}
    assert max(said) == spec["maxReplicas"] == 6
    full = said.index(6)
    assert (full - burst) * STEP <= 90, "1, 2, 4, 6: half a minute between each"
    last_wish = max(n for n in range(len(said)) if wanted(n, 6) > 1)
    down = next(n for n in range(full, len(said)) if said[n] < 6)
    assert (down - last_wish) * STEP >= spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert said[-1] == 1, "for one again"
    one = said.index(1, full)
    assert (one - down) * STEP >= 4 * 60, "one a minute"
    say(
        f"autoscaling, recorded: lag {max(lag):.0f}, wait p95 {max(wait):.0f} s; workers {said[0]} → {max(said)} "
        f"→ {said[-1]}, the wait asks for more {(first - burst) * STEP} s after the burst; {(full - burst) * STEP} s to "
        f"six, {(one - last_wish) * STEP} s from the last wish to one"
    )


def test_a_paused_queue_asks_for_no_worker(tmp_path: Path) -> None:
    """Nothing runs while it is paused, however many workers there are: no query of either recipe asks for any. The
    broker, whom KEDA asks as well, knows of no pause; it is asked for the first worker alone."""
    paused = {
        name: [1.0 if 'kind="queue"' in name and "paused" in name else v for v in values]
        for name, values in SERIES.items()
    }
    for name, query in (*keda_queries().items(), *adapter_queries().items()):
        assert {value for value in evaluated(tmp_path, query, paused) if not math.isnan(value)} == {0.0}, name
    kafka, _, _ = keda_triggers()
    assert math.ceil(1_000_000_000 / int(kafka["metadata"]["lagThreshold"])) == 1


def test_nothing_at_all_is_nothing(tmp_path: Path) -> None:
    """Before the first worker has been scraped the query says 0, not nothing: KEDA would take that for an error."""
    assert set(evaluated(tmp_path, keda_queries()["jobledger_mail_wait_p95"], {"up": [1.0] * (END // STEP + 1)})) == {
        0.0
    }
